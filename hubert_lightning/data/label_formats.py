"""Labels in and out, as text: fairseq's `.km`, Kaldi's `.txt`, and JSON lines.

`.km`     one utterance a line, in the order of the manifest: `12 12 7`; fairseq's manifest `.tsv` is written beside it
`.txt`    `utterance-id 12 12 7`
`.jsonl`  `{"id": "utterance-id", "clusters": [[12, 12, 7]]}`, a list for each stream

Of the first two there is a file for each stream: `units.0.km`, `units.1.km`.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

import numpy as np
from lhotse.cut import Cut
from rich.console import Console

from hubert_lightning.data.labels import LabelSource, LabelStore, begin_store, finish_store, shard_size, write_shard
from hubert_lightning.data.manifest import fingerprint, read_manifest
from hubert_lightning.files import replacing, write_whole
from hubert_lightning.frames import HOP, SAMPLE_RATE, num_frames

SUFFIXES = (".km", ".txt", ".jsonl")


def export_labels(store: Path, manifest: list[Path], out: Path) -> list[Path]:
    """Write the labels of a manifest's utterances as text; the suffix of `out` is the format.

    What has no labels, such as utterances shorter than the `min_duration` of a fit, is left out, and counted.

    Args:
        store: Folder of a finished label store.
        manifest: Manifests whose utterances are written, in their order.
        out: A .km (fairseq), .txt (Kaldi) or .jsonl file.
    """
    _check_suffix(out)
    labels = LabelStore(store)
    labels.verify()
    cuts = _labelled(labels, list(read_manifest(manifest)))
    streams = len(labels.source.clusters)
    paths = [out]
    if out.suffix != ".jsonl" and streams > 1:
        paths = [out.with_suffix(f".{stream}{out.suffix}") for stream in range(streams)]
    if out.suffix == ".km":
        _write_tsv(cuts, out.with_suffix(".tsv"))
    if out.suffix == ".txt" and (spaced := next((cut.id for cut in cuts if len(cut.id.split()) != 1), None)):
        raise ValueError(f"{spaced}: Kaldi's text cannot hold an id with spaces; export to .jsonl")
    with ExitStack() as files:
        opened = [files.enter_context(replacing(path)) for path in paths]
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
    """Read every label, compare it with its checksum, and say what the store holds.

    Args:
        store: Folder of a finished label store.
        manifest: Manifests whose utterances it should label.
    """
    labels = LabelStore(store)
    labels.verify()
    if manifest:
        _labelled(labels, list(read_manifest(manifest)))
    console = Console()
    source = labels.source
    console.print(f"{store}: {len(labels)} utterances, clusters of {source.features} (K-means {source.kmeans})")
    for clusters, counts in zip(source.clusters, labels.histogram, strict=True):
        share = counts / counts.sum()
        perplexity = np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())
        hours = counts.sum() * source.hop / SAMPLE_RATE / 3600
        dead = int((counts == 0).sum())
        console.print(f"  {clusters} clusters, {hours:.2f} h of frames, perplexity {perplexity:.1f}, {dead} dead")


def import_labels(
    labels: list[Path], manifest: list[Path], out: Path, clusters: list[int], hop: int = HOP
) -> LabelStore:
    """Make a label store of labels in text; train on it with `data.init_args.labels`.

    Args:
        labels: A .km, .txt or .jsonl file; of .km and .txt one for each stream. A .km has the order of the manifest.
        manifest: Manifests whose utterances are labelled, all of them.
        out: Folder of the new store.
        clusters: Number of clusters of each stream.
        hop: Samples from one label to the next: 160 for labels of MFCCs at 100 a second, every other of which is kept.
    """
    if not labels or (len(labels) > 1 and any(path.suffix == ".jsonl" for path in labels)):
        raise ValueError(
            f"{len(labels)} files of labels: give one .jsonl, which has all streams, or a .km or .txt for each stream"
        )
    for path in labels:
        _check_suffix(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist; correct the path of the labels")
    if hop not in (HOP, HOP // 2):
        raise ValueError(f"hop {hop}: labels come every {HOP} samples (50 a second) or {HOP // 2} (100 a second)")
    if (out / "store.json").exists():
        raise ValueError(f"{out}: holds a label store already; choose another folder")
    cuts = {cut.id: cut for cut in read_manifest(manifest)}
    digest = sha256()
    for path in labels:
        digest.update(path.read_bytes())
    source = LabelSource("imported", digest.hexdigest()[:16], fingerprint(cuts.values()), tuple(clusters))
    size = shard_size(len(cuts))
    begin_store(out, source)
    rows = _json_rows(labels[0]) if labels[0].suffix == ".jsonl" else _text_rows(labels, list(cuts.values()))
    seen: set[str] = set()
    shard: dict[str, np.ndarray] = {}
    for cut_id, ids in rows:
        if cut_id not in cuts or cut_id in seen:
            raise ValueError(f"{labels[0]}: {cut_id} is not in the manifest, or here twice; give both of one corpus")
        seen.add(cut_id)
        shard[cut_id] = _checked(cuts[cut_id], ids[:, :: HOP // hop], clusters, labels[0])
        if len(shard) == size or len(seen) == len(cuts):
            write_shard(out, (len(seen) - 1) // size, shard)
            shard = {}
    if missing := cuts.keys() - seen:
        raise ValueError(
            f"{min(missing)}: no labels in {labels[0]}, nor of {len(missing) - 1} other utterances; label all of them"
        )
    return finish_store(out, source, -(-len(cuts) // size))


def _labelled(labels: LabelStore, cuts: list[Cut]) -> list[Cut]:
    """The cuts that have labels, which must be right for them; says how many have none."""
    found = [cut for cut in cuts if cut.id in labels]
    labels.check(found or cuts, labels.source.clusters)
    if without := [cut.id for cut in cuts if cut.id not in labels]:
        Console(stderr=True).print(
            f"{len(without)} of {len(cuts)} utterances have no labels in {labels.path}, the first is {without[0]}; "
            "a fit labels none that is shorter than its data.min_duration",
            markup=False,
            soft_wrap=True,
        )
    return found


def _checked(cut: Cut, ids: np.ndarray, clusters: Sequence[int], path: Path) -> np.ndarray:
    frames = num_frames(cut.num_samples)
    if ids.shape != (len(clusters), frames):
        raise ValueError(
            f"{cut.id}: {ids.shape[1]} labels in {ids.shape[0]} streams for {frames} frames in {len(clusters)}; "
            f"{path} was made for other audio, or at another hop (--hop)"
        )
    for stream, number in enumerate(clusters):
        if ids[stream].min() < 0 or ids[stream].max() >= number:
            raise ValueError(
                f"{cut.id}: labels from {ids[stream].min()} to {ids[stream].max()} for {number} clusters; give the "
                f"number of clusters that {path} was made with"
            )
    return ids


def _json_rows(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """id → (streams, labels) of every utterance."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                name, clusters = row["id"], np.array(row["clusters"])
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise ValueError(f"{path}, line {number}: no labels ({error}); correct or remove it") from error
            if clusters.ndim != 2 or clusters.dtype.kind != "i":
                raise ValueError(
                    f'{path}, line {number}: "clusters" is not a list of integers for each stream, [[12, 12, 7]]; '
                    "correct it"
                )
            yield name, clusters


