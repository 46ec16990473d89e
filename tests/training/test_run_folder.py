"""Nothing in a run's folder is lost: not by a kill, a flipped bit, a full disk, or audio that goes away; and no run
goes on with other data than it was trained with."""

import ctypes
import functools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
import torch
import yaml
from helpers import FINETUNING_STEPS, short_finetuning
from lhotse.cut import Cut

from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.training.run_folder import kept_config, kept_metrics, write_json
from hubert_lightning.untrusted.json_file import parse_json


@pytest.fixture(scope="module")
def finished(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    main(short_finetuning(manifests, output))
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def unfinished(run: Path) -> Path:
    """A run that was killed after the last step but two."""
    for path in (
        run / "metrics.json",
        run / "last.ckpt",
        *run.glob(f"best-{FINETUNING_STEPS}.ckpt"),
        run / "average.ckpt",
    ):
        path.unlink(missing_ok=True)
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.ckpt", weights_only=True)["state_dict"]


def refused(capsys: pytest.CaptureFixture, args: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def end_soon_after_opening(name: str) -> None:
    """End this process a moment after it has opened such a file to write."""

    def hear(event: str, args: Any) -> None:
        if event == "open" and str(args[0]).endswith(name) and "w" in str(args[1]):
            signal.setitimer(signal.ITIMER_REAL, 0.004)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.addaudithook(hear)


def test_a_run_killed_while_it_writes_its_config_resumes(
    manifests: Path, unfinished: Path, finished: Path, tmp_path: Path
) -> None:
    other = [
        *short_finetuning(manifests, unfinished),
        "--trainer.log_every_n_steps=7",
    ]  # a config that has to be written
    before = functools.partial(end_soon_after_opening, "config.yaml")
    whole = (unfinished / "config.yaml").read_bytes()
    code = fork_server.run(other, tmp_path / "output.txt", before=before)
    if code != -signal.SIGALRM:  # it is not written under its own name
        assert code == 0, (tmp_path / "output.txt").read_text()
        return
    assert (unfinished / "config.yaml").read_bytes() == whole
    main(short_finetuning(manifests, unfinished))
    torch.testing.assert_close(weights(unfinished), weights(finished), rtol=0, atol=0)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "cut short": lambda content: content[: len(content) // 3],
    "no UTF-8": lambda content: b"\xff\xfe\x80" + content,
    "nested deeply": lambda content: b"[" * 100_000,
    "a list": lambda content: b"[1, 2]",
    "a number": lambda content: b"17",
    "a date that there is not": lambda content: b"model: 2024-13-45",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_config_is_restored_from_the_checkpoint(
    damage: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run / "config.yaml"
    whole = config.read_bytes()
    config.write_bytes(DAMAGES[damage](whole))
    assert kept_config(run) == yaml.safe_load(whole)
    assert config.read_bytes() == whole
    assert f"{config}: corrupt" in caplog.text
    assert "restored from last.ckpt" in caplog.text


@pytest.mark.slow
def test_a_run_with_an_empty_missing_or_misspelt_config_resumes(
    manifests: Path, unfinished: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = unfinished / "config.yaml"
    whole = config.read_bytes()
    damages: list[Callable[[], object]] = [
        config.unlink,
        lambda: config.write_bytes(b""),
        lambda: config.write_bytes(whole.replace(b"mask_length: 10", b"mask_length: 11", 1)),
        lambda: config.write_bytes(whole.replace(b"\nmodel:", b"\nmodem:", 1)),
    ]
    for damage in damages:
        caplog.clear()
        damage()
        kept = Path(shutil.copytree(unfinished, unfinished.with_name("kept"), dirs_exist_ok=True))
        main(short_finetuning(manifests, kept))
        assert "restored from previous.ckpt" in caplog.text
        torch.testing.assert_close(weights(kept), weights(finished), rtol=0, atol=0)
        shutil.rmtree(kept)


def test_a_corrupt_config_that_a_command_names_is_restored_for_review_before_it_is_used(
    run: Path, manifests: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_bytes(b"")
    test = f"--data.init_args.test=[{manifests / 'test.jsonl.gz'}]"
    command = ["test", "--config", str(run / "config.yaml"), f"--output={run}", test]
    message = refused(capsys, command)
    assert "was corrupt (empty), and is restored from the checkpoint beside it; check that it is your run's" in message
    assert (run / "config.yaml").read_bytes() == whole
    main(command)
    assert (run / "test.jsonl").exists()


def test_a_config_in_a_foreign_checkpoint_imports_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_code.py").write_text("from pathlib import Path\nPath('trace').touch()\nclass Model: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for path in run.glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        if "config" in content:  # not in a mean
            content["config"] = content["config"].replace("hubert_lightning.CTCFinetuning", "foreign_code.Model")
        path.unlink()
        torch.save(content, path)
    (run / "config.yaml").write_bytes(b"")
    assert "check that it is your run's" in refused(capsys, ["validate", "--config", str(run / "config.yaml")])
    assert not (tmp_path / "trace").exists()


def without(run: Path, *names: str) -> None:
    """As checkpoints of earlier versions are."""
    for path in run.glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        path.unlink()  # best.ckpt is a link
        torch.save({name: value for name, value in content.items() if name not in names}, path)


def test_a_corrupt_config_without_a_copy_is_refused_with_a_way_out(
    manifests: Path, unfinished: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    without(unfinished, "config")
    (unfinished / "config.yaml").write_bytes(b"")
    message = refused(capsys, short_finetuning(manifests, unfinished))
    assert (
        f"{unfinished / 'config.yaml'}: corrupt (empty), and no checkpoint beside it holds a copy; restore" in message
    )
    previous = unfinished / "previous.ckpt"
    main([*short_finetuning(manifests, tmp_path / "other"), f"--ckpt_path={previous}"])  # the way out
    torch.testing.assert_close(weights(tmp_path / "other"), weights(finished), rtol=0, atol=0)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if "date" not in name])
def test_corrupt_metrics_are_restored_from_the_checkpoint(
    damage: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = run / "metrics.json"
    whole = metrics.read_bytes()
    metrics.write_bytes(DAMAGES[damage](whole))
    assert kept_metrics(run) == json.loads(whole)
    assert metrics.read_bytes() == whole
    assert f"{metrics}: corrupt; restored from last.ckpt" in caplog.text


def test_a_finished_run_with_corrupt_metrics_is_finished(
    manifests: Path, run: Path, capsys: pytest.CaptureFixture
) -> None:
    (run / "metrics.json").write_bytes(b'{"steps": "many"}')
    main(short_finetuning(manifests, run))
    assert "finished already" in capsys.readouterr().out


def test_an_unfinished_run_does_not_end_before_the_step_of_its_checkpoint(
    manifests: Path, run: Path, capsys: pytest.CaptureFixture
) -> None:
    (run / "metrics.json").unlink()  # as of an interrupted run
    sentence = refused(capsys, [*short_finetuning(manifests, run), "--trainer.max_steps=3"])
    assert f"{run / 'last.ckpt'}: saved after step {FINETUNING_STEPS}, and the run is to end after step 3" in sentence
    main(short_finetuning(manifests, run))
    assert json.loads((run / "metrics.json").read_text())["steps"] == FINETUNING_STEPS


def test_a_run_does_not_choose_its_best_checkpoints_by_another_metric(
    manifests: Path, run: Path, capsys: pytest.CaptureFixture
) -> None:
    callbacks = "[{class_path: hubert_lightning.BestCheckpoints, init_args: {monitor: val/cer, keep: 3}}]"
    more = ["--trainer.max_steps=8", f"--trainer.callbacks={callbacks}"]
    sentence = refused(capsys, [*short_finetuning(manifests, run), *more])
    assert (
        f"{run / 'last.ckpt'}: its best checkpoints are chosen by val/wer, not by val/cer; keep the monitor" in sentence
    )


def edited(manifest: Path, path: Path, edit: Callable[[list[Cut]], list[Cut]]) -> Path:
    write_manifest(edit(list(read_manifest(manifest))), path)
    return path


def respelled(cuts: list[Cut]) -> list[Cut]:
    def other(cut: Cut) -> Cut:
        return cut.map_supervisions(lambda segment: segment.transform_text(lambda text: "another word"))

    return [other(cuts[0]), *cuts[1:]]


def cut_later(cuts: list[Cut]) -> list[Cut]:
    return [cuts[0].truncate(offset=0.5, preserve_id=True), *cuts[1:]]


EDITS: dict[str, Callable[[list[Cut]], list[Cut]]] = {
    "a transcript": respelled,
    "an utterance less": lambda cuts: cuts[1:],
    "another order": lambda cuts: [cuts[1], cuts[0], *cuts[2:]],
    "another start": cut_later,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("part", ["train", "validation"])
def test_fine_tuning_does_not_resume_with_an_edited_manifest(
    part: str, edit: str, manifests: Path, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name = {"train": "finetune", "validation": "dev"}[part]
    path = edited(manifests / f"{name}.jsonl.gz", tmp_path / f"{name}.jsonl.gz", EDITS[edit])
    before = {file: file.read_bytes() for file in unfinished.glob("*.ckpt")}
    message = refused(capsys, short_finetuning(manifests, unfinished, **{part: [path]}))
    assert f"{path}: its utterances, their order or their transcripts are not those that" in message
    assert "restore the manifest as it was, or start another run with another --output" in message
    assert {file: file.read_bytes() for file in unfinished.glob("*.ckpt")} == before


@pytest.mark.slow
def test_fine_tuning_resumes_with_moved_manifests_in_another_order(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cuts = list(read_manifest(manifests / "finetune.jsonl.gz"))
    parts = [tmp_path / "b.jsonl.gz", tmp_path / "a.jsonl.gz"]
    for path, of in zip(parts, (cuts[:2], cuts[2:]), strict=True):
        write_manifest(of, path)
    whole, run = tmp_path / "whole", tmp_path / "run"
    main(short_finetuning(manifests, whole, train=parts))
    shutil.copytree(whole, run)
    for name in ("last.ckpt", "metrics.json", "average.ckpt", f"best-{FINETUNING_STEPS}.ckpt"):
        (run / name).unlink(missing_ok=True)
    (tmp_path / "moved").mkdir()
    moved = [Path(shutil.move(path, tmp_path / "moved")) for path in parts]
    message = refused(capsys, short_finetuning(manifests, run, train=moved[:1]))
    assert "a.jsonl.gz: not in data.train, but" in message
    message = refused(capsys, short_finetuning(manifests, run, train=[*moved, manifests / "test.jsonl.gz"]))
    assert f"{manifests / 'test.jsonl.gz'}: not among the manifests in data.train that" in message
    main(short_finetuning(manifests, run, train=moved[::-1]))
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=0)


def test_a_run_whose_checkpoints_do_not_name_their_manifests_resumes(
    manifests: Path, unfinished: Path, finished: Path
) -> None:
    without(unfinished, "TranscribedData", "config", "final_metrics")
    main(short_finetuning(manifests, unfinished))
    torch.testing.assert_close(weights(unfinished), weights(finished), rtol=0, atol=0)


def test_weights_that_are_not_finite_are_not_saved(
    manifests: Path, unfinished: Path, capsys: pytest.CaptureFixture
) -> None:
    """Gradients are finite, and the rate makes infinities of them."""
    shutil.rmtree(unfinished)
    high = "--model.init_args.optimizer={class_path: torch.optim.SGD, init_args: {lr: 1.0e+41}}"
    message = refused(capsys, [*short_finetuning(manifests, unfinished), high, "--model.init_args.freeze_steps=0"])
    assert "is NaN or infinite, so this state is not saved" in message
    assert "which starts again, since no checkpoint was saved" in message
    assert not list(unfinished.glob("*.ckpt"))


def test_a_checkpoint_with_infinite_weights_is_skipped(
    manifests: Path, unfinished: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = torch.load(finished / "last.ckpt", weights_only=True)
    content["state_dict"]["head.bias"][3] = torch.inf
    torch.save(content, unfinished / "last.ckpt")
    main(short_finetuning(manifests, unfinished))
    assert (
        "last.ckpt is not finite (its head.bias is NaN or infinite); training resumes from the checkpoint before it"
        in caplog.text
    )
    torch.testing.assert_close(weights(unfinished), weights(finished), rtol=0, atol=0)


def allow_files_of(size: int) -> None:
    """Let writing fail beyond so many bytes of a file, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_same_command_resumes(
    manifests: Path, finished: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    sizes = [50, 450, *np.exp(rng.uniform(np.log(5000), np.log(350_000), size=2)).astype(int).tolist()]
    for size in sizes:
        run = tmp_path / f"run{size}"
        shutil.copytree(finished, run)
        gone = ["metrics.json", "last.ckpt", "average.ckpt", f"best-{FINETUNING_STEPS}.ckpt"]
        for name in gone if size == 450 else [*gone, "config.yaml"]:
            (run / name).unlink(missing_ok=True)
        pipe = tmp_path / f"output{size}"  # whose size is not limited
        os.mkfifo(pipe)
        reading = ThreadPoolExecutor(1).submit(pipe.read_text)
        code = fork_server.run(short_finetuning(manifests, run), pipe, before=functools.partial(allow_files_of, size))
        message = reading.result()
        assert code == 2, message
        assert "Traceback" not in message
        assert len([line for line in message.splitlines() if line.startswith("hubert: ")]) == 1, message
        assert "File too large" in message
        main(short_finetuning(manifests, run))
        torch.testing.assert_close(weights(run), weights(finished), rtol=0, atol=0)


def be_nobody_special() -> None:
    """Give up what lets root write everywhere (CAP_DAC_OVERRIDE)."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    for number in (0, 1, 2):  # effective, permitted, inheritable
        data[number] &= ~(1 << 1)
    assert libc.capset(header, data) == 0


@pytest.mark.slow
def test_a_read_only_folder_is_one_sentence_and_loses_nothing(
    manifests: Path, unfinished: Path, finished: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}
    unfinished.chmod(0o555)
    code = fork_server.run(short_finetuning(manifests, unfinished), tmp_path / "output.txt", before=be_nobody_special)
    unfinished.chmod(0o755)
    message = (tmp_path / "output.txt").read_text()
    assert code == 2, message
    assert f"{unfinished}: cannot be created or written to (Permission denied)" in message
    assert "Traceback" not in message
    assert {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()} == before
    main(short_finetuning(manifests, unfinished))
    torch.testing.assert_close(weights(unfinished), weights(finished), rtol=0, atol=0)


def removed(audio: Path) -> None:
    audio.unlink()


def cut_short(audio: Path) -> None:
    os.truncate(audio, audio.stat().st_size // 2)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [removed, cut_short])
@pytest.mark.parametrize("workers", [0, 1])
def test_audio_that_disappears_in_training_is_named_and_the_same_command_resumes(
    workers: int, loss: Callable[[Path], None], manifests: Path, tmp_path: Path
) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()

    def copied(cuts: list[Cut]) -> list[Cut]:
        for cut in cuts:
            for source in cut.recording.sources:
                source.source = shutil.copy(source.source, audio)
        return cuts

    train = edited(manifests / "finetune.jsonl.gz", tmp_path / "train.jsonl.gz", copied)
    more = ["--trainer.max_steps=100000", "--trainer.val_check_interval=50000"]
    more.append(f"--data.init_args.num_workers={workers}")
    run, output = tmp_path / "run", tmp_path / "output.txt"
    process = fork_server.start([*short_finetuning(manifests, run, train=[train]), *more], output)
    while process.is_alive() and not (run / "previous.ckpt").exists():
        time.sleep(0.05)
    kept = {path: path.read_bytes() for path in audio.iterdir()}
    for path in kept:
        loss(path)
    assert fork_server.ended(process) == 2, output.read_text()
    message = [line for line in output.read_text().splitlines() if line.startswith("hubert: ")]
    assert len(message) == 1
    assert "restore the file, or run `hubert prepare` again" in message[0]
    assert "Traceback" not in output.read_text()
    for path, content in kept.items():
        path.write_bytes(content)
    step = torch.load(run / "last.ckpt", weights_only=True)["global_step"]
    again = fork_server.start([*short_finetuning(manifests, run, train=[train]), *more], tmp_path / "again.txt")
    while again.is_alive() and torch.load(run / "last.ckpt", weights_only=True)["global_step"] <= step:
        time.sleep(0.05)
    fork_server.end(again)
    assert "Traceback" not in (tmp_path / "again.txt").read_text()
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] > step


def test_metrics_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"val/loss": math.nan, "val/wer": math.inf, "val/cer": 0.5, "steps": 3, "stopped_early": "x"})
    assert parse_json(path.read_bytes()) == json.loads(path.read_text())
    assert json.loads(path.read_text())["val/loss"] is None
    assert json.loads(path.read_text())["val/wer"] is None
    assert kept_metrics(tmp_path) == {}  # without max_steps, it is made again
    write_json(path, {"val/loss": math.nan, "steps": 3})
    assert kept_metrics(tmp_path) == {"val/loss": None, "steps": 3}
