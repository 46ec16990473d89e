"""All verbs find the same audio in folders."""

from collections import Counter
from pathlib import Path

from hubert_lightning.data.audio_folder import AUDIO_SUFFIXES, audio_by_folder
from hubert_lightning.features.recordings import find_recordings


def test_transcribe_and_units_find_the_files_that_prepare_finds(tmp_path: Path) -> None:
    (tmp_path / "in/a/b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for number, suffix in enumerate(sorted(AUDIO_SUFFIXES)):
        folder = ("in", "in/a", "in/a/b", "elsewhere")[number % 4]
        (tmp_path / folder / f"{number}{suffix.upper() if number % 3 else suffix}").touch()
    (tmp_path / "in/._0.wav").touch()
    (tmp_path / "in/a/notes.docx").touch()
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    skipped = Counter[str]()
    prepared = [path for _, paths in audio_by_folder(tmp_path / "in", skipped) for path in paths]
    recordings = find_recordings([tmp_path / "in"])
    assert recordings.paths == sorted(prepared)
    assert len(recordings.paths) == len(AUDIO_SUFFIXES)
    assert recordings.skipped == skipped == {".docx": 1}
    assert recordings.refused == []
