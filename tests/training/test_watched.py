"""The files that a validation leaves for people to look at."""

from pathlib import Path

import pytest

from hubert_lightning.errors import UserError
from hubert_lightning.training.watched import (
    LayerRow,
    LayersOfStep,
    PhoneClusters,
    WatchedTranscript,
    WatchedUnits,
    WatchedUtterance,
    add_layers,
    masked_spans,
    read_layers,
    read_phone_clusters,
    read_transcripts,
    read_units,
    write_phone_clusters,
    write_transcripts,
    write_units,
)

UTTERANCE = WatchedUtterance(
    id="ann-1",
    source="/audio/ann.flac",
    channel=0,
    start=1.5,
    duration=0.1,
    speaker="ann",
    text="größer",
    phones=[("sil", 0.0, 0.04), ("G", 0.04, 0.1)],
    labels=[[3, 3, 7, 7], [0, 1, 1, 1]],
    predictions=[[3, 3, 3, 7], [0, 0, 1, 1]],
    mask=[(1, 2)],
)


def layers_at(step: int, *pnmi: float | None) -> LayersOfStep:
    rows = [LayerRow(number, value, value, value, 40.5, dead=2) for number, value in enumerate(pnmi, start=1)]
    return LayersOfStep(step, 100, rows)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    units = WatchedUnits(500, 0.02, [UTTERANCE])
    counts = PhoneClusters(500, ["AH", "sil"], [[3, 0], [1, 9]])
    transcript = WatchedTranscript(500, "ann-1", None, None, 0.0, 2.5, "", "ONE TWO", "ONE", 0.5)
    write_units(tmp_path, units)
    write_phone_clusters(tmp_path, counts)
    write_transcripts(tmp_path, [transcript])
    assert read_units(tmp_path) == units
    assert read_phone_clusters(tmp_path) == counts
    assert read_transcripts(tmp_path) == [transcript]


def test_a_run_without_the_files_has_nothing_to_show(tmp_path: Path) -> None:
    assert read_units(tmp_path) is None
    assert read_phone_clusters(tmp_path) is None
    assert read_layers(tmp_path) == []
    assert read_transcripts(tmp_path) == []


def test_a_resumed_run_replaces_the_layers_from_its_step_on(tmp_path: Path) -> None:
    for entry in (layers_at(10, 0.1, 0.2), layers_at(20, 0.2, 0.3), layers_at(30, 0.9, 0.9), layers_at(20, 0.4, 0.3)):
        add_layers(tmp_path, entry)
    assert [entry.step for entry in read_layers(tmp_path)] == [10, 20]
    best = read_layers(tmp_path)[-1].best
    assert best is not None
    assert (best.layer, best.pnmi) == (1, 0.4)
    assert layers_at(10, None, None).best is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "Expecting"), ("[]", "line 1 is corrupt"), ('{"step": 5, "hop": 0.02}', "has no 'utterances'")],
)
def test_a_corrupt_file_is_named_with_the_way_out(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "watched" / "units.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=reason) as raised:
        read_units(tmp_path)
    assert str(path) in str(raised.value)
    assert "the next validation of the run writes it again" in str(raised.value)


def test_masked_frames_that_touch_are_one_span() -> None:
    assert masked_spans([False, True, True, False, False, True]) == [(1, 2), (5, 1)]
    assert masked_spans([]) == []
