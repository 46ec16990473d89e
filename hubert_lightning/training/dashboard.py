"""A W&B workspace for runs of this package: one section for each kind of metric, and columns that tell runs apart."""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole

NAME = "HuBERT"
"""Name of the workspace's view."""
STEP = "trainer/global_step"
COLUMNS = (
    "run:displayName",
    "run:group",
    "run:jobType",
    "run:state",
    "summary:val/masked_accuracy.max",
    "summary:layers/best_pnmi.max",
    "summary:val/wer.min",
    "config:encoder/num_layers",
    "config:encoder/dim",
    "config:labels/features",
    "config:labels/layer",
    "config:labels/clusters",
    "config:labels/kmeans_inertia",
    "config:optimizer/lr",
    "config:batch/global_seconds",
    "config:schedule/total_steps",
    "config:data/train/hours",
    "config:seed",
    "summary:speed/audio_seconds_per_second.last",
)
"""Columns of the table of runs."""
SECTIONS: dict[str, tuple[tuple[str, Sequence[str]], ...]] = {
    "Overview": (
        ("Masked accuracy, validation", ("val/masked_accuracy",)),
        ("Word error rate, validation", ("val/wer",)),
        ("PNMI of the best layer", ("layers/best_pnmi",)),
        ("Loss", ("train/loss", "val/loss")),
        ("Audio seconds a second", ("speed/audio_seconds_per_second",)),
    ),
    "train": (
        ("Loss at masked and unmasked frames", ("train/masked_loss", "train/unmasked_loss")),
        ("Accuracy at masked and unmasked frames", ("train/masked_accuracy", "train/unmasked_accuracy")),
        ("Learning rate", ("train/learning_rate",)),
        (
            "Gradient norm by part",
            (
                "train/gradient_norm",
                "train/gradient_norm_convolutions",
                "train/gradient_norm_transformer",
                "train/gradient_norm_head",
            ),
        ),
        ("Skipped steps", ("train/skipped_steps",)),
        ("Masked fraction", ("train/masked_fraction",)),
        ("Feature penalty", ("train/feature_penalty",)),
    ),
    "val": (
        ("Loss", ("val/loss", "val/masked_loss", "val/unmasked_loss")),
        ("Accuracy", ("val/masked_accuracy", "val/unmasked_accuracy")),
        ("Error rates", ("val/wer", "val/cer")),
    ),
    "units": (
        ("Perplexity of labels and predictions", ("units/label_perplexity", "units/predicted_perplexity")),
        ("Share of clusters in use", ("units/label_coverage", "units/predicted_coverage")),
    ),
    "layers": (
        ("PNMI of the best layer", ("layers/best_pnmi",)),
        ("Best layer", ("layers/best_layer",)),
    ),
    "labels": (
        ("K-means inertia by round", ("labels/kmeans_inertia",)),
        ("Hours labelled an hour", ("labels/hours_per_hour",)),
        ("Seconds of labelling", ("labels/seconds",)),
    ),
    "speed": (
        ("Audio seconds a second", ("speed/audio_seconds_per_second",)),
        ("Share of the time that waits for data", ("speed/data_wait",)),
        ("Model FLOPs utilisation", ("speed/mfu",)),
        ("Share of the audio that is padding or cropped away", ("speed/waste",)),
        ("Memory, GiB", ("speed/memory_gib",)),
    ),
}
"""Section → title and metrics of each chart."""
X_AXES = {"labels/kmeans_inertia": "labels/kmeans_round"}
"""Metrics that are not drawn over optimizer steps."""
SCALARS = ("labels/hours_per_hour", "labels/seconds")
"""Metrics that a run logs once."""
MEDIA: dict[str, tuple[tuple[str, Sequence[str]], ...]] = {
    "units": (
        *((f"Utterance {number}", (f"units/utterances/{number}",)) for number in range(1, 5)),
        ("Audio of the utterances", tuple(f"units/audio/{number}" for number in range(1, 5))),
        ("Phones by cluster", ("units/phones_by_cluster",)),
    ),
    "layers": (("Quality by layer", ("layers/pnmi", "layers/perplexity")),),
}
"""Section → title and names of pictures and audio that runs log at each validation."""
TRANSCRIPTS = "val/transcripts"
"""Table that fine-tuning logs at each validation."""


def dashboard(project: str, output: Path | None = None, name: str = NAME) -> None:
    """Add a view to a W&B project: metrics by section, and the runs in a table by what tells them apart.

    Args:
        project: Entity and project in W&B, as in team/hubert_lightning.
        output: JSON file to write instead of sending the view; needs no account.
        name: Name of the view.

    Raises:
        UserError: The project has another form, the package wandb-workspaces is not installed, or W&B refuses.
    """
    entity, slash, title = project.partition("/")
    if not (entity and slash and title) or "/" in title:
        raise UserError(f"{project}: give the entity and the project, as in team/hubert_lightning")
    workspace = _workspace(entity, title, name)
    if output is not None:
        spec = workspace._to_model().spec.model_dump(by_alias=True, exclude_none=True, mode="json")
        content = {"entity": entity, "project": title, "name": name, "spec": spec}
        write_whole(output, (json.dumps(content, indent=2) + "\n").encode())
        return
    try:
        workspace.save()
    except Exception as error:  # whatever W&B or its network raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{project}: W&B refuses the view ({reason}); log in with `wandb login`") from error


def _workspace(entity: str, project: str, title: str) -> Any:
    """Build the view with W&B's own package, whose classes check it."""
    try:
        views: Any = import_module("wandb_workspaces.workspaces")
        panels: Any = import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise UserError("wandb-workspaces is not installed; install hubert-lightning[dashboard]") from error
    contents = {section: [_panel(panels, *chart) for chart in charts] for section, charts in SECTIONS.items()}
    for section, media in MEDIA.items():
        contents[section] += [panels.MediaBrowser(title=title, media_keys=list(keys)) for title, keys in media]
    contents["val"].append(panels.WeavePanelSummaryTable(table_name=TRANSCRIPTS))
    contents["Overview"].append(panels.RunComparer(diff_only="split"))  # the settings that differ
    sections = [views.Section(name=name, panels=charts, is_open=True) for name, charts in contents.items()]
    return views.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=sections,
        settings=views.WorkspaceSettings(x_axis=STEP, group_by_prefix="first"),
        # Runs are not grouped: W&B would draw the mean of a group's iterations
        runset_settings=views.RunsetSettings(pinned_columns=list(COLUMNS)),
    )


def _panel(panels: Any, title: str, metrics: Sequence[str]) -> Any:
    if metrics[0] in SCALARS:
        return panels.BarPlot(title=title, metrics=list(metrics))
    return panels.LinePlot(title=title, x=X_AXES.get(metrics[0], STEP), y=list(metrics))
