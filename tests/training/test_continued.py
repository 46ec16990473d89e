"""One training through several labellings."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import SMOKE, pretraining_options, refused, run_verb
from lhotse import CutSet

from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.training.hubert_cli import HubertCLI
from hubert_lightning.training.iterations import single_iterations
from hubert_lightning.training.metrics_table import read_metrics
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_store import LabelStore

MFCC = "{features: mfcc, clusters: 12, max_frames: 2000, max_steps: 4}"
CONTINUED = "{features: previous, layer: 1, clusters: 12, max_frames: 2000, weights: continued, max_steps: 7}"
ONE_PHASE = f"--iterations=[{MFCC}, {CONTINUED[:-1]}, relabel_every: 4}}]"


def command(manifests: Path, output: Path, iterations: str = ONE_PHASE) -> list[str]:
    return [
        *("fit", *SMOKE, *pretraining_options(manifests), iterations),
        *("--checkpoint.every_n_train_steps=3", "--model.init_args.warmup_steps=2", f"--output={output}"),
    ]


@pytest.fixture(scope="module")
def trained(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("continued") / "run"
    assert run_verb(*command(manifests, output)) == 0
    return output


@pytest.mark.slow
def test_one_schedule_optimizer_and_order_go_through_all_labellings(trained: Path) -> None:
    folders = sorted(trained.glob("iteration*"))
    assert [folder.name for folder in folders] == ["iteration1", "iteration2", "iteration3"]
    ends = [read_checkpoint(folder / "last.ckpt") for folder in folders]
    assert [end["global_step"] for end in ends] == [4, 8, 11]
    assert {float(state["step"]) for state in ends[2]["optimizer_states"][0]["state"].values()} == {11}
    rates = [rate for folder in folders for _, rate in read_metrics(folder)["train/learning_rate"]]
    peak = max(rates)
    assert rates == pytest.approx([peak * min(step / 2, (11 - step) / 9) for step in range(11)])
    batches = [end["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] for end in ends]
    assert batches == [4, 8, 11]


@pytest.mark.slow
def test_clusters_keep_their_numbers_from_labelling_to_labelling(trained: Path, train_cuts: CutSet) -> None:
    stores = [LabelStore(trained / f"iteration{number}" / "labels") for number in (1, 2, 3)]
    pairs = np.zeros((12, 12))
    for cut in train_cuts:
        np.add.at(pairs, (stores[1][cut.id][0], stores[2][cut.id][0]), 1)
    assert np.trace(pairs) > 0.5 * pairs.sum()  # by chance a twelfth
    for before, folder in zip(stores, ("iteration2", "iteration3"), strict=False):
        assert load_kmeans(trained / folder / "kmeans.safetensors")[1]["start"] == before.fingerprint


@pytest.mark.slow
def test_a_killed_training_continues_to_the_bit(trained: Path, manifests: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    shutil.rmtree(output / "iteration3")
    second = output / "iteration2"
    (second / "metrics.json").unlink()
    (second / "previous.ckpt").replace(second / "last.ckpt")
    assert read_checkpoint(second / "last.ckpt")["global_step"] == 6
    assert run_verb(*command(manifests, output)) == 0
    for number in (2, 3):
        name = f"iteration{number}"
        own, whole = (read_checkpoint(folder / name / "last.ckpt") for folder in (output, trained))
        for weight, value in whole["state_dict"].items():
            torch.testing.assert_close(own["state_dict"][weight], value, rtol=0, atol=0)
        states = [end["optimizer_states"][0]["state"] for end in (own, whole)]
        for number_, state in states[1].items():
            assert torch.equal(states[0][number_]["exp_avg"], state["exp_avg"])
    assert read_metrics(output / "iteration2").keys() == read_metrics(trained / "iteration2").keys()


@pytest.mark.slow
def test_a_training_continues_from_the_last_step_of_the_part_before_or_not_at_all(
    trained: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    shutil.rmtree(output / "iteration3")
    last = output / "iteration2" / "last.ckpt"
    content = last.read_bytes()
    last.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    error = refused(capsys, *command(manifests, output))
    assert f"{last} is corrupt, and the next part of the training starts from its step; restore it, or remove" in error
    assert not [*(output / "iteration3").glob("*.ckpt")]
    last.rename(tmp_path / "elsewhere")
    assert f"{last} is missing" in refused(capsys, *command(manifests, output))
    (tmp_path / "elsewhere").rename(last)
    (output / "iteration2" / "metrics.json").unlink()
    assert run_verb(*command(manifests, output)) == 0
    own, whole = (read_checkpoint(run / "iteration3" / "last.ckpt")["state_dict"] for run in (output, trained))
    for name, value in whole.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=0, msg=name)


def parts_of(manifests: Path, output: Path, iterations: str) -> list[Any]:
    return list(single_iterations(HubertCLI("fit", command(manifests, output, iterations)[1:]).config))


def test_an_iteration_is_split_into_parts_of_one_training(manifests: Path, tmp_path: Path) -> None:
    again = "{features: previous, layer: 2, clusters: 9, max_steps: 5, relabel_every: 2}"
    parts = parts_of(manifests, tmp_path, f"--iterations=[{MFCC}, {CONTINUED}, {again}]")
    models, relabels = (
        [part.model.init_args for part in parts],
        [part.trainer.callbacks[-1].init_args for part in parts],
    )
    assert [part.trainer.max_steps for part in parts] == [4, 11, 2, 4, 5]
    assert [model.schedule_steps for model in models] == [11, 11, 5, 5, 5]
    assert [model.num_clusters for model in models] == [12, 12, 9, 9, 9]
    before = [None if relabel.get("continues") is None else Path(relabel.continues).name for relabel in relabels]
    assert before == [None, "iteration1", None, "iteration3", "iteration4"]
    teachers = [Path(relabel.features).parent.name for relabel in relabels]
    assert teachers == ["", "iteration1", "iteration2", "iteration3", "iteration4"]
    assert yaml.safe_load(HubertCLI("fit", command(manifests, tmp_path)[1:]).parser.dump(parts[1]))


@pytest.mark.parametrize(
    ("iterations", "sentence"),
    [
        ("[{features: mfcc, weights: continued}]", "is 'continued', but no iteration precedes it"),
        (f"[{MFCC}, {CONTINUED.replace('12', '13')}]", "continues an iteration with [12] clusters, but has [13]"),
        (f"[{MFCC[:-1]}, relabel_every: 2}}]", "labels of mfcc would be the same again"),
        (f"[{MFCC}, {CONTINUED[:-1]}, relabel_every: 0}}]", "relabel_every is 0"),
        (f"[{MFCC}, {CONTINUED[:-1]}, quantizer: {{kmeans}}}}]", "starts from the labels before"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    capsys: pytest.CaptureFixture[str], run: Path, manifests: Path, tmp_path: Path, iterations: str, sentence: str
) -> None:
    given = iterations.replace("{kmeans}", str(run / "kmeans.safetensors"))
    error = refused(capsys, *command(manifests, tmp_path, f"--iterations={given}"))
    assert sentence in error
