"""Command lines of verbs: lists, renamed options, suggestions; and the private parts of jsonargparse."""

import argparse
import importlib
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers import refused
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI

import hubert_lightning
from hubert_lightning import parsing, verbs
from hubert_lightning.cli import main
from hubert_lightning.errors import UserError
from hubert_lightning.parsing import actions_of, option_names
from hubert_lightning.short_options import ALIASES
from hubert_lightning.training.commands import HELP, KEYS
from hubert_lightning.training.hubert_cli import HubertCLI
from hubert_lightning.verb_table import VERBS
from hubert_lightning.verbs import RENAMED_OPTIONS, Signature, call_verb, signature_of

UPGRADE = "jsonargparse has changed: correct this part of hubert_lightning/parsing.py, and the sentences made of it"


def targets() -> dict[str, str]:
    found = {}
    for group in VERBS.values():
        for verb, target in group.items():
            inner = target if isinstance(target, dict) else {"": target}
            found |= {f"{verb} {name}".strip(): function for name, function in inner.items()}
    return found


@pytest.mark.parametrize(("verb", "target"), targets().items(), ids=targets())
def test_the_signature_in_the_source_is_that_of_the_function(verb: str, target: str) -> None:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(f"hubert_lightning.{module}"), name)
    signature = signature_of(target)
    assert [*signature.required, *signature.optional] == list(inspect.signature(function).parameters)
    assert signature.summary == str(inspect.getdoc(function)).split("\n")[0] != ""
    assert set(RENAMED_OPTIONS.get(verb, {}).values()) <= signature.optional.keys()
    assert not RENAMED_OPTIONS.get(verb, {}).keys() & signature.optional.keys()


def test_every_renamed_option_is_one_of_a_verb() -> None:
    assert RENAMED_OPTIONS.keys() <= targets().keys()


# A verb whose function is this test's, with arguments of every kind


def several(labels: list[Path], manifest: list[Path], out: Path, clusters: list[int], hop: int = 320) -> tuple:
    """Take lists.

    Args:
        labels: Files of labels.
        manifest: Manifests.
        out: Folder.
        clusters: Numbers of clusters.
        hop: Samples.
    """
    return labels, manifest, out, clusters, hop


def flagged(files: list[Path], flag: bool = False, keep_punctuation: str = "'", number: int = 0) -> tuple:
    """Take a flag.

    Args:
        files: Files.
        flag: Flag.
        keep_punctuation: Characters.
        number: Number.
    """
    return files, flag, keep_punctuation, number


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable, list[str]], Any]:
    def signature(target: str) -> Signature:
        function = globals()[target.partition(":")[2]]
        kinds = {
            name: inspect.formatannotation(parameter.annotation).replace("pathlib.", "")
            for name, parameter in inspect.signature(function).parameters.items()
        }
        required = {
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is inspect.Parameter.empty
        }
        return Signature(
            "Test.",
            {name: kind for name, kind in kinds.items() if name in required},
            {name: kind for name, kind in kinds.items() if name not in required},
        )

    monkeypatch.setattr(verbs, "signature_of", signature)
    monkeypatch.setattr(verbs, "stub_of", lambda target: None)  # the function is in no source of the package
    monkeypatch.setattr(importlib, "import_module", lambda name: sys.modules[__name__])
    return lambda function, args: call_verb("verb", f"module:{function.__name__}", args)


@pytest.mark.parametrize(
    "typed",
    [
        "a.km b.km m.jsonl.gz out 100 500",
        "[a.km,b.km] m.jsonl.gz out 100 500",
        "[a.km,b.km] [m.jsonl.gz] out [100,500]",
        "a.km b.km m.jsonl.gz --hop=320 out [100,500]",
        "--hop 320 a.km b.km -- m.jsonl.gz out 100 500",
    ],
)
def test_a_list_is_several_arguments_or_one_in_brackets(call: Callable, typed: str) -> None:
    labels, manifest, out, clusters, hop = call(several, typed.split())
    assert (labels, manifest, out) == ([Path("a.km"), Path("b.km")], [Path("m.jsonl.gz")], Path("out"))
    assert (clusters, hop) == ([100, 500], 320)


