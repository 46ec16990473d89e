"""What GPUs can do: the one table of assumptions that every prediction follows from.

Marks: [measured] on a GPU of this kind; [vendor] a data sheet; [scaled] the vendor's number times the fraction that was
measured on an H200; [assumed] neither.

The H200's product (788 of 989 TFLOP/s, 8192³ in bfloat16) and copy (4.3 of 4.8 TB/s) are [measured]. Everything else
about speed is not: correct convolutions, positional convolution and attention first, once a GPU is at hand.
"""

from dataclasses import dataclass, field, replace

from hubert_lightning.errors import UserError

TFLOPS, TB, GB, GIB = 1e12, 1e12, 1e9, 2**30
MATRIX_SHARE, COPY_SHARE = 788 / 989, 4.3 / 4.8
"""Fractions of the vendor's numbers that an H200 reached [measured]."""

TILES = (
    (128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.88), (64, 256, 0.8), (64, 128, 0.7), (64, 64, 0.45),
)  # fmt: skip
"""Rows and columns of the tiles that a product may be cut into, and their efficiency [assumed]."""
SPLITS = (1, 2, 3, 4, 6, 8)
"""Parts into which a product may cut its inner dimension [assumed]."""
REDUCED = ("bfloat16", "float16")


@dataclass(frozen=True)
class Convolutions:
    """Shares of the matrix rate that convolutions reach [assumed].

    Args:
        forward: Output.
        input_gradient: Gradient of the input.
        weight_gradient: Gradient of the weights.
        grouped: Output of a grouped convolution, as the positional one.
        grouped_gradient: Gradients of it.
        transposes: Whether channels that are not the last dimension are copied to there and back, as cuDNN does.
    """

    forward: float = 0.60
    input_gradient: float = 0.40
    weight_gradient: float = 0.45
    grouped: float = 0.25
    grouped_gradient: float = 0.18
    transposes: bool = True


@dataclass(frozen=True)
class Attention:
    """Shares of the matrix rate that fused attention reaches with heads of 64 [assumed, from published speeds].

    Args:
        flash: Forward pass of FlashAttention 2.
        flash_backward: Its backward pass.
        efficient: Forward pass of the memory-efficient kernel, which masks need.
        efficient_backward: Its backward pass.
        dropout: Factor of a kernel that drops weights.
    """

    flash: float = 300 / 788
    flash_backward: float = 210 / 788
    efficient: float = 150 / 788
    efficient_backward: float = 90 / 788
    dropout: float = 0.75


@dataclass(frozen=True)
class Host:
    """Seconds that the host takes [assumed].

    Args:
        forward: Each operation of a forward pass.
        backward: Each operation of a backward pass.
        optimizer: Each operation of the optimizer, which lists all parameters.
        compiled: Each kernel of compiled code.
        loop: The trainer's own work for a batch.
        wait: Idle time of the GPU after the host has waited for it.
    """

    forward: float = 7e-6
    backward: float = 4.5e-6
    optimizer: float = 40e-6
    compiled: float = 5e-6
    loop: float = 1.2e-3
    wait: float = 20e-6


@dataclass(frozen=True)
class Device:
    """A processor, as predictions see it.

    Args:
        name: As it is typed.
        matrix: Operations in a second of a large product in bfloat16.
        float32: The same in float32, without TF32.
        float64: The same in float64.
        bandwidth: Bytes in a second that a copy reads and writes.
        processors: Streaming multiprocessors, over which the tiles of a product are dealt.
        memory: Bytes.
        link: Bytes in a second that one GPU sends to the others of its node.
        network: Bytes in a second that one GPU sends to other nodes.
        source: Where the numbers come from.
        convolutions: Speed of convolutions.
        attention: Speed of attention.
        host: Speed of the host.
        launch: Least seconds of a kernel.
        product_launch: Seconds of a product before and after its tiles.
        tiles: Tiles of products; none for a processor that has no waves of tiles.
    """

    name: str
    matrix: float
    float32: float
    float64: float
    bandwidth: float
    processors: int
    memory: float
    link: float
    network: float
    source: str
    convolutions: Convolutions = field(default_factory=Convolutions)
    attention: Attention = field(default_factory=Attention)
    host: Host = field(default_factory=Host)
    launch: float = 2e-6
    product_launch: float = 3e-6
    tiles: tuple[tuple[int, int, float], ...] = TILES

    def rate(self, dtype: str) -> float:
        """Operations in a second of a large product.

        Args:
            dtype: Precision, such as "bfloat16".
        """
        if dtype in REDUCED:
            return self.matrix
        return self.float64 if dtype == "float64" else self.float32


def _scaled(
    name: str, matrix: float, float32: float, float64: float, bandwidth: float, processors: int, memory: float,
    link: float, network: float, attention: Attention | None = None,
) -> Device:  # fmt: skip
    """Scale a vendor's dense TFLOP/s and TB/s; link and network are in GB/s."""
    return Device(
        name,
        matrix=matrix * TFLOPS * MATRIX_SHARE,
        float32=float32 * TFLOPS * MATRIX_SHARE,
        float64=float64 * TFLOPS * MATRIX_SHARE,
        bandwidth=bandwidth * TB * COPY_SHARE,
        processors=processors,
        memory=memory * GIB,
        link=link * GB,
        network=network * GB,
        source="scaled",
        attention=attention or Attention(),
    )


AMPERE = Attention(flash=0.60, flash_backward=0.45, efficient=0.35, efficient_backward=0.22)
"""FlashAttention 2 was written for these: about 180 and 140 of 312 TFLOP/s on an A100 [assumed]."""

H200 = replace(_scaled("H200", 989, 67, 67, 4.8, 132, 139.8, 350, 45), source="measured")
DEVICES = {
    device.name: device
    for device in (
        H200,
        _scaled("B200", 2250, 80, 40, 8.0, 148, 178.0, 700, 45),
        _scaled("H100-80GB", 989, 67, 67, 3.35, 132, 79.1, 350, 45),
        _scaled("H100-PCIe", 756, 51, 51, 2.0, 114, 79.1, 50, 22),
        _scaled("A100-80GB", 312, 19.5, 19.5, 2.04, 108, 79.1, 230, 22, AMPERE),
        _scaled("A100-40GB", 312, 19.5, 19.5, 1.56, 108, 39.4, 230, 22, AMPERE),
        _scaled("L40S", 362, 91.6, 1.4, 0.864, 142, 44.4, 22, 11, AMPERE),
        _scaled("A6000", 155, 38.7, 0.6, 0.768, 84, 47.4, 22, 11, AMPERE),
        _scaled("A10G", 70, 31.2, 0.5, 0.6, 80, 22.0, 11, 5, AMPERE),
        _scaled("RTX-4090", 165, 82.6, 1.3, 1.008, 128, 23.5, 22, 11, AMPERE),
        _scaled("RTX-3090", 71, 35.6, 0.6, 0.936, 82, 23.5, 22, 11, AMPERE),
    )
}
"""GPUs by name; the vendors' rates without sparsity. Link and network are [assumed]: NVLink or PCIe inside a node, and
one network card for each GPU in servers of H100s, for two in those of A100s."""


def device_named(name: str) -> Device:
    """Find a GPU.

    Args:
        name: Its name; case, spaces and dashes do not count, and "H100" is the first H100.

    Raises:
        UserError: It is not in the table.
    """
    typed = _plain(name)
    for known, device in DEVICES.items():
        if typed and (_plain(known) == typed or _plain(known).startswith(typed) or _plain(known).endswith(typed)):
            return device
    raise UserError(f"GPU {name!r} is not known; give one of {', '.join(DEVICES)}")


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
