"""Units that earlier starts of the verb have computed: in its journal, or in the output that it has written."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import torch

from hubert_lightning.data.journal import Journal
from hubert_lightning.units.bit_rates import BitRates
from hubert_lightning.units.unit_bpe import Encoding
from hubert_lightning.units.unit_formats import FileUnits, UnitFormat, durations_beside, reader_of, writer_of


class FinishedUnits:
    """Units that are known: those in the journal, or, after the verb has finished, in the output that it describes."""

    def __init__(self, journal: Journal, output: Path, format: UnitFormat, deduplicate: bool) -> None:
        self.journal, self.output, self.format, self.deduplicate = journal, output, format, deduplicate
        self._in_output = bool(journal.about) and journal.about.get("output") == self._status()

    def __contains__(self, path: Path) -> bool:
        return path in self.journal and (self._in_output or "units" in self.journal.row(path))

    def write(
        self,
        paths: Sequence[Path],
        ids: Mapping[str, str],
        rates: BitRates,
        bpe: Encoding | None = None,
    ) -> None:
        """Write the units of these files, unless the output consists of them.

        Args:
            paths: Files whose units are known.
            ids: Name of each file, for the formats that name them.
            rates: Counts that are filled.
            bpe: Encoding of the units; None without one.
        """
        names = {path: ids.get(str(path), str(path)) for path in paths}
        if self._is_complete(names, bpe):
            return
        with ExitStack() as stack:
            read = None
            if self._in_output:
                read = stack.enter_context(reader_of(self.format, self.output, self.deduplicate))

            def known(path: Path) -> FileUnits:
                row = self.journal.row(path)
                if read is not None and "units" not in row:
                    row |= read(row["name"])
                units, durations = (torch.tensor(row[key]) if key in row else None for key in ("units", "durations"))
                assert units is not None
                return FileUnits(str(path), row.get("seconds", 0.0), units, durations)

            encode = None if bpe is None else bpe.made(known(path).units for path in paths).encode
            write = stack.enter_context(
                writer_of(self.format, self.output, ids, self.deduplicate, encoded=encode is not None)
            )
            for path in paths:
                result = known(path)
                if encode is not None:
                    result = result._replace(tokens=encode(result.units))
                count(result, rates)
                write(result)
        if self.format == "dataset":  # it cannot be added to, so that nothing is left to resume
            self.journal.path.unlink(missing_ok=True)
            return
        short = [
            self.journal.identity(path) | {"name": name, "seconds": self.journal.row(path).get("seconds", 0.0)}
            for path, name in names.items()
        ]
        about = {} if bpe is None else {"bpe": bpe.name}
        self.journal.finish(short, output=self._status(), **about)

    def _is_complete(self, names: Mapping[Path, str], bpe: Encoding | None) -> bool:
        """Whether the output consists of the units of these files, in this encoding."""
        return (
            self._in_output
            and len(names) == len(self.journal)
            and self.journal.about.get("bpe") == (None if bpe is None else bpe.name)
            and (bpe is None or bpe.is_saved)
            and all(self._is_written(name, path) for path, name in names.items())
        )

    def _is_written(self, name: str, path: Path) -> bool:
        """Whether the output has a file's units under this name."""
        row = self.journal.row(path)
        return "units" not in row and row.get("name") == name

    def _status(self) -> list[list[int]]:
        beside = [durations_beside(self.output)] if self.format == "kaldi" and self.deduplicate else []
        statuses = [path.stat() for path in (self.output, *beside) if path.is_file()]
        return [[status.st_size, status.st_mtime_ns] for status in statuses]


def journal_beside(output: Path) -> Path:
    """The journal of an output."""
    digest = sha256(os.fsencode(output.name)).hexdigest()[:8]
    name = output.name if len(output.name) < 60 else f"{output.name[:40]}-{digest}"
    return output.with_name(f".made-{name}.jsonl")


def content_of(result: FileUnits) -> dict[str, float | list[int]]:
    """The entries of a file's line in the journal."""
    content: dict[str, float | list[int]] = {"units": result.units.tolist(), "seconds": result.seconds}
    return content if result.durations is None else content | {"durations": result.durations.tolist()}


def count(result: FileUnits, rates: BitRates) -> None:
    """Count the units of a file, unless an earlier version has left its duration out."""
    durations, tokens = (None if values is None else values.tolist() for values in (result.durations, result.tokens))
    if result.seconds:
        rates.add(result.seconds, result.units.tolist(), durations, tokens)
