"""YAML of others is refused in one sentence where it would end the process, wait, or fill the memory."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import refused

from hubert_lightning.cli import main
from hubert_lightning.untrusted.yaml_file import check_yaml, parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{level}: &a{level} [*a{level - 1}]\n" for level in range(1, 500))
HOSTILE = {
    "brackets": "[" * 200_000,
    "braces": "{a: " * 50_000,
    "dashes": "- " * 50_000,
    "aliases": BOMB,
    "a chain of aliases": CHAIN,
    "itself": f"# {'long ' * 30}\na: &a [*a]\n",
}


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**32)


PLACES: dict[str, Callable[[Path], None]] = {
    **{name: lambda path, text=text: path.write_text(text) and None for name, text in HOSTILE.items()},  # type: ignore[misc]
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "4 GB": sparse,
    "no text": lambda path: path.write_bytes(b"\xff\xfea: 1") and None,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_text_that_nests_or_repeats_itself_too_much_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match=r"nested deeper|more than \d+ values|inside of its own"):
        parse_yaml(text)


def test_aliases_and_a_hundred_levels_are_read_as_ever() -> None:
    text = "peak: &peak {rate: 1.0e-3, steps: [1, 2]}\nbase: {<<: *peak, rate: 2.0e-3}\nlarge: *peak\n" + "#" * 100
    assert parse_yaml(text) == yaml.safe_load(text)
    deep = "[" * 100 + "]" * 100
    check_yaml(deep)
    with pytest.raises(yaml.YAMLError, match="deeper"):
        check_yaml(f"[{deep}]")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "command", ["fit --config", "average --config", "labels check --config", "average", "fit --model"]
)
def test_an_unusable_config_is_refused_in_one_sentence(
    command: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    PLACES[place](path)
    verb, *option = command.split()
    out = [] if command != "average" else [str(tmp_path / "out")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SystemExit) as stopped:
        main([verb, *option, str(path), *out])
    assert stopped.value.code == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB
    said = capsys.readouterr().err.strip()
    assert said.startswith("hubert: ")
    assert "Traceback" not in said
    assert "\n" not in said
    assert str(path) in said or command in ("average", "fit --model")


@pytest.mark.parametrize(
    "content", ["path,text\na.wav,secret\n", "- secret\n", "", "# secret\n", "secret: 'x\ny'\n- z"]
)
@pytest.mark.parametrize("verb", ["fit", "test", "average", "labels check", "kmeans fit"])
def test_a_file_without_keys_is_no_config_and_is_not_shown(
    verb: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    said = refused(capsys, *verb.split(), "--config", str(path))
    assert said.startswith(f"hubert: {path}: not ")
    assert "; correct " in said
    assert "secret" not in said
    assert len(said.splitlines()) == 1


def test_a_large_file_given_as_a_config_is_not_to_be_removed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "table.csv"
    sparse(path)
    for command in (["fit", "--config"], ["plan"], ["kmeans", "fit", "--config"]):
        said = refused(capsys, *command, str(path))
        assert said == (
            f"hubert: {path}: has more than 10000000 bytes, where a config has a few thousand; correct the path\n"
        )


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: [1, 2.5, x]\n")
    assert read_yaml(path) == {"a": [1, 2.5, "x"]}
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_yaml(path, 3)
