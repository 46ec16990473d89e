"""Shares of languages and corpora: up-sampling by a temperature, as for mHuBERT-147 (Zanon Boito et al. 2024)."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from lhotse.cut import Cut

from hubert_lightning.data.corpora import Corpora
from hubert_lightning.data.shar import SharCuts
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE

Shares = float | dict[str, float]
"""Exponent of the sizes, or the relative share of each language or corpus by its name."""


class Groups(NamedTuple):
    """Cuts by what is balanced.

    Args:
        names: Language and corpus of each group; "" for the one that is not balanced.
        number: (cuts,) int32, number of the group of each cut.
    """

    names: list[tuple[str, str]]
    number: np.ndarray


@dataclass(frozen=True)
class Balance:
    """How much of an epoch, or of a sample, each language and each corpus gets.

    With an exponent α, language l with n_l of N frames has the share p_l = (n_l / N)^α / Σ_k (n_k / N)^α. The
    same formula with its own exponent divides the share of a language among the corpora in it, or everything among the
    corpora if languages are not balanced. mHuBERT-147 (arXiv 2406.06371) has 0.7 for languages and 0.9 for corpora
    (mhubert147_base.yaml); it counts utterances in training (hubert_dataset.py), and seconds for K-means
    (probability_sampling.py), as here.

    Args:
        languages: Exponent from 0, equal shares, to 1, shares of the audio, as without balance; or the relative share
            of each language. None if languages are not balanced.
        corpora: The same for corpora.

    Raises:
        UserError: A value is out of range.
    """

    languages: Shares | None = None
    corpora: Shares | None = None

    def __post_init__(self) -> None:
        for option, shares in self._options():
            if isinstance(shares, dict):
                if values := [name for name in shares if not isinstance(name, str)]:
                    raise UserError(
                        f"{option} names {values[0]}, which is no text: YAML reads no, yes, on, off, null and numbers "
                        "as values; quote the name, such as {'no': 2, en: 1}"
                    )
                wrong = [name for name, share in shares.items() if not _is_number(share) or not 0 < share < math.inf]
                if wrong or not shares:
                    fact = f"{wrong[0]}: {shares[wrong[0]]}" if wrong else "empty"
                    raise UserError(f"{option} is {fact}; give each name a share above 0, such as {{en: 2, sw: 1}}")
            elif not _is_number(shares) or not 0 <= shares <= 1:
                raise UserError(
                    f"{option} is {shares}; it is an exponent from 0, which gives all the same share, to 1, which "
                    "changes nothing"
                )

    def __bool__(self) -> bool:
        return self.languages is not None or self.corpora is not None

    def _options(self) -> list[tuple[str, Shares]]:
        options = {"balance_languages": self.languages, "balance_corpora": self.corpora}
        return [(option, shares) for option, shares in options.items() if shares is not None]

    def groups(self, cuts: Corpora) -> Groups:
        """Group cuts by what is balanced.

        Args:
            cuts: Utterances.

        Raises:
            UserError: Languages are balanced, and a cut has none.
        """
        pairs, index = cuts.named()
        if self.languages is not None and any(not language for language, _ in pairs):
            unknown = np.isin(index, [number for number, (language, _) in enumerate(pairs) if not language])
            raise UserError(
                f"{cuts[int(unknown.argmax())].id}: no language in the manifest{_and_others(int(unknown.sum()))}, so "
                "languages cannot be balanced; prepare it again with --language, or leave balance_languages out"
            )
        kept = [
            (language if self.languages is not None else "", corpus if self.corpora is not None else "")
            for language, corpus in pairs
        ]
        names = sorted(set(kept))
        numbers = np.array([names.index(pair) for pair in kept], np.int32)
        return Groups(names, numbers[index])

    def check(self, groups: Groups, kept: np.ndarray, reason: str) -> list[str]:
        """Check that everything that is balanced has utterances.

        Args:
            groups: Groups of all cuts of the manifests.
            kept: (cuts,) bool, whether each cut is used.
            reason: Why others are left out, after the name of the language or corpus.

        Returns:
            Sentences on options that change nothing.

        Raises:
            UserError: A language or corpus that an option names has no utterance, one has no share, or all of its
                utterances are left out.
        """
        counts = np.bincount(groups.number[kept], minlength=len(groups.names))
        if not counts.all():
            raise UserError(f"{_printed(groups.names[int(counts.argmin())])}: {reason}")
        sentences = []
        for kind, (option, shares) in zip(self._kinds(), self._options(), strict=True):
            thing = ("language", "corpus")[kind]
            names = sorted({pair[kind] for pair in groups.names})
            if isinstance(shares, dict):
                if missing := sorted(set(shares) - set(names)):
                    raise UserError(
                        f"{option} names {missing[0]}, a {thing} without a recording; the manifests have "
                        f"{', '.join(names[:20])}: correct the name, or remove it"
                    )
                if missing := sorted(set(names) - set(shares)):
                    raise UserError(
                        f"{option} has no share for {missing[0]}, a {thing} of the manifests; give it one, or remove "
                        "its manifest"
                    )
            if len(names) == 1:
                sentences.append(f"{option} changes nothing: all utterances are of one {thing}, {names[0]}")
        return sentences

    def _kinds(self) -> list[int]:
        return [kind for kind, shares in enumerate((self.languages, self.corpora)) if shares is not None]

    def shares(self, groups: Groups, frames: np.ndarray) -> np.ndarray:
        """Compute the share of each group.

        Args:
            groups: Groups of cuts.
            frames: (cuts,), frames of each cut.

        Returns:
            (groups,) float64, which sum to 1; 0 for a group without a cut.
        """
        size = np.bincount(groups.number, weights=frames, minlength=len(groups.names))
        if self.languages is None:
            return _divided(self.corpora, [corpus for _, corpus in groups.names], size)
        languages = sorted({language for language, _ in groups.names})
        members = [[number for number, pair in enumerate(groups.names) if pair[0] == name] for name in languages]
        of_languages = _divided(self.languages, languages, np.array([size[numbers].sum() for numbers in members]))
        shares = np.zeros(len(groups.names))
        for share, numbers in zip(of_languages, members, strict=True):
            corpora = [groups.names[number][1] for number in numbers]
            shares[numbers] = share * _divided(1.0 if self.corpora is None else self.corpora, corpora, size[numbers])
        return shares

    def source(self, cuts: Corpora) -> dict[str, str]:
        """Everything that a balanced sample depends on besides the audio; empty if nothing is balanced.

        Args:
            cuts: Utterances.
        """
        if not self:
            return {}
        settings = {"languages": self.languages, "corpora": self.corpora, "names": names_fingerprint(cuts)}
        return {"balance": json.dumps(settings, sort_keys=True)}


def names_fingerprint(cuts: Corpora) -> str:
    """Identify the languages and corpora of cuts, whatever the order of the manifests."""
    lines: list[str] = []
    for part, name in zip(cuts.parts, cuts.names, strict=True):
        pairs, index = Corpora([part], [name]).named()
        if isinstance(part, SharCuts):
            lines.append(f"{part.fingerprint} {pairs} {hashlib.sha256(index.tobytes()).hexdigest()}")
        else:
            lines += [f"{cut.id}\t{pairs[number]}" for cut, number in zip(part, index.tolist(), strict=True)]
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def amounts(cuts: Corpora, balance: Balance, frames: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Describe how much audio each language and each corpus has, and its share in an epoch.

    Args:
        cuts: Utterances.
        balance: Shares that are asked for.
        frames: (cuts,), frames that each cut contributes to an epoch.

    Returns:
        Under "languages" and "corpora", if there are several or they are balanced: "utterances", "hours" and "share" of
        an epoch by name, "unknown" for utterances without a language.
    """
    pairs, index = cuts.named()
    size = np.bincount(index, weights=frames, minlength=len(pairs))
    share = size / max(size.sum(), 1)
    if balance:
        groups = balance.groups(cuts)
        group_of = np.zeros(len(pairs), np.int64)
        group_of[index] = groups.number
        of_group = np.bincount(group_of, weights=size, minlength=len(groups.names))
        share = balance.shares(groups, frames)[group_of] * size / np.maximum(of_group[group_of], 1)
    hours = np.bincount(index, weights=cuts.num_samples, minlength=len(pairs)) / SAMPLE_RATE / 3600
    utterances = np.bincount(index, minlength=len(pairs))
    described: dict[str, dict[str, dict[str, float]]] = {}
    for kind, (thing, shares) in enumerate((("languages", balance.languages), ("corpora", balance.corpora))):
        members: dict[str, list[int]] = {}
        for number, pair in enumerate(pairs):
            members.setdefault(pair[kind] or "unknown", []).append(number)
        if len(members) > 1 or shares is not None:
            described[thing] = {
                name: {
                    "utterances": int(utterances[numbers].sum()),
                    "hours": round(float(hours[numbers].sum()), 3),
                    "share": round(float(share[numbers].sum()), 4),
                }
                for name, numbers in members.items()
            }
    return described


def as_corpora(cuts: Sequence[Cut]) -> Corpora:
    """The cuts as `Corpora`, which they may be already."""
    return cuts if isinstance(cuts, Corpora) else Corpora([list(cuts)])


def _divided(shares: Shares | None, names: Sequence[str], size: np.ndarray) -> np.ndarray:
    """Shares (names,) that sum to 1; 0 where the size is 0."""
    if isinstance(shares, dict):
        weights = np.array([shares[name] for name in names]) * (size > 0)
    else:
        weights = np.where(size > 0, (size / max(size.sum(), 1)) ** (1.0 if shares is None else shares), 0.0)
    return np.asarray(weights / max(weights.sum(), np.finfo(float).tiny))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _and_others(count: int) -> str:
    return f" (and {count - 1} other{'s' * (count > 2)})" if count > 1 else ""


def _printed(pair: Iterable[str]) -> str:
    return ", ".join(filter(None, pair))
