"""Every source of recordings names languages and corpora, and one place of a manifest holds them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import export_shar, refused
from lhotse import CutSet, Recording, SupervisionSegment
from listed_audio import write_noise

from hubert_lightning.cli import main
from hubert_lightning.data.balance import Balance
from hubert_lightning.data.corpora import Corpora, read_corpora
from hubert_lightning.data.languages import corpus_of, language_of
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.prepare import prepare_folder, prepare_librispeech
from hubert_lightning.data.prepare_csv import prepare_csv
from hubert_lightning.data.prepare_kaldi import prepare_kaldi
from hubert_lightning.data.prepare_nemo import prepare_nemo
from hubert_lightning.data.shar import SharCuts, prepare_shar

SPOKEN = {"a": "de", "b": "sw", "c": "en"}
"""Language of each recording: that of c is named by --language."""


def recordings(folder: Path) -> None:
    for number, name in enumerate(SPOKEN):
        write_noise(folder / f"{name}.wav", 1.0, number)


def of_table(folder: Path) -> Path:
    rows = ["path\tsentence\tlocale", "a.wav\tein Satz\tde", "b.wav\tsentensi\tsw", "c.wav\ta sentence\t"]
    (folder / "table.tsv").write_text("\n".join(rows))
    return prepare_csv(folder / "table.tsv", folder / "out", heldout=0, language="en", corpus_name="cv")[0]


def of_kaldi(folder: Path) -> Path:
    (folder / "wav.scp").write_text("".join(f"{name} {folder / name}.wav\n" for name in SPOKEN))
    (folder / "utt2lang").write_text("a de\nb sw\n")
    return prepare_kaldi([folder], folder / "out", language="en", corpus_name="cv")[0]


def of_nemo(folder: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"audio_filepath": "a.wav", "lang": "de"},
        {"audio_filepath": "b.wav", "source_lang": "sw", "target_lang": "en"},
        {"audio_filepath": "c.wav"},
    ]
    (folder / "nemo.json").write_text("\n".join(map(json.dumps, rows)))
    return prepare_nemo([folder / "nemo.json"], folder / "out", language="en", corpus_name="cv")[0]


def of_hugging_face(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from hubert_lightning.data.prepare_huggingface import prepare_huggingface

    rows = {
        "audio": [{"bytes": (folder / f"{name}.wav").read_bytes(), "path": f"{name}.wav"} for name in SPOKEN],
        "language": [0, 1, None],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(16_000))
    table.cast_column("language", datasets.ClassLabel(names=["de", "sw"])).save_to_disk(folder / "saved")
    return prepare_huggingface(folder / "saved", folder / "out", language="en", corpus_name="cv")[0]


def of_folders(folder: Path) -> Path:
    for name, language in {"a": "de/day1", "b": "sw", "c": ""}.items():
        (folder / "tree" / language).mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.wav").rename(folder / "tree" / language / f"{name}.wav")
    return prepare_folder(
        folder / "tree", folder / "out", heldout=0, language="en", language_folders=True, corpus_name="cv"
    )[0]


@pytest.mark.parametrize("source", [of_table, of_kaldi, of_nemo, of_hugging_face, of_folders])
def test_a_source_names_the_language_of_each_utterance_and_options_the_others(
    tmp_path: Path, source: Callable[[Path], Path]
) -> None:
    recordings(tmp_path)
    cuts = sorted(read_manifest(source(tmp_path)), key=lambda cut: cut.recording.sources[0].source[-5:])
    assert [language_of(cut) for cut in cuts] == list(SPOKEN.values())
    assert {corpus_of(cut) for cut in cuts} == {"cv"}


def test_a_recipe_of_lhotse_names_the_language(tmp_path: Path) -> None:
    from hubert_lightning.data.prepare_lhotse import _utterance

    write_noise(tmp_path / "a.wav", 1.0, 0)
    recording = Recording.from_file(tmp_path / "a.wav", recording_id="a")
    segment = SupervisionSegment("a", "a", 0.0, recording.duration, text="jambo", language="Swahili")
    assert _utterance(tmp_path, recording, segment, has_texts=True).language == "Swahili"


def test_without_names_a_manifest_is_as_before(tmp_path: Path) -> None:
    recordings(tmp_path / "tree")
    [manifest] = prepare_folder(tmp_path / "tree", tmp_path / "out", heldout=0)
    for cut in read_manifest(manifest):
        assert cut.supervisions == []
        assert list(cut.custom or {}) == ["bytes"]


def test_corpora_in_the_layout_of_librispeech_are_named(tmp_path: Path) -> None:
    for number in range(2):
        write_noise(tmp_path / f"LibriSpeech/dev-clean/1{number}/7/1{number}-7-0000.flac", 1.0, number)
    [manifest] = prepare_librispeech(tmp_path, tmp_path / "out", language="en", corpus_name="librispeech")
    assert {(language_of(cut), corpus_of(cut)) for cut in read_manifest(manifest)} == {("en", "librispeech")}


def test_the_summary_says_the_hours_of_each_language(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recordings(tmp_path)
    of_table(tmp_path)
    printed = capsys.readouterr().out
    assert "train by language: de 0.00 h (33.3 %), en 0.00 h (33.3 %), sw 0.00 h (33.3 %)" in printed
    assert "train by corpus: cv 0.00 h (100.0 %)" in printed


def test_an_empty_name_and_a_recording_in_no_folder_of_a_language_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recordings(tmp_path / "tree")
    command = ("prepare", "folder", str(tmp_path / "tree"), str(tmp_path / "out"))
    assert "--language is ''; give a name" in refused(capsys, *command, "--language=")
    sentence = refused(capsys, *command, "--language_folders=true")
    assert "a.wav: in no folder of" in sentence
    assert "--language" in sentence


def with_names(cuts: CutSet) -> CutSet:
    def named(cut: Any) -> Any:
        number = int(cut.id.rpartition("-")[2])
        [segment] = cut.supervisions
        segment.language = ["de", "sw"][number % 2]
        return cut.with_custom("corpus", "cv") if number % 3 == 0 else cut

    return CutSet([named(cut.drop_alignments()) for cut in cuts])


def test_a_table_of_shar_archives_keeps_languages_and_corpora(train_cuts: CutSet, tmp_path: Path) -> None:
    cuts = with_names(train_cuts)
    shar = export_shar(cuts, tmp_path / "shar")
    table = SharCuts(prepare_shar(shar, tmp_path / "out"))
    table.check()
    assert [(language_of(cut), corpus_of(cut)) for cut in table] == [(language_of(cut), corpus_of(cut)) for cut in cuts]
    assert (
        table.fingerprint == SharCuts(prepare_shar(export_shar(train_cuts, tmp_path / "plain"), tmp_path)).fingerprint
    )
    corpora = Corpora([table], ["table"])
    assert Corpora([list(cuts)], ["table"]).named()[0] == corpora.named()[0]
    np.testing.assert_array_equal(Corpora([list(cuts)], ["table"]).named()[1], corpora.named()[1])
    balances = [Balance(0.5, 0.5).groups(one) for one in (corpora, Corpora([list(cuts)], ["table"]))]
    shares = [Balance(0.5, 0.5).shares(groups, table.num_samples) for groups in balances]
    np.testing.assert_allclose(*shares)
    chosen = corpora.chosen(np.arange(len(table)) % 2 == 0)
    pairs, index = chosen.named()
    assert [pairs[number] for number in index] == [(language_of(cut), corpus_of(cut) or "table") for cut in chosen]


def test_options_name_the_languages_of_shar_archives(train_cuts: CutSet, tmp_path: Path) -> None:
    shar = export_shar(train_cuts, tmp_path / "shar")
    main(["prepare", "shar", str(shar), str(tmp_path), "--language=en", "--corpus_name=demo"])
    [cut, *_] = SharCuts(tmp_path / "shar.shar")
    assert (language_of(cut), corpus_of(cut)) == ("en", "demo")
    table = np.load(tmp_path / "shar.shar/table.npy")
    table["language"][3] = 7
    np.save(tmp_path / "shar.shar/table.npy", table)
    with pytest.raises(ValueError, match=r"table\.npy: row 3 points outside .* language 7, corpus 0"):
        read_corpora([tmp_path / "shar.shar"])


def test_a_manifest_without_a_corpus_is_a_corpus_of_its_own_name(tmp_path: Path) -> None:
    for name in ("first", "second"):
        recordings(tmp_path / name / name)
        prepare_folder(tmp_path / name, tmp_path / "out", heldout=0, corpus_name="cv" if name == "first" else None)
    pairs, index = read_corpora([tmp_path / f"out/{name}.jsonl.gz" for name in ("second", "first")]).named()
    assert pairs == [("", "cv"), ("", "second")]
    assert index.tolist() == [1, 1, 1, 0, 0, 0]