def _text_rows(paths: Sequence[Path], cuts: Sequence[Cut]) -> Iterator[tuple[str, np.ndarray]]:
    """id → (streams, labels) of every utterance, in the order of the files, of which each has one stream."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open(encoding="utf-8", errors="replace")) for path in paths]
        places = zip_longest(cuts, *files) if paths[0].suffix == ".km" else zip_longest(*files)
        for number, lines in enumerate(places, start=1):
            if None in lines:
                files_of = "the manifest's utterances" if paths[0].suffix == ".km" else "the other files"
                raise ValueError(f"{paths[0]}: not as many lines as {files_of} ({number}); give both of one corpus")
            words = [line.split() for line in lines if isinstance(line, str)]
            names = {line[0] if line else "" for line in words}
            if paths[0].suffix == ".km":
                names, words = {lines[0].id}, [["", *line] for line in words]
            if len(names) > 1:
                raise ValueError(
                    f"{paths[0]}, line {number}: {' and '.join(sorted(names))} are not one utterance; put the files in "
                    "one order"
                )
            try:
                yield names.pop(), np.array([line[1:] for line in words], dtype=np.int64)
            except (ValueError, OverflowError) as error:
                raise ValueError(
                    f"{paths[0]}, line {number}: something that is no cluster ({error}); correct or remove it"
                ) from error


def _write_tsv(cuts: Sequence[Cut], path: Path) -> None:
    rows = ["/"]
    for cut in cuts:
        source, *others = cut.recording.sources
        if others or cut.start or cut.duration != cut.recording.duration or source.type != "file":
            raise ValueError(
                f"{cut.id}: a piece of a longer recording, or none of one file, which fairseq's manifest cannot say; "
                "export to .jsonl"
            )
        rows.append(f"{Path(source.source).resolve().relative_to('/')}\t{cut.num_samples}")
    write_whole(path, ("\n".join(rows) + "\n").encode())


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: no format of labels; choose a name that ends in {', '.join(SUFFIXES)}")
