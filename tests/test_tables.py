"""A table of paths and sentences becomes manifests, and what is wrong with its rows is told."""

from pathlib import Path

import pytest
import soundfile
import torch

from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.tables import prepare_csv
from hubert_lightning.frames import SAMPLE_RATE


def clips(folder: Path, count: int) -> list[str]:
    names = [f"clips/{number:02d}.wav" for number in range(count)]
    (folder / "clips").mkdir(parents=True)
    for number, name in enumerate(names):
        noise = 0.1 * torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(number))
        soundfile.write(folder / name, noise.numpy(), SAMPLE_RATE)
    return names


def test_rows_become_utterances_some_of_them_held_out(tmp_path: Path) -> None:
    names = clips(tmp_path, 20)
    rows = [f'{name},"Hello, number {number}",{"ab"[number % 2]}' for number, name in enumerate(names)]
    (tmp_path / "table.csv").write_text("\n".join(["path,text,speaker", *rows]), "utf-8-sig")
    train, dev = (read_manifest(path) for path in prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0.2))
    assert len(dev) == 4
    assert {cut.id for cut in train} | {cut.id for cut in dev} == set(names)
    for cut in [*train, *dev]:
        [segment] = cut.supervisions
        number = int(Path(cut.id).stem)
        assert segment.text == f"Hello, number {number}"
        assert segment.speaker == "ab"[number % 2]
    (tmp_path / "table.csv").write_text("\n".join(["path,text,speaker", *reversed(rows)]))
    _, again = prepare_csv(tmp_path / "table.csv", tmp_path / "again", heldout=0.2)
    assert {cut.id for cut in read_manifest(again)} == {cut.id for cut in dev}


def test_speakers_are_held_out_whole_where_there_are_many(tmp_path: Path) -> None:
    names = clips(tmp_path, 24)
    rows = [f"{name}\tsentence\tspeaker{number % 12}" for number, name in enumerate(names)]
    (tmp_path / "validated.tsv").write_text("\n".join(["path\tsentence\tclient_id", *rows]))
    train, dev = (read_manifest(path) for path in prepare_csv(tmp_path / "validated.tsv", tmp_path / "out"))
    speakers = [{cut.supervisions[0].speaker for cut in cuts} for cuts in (train, dev)]
    assert not speakers[0] & speakers[1]
    assert len(dev) == 2


def test_no_recording_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    names = clips(tmp_path, 24)
    rows = [f"{name},one,{number % 12}" for number, name in enumerate(names)]
    rows += [f"{name},two,{(number + 1) % 12}" for number, name in enumerate(names)]  # as somebody else's
    (tmp_path / "table.csv").write_text("\n".join(["path,text,speaker", *rows]))
    train, dev = (read_manifest(path) for path in prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0.3))
    assert not {cut.id for cut in train} & {cut.id for cut in dev}
    assert {cut.supervisions[0].text for cut in [*train, *dev]} == {"one"}
    assert len(train) + len(dev) == 24


def test_nothing_is_held_out_if_not_asked(tmp_path: Path) -> None:
    [name] = clips(tmp_path / "audio", 1)
    (tmp_path / "table.csv").write_text(f'wav; transcript\r\n{name}; "one; two"\r\n')
    [train] = prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0, audio=tmp_path / "audio")
    assert [cut.supervisions[0].text for cut in read_manifest(train)] == ["one; two"]


def test_rows_that_cannot_be_used_are_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = clips(tmp_path, 4)
    (tmp_path / names[2]).write_bytes(b"no audio")
    rows = [
        f"{names[0]},fine",
        f"{names[1]}, ",
        f"{names[2]},broken",
        "gone.wav,gone",
        f"{names[0]},twice",
        ",nameless",
        f"{names[3]},hello, world",
        'x.wav,"begun',
        'y.wav,not ended"',
    ]
    (tmp_path / "table.csv").write_text("\n".join(["file,text", *rows]))
    main(["prepare", "csv", str(tmp_path / "table.csv"), str(tmp_path / "out"), "--heldout=0"])
    assert [cut.id for cut in read_manifest(tmp_path / "out" / "train.jsonl.gz")] == [names[0]]
    refused = (tmp_path / "out" / "train.refused.tsv").read_text()
    for reason in (
        "01.wav\tno sentence in its row",
        "02.wav\tunreadable",
        "gone.wav\tnot there: correct its path",
        "00.wav\tnamed as another file",
        "\tno path in its row",
        "03.wav\tits row has more columns than the first line",
        "x.wav\tseveral lines in its row",
    ):
        assert reason in refused
    assert "7 audio files refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (None, {}, "table.csv: cannot be read"),
        (b"\xff\xfe", {}, "table.csv: is not UTF-8"),
        (b"", {}, "table.csv: no column path or audio .*, only an empty first line; name it with --path_column"),
        (b"path,text\n", {}, "table.csv: no rows below its first line"),
        (b"path,words\na.wav,one\n", {}, "no column text or sentence .*, only path, words; name it with --text_column"),
        (b"path,text\na.wav,one\n", {"speaker_column": "who"}, "no column who, only path, text"),
        (b"path,text\na.wav,one\n", {"heldout": 1.0}, "heldout is 1.0; it is a share"),
        (b"path,text\na.wav,one\n", {}, "train: all 1 audio files are refused, the first because it is not there"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, content: bytes | None, options: dict, sentence: str) -> None:
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        prepare_csv(tmp_path / "table.csv", tmp_path / "out", **options)


def test_quotes_are_letters_between_tabs(tmp_path: Path) -> None:
    names = clips(tmp_path, 2)
    (tmp_path / "t.tsv").write_text(f'path\tsentence\n{names[0]}\t"Yes, he said\n{names[1]}\tno\n')
    [train] = prepare_csv(tmp_path / "t.tsv", tmp_path / "out", heldout=0)
    assert [cut.supervisions[0].text for cut in read_manifest(train)] == ['"Yes, he said', "no"]


def test_a_speaker_who_says_most_is_not_held_out(tmp_path: Path) -> None:
    names = clips(tmp_path, 30)
    for salt in range(5):
        rows = [f"{name},one,{salt}-{max(0, number - 19)}" for number, name in enumerate(names)]  # 20 of one speaker
        (tmp_path / "t.csv").write_text("\n".join(["path,text,speaker", *rows]))
        _, dev = prepare_csv(tmp_path / "t.csv", tmp_path / f"out{salt}")
        assert len(read_manifest(dev)) == 3
