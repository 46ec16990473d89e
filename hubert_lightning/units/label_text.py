"""Import and export of labels as text: fairseq's `.km`, Kaldi's `.txt`, and JSON lines.

`.km`     one utterance per line: `12 12 7`; fairseq's manifest `.tsv` beside it names the utterances
`.txt`    `utterance-id 12 12 7`
`.jsonl`  `{"id": "utterance-id", "clusters": [[12, 12, 7]]}`, one list per stream

The first two have one file per stream: `units.0.km`, `units.1.km`.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import takewhile, zip_longest
from math import ceil
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from lhotse.cut import Cut
from rich.console import Console

from hubert_lightning.data.dataset_writer import check_dataset
from hubert_lightning.data.manifest import fingerprint, read_manifest
from hubert_lightning.errors import UserError, counted
from hubert_lightning.files import composed, replacing_all
from hubert_lightning.frames import HOP, HOPS, SAMPLE_RATE, WINDOW, Clock, num_frames
from hubert_lightning.units.label_shards import LabelSource
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.label_writer import LabelWriter, shard_size
from hubert_lightning.units.quality import perplexity
from hubert_lightning.units.unit_bpe import TOKENIZER, Encoding, UnitBPE, checked_bpe, encoding_of
from hubert_lightning.units.unit_dataset import export_dataset
from hubert_lightning.untrusted.json_file import parse_json
from hubert_lightning.untrusted.text_file import lines_of

log = logging.getLogger(__name__)

LABEL_SUFFIXES = (".km", ".txt", ".jsonl")
IMPORTED = "imported"
"""Name of the features of imported labels."""


def export_labels(
    store: Path,
    manifest: list[Path],
    out: Path,
    format: Literal["text", "dataset"] = "text",
    bpe: int | Path | None = None,
    save_bpe: Path | None = None,
) -> list[Path]:
    """Write the labels of a manifest's utterances as text, or as a Hugging Face dataset.

    Utterances without labels, such as those shorter than the `min_duration` of a fit, are left out and counted.

    Args:
        store: Folder of a finished label store.
        manifest: Manifests whose utterances are written, in their order.
        out: File to write, whose suffix is its format: .km (fairseq), .txt (Kaldi) or .jsonl; or the folder of a
            dataset.
        format: Kind of output: text, or dataset, a folder of parquet tables with runs of labels and their durations,
            speaker, text, duration, language and path of the audio.
        bpe: For a dataset, the number of tokens of a byte-pair encoding that is trained on the runs of these labels and
            applied to them; or the tokenizer.json of one, which is applied.
        save_bpe: File for the encoding that is trained; OUT.tokenizer.json if not given.

    Returns:
        Paths of the files with labels, one per stream or one .jsonl; or the folder of the dataset.

    Raises:
        UserError: The labels are corrupt, or do not belong to the manifest; or the format cannot hold them.
    """
    if format == "dataset":
        check_dataset(out)
    elif bpe is not None:
        raise UserError("bpe is a column of a dataset; add --format dataset, or leave it out")
    else:
        _check_suffix(out)
    trained_or_size = checked_bpe(bpe, save_bpe)
    labels = LabelStore(store)
    encoding = None
    if trained_or_size is not None:
        encoding = _encoding(labels, trained_or_size, bpe, save_bpe or out.with_name(f"{out.name}{TOKENIZER}"))
    labels.verify()
    cuts = _labelled(labels, list(read_manifest(manifest)))
    if format == "dataset":
        export_dataset(labels, cuts, out, encoding)
        return [out]
    streams = len(labels.source.clusters)
    paths = [out]
    if out.suffix != ".jsonl" and streams > 1:
        paths = [out.with_suffix(f".{stream}{out.suffix}") for stream in range(streams)]
    companions = {out.with_suffix(".tsv"): _tsv(cuts)} if out.suffix == ".km" else {}
    if out.suffix == ".txt" and (spaced := next((cut.id for cut in cuts if len(cut.id.split()) != 1), None)):
        raise UserError(f"{spaced}: Kaldi's text cannot hold an id with spaces; export to .jsonl")
    with replacing_all(*companions, *reversed(paths)) as files:
        for file, text in zip(files, companions.values(), strict=False):
            file.write(text.encode())
        opened = files[len(companions) :][::-1]
        for cut in cuts:
            clusters = labels[cut.id].tolist()
            if out.suffix == ".jsonl":
                opened[0].write((json.dumps({"id": cut.id, "clusters": clusters}) + "\n").encode())
                continue
            for file, ids in zip(opened, clusters, strict=True):
                words = map(str, ids if out.suffix == ".km" else [cut.id, *ids])
                file.write((" ".join(words) + "\n").encode())
    return paths


def check_labels(store: Path, manifest: list[Path] | None = None) -> None:
    """Read every label, compare it with its checksum, and print a summary of the store.

    Args:
        store: Folder of a finished label store.
        manifest: Manifests whose utterances the store should label.

    Raises:
        UserError: The labels are corrupt, or do not belong to the manifest.
    """
    labels = LabelStore(store)
    labels.verify()
    if manifest:
        _labelled(labels, list(read_manifest(manifest)))
    console = Console()
    source = labels.source
    console.print(
        f"{store}: {counted(len(labels), 'utterance')}, clusters of {source.features} (K-means {source.kmeans})"
    )
    for clusters, counts in zip(source.clusters, labels.histogram, strict=True):
        hours = counts.sum() * source.hop / SAMPLE_RATE / 3600
        dead = int((counts == 0).sum())
        console.print(
            f"  {clusters} clusters, {hours:.2f} h of frames, perplexity {perplexity(counts):.1f}, {dead} dead"
        )


def import_labels(
    labels: list[Path],
    manifest: list[Path],
    out: Path,
    clusters: list[int],
    hop: int = HOP,
    window: int | None = None,
) -> LabelStore:
    """Make a label store from text; train on it with `data.init_args.labels`.

    Args:
        labels: Files of labels: one .jsonl, or one .km or .txt per stream. The .tsv beside a .km (fairseq's manifest of
            the same name) names its utterances; without one, they are those of the manifest, in its order. The text is
            UTF-8 or UTF-16, and may be compressed with gzip, bzip2 or xz.
        manifest: Manifests whose utterances are labelled; all of them need labels.
        out: Folder of the new store.
        clusters: Number of clusters of each stream.
        hop: Samples from one label to the next: 320, 640 for an encoder of 25 Hz, or 160 for labels of MFCCs at 100 per
            second, of which every other one is used.
        window: Samples that the encoder sees for one label; 400 if not given, and 720 with a hop of 640.

    Returns:
        The new store.

    Raises:
        UserError: A file is not in its format, or labels and manifest do not belong together.
    """
    _check_import(labels, out, hop, window)
    cuts = {cut.id: cut for cut in read_manifest(manifest)}
    listed = list(cuts.values())
    tsv = _tsv_beside(labels[0]) if labels[0].suffix == ".km" else None
    if tsv is not None:
        listed = _cuts_of_tsv(tsv, listed)
    elif labels[0].suffix == ".km":
        log.warning(
            "%s: no %s beside it names the utterance of each line; lines are taken in the order of the manifest",
            labels[0],
            labels[0].with_suffix(".tsv").name,
        )
    digest = sha256()
    for path in [*labels, *([tsv] if tsv else [])]:
        digest.update(path.read_bytes())
    clock = Clock(max(hop, HOP), window or WINDOW + max(hop - HOP, 0))  # 720: an eighth convolution of two frames
    source = LabelSource(IMPORTED, digest.hexdigest()[:16], fingerprint(cuts.values()), tuple(clusters), *clock)
    rows = _json_rows(labels[0]) if labels[0].suffix == ".jsonl" else _text_rows(labels, listed, tsv)
    seen: set[str] = set()
    shard: dict[str, np.ndarray] = {}
    size = shard_size(len(cuts))
    with LabelWriter(out, source, num_shards=ceil(len(cuts) / size)) as writer:
        for cut_id, ids in rows:
            if cut_id not in cuts or cut_id in seen:
                raise UserError(
                    f"{labels[0]}: {cut_id} is not in the manifest, or is repeated; give labels and manifest of one "
                    "corpus"
                )
            seen.add(cut_id)
            shard[cut_id] = _checked(cuts[cut_id], ids[:, :: clock.hop // hop], clusters, labels[0], clock)
            if len(shard) == size or len(seen) == len(cuts):
                writer.write((len(seen) - 1) // size, shard)
                shard = {}
        if missing := cuts.keys() - seen:
            raise UserError(
                f"{min(missing)}: no labels in {labels[0]}, nor for {len(missing) - 1} other utterances; label all of "
                "them"
            )
    return LabelStore(out)


def _check_import(labels: Sequence[Path], out: Path, hop: int, window: int | None) -> None:
    if not labels or (len(labels) > 1 and any(path.suffix == ".jsonl" for path in labels)):
        raise UserError(
            f"{counted(len(labels), 'file')} of labels: give one .jsonl, which has all streams, or a .km or .txt for "
            "each stream"
        )
    for path in labels:
        _check_suffix(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; correct the path")
    if hop not in (HOP // 2, *HOPS):
        raise UserError(
            f"hop {hop}: labels come every {HOP} samples (50 a second), {2 * HOP} (25 a second) or {HOP // 2} (100 a "
            "second)"
        )
    if window is not None and not hop <= window <= 2**16:
        raise UserError(f"window {window}: a frame has at least the {hop} samples from one label to the next")
    if (out / "store.json").exists():
        raise UserError(f"{out}: holds a label store already; choose another folder")


def _encoding(labels: LabelStore, bpe: int | UnitBPE, source: int | Path | None, path: Path) -> Encoding:
    clusters = labels.source.clusters
    if len(clusters) > 1:
        raise UserError(
            f"{labels.path}: labels in {len(clusters)} streams, and bpe encodes one; leave it out, or export labels of "
            "one K-means"
        )
    # imported labels tell nothing of their K-means: the fingerprint is that of their files
    kmeans = "" if labels.source.features == IMPORTED else labels.source.kmeans
    return encoding_of(bpe, source, path, clusters[0], kmeans)


def _labelled(labels: LabelStore, cuts: list[Cut]) -> list[Cut]:
    """Check and return the cuts that have labels; warn about the others."""
    labelled = [cut for cut in cuts if cut.id in labels]
    labels.check(labelled or cuts, labels.source.clusters, labels.source.clock)
    if without := [cut.id for cut in cuts if cut.id not in labels]:
        log.warning(
            "%d of %d utterances have no labels in %s, the first is %s; "
            "a fit does not label utterances shorter than its data.min_duration",
            len(without),
            len(cuts),
            labels.path,
            without[0],
        )
    return labelled


def _checked(cut: Cut, ids: np.ndarray, clusters: Sequence[int], path: Path, clock: Clock) -> np.ndarray:
    frames = num_frames(cut.num_samples, clock)
    if ids.shape != (len(clusters), frames):
        raise UserError(
            f"{cut.id}: {ids.shape[1]} labels in {ids.shape[0]} streams for {frames} frames in {len(clusters)}; "
            f"{path} was made for other audio, or at another hop (--hop)"
        )
    for stream, number in enumerate(clusters):
        if ids[stream].min() < 0 or ids[stream].max() >= number:
            raise UserError(
                f"{cut.id}: labels from {ids[stream].min()} to {ids[stream].max()} for {number} clusters; give the "
                f"number of clusters that {path} was made with"
            )
    return ids


def _json_rows(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Id and (streams, labels) of every utterance."""
    for number, line in _lines(path):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); correct or remove it") from error
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or "clusters" not in row:
            raise UserError(f'{path}, line {number}: no "id" that is a string, or no "clusters"; correct or remove it')
        yield row["id"], _streams(row["clusters"], f"{path}, line {number}")


