"""configs/recipes/librispeech.sh runs any cell of the paper's table, and resumes where it was interrupted.

`hubert` is a stand-in, which notes what it was asked for and leaves the files that the real one leaves; the last test
takes the real one.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from hubert_lightning.cli import main

SCRIPT = ROOT / "configs/recipes/librispeech.sh"
SETS = ("dev-clean", "dev-other", "test-clean", "test-other")
FOLDERS = {"base": [""], "large": ["", "large/"], "xlarge": ["", "large/", "xlarge/"]}
TRAIN = {"100h": ["train-clean-100"], "960h": ["train-clean-100", "train-clean-360", "train-other-500"]}
CELLS = [(size, split) for size in FOLDERS for split in ("10min", "1h", "10h", "100h", "960h")]
# The word error rate of a set counts on from 10.0 %, with the language model from 5.0 %
HUBERT = """#!/usr/bin/env bash
set -eu
(IFS=$'\\t'; echo "$*" >> commands.tsv)
manifests() { for name in "$@"; do : > manifests/$name.jsonl.gz; done; }
mkdir -p manifests
case $1 in
  prepare)
    case $2 in
      librispeech) IFS=, && manifests $(tr -d '[]' <<< "$6") ;;
      librilight) manifests 10min 1h 10h ;;
    esac ;;
  fit)
    run=${*: -1}
    [[ -f $run/metrics.json ]] && echo "$run: finished already" && exit
    mkdir -p $run
    [[ ! ${INTERRUPTED:-} ]] || exit $INTERRUPTED
    for name in config.yaml last.ckpt best.ckpt metrics.json; do : > $run/$name; done ;;
  tune-decoder) echo '{}' > "$4" ;;
  test)
    run=${3%/config.yaml}
    case $4 in *dev-clean*) wer=0 ;; *dev-other*) wer=1 ;; *test-clean*) wer=2 ;; *) wer=3 ;; esac
    [[ $* == *decoder.json ]] && wer=0.05$wer || wer=0.10$wer
    echo "{\\"id\\": \\"$4\\"}" > $run/test.jsonl
    printf '{\\n  "test/loss": 9.5,\\n  "test/wer": %s,\\n  "test/cer": 0.5\\n}\\n' $wer > $run/test-metrics.json
    echo '{}' > $run/scores.json ;;
