"""The table of metrics that every fit keeps in its folder."""

from pathlib import Path

from hubert_lightning.training.metrics_table import keep_rows, keeps_table, read_metrics, table_logger


def test_metrics_are_read_by_name_with_steps_counted_from_1(tmp_path: Path) -> None:
    logger = table_logger(tmp_path)
    assert keeps_table(logger, tmp_path)
    logger.log_metrics({"train/loss": 2.5, "epoch": 0}, 0)
    logger.log_metrics({"train/loss": 1.5}, 9)
    logger.log_metrics({"val/wer": 0.25}, 9)
    assert read_metrics(tmp_path) == {"train/loss": [(1, 2.5), (10, 1.5)], "val/wer": [(10, 0.25)]}


def test_metrics_of_a_resumed_run_are_those_of_all_its_starts(tmp_path: Path) -> None:
    first = table_logger(tmp_path)
    for round_number in range(6):
        first.log_metrics({"labels/kmeans_inertia": 9.0 - round_number}, round_number)
    for step in range(5):
        first.log_metrics({"train/loss": 5.0 - step}, step)
    second = table_logger(tmp_path)
    keep_rows(second, {"global_step": 3})
    for step in range(3, 6):
        second.log_metrics({"train/loss": 50.0 - step}, step)
    metrics = read_metrics(tmp_path)
    assert metrics["train/loss"] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 47.0), (5, 46.0), (6, 45.0)]
    assert len(metrics["labels/kmeans_inertia"]) == 6


def test_tables_of_earlier_versions_are_read_under_the_names_since(tmp_path: Path) -> None:
    for number, rows in enumerate(("0,0.5,30.0\n1,0.25,\n", "1,0.125,31.0\n")):
        folder = tmp_path / f"version_{number}"
        folder.mkdir()
        (folder / "metrics.csv").write_text("step,train/mfu,val/label_perplexity\n" + rows)
    assert read_metrics(tmp_path) == {
        "speed/mfu": [(1, 0.5), (2, 0.125)],
        "units/label_perplexity": [(1, 30.0), (2, 31.0)],
    }


def test_a_folder_without_a_table_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == {}
