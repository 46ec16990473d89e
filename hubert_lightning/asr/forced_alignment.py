"""Forced alignment: the most likely CTC path through given tokens (Viterbi)."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hubert_lightning.vocabulary import BLANK


def forced_path(log_probs: Tensor, tokens: Sequence[int]) -> np.ndarray:
    """Find the token or blank of each frame on the most likely path through all tokens.

    States are the blank before each token, the tokens, and the blank after the last one. A path stays in a state, goes
    to the next one, or skips a blank between different tokens. The paths are those of torchaudio's `forced_align`
    (tests/asr/test_forced_alignment.py), whose Linux wheels load CUDA's libraries.

    Args:
        log_probs: (frames, tokens), float32, with at least as many frames as the tokens need.
        tokens: Tokens without blanks, at least one.

    Returns:
        (frames,) int64.
    """
    emissions = log_probs.detach().float().cpu().numpy()
    states = np.full(2 * len(tokens) + 1, BLANK)
    states[1::2] = tokens
    skips = np.zeros(len(states), dtype=bool)  # the state can be reached from the one before the last
    skips[3::2] = states[3::2] != states[1:-2:2]
    steps = _best_steps(emissions, states, skips)
    state = len(states) - 1 - int(steps[0, 0])
    path = np.empty(len(emissions), dtype=np.int64)
    for frame in range(len(emissions) - 1, -1, -1):
        path[frame] = states[state]
        if frame:
            state -= int(steps[frame, state])
    return path


def _best_steps(emissions: np.ndarray, states: np.ndarray, skips: np.ndarray) -> np.ndarray:
    """The number of states, 0 to 2, between each state and its best predecessor.

    Returns:
        (frames, states) uint8. The first row has no predecessors; its first value is 1 if the best path ends in the
        last token, 0 if it ends in the blank after it.
    """
    num_states = len(states)
    steps = np.zeros((len(emissions), num_states), dtype=np.uint8)
    never = np.float32(-np.inf)
    scores = np.full(num_states + 2, never, dtype=np.float32)  # two states that no path reaches come first
    scores[2:4] = emissions[0, states[:2]]
    blocked = np.where(skips, np.float32(0), never)
    for frame in range(1, len(emissions)):
        stay, advance, skip = scores[2:], scores[1:-1], scores[:-2] + blocked
        step = steps[frame]
        step[(advance > stay) & (advance >= skip)] = 1
        step[(skip > stay) & (skip > advance)] = 2
        scores[2:] = np.maximum(np.maximum(stay, advance), skip) + emissions[frame, states]
    steps[0, 0] = scores[-2] >= scores[-1]
    return steps
