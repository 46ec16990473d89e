"""A table of paths and sentences becomes manifests, and what is wrong with its rows is told."""

import csv
import gzip
import unicodedata
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.prepare import prepare_folder
from hubert_lightning.data.prepare_csv import prepare_csv
from hubert_lightning.frames import SAMPLE_RATE


def clips(folder: Path, count: int) -> list[str]:
    names = [f"clips/{number:02d}.wav" for number in range(count)]
    (folder / "clips").mkdir(parents=True)
    for number, name in enumerate(names):
        noise = 0.1 * torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(number))
        soundfile.write(folder / name, noise.numpy(), SAMPLE_RATE)
    return names


def test_rows_become_utterances_of_train_and_dev(tmp_path: Path) -> None:
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


def test_unusable_rows_are_reported_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        "00.wav\trepeated: an earlier row",
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
        (b"\xff\xfea", {}, "table.csv: is not UTF-8"),
        (
            b"p\0a\0t\0h\0,\0",
            {},
            "table.csv: bytes of value 0 in line 1, so it is not a text file; export it again as UTF-8",
        ),
        (b"path,text,text\na.wav,one,two\n", {}, "columns 2 and 3 are both called text; rename one"),
        (b"path,Text ,n, text\na.wav,one,2,two\n", {"text_column": "text"}, "columns 2 and 4 are both called text"),
        (b"path,path,text\na.wav,b.wav,two\n", {}, "columns 1 and 2 are both called path"),
        (
            b"path,sentence,text\na.wav,1,2\n",
            {},
            "the columns text and sentence may both be the transcript; name one w",
        ),
        (
            b"a.wav|Hello\nb.wav|you\n",
            {},
            "first line, 'a.wav, Hello', lists a recording instead of column names; insert a",
        ),
        (b"", {}, "table.csv: no column path or audio .*, only an empty first line; name it with --path_column"),
        (b"path,text\n", {}, "table.csv: no rows below its first line"),
        (b"path,words\na.wav,one\n", {}, "no column text or sentence .*, only path, words; name it with --text_column"),
        (b"path,text\na.wav,one\n", {"speaker_column": "who"}, "no column who, only path, text"),
        (b"path,text\na.wav,one\n", {"heldout": 1.0}, "heldout is 1.0; it is a share"),
        (b"path,text\na.wav,one\n", {}, "train: all 1 audio files are refused, "),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    tmp_path: Path, content: bytes | None, options: dict, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        prepare_csv(tmp_path / "table.csv", tmp_path / "out", **options)


def test_quotes_are_letters_between_tabs(tmp_path: Path) -> None:
    names = clips(tmp_path, 2)
    (tmp_path / "t.tsv").write_text(f'path\tsentence\n{names[0]}\t"Yes, he said\n{names[1]}\tno\n')
    [train] = prepare_csv(tmp_path / "t.tsv", tmp_path / "out", heldout=0)
    assert [cut.supervisions[0].text for cut in read_manifest(train)] == ['"Yes, he said', "no"]


def test_doubled_quotes_between_tabs_become_single_ones(tmp_path: Path) -> None:
    clips(tmp_path, 2)
    with (tmp_path / "table.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [["path", "text"], ["clips/00.wav", 'said "hi"'], ["clips/01.wav", "plain"]]
        )
    prepare_csv(tmp_path / "table.tsv", tmp_path / "out", heldout=0.0)
    texts = [cut.supervisions[0].text for cut in read_manifest(tmp_path / "out" / "train.jsonl.gz")]
    assert texts == ['said "hi"', "plain"]


def test_the_speaker_of_most_utterances_is_not_held_out(tmp_path: Path) -> None:
    names = clips(tmp_path, 30)
    for salt in range(5):
        rows = [f"{name},one,{salt}-{max(0, number - 19)}" for number, name in enumerate(names)]  # 20 of one speaker
        (tmp_path / "t.csv").write_text("\n".join(["path,text,speaker", *rows]))
        _, dev = prepare_csv(tmp_path / "t.csv", tmp_path / f"out{salt}")
        assert len(read_manifest(dev)) == 3


