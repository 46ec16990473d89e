"""Kernels of the CTC loss, written in Triton. They run on a GPU, or anywhere with `TRITON_INTERPRET=1`.

A transcript of L tokens has 2 L + 1 states: a blank, then each token followed by a blank. A program holds all states of
an utterance in one block, whose size is a power of two.
"""

import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHUNK = 32, 128
"""Tokens of the vocabulary in a program of the gradient, and states that it adds up at a time."""
SIZES = ["frames", "tokens", "vocabulary", "width", "blank"]
"""Sizes that differ between batches, for which nothing is compiled anew."""


@triton.jit(do_not_specialize=SIZES)
def _recursion(
    log_probs, token, sizes, trellis, loss, frames, tokens, vocabulary, width, blank, STATES: tl.constexpr
):  # fmt: skip
    row, backward = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(0)
    num_frames, num_tokens = tl.load(sizes + row), tl.load(sizes + batch + row)
    step = 1 - 2 * backward
    state = tl.arange(0, STATES)
    inside = state <= 2 * num_tokens
    is_token = inside & (state % 2 == 1)
    place = token + row * tokens + backward * (num_tokens - 1) + step * (state // 2)
    label = tl.load(place, mask=is_token, other=blank)
    may_skip = is_token & (state >= 3)
    may_skip = may_skip & (label != tl.load(place - step, mask=may_skip, other=blank))
    source = log_probs + (row * frames + backward * (num_frames - 1)) * vocabulary + label
    target = trellis + (backward * batch + row) * frames * width + state
    variable = tl.where(state == 0, 0.0, -float("inf"))  # before the first frame
    next_emission = tl.load(source, mask=inside & (num_frames > 0), other=-float("inf"))
    for frame in range(num_frames):
        emission = next_emission  # read a frame ahead, since memory answers late
        source += step * vocabulary
        next_emission = tl.load(source, mask=inside & (frame + 1 < num_frames), other=-float("inf"))
        one = tl.where(state >= 1, tl.gather(variable, tl.maximum(state - 1, 0), axis=0), -float("inf"))
        two = tl.where(may_skip, tl.gather(variable, tl.maximum(state - 2, 0), axis=0), -float("inf"))
        highest = tl.maximum(variable, tl.maximum(one, two))
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        total = tl.exp(variable - shift) + tl.exp(one - shift) + tl.exp(two - shift)
        variable = emission + shift + tl.log(total)
        tl.store(target, variable, mask=state < width)
        target += width
    if backward == 0:
        final = tl.where(inside & (state >= 2 * num_tokens - 1), variable, -float("inf"))
        highest = tl.max(final, axis=0)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        tl.store(loss + row, -(shift + tl.log(tl.sum(tl.exp(final - shift), axis=0))))


@triton.jit(do_not_specialize=SIZES)
def _gradient(
    log_probs, token, sizes, trellis, loss, of_loss, gradient, frames, tokens, vocabulary, width, blank,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    frame, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    num_frames, num_tokens = tl.load(sizes + row), tl.load(sizes + batch + row)
    nll = tl.load(loss + row)
    counts = (frame < num_frames) & (nll != float("inf"))
    column = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    place = log_probs + (row * frames + frame) * vocabulary
    forwards = trellis + (row * frames + frame) * width
    backwards = trellis + ((batch + row) * frames + num_frames - 1 - frame) * width + 2 * num_tokens
    posterior = tl.zeros([TOKENS], tl.float32)
    for start in range(0, tl.where(counts, 2 * num_tokens + 1, 0), CHUNK):
        state = start + tl.arange(0, CHUNK)
        inside = state <= 2 * num_tokens
        label = tl.load(token + row * tokens + state // 2, mask=inside & (state % 2 == 1), other=blank)
        paths = tl.load(forwards + state, mask=inside, other=-float("inf"))
        paths += tl.load(backwards - state, mask=inside, other=-float("inf"))
        emission = tl.load(place + label, mask=inside, other=0.0)  # which both variables contain
        share = tl.where(paths == -float("inf"), 0.0, tl.exp(paths - emission + nll))
        posterior += tl.sum(tl.where(label[None, :] == column[:, None], share[None, :], 0.0), axis=1)
    log_prob = tl.load(place + column, mask=column < vocabulary, other=0.0)
    value = tl.where(counts, (tl.exp(log_prob) - posterior) * tl.load(of_loss + row), 0.0)
    tl.store(gradient + (row * frames + frame) * vocabulary + column, value, mask=column < vocabulary)


def recursion(log_probs: Tensor, token: Tensor, sizes: Tensor, trellis: Tensor, loss: Tensor, blank: int) -> None:
    """Compute the forward and backward variables in the logarithm, and the losses (Graves et al. 2006, eqs. 5 to 11).

    The backward variables are the forward variables of the reversed utterance and transcript, so that one kernel
    computes both side by side: one program for each row and direction.

    Args:
        log_probs: (batch, frames, vocabulary) float32, contiguous.
        token: (batch, tokens) int64, contiguous.
        sizes: (2, batch) int32, frames and tokens of each row.
        trellis: (2, batch, frames, 2 · tokens + 1) float32, written: the forward variables, and the backward variables
            from the last frame and state of each row to the first.
        loss: (batch,) float32, written: −ln p(transcript | utterance), infinite if the frames are too few.
        blank: Id of the blank.
    """
    (batch, frames, vocabulary), width = log_probs.shape, trellis.shape[-1]
    states = block_of(width)
    _recursion[batch, 2](
        log_probs, token, sizes, trellis, loss, frames, token.shape[1], vocabulary, width, blank,
        STATES=states, num_warps=warps_of(states),
    )  # fmt: skip


def gradient(
    log_probs: Tensor,
    token: Tensor,
    sizes: Tensor,
    trellis: Tensor,
    loss: Tensor,
    of_loss: Tensor,
    out: Tensor,
    blank: int,
) -> None:
    """Compute the gradient with respect to what the log-probabilities are the log-softmax of (ibid., eq. 16).

    Sums are in a fixed order: unlike torch's kernel, which adds atomically, it returns the same bits each time.

    Args:
        log_probs: (batch, frames, vocabulary) float32, contiguous.
        token: (batch, tokens) int64, contiguous.
        sizes: (2, batch) int32, frames and tokens of each row.
        trellis: (2, batch, frames, 2 · tokens + 1), as `recursion` writes it.
        loss: (batch,), as `recursion` writes it.
        of_loss: (batch,) float32, gradient with respect to each loss.
        out: (batch, frames, vocabulary) float32, written: zero after the last frame and where the loss is infinite.
        blank: Id of the blank.
    """
    batch, frames, vocabulary = log_probs.shape
    _gradient[frames, batch, triton.cdiv(vocabulary, TOKENS)](
        log_probs, token, sizes, trellis, loss, of_loss, out, frames, token.shape[1], vocabulary, trellis.shape[-1],
        blank, TOKENS=TOKENS, CHUNK=CHUNK,
    )  # fmt: skip


def block_of(states: int) -> int:
    """Smallest power of two, at least 32, that holds a number of states."""
    return max(int(triton.next_power_of_2(states)), 32)


def warps_of(states: int) -> int:
    """Warps of a program for a block of states: four states a thread, where 16 warps are enough for that."""
    return min(max(states // 128, 1), 16)
