"""The Dockerfile and the commands of Docker in the documentation agree with pyproject.toml; no image is built."""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator

import pytest
from documented import code_blocks
from helpers import ROOT
from packaging.specifiers import SpecifierSet

from hubert_lightning.verb_table import VERBS

DOCKERFILE = ROOT / "docs/docker/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
COMMENTS = "".join(re.findall(r"^# (docker .*\n)", DOCKERFILE.read_text("utf-8"), re.MULTILINE))


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.*)$", DOCKERFILE.read_text("utf-8"), re.MULTILINE)


def docker_commands(verb: str) -> Iterator[list[str]]:
    """Words of the commands `docker build` and `docker run` in the documentation and in the Dockerfile."""
    for block in [COMMENTS, *(block for page in sorted((ROOT / "docs").glob("*.md")) for block in code_blocks(page))]:
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(f"docker {verb} "):
                yield shlex.split(line)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_every_image_has_a_python_that_the_package_supports() -> None:
    for image in instructions("FROM"):
        [version] = re.findall(r"^python:(\d+\.\d+)-slim AS \w+$", image)
        assert version in SpecifierSet(PROJECT["project"]["requires-python"])
        assert f"Programming Language :: Python :: {version}" in PROJECT["project"]["classifiers"]


def test_the_source_has_all_that_the_wheel_is_built_of() -> None:
    copied = {name for words in instructions("COPY") for name in words.split()[:-1]}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert copied == {"pyproject.toml", PROJECT["project"]["readme"], *wheel["packages"], *wheel["force-include"]} | {
        "LICENSE"
    }
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_for_the_cpu_is_installed_as_the_documentation_says() -> None:
    [torch] = [words for words in instructions("RUN") if "--index-url" in words]
    commands = [line for block in code_blocks(ROOT / "docs/install.md") for line in block.splitlines()]
    assert torch.replace(" --no-cache-dir", "") in commands


def test_commands_build_targets_that_there_are_with_extras_that_there_are() -> None:
    targets = {image.rpartition(" ")[2] for image in instructions("FROM")} - {"source"}
    builds = [*docker_commands("build")]
    assert {option(words, "--target") for words in builds} == targets
    for words in builds:
        assert (ROOT / option(words, "--file")) == DOCKERFILE
        extras = option(words, "--build-arg").removeprefix("EXTRAS=").split(",") if "--build-arg" in words else []
        assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])


def test_commands_run_verbs_in_images_that_are_built() -> None:
    assert set(instructions("ENTRYPOINT")) == {'["hubert"]'}
    tags = {option(words, "--tag") for words in docker_commands("build")}
    runs = [*docker_commands("run")]
    assert len(runs) > 1
    for words in runs:
        [place] = [index for index, word in enumerate(words) if word in tags]
        assert words[place + 1] in {verb.split()[0] for verbs in VERBS.values() for verb in verbs}


@pytest.mark.parametrize(("extras", "argument"), [("", "/source"), ("serve,bpe", "/source[serve,bpe]")])
def test_extras_are_an_argument_of_the_build(extras: str, argument: str) -> None:
    [form] = {re.findall(r"pip install --no-cache-dir (\S*source\S*)$", words)[0] for words in instructions("RUN")[1:]}
    done = subprocess.run(["sh", "-c", f"printf %s {form}"], env={"EXTRAS": extras}, capture_output=True, text=True)
    assert done.stdout == argument
