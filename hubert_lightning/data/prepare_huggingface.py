"""Manifests of Hugging Face datasets on disk.

Audio that a dataset holds inside its tables is written to files beside the manifests as it is, in its format and at
its sampling rate.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert_lightning.data.audio_folder import AUDIO_SUFFIXES, AudioFile
from hubert_lightning.data.languages import LANGUAGE_COLUMNS, language_named
from hubert_lightning.data.prepare import make_folder, prepare
from hubert_lightning.data.prepare_csv import SPEAKER_COLUMNS, TEXT_COLUMNS
from hubert_lightning.data.sources import check_pieces
from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.progress_bar import progress
from hubert_lightning.untrusted.json_file import shown

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

SAVED_FILES = ("dataset_dict.json", "state.json")
"""Files in a folder that `save_to_disk` wrote, of splits or of one dataset."""
TABLE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
"""Builder of `datasets` by the suffix of its tables."""
AUDIO_FOLDER = "audio"
"""Folder of the files that are written beside the manifests."""
FIRST_BYTES = {
    b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3", b"\xff\xf3": ".mp3",
    b"FORM": ".aiff", b"\x1aE\xdf\xa3": ".webm", b".snd": ".au", b"caff": ".caf",
}  # fmt: skip
"""Suffix of audio without a name by its first bytes."""


def prepare_huggingface(
    dataset: Path,
    out: Path,
    audio_column: str | None = None,
    text_column: str | None = None,
    speaker_column: str | None = None,
    splits: Sequence[str] | None = None,
    max_duration: float = 30.0,
    heldout: float = 0.0,
    spell_numbers: str | None = None,
    language_column: str | None = None,
    language: str | None = None,
    corpus_name: str | None = None,
) -> list[Path]:
    """Make a manifest of each split of a Hugging Face dataset: `OUT/train.jsonl.gz` and so on.

    The audio of the tables is written to files in OUT/audio, in its format and at its sampling rate.

    Args:
        dataset: Folder that `save_to_disk` of datasets wrote, or a folder of parquet or arrow tables, as on the hub.
        out: Folder of the manifests.
        audio_column: Column of the audio; default: the only one of audio.
        text_column: Column of the transcripts; default: text, sentence, transcript or transcription, if there is one.
        speaker_column: Column of the speakers; default: speaker, client_id or speaker_id, if there is one.
        splits: Names of the splits; default: all.
        max_duration: Longest cut in seconds of a recording without transcript, which is cut into equal pieces;
            transcribed utterances stay whole.
        heldout: Share of the audio of each manifest that goes into another one, <name>-dev, by whole recordings, or by
            whole speakers where ten or more are known.
        spell_numbers: Language of the transcripts, such as en or pt_BR, in which numbers are written as words; default:
            numbers stay as they are.
        language_column: Column of the languages; default: language, locale or lang, if there is one.
        language: Language of the rows without one, such as en.
        corpus_name: Name of the corpus, by which it can be balanced and scored beside others.

    Returns:
        Paths of the manifests.
    """
    check_pieces(max_duration, heldout)
    folder = Path(dataset)
    tables = _splits(folder)
    if missing := sorted(set(splits or ()) - tables.keys()):
        raise UserError(f"{dataset}: no split {missing[0]}, only {', '.join(tables)}; name one of these")
    chosen = {name: tables[name] for name in splits or tables}
    if wrong := [name for name in chosen if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise UserError(f"{dataset}: a split is called {shown(wrong[0])}, which names no file; rename it")
    columns = {
        name: (
            _audio_column(folder, features, audio_column),
            _column(folder, features, text_column, TEXT_COLUMNS, "text"),
            _column(folder, features, speaker_column, SPEAKER_COLUMNS, "speaker"),
            _column(folder, features, language_column, LANGUAGE_COLUMNS, "language"),
        )
        for name, table in chosen.items()
        for features in [_features(table)]
    }
    out = Path(out)
    make_folder(out / AUDIO_FOLDER, out)
    files_of = {name: list(_files(folder, table, name, columns[name], out)) for name, table in chosen.items()}
    if empty := [name for name, files in files_of.items() if not files]:
        raise UserError(f"{dataset}: split {empty[0]} has no rows; name the others with --splits")
    return prepare(
        files_of, out, max_duration, number_language=spell_numbers, transcribed_whole=True, heldout=heldout,
        language=language, corpus=corpus_name,
    )  # fmt: skip


def _splits(folder: Path) -> dict[str, "Dataset | IterableDataset"]:
    """Open the splits of a dataset, without copying them."""
    if not folder.is_dir():
        fact = "a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(
            f"{folder}: {fact}; give the folder of a dataset, which `hf download NAME --repo-type dataset --local-dir "
            "FOLDER` gets from the hub"
        )
    try:
        import datasets
    except ImportError as error:
        raise UserError('datasets is not installed; run `pip install "hubert-lightning[datasets]"`') from error
    suffixes = {path.suffix.lower() for path in folder.rglob("*")} & TABLE_FORMATS.keys()
    try:
        if any((folder / name).is_file() for name in SAVED_FILES):
            saved = datasets.load_from_disk(str(folder))
            is_one = isinstance(saved, datasets.Dataset)
            return {str(saved.split or folder.resolve().name): saved} if is_one else dict(saved)
        if len(suffixes) == 1:
            builder = TABLE_FORMATS[suffixes.pop()]
            return dict(datasets.load_dataset(builder, data_dir=str(folder), streaming=True))
    except (OSError, ValueError, TypeError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(folder, error) from error
    _refuse_other_layouts(folder)
    fact = "both parquet and arrow tables" if suffixes else "no dataset of save_to_disk, and no parquet or arrow tables"
    raise UserError(f"{folder}: {fact}; give the folder of one dataset, or use `hubert prepare folder` for audio files")


def _refuse_other_layouts(folder: Path) -> None:
    """Name the way for datasets that have no tables of audio."""
    if tables := sorted(folder.rglob("metadata.csv")):
        raise UserError(
            f"{folder}: a folder of audio files with a table; use `hubert prepare csv {tables[0]} OUT --path_column "
            "file_name`"
        )
    if tables := sorted(folder.rglob("metadata.jsonl")):
        raise UserError(
            f"{folder}: a folder of audio files with {tables[0].name}; write its rows as a table, "
            f"`python -c \"import pandas; pandas.read_json('{tables[0]}', lines=True).to_csv('{tables[0].parent}/"
            "metadata.csv', index=False)\"`, and use `hubert prepare csv` with --path_column file_name"
        )
    if archives := sorted(folder.rglob("*.tar")):
        raise UserError(
            f"{folder}: archives of WebDataset, such as {archives[0].name}; unpack them into one folder, "
            "`tar -xf`, and use `hubert prepare folder`, which takes the transcript in a .txt beside each recording"
        )


def _unreadable(folder: Path, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return UserError(f"{folder}: datasets cannot read it ({reason}); copy or download it again")


def _features(table: "Dataset | IterableDataset") -> "Features":
    features = table.features
    assert features is not None  # tables state the types of their columns
    return features


def _audio_column(folder: Path, features: "Features", given: str | None) -> str:
    if given is not None:
        return _column(folder, features, given, (), "audio") or given
    columns: list[str] = [name for name, feature in features.items() if _is_audio(feature)]
    if len(columns) == 1:
        return columns[0]
    fact = f"{len(columns)} columns of audio, {', '.join(columns)}" if columns else "no column of audio"
    raise UserError(f"{folder}: {fact}; name one of {', '.join(features)} with --audio_column")


def _is_audio(feature: Any) -> bool:
    """Whether a column is of audio, also without the hub's metadata: bytes of a file and its name."""
    from datasets import Audio, Value

    if isinstance(feature, Audio):
        return True
    content = feature.get("bytes") if isinstance(feature, Mapping) else None
    return isinstance(content, Value) and content.dtype in ("binary", "large_binary")


