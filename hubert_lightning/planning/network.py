"""Seconds that GPUs exchange data, and how much of that a step waits for."""

from hubert_lightning.planning.devices import Device
from hubert_lightning.planning.workload import Workload, layer_parameters, num_parameters

HIDDEN = 0.6
"""Fraction of a batch's time, the backward pass, that hides the exchange of gradients [assumed]."""


def link_speed(device: Device, gpus: int, gpus_per_node: int) -> float:
    """Bytes in a second that each GPU sends: its link inside a node, the network beyond.

    Args:
        device: The GPUs.
        gpus: GPUs that train together.
        gpus_per_node: GPUs in a node.
    """
    return device.link if gpus <= gpus_per_node else min(device.link, device.network)


def data_parallel_seconds(workload: Workload, gpus: int, speed: float) -> float:
    """Seconds of an all-reduce of the float32 gradients, once a step.

    Args:
        workload: Model in training.
        gpus: GPUs that train together.
        speed: Bytes in a second that each GPU sends.
    """
    return 2 * (gpus - 1) / gpus * 4 * num_parameters(workload) / speed


def sharded_seconds(workload: Workload, gpus: int, speed: float) -> float:
    """Seconds in which LayerwiseFSDP gathers parameters and scatters gradients, once a batch.

    Layers are gathered in bfloat16 for the forward and the backward pass, the rest once in float32; all gradients are
    scattered in float32.

    Args:
        workload: Model in training.
        gpus: GPUs that train together.
        speed: Bytes in a second that each GPU sends.
    """
    layers = workload.encoder.num_layers * layer_parameters(workload.encoder)
    rest = num_parameters(workload) - layers
    return (gpus - 1) / gpus * (2 * 2 * layers + 4 * rest + 4 * (layers + rest)) / speed
