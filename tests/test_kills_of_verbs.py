"""Verbs that are killed wherever they write, and started again: a share of benchmarks/kills_of_verbs.py."""

import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import kills_of_verbs


@pytest.mark.campaign
@pytest.mark.parametrize(
    "verbs",
    [
        ["prepare csv", "prepare shar", "prepare alignments"],
        ["transcribe", "align", "units", "units kaldi", "units npz"],
        ["export transformers", "export fairseq", "import", "average"],
        ["kmeans fit", "kmeans export", "labels import", "labels export", "quality"],
        ["vocabulary", "ngram", "lexicon", "tune-decoder", "score"],
    ],
    ids=lambda verbs: verbs[0],
)
def test_what_a_killed_verb_leaves_is_whole_and_the_next_start_ends_as_an_uninterrupted_one(
    verbs: list[str], tmp_path: Path
) -> None:
    number, wrong = kills_of_verbs.kills(verbs, most=3, at_random=1, seed=0, folder=tmp_path)
    assert not wrong
    assert number >= 4 * len(verbs) - 4  # of which some write less often


@pytest.mark.campaign
def test_a_verb_that_is_killed_in_the_middle_goes_on_with_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "material").mkdir()
    kills_of_verbs.make_material(tmp_path / "material")
    for verb in ("transcribe", "units npz"):
        campaign = kills_of_verbs.Campaign(verb, tmp_path / "material", tmp_path / verb)
        assert campaign.kill(number=campaign.writes - 5) is None, campaign.log.read_text()
        assert "finished before with the same model and settings" in campaign.log.read_text()
