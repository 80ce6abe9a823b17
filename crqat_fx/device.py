"""Where torch computes, by the name that the user gives."""

import torch

from crqat_fx.errors import UserError


def usable_device(device: str | torch.device) -> torch.device:
    """The device, once a number has been put on it and read back: `meta` keeps none."""
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch without CUDA asserts; without an accelerator's part, it imports
        reason = str(error).strip().splitlines()[0]
        available = [f"cuda:{index}" for index in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
        raise UserError(
            f"device {str(device)!r} is of no use ({reason})", remedy=f"choose among {', '.join(['cpu', *available])}"
        ) from error
    return chosen