CELLS = [["path", "text", "n"], ["clips/00.wav", 'One, two; "three"', "1"], ["clips/01.wav", "a|b", "2"]]


def csv_of(cells: list[list[str]], delimiter: str, end: str = "\n", **how: Any) -> str:
    text = StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, **how).writerows(cells)
    return text.getvalue()


TABLES = {
    "commas": csv_of(CELLS, ","),
    "semicolons": csv_of(CELLS, ";"),
    "bars": csv_of(CELLS, "|"),
    "quotes everywhere": csv_of(CELLS, ",", quoting=csv.QUOTE_ALL),
    "tabs and quotes everywhere": csv_of(CELLS, "\t", quoting=csv.QUOTE_ALL),
    "lines of Windows": csv_of(CELLS, ";", "\r\n"),
    "lines of old Macs": csv_of(CELLS, ",", "\r"),
    "a separator that is stated": "sep=;\r\n" + csv_of(CELLS, ";", "\r\n"),
    "delimiters at the end": csv_of(CELLS, ",").replace("\n", ",,\n") + ",,,,\n\n",
    "a last column without a name": csv_of([[*CELLS[0], ""], *([*row, "x"] for row in CELLS[1:])], ","),
    "spaces around names": csv_of([[" Path ", "TEXT ", " n"], *CELLS[1:]], ","),
    "empty lines above": "\n\r\n" + csv_of(CELLS, ","),
}


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gzip"])
def test_a_table_in_any_form_has_the_same_rows(tmp_path: Path, form: str, encoding: str) -> None:
    clips(tmp_path, 2)
    content = TABLES[form].encode("utf-8" if encoding == "gzip" else encoding)
    (tmp_path / "table.csv").write_bytes(gzip.compress(content, mtime=0) if encoding == "gzip" else content)
    [train] = prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0)
    assert not (tmp_path / "out" / "train.refused.tsv").exists()
    assert {cut.id: cut.supervisions[0].text for cut in read_manifest(train)} == {row[0]: row[1] for row in CELLS[1:]}


def test_a_table_that_excel_wrote_as_unicode_text_is_read(tmp_path: Path) -> None:
    """UTF-16 with tabs, and quotes around the cells alone that have commas, quotes or lines in them."""
    clips(tmp_path, 2)
    rows = 'path\ttext\r\nclips/00.wav\t"Yes, ""so"" it is"\r\nclips/01.wav\tÜbel\r\n'
    (tmp_path / "table.txt").write_bytes(rows.encode("utf-16"))
    [train] = prepare_csv(tmp_path / "table.txt", tmp_path / "out", heldout=0)
    assert [cut.supervisions[0].text for cut in read_manifest(train)] == ['Yes, "so" it is', "Übel"]


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_sentence_of_several_lines_is_one_sentence(tmp_path: Path, delimiter: str, end: str) -> None:
    names = clips(tmp_path, 3)
    cells = [
        ["path", "text", "speaker"],
        [names[0], f"one,{end}two;{end}{end}three, and four", "a"],
        [names[1], "x", "b"],
    ]
    (tmp_path / "table.csv").write_bytes(csv_of([*cells, [names[2], "y", "c"]], delimiter, end).encode())
    [train] = prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0)
    assert not (tmp_path / "out" / "train.refused.tsv").exists()
    assert [(cut.supervisions[0].text, cut.supervisions[0].speaker) for cut in read_manifest(train)] == [
        ("one, two; three, and four", "a"),
        ("x", "b"),
        ("y", "c"),
    ]


@pytest.mark.parametrize("closed", ['"', ""])
def test_an_error_names_an_unclosed_quote_and_the_row_inside_it(tmp_path: Path, closed: str) -> None:
    names = clips(tmp_path, 4)
    rows = [f"{names[0]},fine", f'{names[1]},"begun', f"{names[2]},lost", f"{names[3]},the last{closed}"]
    (tmp_path / "table.csv").write_text("\n".join(["path,text", *rows]) + "\n")
    [train] = prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0)
    assert [cut.id for cut in read_manifest(train)] == [names[0]]
    refused = (tmp_path / "out" / "train.refused.tsv").read_text()
    assert f"{names[1]}\tseveral lines in its row of the table, such as '{names[2]},lost', which looks" in refused


