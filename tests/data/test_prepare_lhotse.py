"""Corpora that lhotse has a recipe for become manifests, and nothing is downloaded."""

import ast
import inspect
import sys
from itertools import product
from pathlib import Path

import pytest
from helpers import refused
from lhotse import recipes
from listed_audio import rows, samples_of, write_noise
from numpy.testing import assert_allclose
from tqdm import tqdm

from hubert_lightning.data.prepare_lhotse import DOWNLOADING, PREFIX, prepare_lhotse, recipe_names
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE

DOWNLOADERS = {"resumable_download", "urlopen", "urlretrieve", "load_dataset", "snapshot_download", "hf_hub_download"}


def ljspeech(folder: Path) -> Path:
    texts = {"LJ001-0001": "Printing, in 1450.|Printing, in fourteen fifty.", "LJ001-0002": "the art|the art"}
    for number, name in enumerate(texts):
        write_noise(folder / f"wavs/{name}.wav", 1.0 + number, number, rate=22_050)
    (folder / "metadata.csv").write_text("".join(f"{name}|{text}\n" for name, text in texts.items()))
    return folder


def test_a_corpus_without_parts_becomes_a_manifest(tmp_path: Path) -> None:
    [manifest] = prepare_lhotse("ljspeech", [ljspeech(tmp_path / "LJSpeech-1.1")], tmp_path / "out")
    assert manifest.name == "ljspeech.jsonl.gz"
    listed = rows(manifest)
    assert listed.keys() == {"LJ001-0001", "LJ001-0002"}
    assert listed["LJ001-0002"][:3] == (0.0, 2.0, "the art")


def test_parts_of_a_corpus_become_manifests(tmp_path: Path) -> None:
    for number, bits in enumerate([*product("01", repeat=8)][:60]):
        write_noise(tmp_path / f"waves_yesno/{'_'.join(bits)}.wav", 0.25, number, rate=8000)
    manifests = prepare_lhotse("yesno", [tmp_path / "waves_yesno"], tmp_path / "out")
    assert [path.name for path in manifests] == ["train.jsonl.gz", "test.jsonl.gz"]
    listed = rows(manifests[0]) | rows(manifests[1])
    assert len(listed) == 60
    assert listed["0_0_0_0_0_0_0_1"][2] == "NO NO NO NO NO NO NO YES"


def test_supervisions_become_segments_of_their_channel(tmp_path: Path) -> None:
    stereo = write_noise(tmp_path / "dev/talk.wav", 4.0, 0, channels=2)
    (tmp_path / "dev/talk.rttm").write_text(
        "SPEAKER talk 1 0.5 1.5 <NA> <NA> anna <NA> <NA>\nSPEAKER talk 1 2.0 1.5 <NA> <NA> ben <NA> <NA>\n"
    )
    for number, name in enumerate("ab"):
        write_noise(tmp_path / f"test/{name}.wav", 1.0, number + 1)
        (tmp_path / f"test/{name}.rttm").write_text(f"SPEAKER {name} 1 0 1.0 <NA> <NA> carl <NA> <NA>\n")
    manifests = prepare_lhotse("voxconverse", [tmp_path], tmp_path / "out", {"split_test": True})
    assert [path.name for path in manifests] == ["train.jsonl.gz", "dev.jsonl.gz", "test.jsonl.gz"]
    train, dev, _ = manifests
    assert rows(train) == {"talk-0": (0.5, 1.5, None, "anna"), "talk-1": (2.0, 1.5, None, "ben")}
    assert_allclose(samples_of(train, "talk-1"), stereo[2 * SAMPLE_RATE : 7 * SAMPLE_RATE // 2, 0])
    assert rows(dev) == {"a-0": (0.0, 1.0, None, "carl")}


def test_a_recipe_is_named_and_none_that_downloads_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, out = str(tmp_path), str(tmp_path / "out")
    sentence = refused(capsys, "prepare", "lhotse", "ljspech", corpus, out)
    assert "did you mean ljspeech? the recipes are " in " ".join(sentence.split())
    assert all(name in sentence for name in ("ami", "commonvoice", "vctk"))
    sentence = refused(capsys, "prepare", "lhotse", "voxpopuli", corpus, out)
    assert "downloads a part of the corpus, and nothing is downloaded here" in " ".join(sentence.split())
    assert not set(DOWNLOADING) & set(recipe_names())


def called_names(function: ast.FunctionDef) -> set[str]:
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", [name for name in dir(recipes) if name.startswith(PREFIX)])
def test_the_recipes_that_download_are_known(name: str) -> None:
    """A recipe whose `prepare_` function reaches a download is listed; an upgrade of lhotse may add some."""
    function = getattr(recipes, name)
    module = sys.modules[inspect.unwrap(function).__module__]
    functions = {
        node.name: node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.FunctionDef)
    }
    reached: set[str] = set()
    waiting = [inspect.unwrap(function).__name__]
    while waiting:
        current = waiting.pop()
        if current in functions and current not in reached:
            reached.add(current)
            waiting += called_names(functions[current])
    downloads = any(
        called in DOWNLOADERS or called.startswith("download_")
        for current in reached
        for called in called_names(functions[current])
    )
    assert downloads == (name.removeprefix(PREFIX) in DOWNLOADING)


def test_a_corpus_that_the_recipe_cannot_read_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lhotse's recipe yesno cannot read it \(AssertionError.*lhotse.recipes.yesno"):
        prepare_lhotse("yesno", [tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        prepare_lhotse("yesno", [tmp_path / "gone"], tmp_path / "out")
    with pytest.raises(UserError, match="takes corpus_dir, and 2 folders are given"):
        prepare_lhotse("yesno", [tmp_path, tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="takes speech_dir, transcript_dir, and 1 folders are given"):
        prepare_lhotse("heroico", [tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="mic: no argument of lhotse's recipe yesno"):
        prepare_lhotse("yesno", [tmp_path], tmp_path / "out", {"mic": "sdm"})


def test_bars_of_a_recipe_are_hidden_and_it_is_said_what_takes_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prepare_lhotse("ljspeech", [ljspeech(tmp_path / "LJSpeech-1.1")], tmp_path / "out")
    printed = capsys.readouterr().err
    assert "hubert: lhotse's recipe reads the corpus" in printed
    assert "it/s" not in printed
    assert "%|" not in printed
    with tqdm([0], file=sys.stderr) as bar:  # those of others are shown as before
        list(bar)
    assert "1/1" in capsys.readouterr().err
