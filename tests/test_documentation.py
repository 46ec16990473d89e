"""What the documentation names exists: commands, options, links, files; and README's Python prints what it states."""

import importlib
import inspect
import re
import shutil
from collections.abc import Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
from documented import code_blocks, commands
from helpers import ROOT, save_ctc
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import hubert_lightning
from hubert_lightning import EncoderConfig, HubertEncoder
from hubert_lightning.cli import main
from hubert_lightning.recipes.commands import OF_FINETUNE, OF_PRETRAIN
from hubert_lightning.short_options import ALIASES
from hubert_lightning.verb_table import VERBS
from hubert_lightning.verbs import RENAMED_OPTIONS, find_verb, signature_of

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
GENERATED = {"contributing.md", "index.md", "reference/verbs.md", "reference/yaml.md", "reference/python.md"} | {
    "reference/transcript-schema.md"
}
"""Pages that docs/generated_pages.py makes."""
LIGHTNING_VERBS = ("fit", "pretrain", "finetune", "validate", "test", "predict")
KEYS = {
    "trainer": [Trainer],
    "checkpoint": [ModelCheckpoint],
    "model.init_args": [hubert_lightning.HubertPretraining, hubert_lightning.CTCFinetuning],
    "data.init_args": [hubert_lightning.PretrainingData, hubert_lightning.TranscribedData],
}
GROUPS = {"subtitles": hubert_lightning.SubtitleStyle}
"""Options of verbs that are classes, whose arguments are written after a dot."""
TOP_KEYS = {"config", "output", "iterations", "seed_everything", "ckpt_path", "print_config", "help"} | {
    "pictures",
    "stalls",
    *ALIASES,
    *OF_PRETRAIN,
    *OF_FINETUNE,
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def inline_code(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def runs_of(config: Path) -> list[str]:
    """The commands in the header of a config."""
    header = re.match(r"(#.*\n)+", config.read_text("utf-8"))
    assert header, config
    text = re.sub(r"\\\n#\s+", "", header[0])
    return re.findall(r"^# (?:Run|Then): (.*)", text, re.MULTILINE)


def check_key(option: str) -> None:
    """Fail unless a key of `hubert fit` exists; keys below those of our classes are theirs."""
    parts = option.split(".")
    if parts[0] in TOP_KEYS:
        return
    group = ".".join(parts[:2]) if parts[0] in ("model", "data") else parts[0]
    assert group in KEYS, f"{option} is no key; the groups are {', '.join([*TOP_KEYS, *KEYS])}"
    key = parts[len(group.split("."))]
    known = {argument for cls in KEYS[group] for argument in inspect.signature(cls).parameters}  # type: ignore[attr-defined]
    assert key in known, f"{option} is no key of {', '.join(cls.__name__ for cls in KEYS[group])}"  # type: ignore[attr-defined]


def check_options(args: list[str]) -> None:
    for arg in args:
        if arg.startswith("--"):
            check_key(arg[2:].partition("=")[0])


def all_functions() -> Iterator[str]:
    for verbs in VERBS.values():
        for target in verbs.values():
            yield from target.values() if isinstance(target, dict) else [target]


@cache
def all_options() -> set[str]:
    """Options of all verbs."""
    return {option for target in all_functions() for option in signature_of(target).optional}


@pytest.fixture(scope="module")
def called() -> Iterator[list[Any]]:
    """Arguments of the verbs that were called, none of which does anything."""
    calls: list[Any] = []

    def stand_in(function: Any) -> Any:
        @wraps(function)
        def note(*args: Any, **values: Any) -> None:
            calls.append(args or values)

        return note

    with pytest.MonkeyPatch.context() as patch:
        for target in all_functions():
            module, _, function = target.partition(":")
            loaded = importlib.import_module(f"hubert_lightning.{module}")
            patch.setattr(loaded, function, stand_in(getattr(loaded, function)))
        yield calls


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=name)
def test_a_command_line_of_the_documentation_parses(page: Path, called: list[Any], tmp_path: Path) -> None:
    blocks = runs_of(page) if page.suffix == ".yaml" else code_blocks(page)
    for block in blocks:
        for args in commands(block):
            called.clear()
            try:
                main(args)
            except SystemExit as stop:
                pytest.fail(f"hubert {' '.join(args)} exits with {stop.code}")
            assert len(called) == 1, f"hubert {' '.join(args)}"
            if args[0] in LIGHTNING_VERBS:
                check_options(args)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_verb_or_an_option_in_a_sentence_exists(page: Path) -> None:
    for code in inline_code(page):
        words = code.removeprefix("uv run ").split()
        if words[0] == "hubert" and len(words) > 1 and words[1].islower() and words[1].isidentifier():
            verb, target, rest = find_verb(VERBS, words[1:])
            options = {re.split("[=.]", word[2:])[0] for word in rest if word.startswith("--")}
            options -= {"help", "print_config"}
            if verb in LIGHTNING_VERBS:
                check_options(rest)
            elif isinstance(target, str):
                unknown = {option.replace("-", "_") for option in options} - set(signature_of(target).optional)
                assert not unknown, f"hubert {verb} has no {unknown}"
        elif (match := re.match(r"--(\w+)\.(\w+)", code)) and match[1] in GROUPS:
            assert match[1] in all_options()
            assert match[2] in inspect.signature(GROUPS[match[1]]).parameters, code
        elif match := re.match(r"'?--([a-z_]+\.[\w.]+)", code):
            check_key(match[1])
        elif match := re.fullmatch(r"--([a-z][\w-]*)( .*)?", code):
            known = all_options() | TOP_KEYS | {"version"}
            assert match[1].replace("-", "_") in known or page.name == "changelog.md", code


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_link_leads_to_a_file(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        file = link.partition("#")[0]
        if file and not link.startswith("http"):
            target = (page.parent / file).resolve()
            made = target.is_relative_to(ROOT / "docs") and str(target.relative_to(ROOT / "docs")) in GENERATED
            assert target.exists() or made, link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "changelog.md"], ids=name)
