"""Random spans of frames or channels that are masked; spans may overlap."""

from collections.abc import Sequence

import torch
from torch import Tensor


def span_mask(
    num_frames: Sequence[int],
    prob: float,
    length: int,
    generator: torch.Generator,
    *,
    same_count: bool = False,
    min_spans: int = 2,
) -> Tensor:
    """Draw masked spans for every row of a batch. For channel masks, count channels and set `min_spans` to 0.

    Args:
        num_frames: (batch,), frames of each row, at least 1; nothing is masked after them.
        prob: Fraction of a row that its spans would cover if they did not overlap.
        length: Frames in a span, at most half of the row.
        generator: Source of all random numbers.
        same_count: Whether all rows get as many masked frames as the row with the fewest.
        min_spans: Minimum number of spans in a row, as long as a frame stays unmasked; with 1 or more, every row has
            masked frames.

    Returns:
        (batch, longest row) bool, True where masked.
    """
    frames = torch.as_tensor(num_frames)
    longest = int(frames.max())
    # A short row is never masked whole (icefall issue 1904): its spans take half of it at most, and there are no more
    # of them than fit side by side with a frame to spare. Up to prob 0.8 this changes no row of five spans' length.
    span = (frames // 2).clamp(min=1, max=length)
    rounding = torch.rand((), generator=generator)  # up or down at random, for the whole batch as in fairseq
    spans = (prob * frames / span + rounding).long().clamp(min=min_spans)
    spans = spans.minimum(((frames - 1) // span).clamp(min=1))

    # Unlike fairseq, which never masks the last frame of a row, all starts where a span fits are equally likely.
    score = torch.rand(len(frames), longest, generator=generator)
    score[torch.arange(longest) > (frames - span)[:, None]] = -1  # a span does not fit here
    most = int(spans.max())
    start = score.topk(most).indices  # drawn without replacement: (batch, spans)
    drawn = (torch.arange(most) < spans[:, None]).int()
    change = torch.zeros(len(frames), longest + 1, dtype=torch.int32)  # spans that start minus spans that end
    change.scatter_add_(1, start, drawn)
    change.scatter_add_(1, (start + span[:, None]).clamp(max=longest), -drawn)
    mask = change.cumsum(dim=1)[:, :longest] > 0
    # fairseq unmasks down to the fewest in fine-tuning too, where a short utterance leaves the long ones of its batch
    # nearly unmasked. Here only pre-training, with rows of one length, asks for equal counts.
    return _unmask_to_smallest(mask, generator) if same_count else mask


def _unmask_to_smallest(mask: Tensor, generator: torch.Generator) -> Tensor:
    smallest = int(mask.sum(dim=1).min())
    order = torch.rand(mask.shape, generator=generator).masked_fill(~mask, -1)
    return torch.zeros_like(mask).scatter_(1, order.topk(smallest).indices, True)
