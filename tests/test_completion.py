"""Shell completion: the scripts of `hubert completion` complete real command lines in real shells."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import refused

from hubert_lightning.cli import main
from hubert_lightning.completion import script_of
from hubert_lightning.packaged_configs import config_names
from hubert_lightning.recipes.commands import OF_FINETUNE, OF_PRETRAIN
from hubert_lightning.verb_table import VERBS

IN_BASH = """
source "$0"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
function=$(complete -p hubert | sed -E 's/.*-F ([^ ]+) .*/\\1/')
$function
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "hubert.bash"
    path.write_text(script_of("bash"))
    return path


def completed(script: Path, *words: str, folder: Path | None = None) -> set[str]:
    """What bash offers for the last word of a command line."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    command = ["bash", "--norc", "--noprofile", "-c", IN_BASH, str(script), *words]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder or script.parent)
    assert run.stderr == ""
    return set(run.stdout.split("\n")) - {""}


def test_bash_completes_verbs_and_verbs_of_verbs(script: Path) -> None:
    assert completed(script, "hubert", "") == {verb for group in VERBS.values() for verb in group}
    assert completed(script, "hubert", "tr") == {"transcribe"}
    assert completed(script, "hubert", "prepare", "") == set(VERBS["data"]["prepare"])
    assert completed(script, "hubert", "kmeans", "ex") == {"export"}


def test_bash_completes_options_of_the_verb_and_their_choices(script: Path) -> None:
    assert completed(script, "hubert", "transcribe", "--hot") == {"--hot_words", "--hot_words_weight"}
    assert completed(script, "hubert", "transcribe", "m.ckpt", "a.wav", "--format", "s") == {"srt"}
    assert completed(script, "hubert", "pretrain", "--size", "") == {"small", "base", "large", "xlarge"}
    assert completed(script, "hubert", "prepare", "folder", "--transcribed_only", "") == {"true", "false"}
    assert "--hot_words" not in completed(script, "hubert", "align", "--")


def test_bash_completes_keys_of_configs_and_short_forms(script: Path) -> None:
    assert completed(script, "hubert", "fit", "--data.init_args.tr") == {"--data.init_args.train"}
    assert "--trainer.max_steps" in completed(script, "hubert", "fit", "--trainer.max")
    assert completed(script, "hubert", "finetune", "--te") == {"--text_column"}
    assert "--batch_seconds" in completed(script, "hubert", "pretrain", "--ba")


@pytest.mark.parametrize(("verb", "options"), [("pretrain", OF_PRETRAIN), ("finetune", OF_FINETUNE)])
def test_every_option_of_the_short_commands_is_completed(script: Path, verb: str, options: dict[str, type]) -> None:
    assert {f"--{name}" for name in options} <= completed(script, "hubert", verb, "--")
    assert completed(script, "hubert", verb, "--language_folders", "") == {"true", "false"}


def test_bash_completes_config_names_and_files(script: Path, tmp_path: Path) -> None:
    names = {name for name, _ in config_names()}
    typed = completed(script, "hubert", "fit", "--config", "pretrain/", folder=tmp_path)
    assert typed == {name for name in names if name.startswith("pretrain/")}
    assert completed(script, "hubert", "plan", "finetune/10m", folder=tmp_path) == {"finetune/10min"}
    (tmp_path / "own.yaml").touch()
    assert completed(script, "hubert", "fit", "--config", "ow", folder=tmp_path) == {"own.yaml"}
    (tmp_path / "talks").mkdir()
    assert completed(script, "hubert", "prepare", "folder", "t", folder=tmp_path) == {"talks"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_another_shell_reads_its_script(shell: str, tmp_path: Path) -> None:
    script = script_of(shell)  # type: ignore[arg-type]
    assert "pretrain/base" in script
    assert "hot_words" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell}, which would read the script, is not installed")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_fish_completes_verbs_and_config_names(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "script").write_text(script_of("fish"))
    (tmp_path / "model.ckpt").touch()
    for typed, offered in (
        ("hubert transc", "transcribe"),
        ("hubert kmeans ex", "export"),
        ("hubert transcribe --form", "--format"),
        ("hubert transcribe m.ckpt --format ", "srt"),
        ("hubert pretrain --size ", "xlarge"),
        ("hubert transcribe mod", "model.ckpt"),
        ("hubert fit --config pretrain/sm", "pretrain/small"),
    ):
        line = f"source {tmp_path / 'script'}; complete -C '{typed}'"
        command = ["fish", "--no-config", "-c", line]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert offered in re.split(r"[\t\n]", run.stdout)


def test_the_verb_prints_the_script_and_refuses_other_shells(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    assert capsys.readouterr().out == script.read_text() + "\n"
    assert "tcsh" in refused(capsys, "completion", "tcsh")
