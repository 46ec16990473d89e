"""A part of the campaigns of benchmarks/kills.py: killed fits end in the same bits as uninterrupted ones."""

import random
import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import kills


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["pretraining", "labelling", "finetuning", "epochs", "ranks"])
def test_a_fit_that_is_killed_at_random_ends_in_the_same_bits(name: str, manifests: Path, tmp_path: Path) -> None:
    fit = kills.fits(manifests)[name]
    kills.measure(name, fit, tmp_path)
    generator = random.Random(name)
    for _ in range(3):
        plan = kills.drawn(fit, generator)
        assert kills.trial(fit, tmp_path / name, plan) == [], plan


@pytest.mark.slow
def test_a_fine_tuning_that_is_killed_at_its_end_has_all_of_its_results(manifests: Path, tmp_path: Path) -> None:
    fit = kills.fits(manifests)["finetuning"]
    kills.measure("finetuning", fit, tmp_path, alone=False)
    writes = (tmp_path / "finetuning-writes.txt").read_text().splitlines()
    # After the last validation, which stopped it: before the mean is written, and before the metrics are
    for name in ("open {}/.average.ckpt.", "open {}/.metrics.json."):
        number = next(
            n for n, write in enumerate(writes, start=1) if name.format(tmp_path / "finetuning-fork") in write
        )
        assert kills.trial(fit, tmp_path / "run", [kills.Kill(write=number)]) == []


def test_a_comparison_finds_a_bit_a_leftover_and_a_missing_file(manifests: Path, tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "labels.npy").write_bytes(b"\0\1")
    here, there = tmp_path / "here", tmp_path / "there"
    assert list(kills.differences(here, there)) == []
    (here / "labels.npy").write_bytes(b"\0\0")
    (here / "last.ckpt.part").touch()
    (there / "config.yaml").touch()
    found = list(kills.differences(here, there))
    assert [line.split(":")[0] for line in found] == ["config.yaml", "labels.npy", "last.ckpt.part"]
