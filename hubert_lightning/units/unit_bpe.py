"""Byte-pair encoding of units: tokens for language models, which stand for frequent sequences of runs.

A unit is written as a character of Unicode's private planes, so that Hugging Face's tokenizers train and apply the
merges for any number of clusters, and their tokenizer.json serves transformers too:

bpe = UnitBPE.train(sequences, size=2000, clusters=500)
tokens = bpe.encode(runs.units)
bpe.decode(tokens)  # the units of the runs
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular, write_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PRIVATE_PLANES = (0xF0000, 0x100000)
"""First characters of Unicode's private planes 15 and 16."""
PLANE_SIZE = 0xFFFE
"""Private characters of a plane."""
MAX_CLUSTERS = 2 * PLANE_SIZE
TOKENIZER = ".tokenizer.json"
"""End of the name of the file for an encoding that is trained, after the name of the output."""
TRAINING_PIECE = 128
"""Runs of a sequence that training counts together: it looks through a whole piece at each merge."""
ORIGIN = re.compile(r"<K-means (?P<kmeans>\w+)>")
"""Pattern of tokenizer.json's normalizer, which replaces nothing in units and names the K-means."""


class UnitBPE:
    """A byte-pair encoding of units without repetitions.

    Args:
        tokenizer: Tokenizer of units as characters; see `train` and `load`.

    Attributes:
        clusters: Number of different units.
        kmeans: Fingerprint of the K-means of the units; empty if it is not known.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self._parts = [_units_of(tokenizer.id_to_token(token) or "") for token in range(len(self))]
        singles = sorted(units[0] for units in self._parts if len(units) == 1)
        if singles != list(range(len(singles))) or not singles:
            raise UserError("a tokenizer of other text than units; give one that `hubert units --bpe` trained")
        self.clusters = len(singles)
        pattern = (json.loads(tokenizer.to_str()).get("normalizer") or {}).get("pattern") or {}
        origin = ORIGIN.fullmatch(pattern.get("String", ""))
        self.kmeans = origin["kmeans"] if origin else ""

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.tokenizer.get_vocab_size())

    @classmethod
    def train(
        cls, sequences: Iterable[Sequence[int] | Tensor], size: int, clusters: int, kmeans: str = ""
    ) -> "UnitBPE":
        """Train an encoding.

        Args:
            sequences: Units without repetitions of each recording.
            size: Number of tokens, the units themselves among them; fewer if no pair of tokens occurs twice.
            clusters: Number of different units.
            kmeans: Fingerprint of the K-means of the units.

        Raises:
            UserError: tokenizers is not installed, or there are fewer tokens than units or more units than characters.
        """
        check_tokenizers()
        from tokenizers import Tokenizer, decoders, models, normalizers, trainers

        check_size(size, clusters)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoders.Fuse()  # no spaces between tokens
        if kmeans:
            tokenizer.normalizer = normalizers.Replace(f"<K-means {kmeans}>", "")
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=[_character(unit) for unit in range(clusters)], show_progress=False
        )
        tokenizer.train_from_iterator(_pieces(sequences, clusters), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path | str) -> "UnitBPE":
        """Read a tokenizer.json that `save` wrote.

        Raises:
            UserError: tokenizers is not installed, or the file is no encoding of units.
        """
        check_tokenizers()
        from tokenizers import Tokenizer

        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the tokenizer.json of an encoding, or a number of tokens")
        check_regular(path)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more precise
            raise UserError(f"{path}: not a tokenizer.json ({str(error)[:100]}); train one with --bpe SIZE") from error
        try:
            return cls(tokenizer)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write a tokenizer.json, which tokenizers and transformers' PreTrainedTokenizerFast load.

        Raises:
            UserError: The disk is full or cannot be written to.
        """
        write_whole(Path(path), self.tokenizer.to_str(pretty=True).encode())

    def check_units(self, clusters: int, kmeans: str, name: str) -> None:
        """Check that the encoding is one of the units of a K-means.

        Args:
            clusters: Number of clusters of the K-means.
            kmeans: Fingerprint of the K-means; empty if it is not known, so that only the clusters are compared.
            name: File of the encoding.

        Raises:
            UserError: It is of another K-means.
        """
        if self.clusters != clusters or (self.kmeans and kmeans and self.kmeans != kmeans):
            fact = f"{self.clusters} units" if self.clusters != clusters else "the units of another K-means"
            raise UserError(
                f"{name}: an encoding of {fact}, but this K-means has {clusters} clusters; train one with --bpe SIZE"
            )

    def encode(self, units: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Encode units.

        Args:
            units: (runs,) units without repetitions.

        Returns:
            (tokens,) int64.

        Raises:
            UserError: A unit is not one of the K-means.
        """
        tokens = self.tokenizer.encode(text_of(units, self.clusters)).ids
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Decode tokens: the inverse of `encode`.

        Args:
            tokens: (tokens,).

        Returns:
            (runs,) int64 units.

        Raises:
            UserError: There is no such token.
        """
        numbers = _numbers(tokens)
        if wrong := [token for token in numbers if not 0 <= token < len(self)]:
            raise UserError(f"token {wrong[0]} of {len(self)}; give tokens of this encoding")
        return torch.tensor([unit for token in numbers for unit in self._parts[token]], dtype=torch.int64)

    def frames(self, tokens: Sequence[int] | np.ndarray | Tensor, durations: Sequence[int] | Tensor) -> Tensor:
        """Decode tokens to the unit of every frame.

        Args:
            tokens: (tokens,).
            durations: (runs,) frames of each run.

        Returns:
            (frames,) int64.

        Raises:
            UserError: There are not as many durations as runs.
        """
        runs = self.decode(tokens)
        repeats = torch.as_tensor(durations, dtype=torch.int64)
        if len(runs) != len(repeats):
            raise UserError(f"{len(repeats)} durations of {len(runs)} runs; give the durations of these tokens")
        return runs.repeat_interleave(repeats)


class Encoding:
    """The encoding of an output: a file, or one that is trained on the output's units.

    Args:
        bpe: Encoding of a file, or the number of tokens of one to train.
        path: File for the encoding that is trained.
        clusters: Number of clusters of the K-means.
        kmeans: Fingerprint of the K-means.

    Attributes:
        name: What tells it from others.
    """

    def __init__(self, bpe: UnitBPE | int, path: Path | None, clusters: int, kmeans: str) -> None:
        self._bpe, self._path, self._clusters, self._kmeans = bpe, path, clusters, kmeans
        digest = "" if isinstance(bpe, int) else sha256(bpe.tokenizer.to_str().encode()).hexdigest()[:16]
        self.name = digest or f"{bpe} tokens"

    @property
    def is_saved(self) -> bool:
        """Whether the file of the encoding exists, if there is to be one."""
        return self._path is None or self._path.is_file()

    def made(self, sequences: Iterable[Tensor]) -> UnitBPE:
        """Return the encoding, trained on these runs of units and saved if it is not made yet."""
        bpe = self._bpe
        if isinstance(bpe, int):
            bpe = UnitBPE.train(sequences, bpe, self._clusters, self._kmeans)
        if self._path is not None:
            bpe.save(self._path)
        return bpe


def checked_bpe(bpe: int | Path | None, save_bpe: Path | None) -> int | UnitBPE | None:
    """Check the options of an encoding, and read its file.

    Args:
        bpe: Number of tokens of an encoding to train, or the tokenizer.json of one.
        save_bpe: File for the encoding that is trained.

    Returns:
        The number of tokens, the encoding of the file, or None.

    Raises:
        UserError: The options contradict each other, tokenizers is not installed, or the file is no encoding of units.
    """
    if save_bpe is not None and not isinstance(bpe, int):
        raise UserError("save_bpe is for an encoding that is trained; give the number of its tokens with --bpe")
    if bpe is None:
        return None
    check_tokenizers()
    return bpe if isinstance(bpe, int) else UnitBPE.load(bpe)


def encoding_of(
    bpe: int | UnitBPE, source: int | Path | None, path: Path | None, clusters: int, kmeans: str
) -> Encoding:
    """Check that an encoding is one of the units of a K-means.

    Args:
        bpe: Encoding, or the number of tokens of one to train.
        source: File of the encoding, which errors name, or that number.
        path: File for the encoding that is trained.
        clusters: Number of clusters of the K-means.
        kmeans: Fingerprint of the K-means; empty if it is not known.

    Returns:
        The encoding that is to be used or trained.

    Raises:
        UserError: It is an encoding of other units, or has too few tokens.
    """
    if isinstance(bpe, UnitBPE):
        bpe.check_units(clusters, kmeans, str(source))
        return Encoding(bpe, None, clusters, kmeans)
    check_size(bpe, clusters)
    return Encoding(bpe, path, clusters, kmeans)


def check_tokenizers() -> None:
    """Check that tokenizers is installed.

    Raises:
        UserError: It is not.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UserError(
            'bpe needs tokenizers, which is not installed; run `pip install "hubert-lightning[bpe]"`'
        ) from error


def check_size(size: int, clusters: int) -> None:
    """Check the number of tokens of a new encoding.

    Raises:
        UserError: There are fewer tokens than clusters, or more clusters than private characters.
    """
    if clusters > MAX_CLUSTERS:
        raise UserError(f"{clusters} clusters: an encoding has characters for {MAX_CLUSTERS}; take fewer")
    if size <= clusters:
        raise UserError(f"bpe {size}: each of the {clusters} clusters is a token already; give a larger number")


def text_of(units: Sequence[int] | np.ndarray | Tensor, clusters: int = MAX_CLUSTERS) -> str:
    """Write units as private characters, as the tokenizer.json reads them.

    Args:
        units: (runs,) units.
        clusters: Number of different units.

    Raises:
        UserError: A unit is not below the number of clusters.
    """
    numbers = _numbers(units)
    if wrong := [unit for unit in numbers if not 0 <= unit < clusters]:
        raise UserError(f"unit {wrong[0]} of {clusters} clusters; give units of the K-means of this encoding")
    return "".join(map(_character, numbers))


def _numbers(values: Sequence[int] | np.ndarray | Tensor) -> list[int]:
    numbers: list[int] = values.tolist() if isinstance(values, (np.ndarray, Tensor)) else list(values)
    return numbers


def _pieces(sequences: Iterable[Sequence[int] | Tensor], clusters: int) -> Iterator[str]:
    for units in sequences:
        text = text_of(units, clusters)
        yield from (text[start : start + TRAINING_PIECE] for start in range(0, len(text), TRAINING_PIECE))


def _character(unit: int) -> str:
    plane, place = divmod(unit, PLANE_SIZE)
    return chr(PRIVATE_PLANES[plane] + place)


def _units_of(token: str) -> list[int]:
    """Units of a token's characters; empty for a token of other text."""
    units = []
    for character in map(ord, token):
        plane, place = divmod(character - PRIVATE_PLANES[0], PRIVATE_PLANES[1] - PRIVATE_PLANES[0])
        if plane not in (0, 1) or place >= PLANE_SIZE:
            return []
        units.append(plane * PLANE_SIZE + place)
    return units
