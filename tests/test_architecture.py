"""Who may import whom. The table in docs/architecture.md is made from this one: `python tests/test_architecture.py`."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hubert_lightning"
DOCUMENT = ROOT / "docs" / "architecture.md"


class Room(NamedTuple):
    """A folder of the package, or modules beside the folders.

    Args:
        holds: Its contents, for the documentation.
        ours: Rooms that its modules may import, beside its own.
        heavy: Packages of `HEAVY` that its modules may import.
    """

    holds: str
    ours: str = ""
    heavy: str = ""


GROUND = (
    "frames", "files", "errors", "console", "progress_bar", "current_work", "first_process", "figure_style",
    "interrupts", "hub",
)  # fmt: skip
VOCABULARY = ("vocabulary", "spelling", "characters")
PARSING = (
    "parsing", "verbs", "verb_stub", "verb_table", "completion", "packaged_configs", "short_options",
    "class_sources",
    "default_optimizers",
)  # fmt: skip
MODULES = {"ground": GROUND, "vocabulary": VOCABULARY, "parsing": PARSING}
"""Rooms of modules beside the folders."""
ROOMS = {
    "ground": Room(
        "frame arithmetic, atomic writes, user errors, messages and progress, ranks, style of figures, signals, "
        "methods of models"
    ),
    "untrusted": Room("readers of untrusted files that never run code in them", "ground"),
    "vocabulary": Room("letters of transcripts: normalise, tokenise, encode, decode", "ground untrusted"),
    "data": Room("audio on disk → manifests", "ground untrusted vocabulary", "datasets lhotse"),
    "model": Room("the network in plain torch", "ground"),
    "pretrained": Room(
        "weights of any system → our model",
        "ground untrusted vocabulary model",
        "safetensors huggingface_hub transformers",
    ),
    "features": Room(
        "recordings → one row of features per frame, never stored on disk",
        "ground untrusted data model pretrained",
        "lhotse",
    ),
    "units": Room(
        "features → K-means → cluster ids",
        "ground untrusted data model pretrained features",
        "lhotse safetensors sklearn",
    ),
    "asr": Room(
        "frames → words",
        "ground untrusted vocabulary data model pretrained features",
        "jiwer lhotse optuna safetensors transformers",
    ),
    "interchange": Room(
        "import and export of models, ONNX, model cards",
        "ground untrusted vocabulary model pretrained units",
        "huggingface_hub",
    ),
    "parsing": Room("command lines: a function's signature is its options", "ground untrusted", "jsonargparse shtab"),
    "planning": Room("memory, time and disk of a run before it starts", "ground untrusted data model parsing"),
    "training": Room(
        "everything that imports Lightning: tasks, data modules, callbacks, runs",
        "ground untrusted vocabulary data model pretrained features units asr parsing planning",
        "jsonargparse lhotse lightning torchmetrics",
    ),
    "report": Room(
        "pages that show runs and their results",
        "ground untrusted data features asr training",
        "jinja2 jiwer plotly",
    ),
    "recipes": Room(
        "from recordings or a table to a trained model, in one command",
        "ground untrusted vocabulary data model pretrained asr parsing training report",
    ),
    "demo": Room(
        "the whole method on synthetic speech",
        "ground untrusted vocabulary data model pretrained features units asr parsing training report",
        "lhotse",
    ),
    "serving": Room(
        "words and units over HTTP",
        "ground untrusted vocabulary data model pretrained features units asr",
        "fastapi fastapi_offline lhotse prometheus_client starlette uvicorn",
    ),
    "cli": Room(
        "the verbs, imported when they are called",
        "ground untrusted vocabulary data model pretrained features units asr interchange parsing planning training "
        "report recipes demo serving",
    ),
}
"""In this order, a room imports rooms above it alone."""

PUBLIC_NAMES = {"hub": {"push_model", "save_model"}, "model.hubert": {"load_hubert"}}
"""Public functions that methods of models call, although the rooms that define them come later."""

IMPORTED_BY_NAME = {
    "serving.serve": "packages of its extra, to name the one that is missing",
    "training.arguments": "classes that a config names",
    "training.dashboard": "W&B's package of views, which has no types",
    "training.hubert_cli": "the task that a config names",
    "training.media": "the package of a logger that a config names",
    "training.parser": "classes that a config names",
    "verb_stub": "light packages in which a signature names values",
    "verbs": "functions of the table of verbs",
}
"""Modules that import others by a string, which no table sees, and what."""

HEAVY = {
    "datasets", "fastapi", "fastapi_offline", "huggingface_hub", "jinja2", "jiwer", "jsonargparse", "lhotse",
    "lightning", "optuna", "plotly", "prometheus_client", "safetensors", "shtab", "sklearn", "starlette", "torchaudio",
    "torchmetrics", "transformers", "uvicorn", "wandb",
}  # fmt: skip


def modules() -> list[str]:
    files = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files]
    return [name for name in names if name.rpartition(".")[2] not in ("__init__", "__main__")]


def imports(module: str) -> set[str]:
    """What a module imports anywhere, also inside its functions: our modules without the package's name, and others."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            is_package = source.startswith("hubert_lightning") and (ROOT / source.replace(".", "/")).is_dir()
            names |= {f"{source}.{alias.name}" for alias in node.names} if is_package else {source}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = {name.removeprefix("hubert_lightning.") for name in names if name.startswith("hubert_lightning.")}
    return (ours & set(modules())) | {name.split(".")[0] for name in names if not name.startswith("hubert_lightning")}


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return next((room for room, names in MODULES.items() if first in names), first)


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room = room_of(module)
    assert room in ROOMS, f"{module} is in no room; put it into one of {', '.join(ROOMS)}"
    allowed = {room, *ROOMS[room].ours.split()}
    found = imports(module)
    up = {name for name in found & set(modules()) if room_of(name) not in allowed}
    heavy = found & HEAVY - set(ROOMS[room].heavy.split())
    assert not up, f"{module} may not import {sorted(up)}: {room} knows {sorted(allowed)} alone"
    assert not heavy, f"{module} may not import {sorted(heavy)}: {room} imports {ROOMS[room].heavy or 'none of these'}"