def test_a_file_that_a_page_names_is_there(page: Path) -> None:
    folders = "configs|tests|docs|benchmarks|hubert_lightning"
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", page.read_text("utf-8")):
        assert (ROOT / path).exists(), path
    for code in inline_code(page):  # paths inside the package
        if re.fullmatch(r"[\w/]+\.py", code) and not (ROOT / code).exists():
            assert (ROOT / "hubert_lightning" / code).exists(), code


def test_every_test_that_the_matrix_of_formats_names_is_there() -> None:
    named = set(re.findall(r"\btest_\w+", (ROOT / "docs/dev/formats.md").read_text("utf-8")))
    files = {file.stem: file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py")}
    defined = {test for text in files.values() for test in re.findall(r"def (test_\w+)", text)}
    assert len(named) > 20
    assert not named - defined - files.keys()


def test_the_changelog_lists_every_renamed_option() -> None:
    changelog = (ROOT / "docs/changelog.md").read_text("utf-8").replace("-", "_")
    for verb, names in RENAMED_OPTIONS.items():
        for former, current in names.items():
            assert f"| `{verb.replace('-', '_')}` | `__{former}` | `__{current}` |" in changelog, f"{verb} --{former}"


def test_the_python_of_the_readme_prints_what_it_states(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert 'load_encoder("facebook/hubert-base-ls960")' in block
    stated = re.findall(r"print\(.*\)  # (torch\.Size\(.*?\))", block)
    config = EncoderConfig(conv_channels=8, ffn_dim=8, num_layers=9)  # Base's width, no download
    code = block.replace('load_encoder("facebook/hubert-base-ls960")', "random_encoder")
    exec(code, {"random_encoder": HubertEncoder(config).eval()})
    assert capsys.readouterr().out.splitlines() == stated


def test_the_python_of_transcribing_runs(
    tmp_path: Path, speech: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/transcribing.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "checkpoints/own").mkdir(parents=True)
    save_ctc(tmp_path / "checkpoints/own/best.ckpt", spread=3.0)
    (tmp_path / "recordings").mkdir()
    for name in ("recording.wav", "recordings/a.wav"):
        shutil.copy(speech[0], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert names["transcript"].to_srt() in printed
    assert "Transcript(file='recordings/a.wav'" in printed
    assert names["words"]
