"""Runs that a report finds, and what it reads from their folders."""

import json
from pathlib import Path

import pytest
from run_folders import CLUSTERS, STEPS, finetuning_run, pretraining_run, result_rows, trials_file, write_json

from hubert_lightning.errors import UserError
from hubert_lightning.report.json_files import natural
from hubert_lightning.report.run_files import find_runs, read_run, short_names
from hubert_lightning.training.run_lock import locked


def test_iterations_come_in_their_order_and_before_the_fine_tuning(tmp_path: Path) -> None:
    finetuning_run(tmp_path / "demo" / "finetuning")
    for number in (10, 2, 1):
        pretraining_run(tmp_path / "demo" / "pretraining" / f"iteration{number}", number=number)
    names = [run.name for run in find_runs([tmp_path / "demo"])]
    assert names == [*(f"pretraining/iteration{number}" for number in (1, 2, 10)), "finetuning"]


def test_a_folder_that_is_given_twice_is_one_run(tmp_path: Path) -> None:
    run = finetuning_run(tmp_path / "run")
    assert len(find_runs([run, tmp_path, run / "."])) == 1


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [finetuning_run(tmp_path / place / "finetuning") for place in ("monday", "tuesday")]
    assert [run.name for run in find_runs(runs)] == ["monday/finetuning", "tuesday/finetuning"]


def test_iterations_of_two_trainings_are_told_apart() -> None:
    folders = [Path("/a/one/iteration1"), Path("/a/two/iteration1"), Path("/a/small")]
    assert short_names(folders) == ["one/iteration1", "two/iteration1", "small"]


def test_numbers_in_names_sort_by_value() -> None:
    assert sorted(["iteration10", "iteration2", "base"], key=natural) == ["base", "iteration2", "iteration10"]


def test_an_empty_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run .*; give a folder that `hubert fit --output` named$"):
        find_runs([tmp_path])


@pytest.mark.parametrize(("name", "fact"), [("nowhere", "no such folder"), ("file", "a file")])
def test_what_is_no_folder_is_named(tmp_path: Path, name: str, fact: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{name}: {fact}; give the folder of a run"):
        find_runs([tmp_path / name])


def test_parts_of_runs_are_no_runs(tmp_path: Path) -> None:
    run = finetuning_run(tmp_path / "run", result_rows(None))
    write_json(run / "wandb" / "files" / "config.yaml", {})
    assert [found.folder for found in find_runs([tmp_path])] == [run.resolve()]


def test_a_finished_a_running_and_a_stopped_run_differ(tmp_path: Path) -> None:
    finished = pretraining_run(tmp_path / "finished")
    stopped = pretraining_run(tmp_path / "stopped", finished=False)
    assert read_run(finished, "").status == "finished"
    assert read_run(stopped, "").status == "interrupted"
    assert (read_run(stopped, "").step, read_run(stopped, "").total_steps) == (STEPS, STEPS)


def test_a_locked_run_is_still_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pretraining_run(tmp_path / "run", finished=False)
    with locked(run):
        monkeypatch.setattr("hubert_lightning.training.run_lock._held", {})  # as another process sees it
        assert read_run(run, "").status == "training"


def test_curves_of_an_earlier_version_get_the_names_of_today(tmp_path: Path) -> None:
    run = tmp_path / "old"
    for version, steps in ((0, (9, 19)), (1, (19, 29))):
        table = run / f"version_{version}" / "metrics.csv"
        table.parent.mkdir(parents=True)
        rows = "".join(f"0,{step},{version + 1},{CLUSTERS // 2}\n" for step in steps)
        table.write_text(f"epoch,step,train/audio_seconds_per_second,val/label_clusters\n{rows}")
    (run / "version_0" / "hparams.yaml").write_text("labels: {clusters: [20]}\ntrainer: {precision: bf16-mixed}\n")
    curves = read_run(run, "").curves
    assert curves["speed/audio_seconds_per_second"] == [(10, 1.0), (20, 2.0), (30, 2.0)]
    assert curves["units/label_coverage"] == [(10, 0.5), (20, 0.5), (30, 0.5)]
    assert read_run(run, "").record["precision"] == "bf16-mixed"


def test_the_table_of_all_starts_counts_more_than_that_of_one(tmp_path: Path) -> None:
    for folder, steps in ((tmp_path, range(4)), (tmp_path / "version_0", range(2))):
        folder.mkdir(exist_ok=True)
        (folder / "metrics.csv").write_text("step,train/loss\n" + "".join(f"{step},1\n" for step in steps))
    assert [step for step, _ in read_run(tmp_path, "").curves["train/loss"]] == [1, 2, 3, 4]


def test_corrupt_files_count_as_missing_and_are_named(tmp_path: Path) -> None:
    run = pretraining_run(tmp_path / "run")
    for name in ("record.json", "metrics.json", "config.yaml", "layers.json"):
        (run / name).write_bytes(b"\xff{")
    found = read_run(run, "run")
    assert [Path(problem.split(" cannot be read")[0]).name for problem in found.problems] == [
        "record.json",
        "config.yaml",
        "metrics.json",
        "layers.json",
    ]
    assert found.curves["val/masked_accuracy"][-1][0] == STEPS


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("epoch,step,train/loss\n0,0,nan\n0,1,inf\n0,2,1.5\nx,y,2\n")
    assert read_run(run, "").curves == {"train/loss": [(3, 1.5)]}


def test_each_result_counts_once(tmp_path: Path) -> None:
    run = finetuning_run(tmp_path / "run", result_rows(None))
    [results] = read_run(run, "").results
    assert (results.name, results.manifest, results.decoder) == ("test", "test", "greedy")


def test_results_beside_an_old_run_are_found(tmp_path: Path) -> None:
    run = finetuning_run(tmp_path / "run", result_rows(None))
    (run / "test" / "test" / "test.jsonl").unlink()
    assert [results.path for results in read_run(run, "").results] == [run / "test.jsonl"]


def test_trials_beside_the_settings_of_a_test_are_found(tmp_path: Path) -> None:
    settings = tmp_path / "lm" / "decoder.json"
    trials_file(settings.with_suffix(".trials.json"))
    rows = [row | {"decoder": str(settings)} for row in result_rows(None)]
    [tuning] = read_run(finetuning_run(tmp_path / "run", rows), "").tunings
    assert tuning.content["best_wer"] == 0.2
    assert len(tuning.content["trials"]) == 8


def test_layers_of_quality_and_of_the_labels_are_read(tmp_path: Path) -> None:
    run = pretraining_run(tmp_path / "run")
    measures = {"pnmi": 0.4, "perplexity": 30.0}
    write_json(run / "layers.json", {"settings": {}, "best_layer": 2, "layer 1": measures, "layer 2": measures})
    write_json(run / "quality" / "quality.json", {"mfcc": measures, "layer 1": measures, "clusters": 50})
    layers = read_run(run, "").layers
    assert [row["layer"] for row in layers["the model behind its labels"]] == [1, 2]
    assert [row["layer"] for row in layers["hubert quality"]] == [0, 1]
    assert json.dumps(layers["hubert quality"][0]["pnmi"]) == "0.4"
