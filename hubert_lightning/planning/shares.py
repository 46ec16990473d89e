"""Hours and shares of languages and corpora of a run whose manifests are there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hubert_lightning.frames import CLOCK, SAMPLE_RATE, Clock, num_frames, seconds_to_samples
from hubert_lightning.planning.settings import CROP


class AudioShares(NamedTuple):
    """Audio of the training manifests.

    Args:
        hours: Hours in all.
        parts: Under "languages" and "corpora": "utterances", "hours" and "share" of an epoch by name.
    """

    hours: float
    parts: dict[str, dict[str, dict[str, float]]]


def audio_shares(config: Mapping[str, Any], clock: Clock = CLOCK) -> AudioShares | None:
    """Read how much audio each language and each corpus of a config has, and its share of an epoch.

    Args:
        config: What `read_config` returned.
        clock: Clock of the encoder.

    Returns:
        Hours and shares; None if the config balances nothing, or a manifest is not there yet.

    Raises:
        UserError: The options of the balance cannot be used with the manifests.
    """
    data = config["data"].get("init_args") or {}
    options = [data.get(name) for name in ("balance_languages", "balance_corpora")]
    if options == [None, None]:
        return None
    import numpy as np

    from hubert_lightning.data.balance import Balance, amounts
    from hubert_lightning.data.corpora import listed_corpora

    balance, train = Balance(*options), data.get("train") or []
    paths = [Path(str(path)) for path in (train if isinstance(train, list) else [train])]
    if not paths or not all(path.exists() for path in paths):
        return None
    cuts = listed_corpora(paths)
    frames = num_frames(cuts.num_samples, clock)
    balance.check(balance.groups(cuts), np.ones(len(cuts), bool), "")
    if "CTC" not in str(config["model"].get("class_path", "")):
        longest = seconds_to_samples(float(data.get("max_crop", CROP)))
        frames = np.minimum(frames, num_frames(longest, clock))
    return AudioShares(float(cuts.num_samples.sum()) / SAMPLE_RATE / 3600, amounts(cuts, balance, frames))