def _column(folder: Path, features: "Features", given: str | None, usual: Sequence[str], kind: str) -> str | None:
    """The column that is given, or that has a usual name."""
    if given is not None and given not in features:
        raise UserError(f"{folder}: no column {given}, only {', '.join(features)}; correct --{kind}_column")
    columns: list[str] = [given] if given is not None else [name for name in features if name.lower() in usual]
    if kind == "text" and len(columns) > 1:
        raise UserError(f"{folder}: {' and '.join(columns)} may both be the transcript; name one with --text_column")
    return columns[0] if columns else None


def _files(
    folder: Path,
    table: "Dataset | IterableDataset",
    split: str,
    columns: tuple[str, str | None, str | None, str | None],
    out: Path,
) -> Iterator[AudioFile]:
    """Write the audio of a split to files."""
    audio, text, speaker, language = columns
    has_texts = False
    files = []
    for index, row in enumerate(_rows(folder, table, columns, split)):
        sound = row[audio]
        content, name = (sound.get("bytes"), sound.get("path")) if isinstance(sound, Mapping) else (None, sound)
        refused = None
        stem = re.sub(r"[^\w.-]", "_", Path(name).stem)[-80:] if isinstance(name, str) else ""
        utterance = f"{split}/{index:07d}{'-' if stem else ''}{stem}"
        if isinstance(content, bytes):
            path = out / AUDIO_FOLDER / f"{utterance}{_suffix(content, name)}"
            _write_once(path, content)
        elif isinstance(name, str) and name:
            path = folder / name
        else:
            path, refused = folder / utterance, f"no audio in row {index + 1}, but {shown(sound)}"
        words = " ".join(str(row[text]).split()) if text and row[text] is not None else None
        has_texts = has_texts or bool(words)
        person = _name_of(_features(table)[speaker], row[speaker]) if speaker else None
        spoken = language_named(_name_of(_features(table)[language], row[language])) if language else None
        files.append(AudioFile(path, utterance, person, words or None, refused, language=spoken))
    for file in files:
        wordless = has_texts and not file.text and not file.refused
        yield file._replace(refused="no words in its row of the dataset") if wordless else file


