"""fairseq's dictionaries: the symbols of clusters and letters, and their rows in the weights.

Each dictionary begins with four symbols of fairseq's own, so the codewords of clusters begin at row 4 (fairseq
data/dictionary.py; models/hubert/hubert.py: label_embs_concat).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.json_file import shown
from hubert_lightning.untrusted.text_file import lines_of

OWN_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")  # the blank of CTC is the first
OVERWRITE_FLAG = "#fairseq:overwrite"
"""Flag after a symbol in a dictionary: it takes the place of an earlier symbol of its name."""
RENAMED_BOS = "<bos>"
"""Name in fairseq of a token "<s>" beside the blank, which fairseq would take for the blank."""
NEVER = -1e4  # bias of a row that never wins


def symbols_and_rows(tokens: Sequence[str]) -> tuple[list[str], list[int | None]]:
    """Map tokens to the symbols by which fairseq knows them.

    fairseq's own symbols come first: the blank is one of them, and tokens with the names of the others keep their rows.

    Args:
        tokens: Tokens, the blank first.

    Returns:
        Symbols, and the index of each one's token; None for a symbol without a token.
    """
    _, *own = OWN_SYMBOLS
    own_rows: list[int | None] = [0, *(tokens.index(name) if name in tokens[1:] else None for name in own)]
    others = [index for index in range(1, len(tokens)) if tokens[index] not in own]
    names = [RENAMED_BOS if tokens[index] == OWN_SYMBOLS[0] else tokens[index] for index in others]
    return [*OWN_SYMBOLS, *names], [*own_rows, *others]


def head_for_symbols(head: Mapping[str, Tensor], rows: Sequence[int | None]) -> dict[str, Tensor]:
    """Order the rows of a CTC head as fairseq's symbols; rows without a token never win."""

    def ordered(part: str, value: Tensor) -> Tensor:
        never = torch.full_like(value[0], NEVER if part == "bias" else 0)
        return torch.stack([never if row is None else value[row] for row in rows])

    return {part: ordered(part, value) for part, value in head.items()}


def head_for_tokens(head: Mapping[str, Tensor], tokens: Sequence[str]) -> dict[str, Tensor]:
    """Order the rows of a CTC head as tokens; the inverse of `head_for_symbols`."""
    _, rows = symbols_and_rows(tokens)
    order = [rows.index(index) for index in range(len(tokens))]
    return {part: value[order] for part, value in head.items()}


def dictionary_file(symbols: Iterable[object]) -> bytes:
    """Write a dictionary of symbols; fairseq adds its own."""
    return "".join(f"{symbol} 1\n" for symbol in symbols).encode()


def symbols_beside(path: Path, rows: int) -> list[str] | None:
    """Read the dictionary of letters that lies beside a checkpoint, as fairseq does (data/dictionary.py).

    Args:
        path: Path of the checkpoint.
        rows: Rows of its CTC head.

    Returns:
        Symbols, fairseq's own first; None if there is no dictionary.

    Raises:
        UserError: The file is no dictionary, or has another number of symbols than the head has rows.
    """
    file = path.parent / "dict.ltr.txt"
    if not file.exists():
        return None
    symbols, own = list(OWN_SYMBOLS), len(OWN_SYMBOLS)
    for number, line in enumerate(lines_of(file), start=1):
        if line.strip():
            _add_symbol(symbols, line.removesuffix("\n"), f"{file}, line {number}", is_first=number == 1)
        if len(symbols) > rows:
            break
    if len(symbols) != rows:
        more = "" if len(symbols) < rows else " or more"
        raise UserError(
            f"{file} has {len(symbols) - own}{more} symbols, and the model beside it {rows - own}; put the dictionary "
            "of that model there"
        )
    return symbols


def _add_symbol(symbols: list[str], entry: str, where: str, is_first: bool) -> None:
    """Add the symbol of a dictionary's line: the symbol, its count, and perhaps a flag."""
    is_flagged = entry.rstrip().endswith(" " + OVERWRITE_FLAG)
    if is_flagged:
        entry = entry.rstrip().removesuffix(" " + OVERWRITE_FLAG)
    symbol, space, count = entry.rstrip().rpartition(" ")
    if not space:
        symbol = count
    elif not count.isdecimal():
        raise UserError(f"{where}: {shown(count)} is not the count that must follow each symbol; correct the line")
    symbol = symbol or ("\ufeff" if is_first else "")  # a symbol at the start that looks like a byte order mark
    if symbol in symbols:
        row = symbols.index(symbol)
        if not is_flagged:
            raise UserError(f"{where}: {shown(symbol)} is listed already; keep it once, or add {OVERWRITE_FLAG}")
        symbols[row] = f"<{row}>"  # a row without a token
    symbols.append(symbol)


def cluster_rows(symbols: Sequence[str]) -> list[int] | slice:
    """Find the rows of the clusters 0, 1, … in a dictionary, which may list them by frequency."""
    rows = {symbol: row for row, symbol in enumerate(symbols)}
    clusters = [str(cluster) for cluster in range(len(symbols))]
    if [*symbols] == clusters or rows.keys() != set(clusters):
        return slice(None)
    return [rows[cluster] for cluster in clusters]


def dictionary_sizes(
    path: Path, num_codewords: int, labels: Sequence[str], dictionaries: Sequence[Sequence[str]]
) -> list[int]:
    """Find how many codewords each stream of labels has, fairseq's own symbols among them.

    Args:
        path: File that errors name.
        num_codewords: Codewords of all streams.
        labels: Names of the streams.
        dictionaries: Symbols of each stream, if the checkpoint holds them.

    Raises:
        UserError: Dictionaries are missing, or do not fit the codewords.
    """
    own, sizes = len(OWN_SYMBOLS), [len(symbols) for symbols in dictionaries]
    if not sizes and len(labels) == 1:
        sizes = [num_codewords]
    if not sizes:
        raise UserError(
            f"{path} predicts {len(labels)} streams of clusters, and does not hold the dictionaries with the size of "
            "each; save it in fairseq with its task_state"
        )
    if sum(sizes) != num_codewords or min(sizes) <= own:
        raise UserError(
            f"{path} has {num_codewords} codewords for dictionaries of {sizes} symbols, {own} of which are fairseq's "
            "own; they belong to different models"
        )
    return sizes