esac
"""
# Asks the process that reads the pipe, and ends when that has answered
RELAY = """#!/usr/bin/env bash
printf '%s\\n' "$@" > asked
cat answered > /dev/null
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the script is called: encoders of all sizes, a corpus and a language model are there."""
    (tmp_path / "hubert").write_text(HUBERT)
    (tmp_path / "hubert").chmod(0o755)
    for encoder in ("base/iteration2", "large/iteration1", "xlarge/iteration1"):
        (tmp_path / "checkpoints" / encoder).mkdir(parents=True)
        (tmp_path / "checkpoints" / encoder / "last.ckpt").touch()
    (tmp_path / "corpora").mkdir()
    for name in ("lm.arpa", "lexicon.txt"):
        (tmp_path / name).touch()
    return tmp_path


def run(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SCRIPT, *args],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HUBERT": "./hubert"} | environment,
        capture_output=True,
        text=True,
    )


def commands(folder: Path) -> list[list[str]]:
    """What the stand-in was asked for since it was last looked."""
    noted = (folder / "commands.tsv").read_text().splitlines() if (folder / "commands.tsv").exists() else []
    (folder / "commands.tsv").unlink(missing_ok=True)
    return [line.split("\t") for line in noted]


def a_test(output: str, name: str, *more: str) -> list[str]:
    return ["test", "--config", f"{output}/config.yaml", f"--data.init_args.test=[manifests/{name}.jsonl.gz]", *more]


@pytest.mark.parametrize(("size", "split"), CELLS)
def test_a_cell_is_fitted_tuned_and_tested_by_one_command(size: str, split: str, folder: Path) -> None:
    environment = {"DATA": "corpora", "LM": "lm.arpa", "LEXICON": "lexicon.txt", "EXTRA": "--trainer.devices 8"}
    done = run(folder, size, split, **environment)
    assert done.returncode == 0, done.stderr

    configs = [ROOT / f"configs/finetune/{layer}{split}.yaml" for layer in FOLDERS[size]]
    last = yaml.safe_load(configs[-1].read_text())
    output = last["output"]  # of the config, as is the encoder
    subsets = [*TRAIN.get(split, []), "dev-other", "dev-clean", "test-clean", "test-other"]
    limited = [["prepare", "librilight", "corpora", "manifests"]] if split not in TRAIN else []
    decoder = f"{output}/decoder.json"
    first, second, *tests = (
        [["prepare", "librispeech", "corpora", "manifests", "--subsets", f"[{','.join(subsets)}]"], *limited],
        [
            ["fit", *(word for config in configs for word in ("--config", str(config)))]
            + ["--model.init_args.pretrained", last["model"]["init_args"]["pretrained"]]
            + ["--trainer.devices", "8", "--output", output],
            ["tune-decoder", f"{output}/best.ckpt", "[manifests/dev-other.jsonl.gz]", decoder]
            + ["--lm", "lm.arpa", "--lexicon", "lexicon.txt", "--trials", "60"],
        ],
        *([a_test(output, name), a_test(output, name, "--model.init_args.decoder", decoder)] for name in SETS),
    )
    assert commands(folder) == [*first, *second, *(command for both in tests for command in both)]
    assert done.stdout.splitlines()[-1] == f"| {split} | {size} | 10.0/10.1/10.2/10.3 | 5.0/5.1/5.2/5.3 |"
    for name in SETS:
        for result in (name, f"{name}-lm"):
            assert f"manifests/{name}.jsonl.gz" in (folder / output / f"{result}.jsonl").read_text()
            assert "test/wer" in (folder / output / f"{result}.metrics.json").read_text()
            assert (folder / output / f"{result}.scores.json").exists()

    again = run(folder, size, split, **environment | {"DATA": ""})
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert [command[0] for command in commands(folder)] == ["fit"]  # which says that it is finished


def test_without_a_language_model_it_decodes_greedily(folder: Path) -> None:
    done = run(folder, "base", "10h", DATA="corpora", SETS="test-clean")
    assert [command[0] for command in commands(folder)] == ["prepare", "prepare", "fit", "test"]
    assert done.stdout.splitlines()[-2:] == [
        "| labels | size | greedy, WER % on test-clean | with LM |",
        "| 10h | base | 10.2 |  |",
    ]


def test_a_language_model_that_comes_later_adds_what_is_missing(folder: Path) -> None:
    run(folder, "base", "10h", DATA="corpora")
    commands(folder)
    assert run(folder, "base", "10h", LM="lm.arpa", LEXICON="lexicon.txt").returncode == 0
    assert [command[0] for command in commands(folder)] == ["fit", "tune-decoder", *4 * ["test"]]


def test_what_is_older_than_the_checkpoint_is_done_again(folder: Path) -> None:
    environment = {"LM": "lm.arpa", "LEXICON": "lexicon.txt"}
    run(folder, "base", "10h", DATA="corpora", **environment)
    commands(folder)
    (folder / "checkpoints/base-10h/best.ckpt").touch()
    run(folder, "base", "10h", **environment)
    assert [command[0] for command in commands(folder)] == ["fit", "tune-decoder", *8 * ["test"]]


@pytest.mark.parametrize("code", ["143", "0"])  # told to end; ended by Ctrl-C
def test_a_fit_that_did_not_end_is_not_tested(code: str, folder: Path) -> None:
    done = run(folder, "base", "10h", DATA="corpora", INTERRUPTED=code)
    assert done.returncode == int(code) or "the fit did not end; the same command resumes" in done.stderr
    assert done.returncode != 0
    assert [command[0] for command in commands(folder)] == ["prepare", "prepare", "fit"]
    assert run(folder, "base", "10h").returncode == 0


def test_another_encoder_can_be_named(folder: Path) -> None:
    (folder / "hubert-base-ls960").mkdir()
    run(folder, "base", "10h", DATA="corpora", PRETRAINED="hubert-base-ls960")
    [fit] = [command for command in commands(folder) if command[0] == "fit"]
    assert fit[fit.index("--model.init_args.pretrained") + 1] == "hubert-base-ls960"


@pytest.mark.parametrize(
    ("args", "environment", "sentence"),
    [
        ([], {}, "give a size and a split, as in: configs/recipes/librispeech.sh base 10h"),
        (["huge", "10h"], {}, "the size 'huge' is none of base, large and xlarge"),
        (["base", "10hours"], {}, "the split '10hours' is none of 10min, 1h, 10h, 100h and 960h"),
        (["base", "10h"], {"DATA": ""}, "manifests are missing, and DATA is not set; give the folder that holds Libri"),
        (["base", "10h"], {"DATA": "nowhere"}, "nowhere: no such folder; correct DATA, which holds LibriSpeech"),
        (["base", "10h"], {"PRETRAINED": "no.ckpt"}, "no.ckpt: no such encoder; pre-train it (configs/pretrain/base."),
        (["base", "10h"], {"LM": "lm.arpa"}, "LM is set, and LEXICON is not; make one of it by `hubert lexicon`"),
        (["base", "10h"], {"LEXICON": "lexicon.txt"}, "LEXICON is set, and LM is not; give both or neither"),
        (["base", "10h"], {"LM": "lm.arpa", "LEXICON": "gone.txt"}, "gone.txt: no such file; correct LM or LEXICON"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(
    args: list[str], environment: dict[str, str], sentence: str, folder: Path
) -> None:
    done = run(folder, *args, **{"DATA": "corpora"} | environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"librispeech.sh: {sentence}")
    assert len(done.stderr.splitlines()) == 1
    assert not commands(folder)


def run_with_the_real_command(folder: Path, **environment: str) -> str:
    """What the script prints for Base and 10 h.

    This process is the command, since it has imported already what takes a new one ten seconds.
    """
    (folder / "hubert").write_text(RELAY)
    (folder / "hubert").chmod(0o755)
    for pipe in ("asked", "answered"):
        os.mkfifo(folder / pipe)
    script = subprocess.Popen(
        ["bash", "-c", '"$0" base 10h; code=$?; : > asked; exit $code', SCRIPT],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HUBERT": "./hubert"} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while words := (folder / "asked").read_text().splitlines():
            main(words)
            (folder / "answered").write_text("done")
        printed, _ = script.communicate(timeout=60)
    finally:
        script.kill()
    assert script.returncode == 0
    return printed


@pytest.mark.slow
def test_the_real_command_ends_in_a_row_of_error_rates(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    speech = f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]"
    smoke = ["--config", str(ROOT / "configs/demo.yaml"), "--config", str(ROOT / "tests/smoke.yaml")]
    iteration = "--iterations=[{features: mfcc, clusters: 10, max_frames: 1000, max_steps: 1}]"
    encoder = tmp_path / "checkpoints/base"
    main(["fit", *smoke, speech, "--data.init_args.validation=null", iteration, f"--output={encoder}"])
    (tmp_path / "manifests").mkdir()
    for name, ours in {"10h": "finetune", "dev-other": "dev", "test-clean": "test"}.items():
        shutil.copy(manifests / f"{ours}.jsonl.gz", tmp_path / "manifests" / f"{name}.jsonl.gz")

    pretrained = "checkpoints/base/iteration1/last.ckpt"
    printed = run_with_the_real_command(
        tmp_path,
        PRETRAINED=pretrained,
        SETS="test-clean",
        EXTRA=f"--config {ROOT / 'tests/smoke-finetune.yaml'} --model.init_args.pretrained={pretrained}",
    )
    output = tmp_path / "checkpoints/base-10h"
    wer = json.loads((output / "test-clean.metrics.json").read_text())["test/wer"]
    assert printed.splitlines()[-1] == f"| 10h | base | {100 * wer:.1f} |  |"
    assert (output / "test-clean.jsonl").read_text() == (output / "test.jsonl").read_text()
    assert yaml.safe_load((output / "config.yaml").read_text())["model"]["init_args"]["pretrained"] == pretrained
