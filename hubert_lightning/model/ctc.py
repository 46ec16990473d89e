"""The CTC loss (Graves et al. 2006, "Connectionist temporal classification"), on a GPU without a wait of the host.

torch's own loss copies lengths to the GPU six times in a step, and waits for each copy.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_lightning.model.devices import without_waiting

MOST_STATES = 4096
"""States of the longest transcripts of the kernels: 2047 tokens and the blanks between them."""
log = logging.getLogger(__name__)


def ctc_loss(
    log_probs: Tensor, token: Tensor, num_frames: Sequence[int], num_tokens: Sequence[int], blank: int = 0
) -> Tensor:
    """Sum −ln p(transcript | utterance) over the utterances that have frames enough for their transcripts.

    GPUs compute it by kernels of this package, once these have agreed with torch's loss there; processors, and GPUs on
    which they do not work, by torch's.

    Args:
        log_probs: (batch, frames, vocabulary), log-softmax of the logits.
        token: (batch, tokens) int64, anything after the end of a transcript.
        num_frames: (batch,), frames before padding.
        num_tokens: (batch,), tokens before padding.
        blank: Id of the blank, which no transcript contains.

    Returns:
        (), differentiable with respect to the logits; no utterance with too few frames adds to it or to gradients.
    """
    states = 2 * max(num_tokens, default=0) + 1
    on_gpu = log_probs.device.type == "cuda" and log_probs.dtype == torch.float32
    if on_gpu and states <= MOST_STATES and is_right(log_probs.device, max(1 << states.bit_length(), 32)):
        return fused_loss(log_probs, token, num_frames, num_tokens, blank)
    return torch_loss(log_probs, token, num_frames, num_tokens, blank)


def torch_loss(
    log_probs: Tensor, token: Tensor, num_frames: Sequence[int], num_tokens: Sequence[int], blank: int = 0
) -> Tensor:
    """`ctc_loss` by torch."""
    with torch.backends.cudnn.flags(enabled=False):  # torch reads the tokens back to ask whether cuDNN takes them
        return F.ctc_loss(
            log_probs.transpose(0, 1),  # (frames, batch, vocabulary)
            token,
            num_frames,  # type: ignore[arg-type]  # tensors on a GPU would be read back as well
            num_tokens,  # type: ignore[arg-type]
            blank=blank,
            reduction="sum",
            zero_infinity=True,
        )


def fused_loss(
    log_probs: Tensor, token: Tensor, num_frames: Sequence[int], num_tokens: Sequence[int], blank: int = 0
) -> Tensor:
    """`ctc_loss` by the kernels of this package."""
    longest = max(num_tokens, default=0)
    assert longest <= token.shape[1]
    assert max(num_frames, default=0) <= log_probs.shape[1]
    sizes = without_waiting(torch.tensor([num_frames, num_tokens], dtype=torch.int32), log_probs.device)
    losses, _ = _ctc_losses(log_probs.contiguous(), token[:, :longest].contiguous(), sizes, blank)
    loss: Tensor = losses.masked_fill(losses == torch.inf, 0).sum()
    return loss


@cache
def is_right(device: torch.device, block: int) -> bool:
    """Whether the kernels agree with torch's loss on made-up utterances that fill a block; say so if they do not.

    It waits for the device, once a process for each size of blocks.

    Args:
        device: Device to try them on.
        block: States of the longest transcript, a power of two.
    """
    rng = torch.Generator().manual_seed(block)
    longest = block // 2 - 1
    num_tokens = (longest, longest // 2, 0, longest)
    num_frames = (longest + longest // 4 + 8, longest + 2, 5, longest // 2)  # the last are too few
    token = torch.randint(1, 28, (4, longest), generator=rng)
    token[1, 1::3] = token[1, :-1:3]  # repeated tokens
    logits = torch.randn(4, max(num_frames), 28, generator=rng)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            token, logits = token.to(device), logits.to(device)
            results = []
            for loss_of, dtype in ((fused_loss, torch.float32), (torch_loss, torch.float64)):
                x = logits.to(dtype, copy=True).requires_grad_()
                loss = loss_of(x.log_softmax(dim=-1), token, num_frames, num_tokens)
                results.append((loss.detach(), *torch.autograd.grad(loss, x)))
            (loss, gradient), (expected, of_logits) = results
            agree = torch.allclose(loss.double(), expected, rtol=1e-4)
            # With 4095 states, torch's own gradient in float32 is 0.009 from that in float64
            agree = agree and torch.allclose(gradient.double(), of_logits, rtol=0.0, atol=0.05)
            reason = "they differ from torch's there"
    except Exception as error:  # whatever Triton, its compilers or the driver raise: torch's loss works without them
        agree, reason = False, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if not agree:
        log.warning("The CTC loss of %s is torch's, which waits, since our kernels do not work: %s", device, reason)
    return agree


@torch.library.custom_op("hubert_lightning::ctc_losses", mutates_args=())
def _ctc_losses(log_probs: Tensor, token: Tensor, sizes: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Losses (batch,), and the forward and backward variables; arguments as in `ctc_kernels.recursion`."""
    from hubert_lightning.model import ctc_kernels

    losses, trellis = _empty(log_probs, token)
    with torch.cuda.device_of(log_probs):  # type: ignore[no-untyped-call, unused-ignore]
        ctc_kernels.recursion(log_probs, token, sizes, trellis, losses, blank)
    return losses, trellis


@_ctc_losses.register_fake
def _(log_probs: Tensor, token: Tensor, sizes: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    return _empty(log_probs, token)


def _empty(log_probs: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    batch, frames, _ = log_probs.shape
    return log_probs.new_empty(batch), log_probs.new_empty(2, batch, frames, 2 * token.shape[1] + 1)


@torch.library.custom_op("hubert_lightning::ctc_gradient", mutates_args=())
def _ctc_gradient(
    log_probs: Tensor, token: Tensor, sizes: Tensor, losses: Tensor, trellis: Tensor, of_losses: Tensor, blank: int
) -> Tensor:
    """(batch, frames, vocabulary); arguments as in `ctc_kernels.gradient`."""
    from hubert_lightning.model import ctc_kernels

    out = torch.empty_like(log_probs)
    with torch.cuda.device_of(log_probs):  # type: ignore[no-untyped-call, unused-ignore]
        ctc_kernels.gradient(log_probs, token, sizes, trellis, losses, of_losses.contiguous(), out, blank)
    return out


@_ctc_gradient.register_fake
def _(
    log_probs: Tensor, token: Tensor, sizes: Tensor, losses: Tensor, trellis: Tensor, of_losses: Tensor, blank: int
) -> Tensor:
    return torch.empty_like(log_probs)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.blank = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_losses: Tensor, of_trellis: None) -> tuple[Tensor, None, None, None]:
    return _ctc_gradient(*ctx.saved_tensors, of_losses, ctx.blank), None, None, None


_ctc_losses.register_autograd(_backward, setup_context=_keep)
