"""From log-probabilities to words."""

import torch
from torch import Tensor

from hubert_lightning.data.text import BLANK, Vocabulary


def greedy(log_probs: Tensor, num_frames: Tensor, vocabulary: Vocabulary) -> list[str]:
    """The words on the single best path: the best token of each frame, repeats collapsed, blanks dropped.

    log_probs:  (batch, frames, tokens); logits do as well
    num_frames: (batch,), frames before padding
    returns:    one text per utterance, with one space between words and none around them
    """
    texts = []
    for path, length in zip(log_probs.argmax(dim=-1).cpu(), num_frames.tolist(), strict=True):
        tokens = torch.unique_consecutive(path[:length])
        texts.append(" ".join(vocabulary.decode(tokens[tokens != BLANK].tolist()).split()))
    return texts
