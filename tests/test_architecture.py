"""Who may import whom: the table of docs/architecture.md, held as data and read with ast."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hubert_lightning"

# module → what of this package, and which of the restricted packages, it may import
MAY_IMPORT = {
    "frames": set(),
    "garbage": set(),
    "ranges": set(),
    "arguments": {"parser", "ranges"},
    "files": set(),
    "json_files": {"files"},
    "yaml_files": {"files"},
    "unpickling": set(),
    "tokens": set(),
    "progress": set(),
    "interrupts": {"messages"},
    "stalls": {"garbage", "interrupts", "progress", "data.workers", "lightning"},
    "ranks": {"data.workers", "lightning"},
    "run_lock": {"files", "messages"},
    "run_folder": {"checkpoints", "files", "json_files", "messages", "yaml_files", "model.formats.checkpoint"},
    "global_batch": {"lightning"},
    "averaging": {"files", "model.formats.checkpoint"},
    "checkpoints": {"averaging", "files", "ranks", "model.formats.checkpoint", "lightning"},
    "peak_rate": {"lightning"},
    "preemption": {"checkpoints", "interrupts", "lightning"},
    "throughput": {"frames", "lightning"},
    "sharding": {"model.*", "lightning"},
    "collapse": {"data.labels", "lightning"},
    "data.*": {"frames", "files", "garbage", "interrupts", "json_files", "tokens", "data.*", "lhotse"},
    "data.datamodule": {"frames", "ranges", "data.*", "lhotse", "lightning"},
    "torch_files": {"files", "unpickling"},
    "model.*": {"files", "frames", "json_files", "tokens", "torch_files", "model.*"},
    "clustering.*": {"ranges", "torch_files", "frames", "files", "json_files", "unpickling", "clustering.*", "sklearn"},
    "schedules": set(),
    "rescoring": {"files"},
    "language_files": {"files"},
    "decoding": {"files", "interrupts", "json_files", "data.text", "language_files", "rescoring", "word_times"},
    "spelling": {"files", "data.manifest", "data.text", "language_files", "recognition"},
    "language_model": {"files", "data.text", "language_files", "spelling"},
    "pauses": {"frames", "data.audio", "extraction", "lhotse"},
    "recognition": {"frames", "data.text", "extraction", "model.*", "pauses", "lhotse"},
    "word_times": {"frames", "data.text"},
    "transcripts": {"files", "journal", "data.preparation", "word_times"},
    "journal": {"files"},
    "recordings": {"frames", "data.preparation", "data.probe", "lhotse"},
    "transcription": {
        "data.preparation",
        "data.text",
        "decoding",
        "recognition",
        "recordings",
        "transcripts",
        "word_times",
        "lhotse",
    },
    "tuning": {"files", "data.batches", "data.manifest", "data.text", "decoding", "recognition", "rescoring", "lhotse"},
    "messages": set(),
    "results": {"files", "json_files"},
    "run_record": {"data.labels", "lightning"},
    "scoring": {"files", "json_files", "results", "data.text"},
    "onnx_export": {"frames", "model.*"},
    "model_card": {"files", "yaml_files", "model.*"},
    "exchange": {
        "averaging",
        "files",
        "model_card",
        "onnx_export",
        "clustering.kmeans",
        "data.text",
        "model.*",
    },
    "restoring": {"data.text", "model.*", "lightning"},
    "pretraining": {
        "global_batch",
        "ranges",
        "model.*",
        "restoring",
        "schedules",
        "sharding",
        "data.batches",
        "lightning",
    },
    "finetuning": {
        "frames",
        "global_batch",
        "model.*",
        "ranges",
        "restoring",
        "schedules",
        "sharding",
        "decoding",
        "recognition",
        "results",
        "data.batches",
        "data.manifest",
        "data.text",
        "lightning",
    },
    "extraction": {
        "frames",
        "progress",
        "data.audio",
        "data.corpora",
        "data.workers",
        "clustering.mfcc",
        "model.*",
        "lhotse",
    },
    "unit_quality": {
        "frames",
        "ranges",
        "files",
        "ranks",
        "data.*",
        "clustering.*",
        "extraction",
        "model.*",
        "lightning",
        "lhotse",
    },
    "relabelling": {
        "frames",
        "ranges",
        "ranks",
        "data.*",
        "model.formats.checkpoint",
        "model.pretrained",
        "clustering.*",
        "extraction",
        "progress",
        "unit_quality",
        "lightning",
        "lhotse",
    },
    "quantizers": {
        "frames",
        "files",
        "data.corpora",
        "clustering.*",
        "extraction",
        "model.*",
        "relabelling",
        "sklearn",
    },
    "units": {
        "frames",
        "data.audio",
        "clustering.kmeans",
        "extraction",
        "model.hubert",
        "model.pretrained",
        "model.statistics",
        "recordings",
        "lhotse",
    },
    "unit_files": {"frames", "files", "journal", "data.preparation", "recordings", "units", "lhotse"},
    "parser": {"yaml_files", "lightning"},
    "experiment": {
        "arguments",
        "messages",
        "results",
        "run_record",
        "parser",
        "restoring",
        "checkpoints",
        "files",
        "interrupts",
        "preemption",
        "progress",
        "ranks",
        "run_folder",
        "run_lock",
        "stalls",
        "throughput",
        "collapse",
        "global_batch",
        "data.manifest",
        "clustering.kmeans",
        "clustering.mfcc",
        "model.formats.checkpoint",
        "model.pretrained",
        "scoring",
        "unit_quality",
        "yaml_files",
        "lightning",
    },
    "demo": {"files", "data.*", "clustering.*", "extraction", "relabelling", "unit_quality", "cli"},
    "cli": {
        "yaml_files",
        "messages",
        "experiment",
        "demo",
        "interrupts",
        "progress",
        "averaging",
        "exchange",
        "unit_quality",
        "quantizers",
        "spelling",
        "language_model",
        "tuning",
        "transcription",
        "unit_files",
        "scoring",
        "data.preparation",
        "data.shar",
        "data.tables",
        "data.alignment",
        "data.label_formats",
        "data.labels",
    },
    "__main__": {"cli"},
    "__init__": {
        "checkpoints",
        "clustering.kmeans",
        "data.datamodule",
        "finetuning",
        "model.*",
        "peak_rate",
        "pretraining",
        "relabelling",
        "sharding",
        "unit_quality",
        "units",
    },
}
RESTRICTED = {"lhotse", "lightning", "sklearn", "wandb"}


def modules() -> list[str]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files]


def imported(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if source == "hubert_lightning" or (source.startswith("hubert_lightning.") and _is_package(source)):
                names |= {f"{source}.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
            else:
                names.add(source)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = {name.removeprefix("hubert_lightning.") for name in names if name.startswith("hubert_lightning.")}
    return ours | {name.split(".")[0] for name in names} & RESTRICTED


def _is_package(name: str) -> bool:
    return (PACKAGE.parent / name.replace(".", "/")).is_dir()


def _covers(pattern: str, module: str) -> bool:
    return module == pattern or (pattern.endswith(".*") and module.startswith(pattern[:-1]))


@pytest.mark.parametrize("module", [name for name in modules() if not name.endswith(".__init__")])
def test_a_module_imports_only_what_the_house_allows(module: str) -> None:
    rule = MAY_IMPORT.get(module) or next(
        (allowed for pattern, allowed in MAY_IMPORT.items() if pattern.endswith(".*") and _covers(pattern, module)),
        MAY_IMPORT.get(module),
    )
    assert rule is not None, f"{module} has no row in the table"
    forbidden = {name for name in imported(module) if not any(_covers(allowed, name) for allowed in rule)}
    assert not forbidden, f"{module} may not import {sorted(forbidden)}"


def test_every_row_of_the_table_is_a_module_that_exists() -> None:
    unknown = [row for row in MAY_IMPORT if not any(_covers(row, module) for module in modules())]
    assert not unknown