def _streams(clusters: Any, location: str) -> np.ndarray:
    """Convert a list of integers per stream, all of one length, to (streams, labels)."""
    streams = clusters if isinstance(clusters, list) and clusters else [[None]]
    if not all(isinstance(ids, list) and len(ids) == len(streams[0]) for ids in streams) or not all(
        type(cluster) is int and abs(cluster) < 2**63 for ids in streams for cluster in ids
    ):
        raise UserError(f'{location}: "clusters" is not a list of integers for each stream, [[12, 12, 7]]; correct it')
    return np.array(streams, dtype=np.int64)


def _text_rows(paths: Sequence[Path], cuts: Sequence[Cut], tsv: Path | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Id and (streams, labels) of every utterance, from files of one stream each.

    Args:
        paths: Files of one format, in the order of the streams.
        cuts: Utterance of each line, for .km.
        tsv: File that lists the utterances; None if the manifest does.
    """
    texts = [(line for _, line in _lines(path)) for path in paths]
    rows = zip_longest(cuts, *texts) if paths[0].suffix == ".km" else zip_longest(*texts)
    for number, lines in enumerate(rows, start=1):
        if None in lines:
            others = "the manifest's utterances" if paths[0].suffix == ".km" else "the other files"
            others += f" in {tsv.name}" if tsv else ""
            raise UserError(f"{paths[0]}: not as many lines as {others} ({number}); give both of one corpus")
        words = [line.split() for line in lines if isinstance(line, str)]
        names = {line[0] if line else "" for line in words}
        if paths[0].suffix == ".km":
            names, words = {lines[0].id}, [["", *line] for line in words]
        if names == {""}:
            raise UserError(f"{paths[0]}, line {number}: empty; remove it")
        if len(names) > 1:
            raise UserError(
                f"{paths[0]}, line {number}: {' and '.join(sorted(names))} are not one utterance; put the files in "
                "one order"
            )
        try:
            yield names.pop(), np.array([line[1:] for line in words], dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{paths[0]}, line {number}: a word is not a cluster ({error}); correct or remove it"
            ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and content of every line, except empty ones at the end of the file."""
    empty: list[tuple[int, str]] = []
    for number, line in enumerate(lines_of(path), start=1):
        if "\0" in line:
            raise UserError(f"{path}, line {number}: has zero bytes, as UTF-16 without its mark; save it as UTF-8")
        if not line.strip():
            empty.append((number, line))
            continue
        yield from empty
        empty.clear()
        yield number, line


def _tsv_beside(labels: Path) -> Path | None:
    """fairseq's manifest of the same name: dev.tsv for dev.km, and for a stream's dev.0.km."""
    names = [labels.with_suffix(".tsv")]
    if labels.with_suffix("").suffix[1:].isdecimal():
        names.append(labels.with_suffix("").with_suffix(".tsv"))
    return next((path for path in names if path.is_file()), None)


def _cuts_of_tsv(tsv: Path, cuts: Sequence[Cut]) -> list[Cut]:
    """Find the utterance of each row: its file or id has the row's name, and its folders as far as both have some.

    Raises:
        UserError: A row matches no utterance or several, two rows match the same, or its number of samples differs.
    """
    by_name: dict[str, list[tuple[tuple[str, ...], bool, Cut]]] = defaultdict(list)
    for cut in cuts:
        for name, is_id in _names_of(cut):
            by_name[composed(name[-1])].append((name, is_id, cut))
    lines = list(_lines(tsv))
    listed: list[Cut] = []
    rows: dict[str, int] = {}
    root = lines[0][1].strip() if lines else ""
    for number, line in lines[1:]:
        path, _, samples = line.rstrip("\n").rpartition("\t")
        location = f"{tsv}, line {number}"
        if not path or not samples.strip().isdecimal():
            raise UserError(f"{location}: no path, tab and number of samples; write fairseq's manifest again")
        row = _without_suffix(str(PurePosixPath(root) / path))
        named = by_name.get(composed(row[-1]), [])
        # If names exist in both normal forms of Unicode, take the row's
        named = [candidate for candidate in named if candidate[0][-1] == row[-1]] or named
        least = len(PurePosixPath(path).parts)
        matches = [
            (common, cut)
            for name, is_id, cut in named
            if (common := _in_common(row, name)) >= (len(name) if is_id else least)
        ]
        most = max((common for common, _ in matches), default=0)
        best = {cut.id: cut for common, cut in matches if common == most}
        if len(best) != 1:
            both = " and ".join(sorted(best)[:2])
            fact = f"{both} could both be {path}" if best else f"{path} is not in the manifest"
            raise UserError(f"{location}: {fact}; give labels and a manifest of one corpus, or import a .jsonl")
        [cut] = best.values()
        if cut.id in rows:
            raise UserError(f"{location}: {path} is {cut.id}, as line {rows[cut.id]} is; keep one row per utterance")
        if abs(int(samples) - cut.num_samples) >= HOP:
            raise UserError(
                f"{location}: {path} has {samples.strip()} samples, and {cut.id} {cut.num_samples} at {SAMPLE_RATE} "
                "Hz; give labels of this audio"
            )
        rows[cut.id] = number
        listed.append(cut)
    return listed


def _names_of(cut: Cut) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Parts of the names of an utterance without suffix, its file's path and its id, and whether it is the id."""
    source = cut.recording.sources[0]
    file = source.source if source.type == "file" else ""
    if file:
        yield _without_suffix(file), False
    named_as_file = not file or PurePosixPath(cut.id).suffix == PurePosixPath(file).suffix
    yield _without_suffix(cut.id) if named_as_file else (PurePosixPath(cut.id).parts or (cut.id,)), True


def _without_suffix(path: str) -> tuple[str, ...]:
    *folders, name = PurePosixPath(path).parts or ("",)
    return (*folders, PurePosixPath(name).stem)


def _in_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Count the equal parts of two paths from the end, in any normal form of Unicode."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: composed(pair[0]) == composed(pair[1]), pairs))


def _tsv(cuts: Sequence[Cut]) -> str:
    rows = ["/"]
    for cut in cuts:
        source, *others = cut.recording.sources
        if others or cut.start or cut.duration != cut.recording.duration or source.type != "file":
            raise UserError(
                f"{cut.id}: a piece of a longer recording, or not one file, which fairseq's manifest cannot express; "
                "export to .jsonl"
            )
        rows.append(f"{Path(source.source).resolve().relative_to('/')}\t{cut.num_samples}")
    return "\n".join(rows) + "\n"


def _check_suffix(path: Path) -> None:
    if path.suffix not in LABEL_SUFFIXES:
        raise UserError(f"{path}: no format of labels; choose a name that ends in {', '.join(LABEL_SUFFIXES)}")