def _rows(
    folder: Path, table: "Dataset | IterableDataset", columns: Iterable[str | None], split: str
) -> Iterator[Mapping[str, Any]]:
    """The rows of a split, their audio as it is stored."""
    from datasets import Audio, Dataset
    from datasets.exceptions import DatasetsError

    names = list(dict.fromkeys(name for name in columns if name))
    raw = table.select_columns(names)
    for name in names:
        if isinstance(_features(table)[name], Audio):
            raw = raw.cast_column(name, Audio(decode=False))
    total = len(table) if isinstance(table, Dataset) else None
    rows = iter(raw)
    with progress(f"reading {split}", total, "rows") as advance:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, ValueError, TypeError, LookupError, DatasetsError) as error:
                raise _unreadable(folder, error) from error
            yield row
            advance(1)


def _suffix(content: bytes, name: object) -> str:
    """Suffix of the name that a dataset has for its audio, or of the format of its first bytes."""
    suffix = Path(name).suffix.lower() if isinstance(name, str) else ""
    if suffix in AUDIO_SUFFIXES:
        return suffix
    known = (suffix for start, suffix in FIRST_BYTES.items() if content.startswith(start))
    return next(known, ".m4a" if content[4:8] == b"ftyp" else ".audio")


def _write_once(path: Path, content: bytes) -> None:
    """Write a file, unless it has this content already."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def _name_of(feature: Any, value: Any) -> str | None:
    """Name of a speaker or language, which a dataset may count from 0."""
    if value is None:
        return None
    return str(feature.int2str(value)) if hasattr(feature, "int2str") else str(value)
