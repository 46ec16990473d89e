"""The device to compute on."""

import torch

from hubert_lightning.errors import UserError


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the requested device, or by default the GPU if the machine has one.

    Args:
        device: "cpu", "cuda", "cuda:1", …; "auto" or None for the GPU if there is one, else the CPU.

    Raises:
        UserError: The machine has no such device.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        raise UserError(f"device {device}: not available ({reason}); choose auto, cpu or cuda") from error
    return chosen
