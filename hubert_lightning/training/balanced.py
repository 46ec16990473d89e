"""Balance of languages and corpora in the data modules: checks, shares of an epoch, and the state in checkpoints."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hubert_lightning.data.balance import Balance, amounts, names_fingerprint
from hubert_lightning.data.corpora import Corpora
from hubert_lightning.errors import UserError

log = logging.getLogger(__name__)

MAX_RECORDED = 200
"""Languages and corpora that a run's record has the amounts of."""


def check_weights(balance: Balance, weights: Sequence[float] | None) -> None:
    """Refuse shares of manifests beside shares of languages or corpora.

    Raises:
        UserError: Both are given.
    """
    if balance and weights is not None:
        raise UserError(
            "data.weights gives each manifest its share of an epoch, and data.balance_languages or "
            "data.balance_corpora each language or corpus; leave one of them out"
        )


def check_balance(balance: Balance, cuts: Corpora, kept: np.ndarray, reason: str) -> None:
    """Check that everything that is balanced has training utterances, and warn of options that change nothing.

    Args:
        balance: Shares that are asked for.
        cuts: All cuts of the training manifests.
        kept: (cuts,) bool, whether each cut is trained on.
        reason: Length that a cut needs, for the sentence, and the way out.

    Raises:
        UserError: As in `Balance.groups` and `Balance.check`.
    """
    if balance:
        for sentence in balance.check(balance.groups(cuts), kept, f"no utterance lasts {reason}"):
            log.warning("data.%s", sentence)


def groups_and_shares(
    balance: Balance, cuts: Corpora, frames: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Group the cuts for the plan of batches.

    Args:
        balance: Shares that are asked for.
        cuts: Training utterances.
        frames: (cuts,), frames that each cut contributes to an epoch.

    Returns:
        (cuts,) int32, number of the group of each cut, and (groups,), share of each group; None if nothing is balanced.
    """
    if not balance:
        return None, None
    groups = balance.groups(cuts)
    present = np.flatnonzero(np.bincount(groups.number))
    numbers = np.searchsorted(present, groups.number).astype(np.int32)
    return numbers, balance.shares(groups, frames)[present]


def shares_record(cuts: Corpora, balance: Balance, frames: np.ndarray) -> dict[str, Any]:
    """Amounts and shares of languages and corpora, for the loggers; empty if there is one of each.

    Args:
        cuts: Training utterances.
        balance: Shares that are asked for.
        frames: (cuts,), frames that each cut contributes to an epoch.
    """
    record: dict[str, Any] = {
        thing: dict(list(names.items())[:MAX_RECORDED]) for thing, names in amounts(cuts, balance, frames).items()
    }
    if balance:
        record |= {"balance_languages": balance.languages, "balance_corpora": balance.corpora}
    return record


def balance_state(balance: Balance, cuts: Corpora) -> dict[str, Any]:
    """What a checkpoint keeps of the balance; nothing if nothing is balanced."""
    if not balance:
        return {}
    settings = {"languages": balance.languages, "corpora": balance.corpora}
    return {"balance": settings | {"names": names_fingerprint(cuts)}}


def check_same_balance(balance: Balance, cuts: Corpora, state: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse to resume with other shares than those that a checkpoint was trained with.

    Args:
        balance: Shares that are asked for.
        cuts: Training utterances.
        state: State of the data in the checkpoint.
        checkpoint: Path of the checkpoint.

    Raises:
        UserError: The options, or the languages or corpora of the utterances, differ.
    """
    saved, current = state.get("balance"), balance_state(balance, cuts).get("balance")
    if saved == current:
        return
    settings = [{name: value for name, value in (one or {}).items() if name != "names"} for one in (saved, current)]
    if not isinstance(saved, dict) or settings[0] != settings[1]:
        fact = "data.balance_languages or data.balance_corpora is another"
    else:
        fact = "the languages or corpora in the manifests of data.train are others"
    raise UserError(
        f"{checkpoint}: {fact} than it was trained with ({saved} there, {current} here); give the same, or start "
        "another run with another --output"
    )
