"""The device to compute on, and what float32 means there."""

import ctypes
import os

import torch
from torch import Tensor

from hubert_lightning.errors import UserError


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the requested device, or by default the GPU if the machine has one, after `set_float32_precision`.

    Args:
        device: "cpu", "cuda", "cuda:1", …; "auto" or None for the GPU if there is one, else the CPU.

    Raises:
        UserError: The machine has no such device.
    """
    set_float32_precision()
    return find_device(device)


def find_device(device: str | torch.device | None = None) -> torch.device:
    """Return a device as `choose_device` does, without changing torch's settings."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        raise UserError(f"device {device}: not available ({reason}); choose auto, cpu or cuda") from error
    return chosen


TF32 = "HUBERT_TF32"
"""Environment variable that allows GPUs to round the factors of float32 products to 10 bits."""


def set_float32_precision() -> None:
    """Let this process compute products and convolutions in float32 on a GPU, in TF32 only where `HUBERT_TF32` is 1.

    By default, torch rounds the factors of convolutions to the 10 bits of TF32, and those of products not at all.

    Raises:
        UserError: `HUBERT_TF32` is neither 0 nor 1.
    """
    value = os.environ.get(TF32, "0")
    if value not in ("0", "1"):
        raise UserError(f"{TF32} is {value!r}; set it to 1 to allow TF32, or to 0 for float32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = value == "1"


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor, such as lengths, to a device without waiting for what the device computes.

    Args:
        tensor: (…).
        device: Device to copy it to.

    Returns:
        (…), the tensor itself if it is there.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # copies from other memory wait
    return tensor.to(device, non_blocking=True)


MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD = -3, -1, -2
"""Parameters of glibc's mallopt (malloc.h)."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for the next step of a training on a CPU.

    By default, glibc returns large blocks to the system, and every step faults all pages of its activations in again: a
    step of a small model takes 62 ms instead of 51 ms (docs/dev/measurements.md). Other C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Older versions of glibc accept at most 32 MiB here; setting the others alone would keep this at 128 KiB
    if mallopt(MMAP_THRESHOLD, 2**30) or mallopt(MMAP_THRESHOLD, 2**25):
        mallopt(TRIM_THRESHOLD, 2**30)
        mallopt(TOP_PAD, 2**26)