@pytest.mark.parametrize(
    "typed", ["--hop 7 a.km b.km m out 100 --config {}", "--config={} --hop 7 a.km b.km m out 100"]
)
def test_options_override_a_config_and_lists_of_arguments_stay_plain_beside_one(
    call: Callable, typed: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("hop: 5")
    labels, manifest, _, clusters, hop = call(several, typed.format(tmp_path / "c.yaml").split())
    assert (labels, manifest, clusters, hop) == ([Path("a.km"), Path("b.km")], [Path("m")], [100], 7)
    (tmp_path / "all.yaml").write_text("{labels: [a.km], manifest: [m], out: out, clusters: [100], hop: 5}")
    assert call(several, ["--config", str(tmp_path / "all.yaml")])[0] == [Path("a.km")]


def test_a_list_in_brackets_takes_no_other_argument(call: Callable) -> None:
    labels, manifest, *_ = call(several, ["[a.km]", "m1.jsonl.gz", "m2.jsonl.gz", "out", "100"])
    assert labels == [Path("a.km")]
    assert manifest == [Path("m1.jsonl.gz"), Path("m2.jsonl.gz")]


def listed(
    files: list[Path],
    out: Path,
    clusters: int | list[int] = 100,
    manifest: list[Path] | None = None,
    hop: int = 320,
    case: Literal["lower", "upper", "as_written"] = "lower",
) -> tuple:
    """Take lists as options.

    Args:
        files: Files.
        out: Folder.
        clusters: Numbers of clusters.
        manifest: Manifests.
        hop: Samples.
        case: Case of letters.
    """
    return files, out, clusters, manifest, hop


@pytest.mark.parametrize(
    "typed",
    [
        "a.wav b.wav out --clusters 10 20 --manifest m1 m2",
        "--clusters 10 20 a.wav b.wav out --manifest m1 m2 --hop 320",
        "--manifest m1 m2 --clusters [10,20] a.wav b.wav out",
        "--manifest [m1,m2] --clusters=[10,20] a.wav b.wav out",
        "--clusters 10 20 --manifest m1 m2 -- a.wav b.wav out",
    ],
)
def test_an_option_that_is_a_list_takes_several_values_or_one_in_brackets(call: Callable, typed: str) -> None:
    files, out, clusters, manifest, hop = call(listed, typed.split())
    assert (files, out) == ([Path("a.wav"), Path("b.wav")], Path("out"))
    assert (clusters, manifest, hop) == ([10, 20], [Path("m1"), Path("m2")], 320)


def test_an_option_that_is_a_list_takes_one_value(call: Callable) -> None:
    assert call(listed, ["a.wav", "out", "--clusters", "10", "--manifest", "m1"])[2:4] == (10, [Path("m1")])
    assert call(listed, ["a.wav", "out", "--manifest=m1"])[3] == [Path("m1")]


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["--clusters", "abc"], "^--clusters abc: not a whole number; `hubert"),
        (["--clusters=[10, x]"], "^--clusters x: not a whole number; `hubert"),
        (["--case", "title"], "^--case title: choose lower, upper or as_written$"),
    ],
)
def test_a_value_of_another_type(call: Callable, typed: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        call(listed, ["a.wav", "out", *typed])


def test_arguments_after_the_values_of_an_option(call: Callable) -> None:
    with pytest.raises(
        UserError, match=r"^FILES, OUT missing; --manifest took all values .* '\[a,b\]' if arguments follow"
    ):
        call(listed, ["--manifest", "m1", "a.wav", "out"])


def test_a_path_may_be_a_number_or_have_spaces(call: Callable) -> None:
    files, *_ = call(flagged, ["1", "two words.wav", "ü.wav", "-"])
    assert files == [Path("1"), Path("two words.wav"), Path("ü.wav"), Path("-")]


def test_a_flag_takes_a_value_only_if_it_is_one(call: Callable) -> None:
    assert call(flagged, ["--flag", "a.wav"])[:2] == ([Path("a.wav")], True)
    assert call(flagged, ["--flag", "false", "a.wav"])[:2] == ([Path("a.wav")], False)
    assert call(flagged, ["a.wav", "--number", "-1"])[3] == -1


def test_hyphens_and_underscores_in_options_are_alike(call: Callable) -> None:
    assert call(flagged, ["a.wav", "--keep-punctuation", "'-"])[2] == "'-"


def test_a_former_name_of_an_option_works_with_a_warning(
    call: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(RENAMED_OPTIONS, "verb", {"kept": "keep_punctuation"})
    with caplog.at_level(logging.WARNING):
        assert call(flagged, ["a.wav", "--kept=!"])[2] == "!"
    assert "hubert: --kept: renamed to --keep_punctuation" in caplog.text


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("a.wav --numbr=3", r"there is no option numbr; did you mean --number\?"),
        ("a.wav -n 3", "there is no option n;"),
        ("--files=a.wav", r"FILES is given without its name: `hubert verb FILES \.\.\. \[options\]`"),
        ("", "FILES missing; `hubert verb --help` lists the arguments"),
        ("a.wav --number=many", "^--number many: not a whole number; `hubert verb --help` lists the options"),
        ("a.wav --number", "number: expects a value"),
    ],
)
def test_a_mistake_is_one_sentence(call: Callable, typed: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        call(flagged, typed.split())


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("trascribe x", "'trascribe' is not a verb of hubert; did you mean transcribe?"),
        ("prepare libriligt x", "'libriligt' is not a verb of hubert prepare; did you mean librilight?"),
        ("quality m x --clustrs=3", "there is no option clustrs; did you mean --clusters?"),
        ("fit --learning_rate 1e-3", "no option learning_rate; the key is model.init_args.optimizer.init_args.lr"),
        ("validate --lr 1e-3", "there is no option lr; the key is model.init_args.optimizer.init_args.lr"),
        ("fit --config demo --iterations.1.steps 3", "--iterations.1.steps: an iteration has no steps; its keys are"),
        ("configs copy pretrain/bse .", "did you mean pretrain/base? `hubert configs` lists them"),
        ("fit --batch_size=8", "the key is data.init_args.max_duration"),
        ("fit configs/demo.yaml", "configs/demo.yaml is given without --config; write --config configs/demo.yaml"),
        ("fit --config no.yaml", "no.yaml: there is no such config; correct the path; `hubert configs` lists those"),
        ("test --config no.yaml", "correct the path, or give the config.yaml of a run"),
        ("fit --config configs/clusters/a.yaml", "moved; write configs/pretrain/ablations/a.yaml\n"),
        ("fit --config configs/cluster/a.sh", "moved; write configs/launch/a.sh\n"),
        ("fit --config x/configs/size/a.yaml", "moved; write x/configs/pretrain/size/a.yaml\n"),
        ("fit configs/librispeech.sh", "moved; write configs/recipes/librispeech.sh\n"),
        ("fit --help modell", "--help modell: there is no help on that; write `hubert fit --help`"),
        (
            "fit --model.help CTCFinetuning",
            "write hubert_lightning.HubertPretraining or hubert_lightning.CTCFinetuning",
        ),
        (
            "fit --model.help CTCFinetunin",
            "--model.help CTCFinetunin: not the full name of a class; write hubert_lightning.",
        ),
        ("fit", "which config? `hubert fit --config CONFIG`\n"),
        ("test", "give the config.yaml of a run"),
    ],
)
def test_mistakes_are_answered_before_heavy_packages_are_imported(typed: str, sentence: str) -> None:
    code = (
        "import sys\nfrom hubert_lightning.cli import main\n"
        f"try: main({typed.split()!r})\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'lightning', 'lhotse', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sentence in done.stderr
    assert done.stdout == "[]\n"


def test_fit_alone_lists_the_configs(capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, "fit")
    assert "  pretrain/base  " in said
    assert "HuBERT Base (95 M parameters)" in said
    assert all(line.endswith(".") for line in said.splitlines()[1:])


def test_the_version(capsys: pytest.CaptureFixture) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"hubert_lightning {hubert_lightning.__version__}\n"


def test_a_closed_pipe_ends_a_verb_without_a_traceback() -> None:
    command = f"{sys.executable} -m hubert_lightning --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == "usage: hubert VERB ..."
    assert done.stdout.splitlines()[-1] in ("141", "0")  # 0 if all was written before the pipe was closed


def test_a_closed_pipe_ends_a_table_with_the_status_of_a_closed_pipe(tmp_path: Path) -> None:
    results = tmp_path / "test.jsonl"
    results.write_text('{"id": "a", "hypothesis": "one two", "reference": "one too"}\n')
    command = f"{sys.executable} -m hubert_lightning score {results} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_the_help_of_fit_fits_two_screens(capsys: pytest.CaptureFixture) -> None:
    main(["fit", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120


def test_the_help_of_fit_names_keys_and_classes_that_there_are() -> None:
    keys = {line.split()[0].removeprefix("--") for line in HELP.splitlines() if line.startswith("  --")}
    known = fit_keys() | {*ALIASES, "iterations.1.KEY"}
    assert keys | {value.split()[0] for value in KEYS.values() if " of an entry" not in value} <= known
    assert not {f"--{name}" for name in KEYS} & {f"--{key}" for key in fit_keys() if "." not in key}
    classes = [name.strip(",") for line in HELP.splitlines()[-3:] for name in line.split() if name[0].isupper()]
    assert set(classes) <= set(hubert_lightning.__all__)  # type: ignore[attr-defined]


def fit_keys() -> set[str]:
    """Every key of `hubert fit`, those of our classes included."""

    class Keys(Exception):
        pass

    class OnlyParser(HubertCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.keys = set(option_names(parser))
            raise Keys

    cli = OnlyParser.__new__(OnlyParser)
    with pytest.raises(Keys):
        cli.__init__("fit", [])  # type: ignore[misc]
    inner = {
        f"{group}.init_args.{name}"
        for group, classes in {
            "model": (hubert_lightning.HubertPretraining, hubert_lightning.CTCFinetuning),
            "data": (hubert_lightning.PretrainingData, hubert_lightning.TranscribedData),
        }.items()
        for made in classes
        for name in inspect.signature(made).parameters
    }
    optimizer = {f"model.init_args.optimizer.init_args.{name}" for name in ("lr", "weight_decay")}
    return cli.keys | inner | optimizer


# Private parts of jsonargparse and LightningCLI


class Kept:
    def __init__(self, size: int = 1) -> None: ...


def message_of(args: list[str], config: dict | None = None) -> str:
    """What jsonargparse reports for a command line."""
    messages = []

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
            if not self.exit_on_error:
                super().error(message, ex)
            messages.append(message)
            raise SystemExit(2)

    parser = Parser()
    parser.add_argument("--number", type=int)
    parser.add_argument("--case", type=Literal["lower", "upper"])
    parser.add_argument("--files", type=list[Path])
    parser.add_subclass_arguments(Kept, "kept")
    parser.add_argument("--callbacks", type=list[Callback] | Callback | None)
    parser.add_argument("path", type=Path)
    with pytest.raises(SystemExit):
        parser.parse_args(args)
    return messages[-1]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("KEY", ["p", "--number=x"]),
        ("UNRECOGNIZED", ["p", "--numbre=3"]),
        ("UNKNOWN", ["p", "--kept=test_parsing.Kept", "--kept.init_args.sise=3"]),
        ("REQUIRED", []),
        ("GIVEN_CLASS", ["p", "--kept=test_parsing.Kept", "--kept.init_args.sise=3"]),
        ("GIVEN_VALUE", ["p", "--callbacks=3"]),
        ("REFUSED_VALUE", ["p", "--number=x"]),
        ("EXPECTED", ["p", "--number=x"]),
        ("LITERAL", ["p", "--case=x"]),
        ("NOT_A_LIST", ["p", "--files=3"]),
        ("CLASS_PROBLEM", ["p", "--kept=test_parsing.Kept", "--kept.init_args.size=x"]),
        ("ASIDE", ["p", "--callbacks=3"]),
    ],
)
def test_jsonargparse_words_its_messages_as_they_are_read(name: str, args: list[str]) -> None:
    message = message_of(args)
    pattern = getattr(parsing, name)
    found = pattern in message if isinstance(pattern, str) else any(map(pattern.search, message.splitlines()))
    assert found, f"parsing.{name} is not in {message!r}; {UPGRADE}"


def test_argparse_keeps_its_arguments_where_they_are_read() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--a")
    assert hasattr(parser, "_actions"), f"argparse has no _actions; {UPGRADE} (actions_of)"
    made = ArgumentParser()
    made.add_argument("--b", type=int)
    assert "b" in option_names(made)
    assert actions_of(made)[-1].dest == "b"


@pytest.mark.parametrize("name", ["_set_seed"])
def test_lightning_cli_has_the_private_methods_that_are_overridden(name: str) -> None:
    assert callable(getattr(LightningCLI, name, None)), (
        f"LightningCLI has no {name}; find where it seeds, and let HubertCLI print the seed once for all iterations"
    )


def test_lightning_cli_keeps_the_config_that_a_second_run_must_not_see() -> None:
    source = inspect.getsource(LightningCLI)
    assert 'hasattr(self, "config_dump")' in source, "LightningCLI keeps its config elsewhere; correct HubertCLI.build"
    assert "self.trainer_defaults" in source, "LightningCLI has no trainer_defaults; correct HubertCLI.build"