def test_no_room_imports_one_that_comes_after_it() -> None:
    order = list(ROOMS)
    late = [
        (room, other) for room in ROOMS for other in ROOMS[room].ours.split() if order.index(other) >= order.index(room)
    ]
    assert not late


@pytest.mark.slow
def test_no_modules_import_one_another_in_a_circle() -> None:
    known = set(modules())
    circle: list[str] = []
    try:
        TopologicalSorter({module: imports(module) & known for module in known}).prepare()
    except CycleError as error:
        circle = [*reversed(error.args[1])]
    assert not circle, " imports ".join(circle)


def test_only_methods_of_models_call_public_functions_of_later_rooms() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    public = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    importing = {}
    for module in modules():
        nodes = list(ast.walk(tree_of(module)))
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "hubert_lightning"]
        names = {alias.name for node in froms for alias in node.names} & public
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} & {PACKAGE.name}
        if names:
            importing[module] = names
    assert importing == PUBLIC_NAMES


def test_modules_that_import_others_by_a_string_are_known() -> None:
    by_string = {"import_module", "__import__", "sys.modules"}
    words = {
        module: {ast.unparse(node) for node in ast.walk(tree_of(module)) if isinstance(node, (ast.Name, ast.Attribute))}
        for module in modules()
    }
    importing = {module for module, used in words.items() if used & (by_string | {"importlib.import_module"})}
    assert importing == set(IMPORTED_BY_NAME)


def test_the_documentation_has_this_table() -> None:
    assert table() in DOCUMENT.read_text(), "run python tests/test_architecture.py"


def table() -> str:
    rows = []
    for name, room in ROOMS.items():
        label = ", ".join(f"`{module}`" for module in MODULES.get(name, (name,)))
        ours = ", ".join(other if other == "ground" else f"`{other}`" for other in room.ours.split()) or "–"
        rows.append(f"| {label} | {room.holds} | {ours} | {', '.join(room.heavy.split()) or '–'} |")
    head = ["| room | content | may import from this package | may import of the heavy packages |", "|---|---|---|---|"]
    return "\n".join(head + rows) + "\n"


if __name__ == "__main__":
    before, start, rest = DOCUMENT.read_text().partition("| room |")
    DOCUMENT.write_text(before + table() + rest.partition("\n\n")[2].join(["\n", ""]))
