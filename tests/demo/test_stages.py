"""The stages of a long command."""

import pytest

from hubert_lightning.demo import stages
from hubert_lightning.demo.stages import Stages


def test_stages_tell_the_time_left_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = 0.0
    monkeypatch.setattr(stages, "monotonic", lambda: seconds)
    announced = Stages({"synthesis": 60, "iteration 1": 120, "iteration 2": 240})
    announced.begin("synthesis")
    seconds += 120  # twice as long as expected
    announced.begin("iteration 1")
    seconds += 240
    announced.begin("iteration 2")
    assert capsys.readouterr().err.splitlines() == [
        "stage 1 of 3: synthesis, about 1 minute (7 minutes left of all)",
        "stage 2 of 3: iteration 1, about 4 minutes (12 minutes left of all)",
        "stage 3 of 3: iteration 2, about 8 minutes (8 minutes left of all)",
    ]
