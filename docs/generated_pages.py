"""Pages of the site that are made from the code and from files of the repository's root; a hook of mkdocs.

They are the home page (README.md), contributing (CONTRIBUTING.md), every verb, every YAML key, the Python API, and the
JSON Schema of transcripts.
"""

import ast
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

KEYS = {
    "iterations": "hubert_lightning.training.iterations.Iteration",
    "iterations.kmeans": ("hubert_lightning.KMeans", "hubert_lightning.ScikitKMeans"),
    "model.init_args": ("hubert_lightning.HubertPretraining", "hubert_lightning.CTCFinetuning"),
    "model.init_args.encoder": "hubert_lightning.EncoderConfig",
    "data.init_args": ("hubert_lightning.PretrainingData", "hubert_lightning.TranscribedData"),
    "data.init_args.mixing": "hubert_lightning.Mixing",
    "trainer.callbacks": (
        "hubert_lightning.Relabel",
        "hubert_lightning.LayerQuality",
        "hubert_lightning.BestCheckpoints",
        "hubert_lightning.PeakRateFinder",
    ),
    "trainer.strategy": "hubert_lightning.LayerwiseFSDP",
    "pictures": "hubert_lightning.Pictures",
    "stalls": "hubert_lightning.training.callbacks.stalls.StalledRanks",
}
"""Where a YAML file names the arguments of which classes."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "index.md": root_page("README.md"),
        "contributing.md": root_page("CONTRIBUTING.md"),
        "reference/verbs.md": verbs_page(),
        "reference/yaml.md": keys_page(),
        "reference/python.md": python_page(),
        "reference/transcript-schema.md": schema_page(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def root_page(name: str) -> str:
    """A Markdown file of the root, with links that start from docs/."""
    text = (ROOT / name).read_text("utf-8")
    text = re.sub(r"\]\(docs/", "](", text).replace("](CONTRIBUTING.md)", "](contributing.md)")
    return re.sub(r"\[([^]]+)\]\((?:LICENSE|configs/[^)]*|\.ci/[^)]*|tests/[^)]*)\)", r"`\1`", text)


def schema_page() -> str:
    """The JSON Schema of transcripts."""
    schema = (ROOT / "hubert_lightning/asr/transcript.schema.json").read_text("utf-8")
    lead = "What `hubert transcribe --format json` and `Transcript.to_json` write, as a JSON Schema."
    return f"# Transcripts as JSON\n\n{lead}\n\n```json\n{schema}```\n"


def help_of(*verb: str) -> str:
    """What `hubert VERB --help` prints."""
    from hubert_lightning.cli import main

    with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
        main([*verb, "--help"])
    return printed.getvalue().strip()


def verbs() -> Iterator[tuple[str, str]]:
    """Group and verb, for every verb and every verb of a verb."""
    from hubert_lightning.verb_table import VERBS

    for group, targets in VERBS.items():
        for verb, target in targets.items():
            yield from (
                ((group, f"{verb} {inner}".rstrip()) for inner in target)
                if isinstance(target, dict)
                else [(group, verb)]
            )


def verbs_page() -> str:
    os.environ["COLUMNS"] = "100"
    parts = ["# Verbs", "", "Generated from the parsers: what `hubert VERB --help` prints.", "", "```text"]
    parts += [help_of(), "```", ""]
    for group, members in groupby(verbs(), key=itemgetter(0)):
        parts += [f"## {group}", ""]
        for _, verb in members:
            parts += [f"### hubert {verb}", "", "```text", help_of(*verb.split()), "```", ""]
    return "\n".join(parts)


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def rows_of(key: str, path: str) -> Iterator[str]:
    """The rows of one class: its name and purpose, then each argument with default, type and meaning."""
    cls = named(path)
    documented = parse(cls.__doc__ or "")
    meanings = {argument.arg_name: argument.description or "" for argument in documented.params}
    hints = get_type_hints(cls.__init__)
    yield f"| **{cls.__name__}** | | | **{cell(documented.short_description or '')}** |"
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = "required" if parameter.default is parameter.empty else f"`{shown(parameter.default)}`"
        kind = annotation(hints.get(name, parameter.annotation))
        yield f"| `{key}.{name}` | {default} | `{kind}` | {cell(meanings.get(name, ''))} |"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def shown(value: Any) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return re.sub(r"\(.*", "", repr(value), flags=re.DOTALL) if "(" in repr(value) else str(value)


def annotation(kind: Any) -> str:
    """A type without the names of modules; alternatives are joined by "or"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(annotation(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is Callable:
        return f"class of {annotation(arguments[-1])}"
    if arguments:
        return f"{annotation(origin)}[{', '.join(map(annotation, arguments))}]"
    return {type(None): "null", Any: "any"}.get(kind) or getattr(kind, "__name__", str(kind))


def keys_page() -> str:
    parts = [
        "# YAML keys",
        "",
        "Generated from the signatures and docstrings. Lightning documents the keys of its own classes, such as",
        "`trainer.max_steps`. `hubert fit --print_config` prints all keys with their values.",
        "",
        "Four more keys stand at the top: `output` (folder of the run), `seed_everything` (seed of fresh weights),",
        "`checkpoint` (arguments of Lightning's `ModelCheckpoint`, such as `every_n_train_steps`), and `trainer`.",
        "",
        "| key | default | type | meaning |",
        "|---|---|---|---|",
    ]
    for key, paths in KEYS.items():
        for path in [paths] if isinstance(paths, str) else paths:
            within = f"{key}[].init_args" if key == "trainer.callbacks" else key
            parts += rows_of(within.replace("iterations", "iterations[]"), path)
    return "\n".join(parts) + "\n"


def python_page() -> str:
    """One section for each public name; the names and their modules are those of `__init__.pyi`."""
    stub = ast.parse((ROOT / "hubert_lightning/__init__.pyi").read_text("utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    paths = sorted(
        (alias.name, f"hubert_lightning.{node.module}.{alias.name}") for node in imports for alias in node.names
    )
    parts = ["# Python API", "", "Every name is imported from `hubert_lightning`.", ""]
    for _, path in paths:
        parts += [f"::: {path}", ""]
        if ".training." in path:  # methods are Lightning's hooks
            parts[-1:] = ["    options:", "      members: false", ""]
    return "\n".join(parts)
