"""Labels, units, transcripts and K-means on a GPU, as far as a phantom shows: where the host waits for it."""

from collections import Counter
from pathlib import Path

import pytest
from phantom.device import Run
from phantom.record import Record

CORPUS_RUNS = ["labelling", "sampling", "units", "transcription"]


def waits(record: Record) -> dict[str, int]:
    """How often the host waits, by reason and line."""
    return dict(Counter(f"{wait.what} at {wait.line}" for wait in record.waits))


@pytest.mark.parametrize("run", CORPUS_RUNS)
def test_a_corpus_mixes_no_devices(recorded: Run, manifests: Path, run: str) -> None:
    record = recorded(f"inference_runs:{run}", manifests=str(manifests))
    assert record.result > 3  # batches
    assert record.ops
    assert not record.mixtures


@pytest.mark.parametrize("run", CORPUS_RUNS)
def test_a_corpus_waits_for_the_gpu_once_a_batch(recorded: Run, manifests: Path, run: str) -> None:
    record = recorded(f"inference_runs:{run}", manifests=str(manifests))
    assert len(record.waits) <= record.result + 1, waits(record)  # the centroids are copied once


@pytest.mark.parametrize("run", CORPUS_RUNS)
def test_audio_is_copied_while_the_gpu_computes(recorded: Run, manifests: Path, run: str) -> None:
    record = recorded(f"inference_runs:{run}", manifests=str(manifests))
    audio = [copy for copy in record.copies if copy.to_gpu and copy.bytes > 100_000]
    assert len(audio) == record.result
    assert all(copy.pinned and not copy.blocking for copy in audio)


@pytest.mark.parametrize("run", CORPUS_RUNS)
def test_results_are_copied_back_once_a_batch(recorded: Run, manifests: Path, run: str) -> None:
    record = recorded(f"inference_runs:{run}", manifests=str(manifests))
    results = [copy for copy in record.copies if not copy.to_gpu and copy.bytes > 100]
    assert len(results) == (0 if run == "sampling" else record.result)  # rows for K-means stay on the GPU
    assert all(copy.pinned and not copy.blocking for copy in results)


def test_utterances_before_a_missing_file_get_their_labels(recorded: Run, manifests: Path) -> None:
    assert recorded("inference_runs:labelling_until_a_file_is_missing", manifests=str(manifests)).result == 2


@pytest.mark.parametrize("on_gpu", [True, False], ids=["rows on the GPU", "rows in the host's memory"])
def test_a_round_of_kmeans_waits_once(recorded: Run, on_gpu: bool) -> None:
    # On the phantom, the inertia of all rounds is the same
    options = {"on_gpu": on_gpu, "restarts": 1, "tolerance": 0}
    few, many = (recorded("inference_runs:kmeans", max_rounds=rounds, **options) for rounds in (2, 6))
    assert many.result > few.result
    more = Counter(waits(many))
    more.subtract(waits(few))
    # Memory that chunks are staged in is waited for by events, which are those of earlier chunks
    drained = {reason: count for reason, count in more.items() if not reason.startswith("Event") and count}
    assert sum(drained.values()) <= many.result - few.result, drained


def test_seeding_waits_for_no_single_centroid(recorded: Run) -> None:
    few, many = (
        recorded("inference_runs:kmeans", clusters=clusters, restarts=1, max_rounds=1) for clusters in (16, 48)
    )
    assert len(many.waits) == len(few.waits), waits(many)


def test_kmeans_mixes_no_devices(recorded: Run) -> None:
    for on_gpu in (True, False):
        assert not recorded("inference_runs:kmeans", on_gpu=on_gpu, restarts=1, max_rounds=2).mixtures
