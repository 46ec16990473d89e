"""Configs of this package by name."""

from pathlib import Path

import pytest
from helpers import ROOT

from hubert_lightning.cli import main
from hubert_lightning.errors import UserError
from hubert_lightning.packaged_configs import config_names, copy_config, packaged


@pytest.mark.parametrize("name", ["pretrain/base", "pretrain/base.yaml", "configs/pretrain/base.yaml"])
def test_a_config_is_found_by_name_in_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert packaged(name).read_bytes() == (ROOT / "configs/pretrain/base.yaml").read_bytes()


def test_a_local_file_comes_before_a_config_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pretrain").mkdir()
    Path("pretrain/base").write_text("output: here")
    assert packaged("pretrain/base") == Path("pretrain/base")
    assert packaged("pretrain/base.yaml") == ROOT / "configs/pretrain/base.yaml"


def test_a_name_that_is_no_config_stays_as_it_is() -> None:
    for name in ("../pyproject.toml", "pretrain", "", "/etc/hostname", "no.yaml", "a: {b: c}" * 100):
        assert packaged(name) == Path(name)


def test_configs_are_listed_with_the_first_sentence_of_their_header(capsys: pytest.CaptureFixture) -> None:
    main(["configs"])
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("  pretrain/base ")]
    assert line.endswith("HuBERT Base (95 M parameters), both iterations, on LibriSpeech 960 h (Hsu et al. 2021, "
                         "§IV-B, §IV-C, table I).")  # fmt: skip
    assert {name for name, _ in config_names()} == {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        for path in (ROOT / "configs").rglob("*.yaml")
        if path.parent.name != "sweeps"
    }
    assert "launch/slurm.sh" in printed


def test_a_copy_is_the_config_and_replaces_no_file(tmp_path: Path) -> None:
    copy_config("pretrain/base", tmp_path)
    copy_config("launch/slurm.sh", tmp_path / "mine.sh")
    assert (tmp_path / "base.yaml").read_bytes() == (ROOT / "configs/pretrain/base.yaml").read_bytes()
    assert (tmp_path / "mine.sh").read_bytes() == (ROOT / "configs/launch/slurm.sh").read_bytes()
    (tmp_path / "base.yaml").write_text("edited")
    with pytest.raises(UserError, match=r"base\.yaml: exists already"):
        copy_config("pretrain/base.yaml", tmp_path)
    assert (tmp_path / "base.yaml").read_text() == "edited"
    with pytest.raises(UserError, match="did you mean finetune/own"):
        copy_config("finetune/owm", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        copy_config("finetune/own", tmp_path / "none" / "own.yaml")