def test_an_unclosed_quote_above_a_long_table_is_no_error_of_the_csv_module(tmp_path: Path) -> None:
    names = clips(tmp_path, 2)
    rows = [f"{names[0]},fine", f'{names[1]},"begun', *[f"{number}.wav,{'x' * 90}" for number in range(2000)]]
    (tmp_path / "table.csv").write_text("\n".join(["path,text", *rows]))
    [train] = prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0)
    assert [cut.id for cut in read_manifest(train)] == [names[0]]


def test_common_voice_s_tables_keep_their_quotes_and_rows(tmp_path: Path) -> None:
    names = clips(tmp_path, 4)
    sentences = ['"Begun and not ended', 'He said "no".', '"All of it"', "plain, with a comma; and more"]
    head = "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tage"
    rows = [f"s{n}\t{name}\t1\t{text}\t\t2\t" for n, (name, text) in enumerate(zip(names, sentences, strict=True))]
    (tmp_path / "validated.tsv").write_text("\n".join([head, *rows, ""]))
    [train] = prepare_csv(tmp_path / "validated.tsv", tmp_path / "out", heldout=0)
    assert [cut.supervisions[0].text for cut in read_manifest(train)] == sentences
    assert [cut.supervisions[0].speaker for cut in read_manifest(train)] == ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize(("of_table", "of_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_is_found_in_any_normal_form_of_its_name(tmp_path: Path, of_table: str, of_disk: str) -> None:
    """macOS has decomposed ones."""
    names = ["größe/één.wav", "größe/elf.wav", "zwölf.wav"]
    for number, name in enumerate(names):
        path = tmp_path / unicodedata.normalize(of_disk, name)
        path.parent.mkdir(exist_ok=True)
        noise = 0.1 * torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(number))
        soundfile.write(path, noise.numpy(), SAMPLE_RATE)
    rows = [f"{unicodedata.normalize(of_table, name)},a sentence" for name in [*names, "größe/nicht da.wav"]]
    (tmp_path / "table.csv").write_text("\n".join(["path,text", *rows]))
    [train] = prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0)
    cuts = list(read_manifest(train))
    assert {cut.id for cut in cuts} == {unicodedata.normalize(of_table, name) for name in names}
    assert all(Path(cut.recording.sources[0].source).is_file() for cut in cuts)
    assert "nicht da.wav" in (tmp_path / "out" / "train.refused.tsv").read_text()


def test_files_in_both_normal_forms_are_distinguished(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    for number, form in enumerate(forms):
        noise = 0.1 * torch.randn(SAMPLE_RATE + number, generator=torch.Generator().manual_seed(number))
        soundfile.write(tmp_path / f"{form}.wav", noise.numpy(), SAMPLE_RATE)
    (tmp_path / "table.csv").write_text("\n".join(["path,text", *(f"{form}.wav,a sentence" for form in forms)]))
    [train] = prepare_csv(tmp_path / "table.csv", tmp_path / "out", heldout=0)
    lengths = {cut.id: cut.num_samples for cut in read_manifest(train)}
    assert lengths == {f"{form}.wav": SAMPLE_RATE + number for number, form in enumerate(forms)}


def test_a_transcript_of_a_folder_is_found_in_any_normal_form_of_its_name(tmp_path: Path) -> None:
    name = "één-1-0001"
    noise = 0.1 * torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    soundfile.write(tmp_path / f"{unicodedata.normalize('NFD', name)}.flac", noise.numpy(), SAMPLE_RATE)
    (tmp_path / "één-1.trans.txt").write_text(f"{unicodedata.normalize('NFC', name)} A SENTENCE\n")
    [manifest] = prepare_folder(tmp_path, tmp_path / "out", heldout=0)
    [cut] = read_manifest(manifest)
    assert [supervision.text for supervision in cut.supervisions] == ["A SENTENCE"]
