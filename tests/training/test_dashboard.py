"""The W&B view that `hubert dashboard` makes names metrics and settings that runs log."""

import json
from pathlib import Path

import pytest
from helpers import ROOT

from hubert_lightning.cli import main
from hubert_lightning.training.dashboard import COLUMNS, SECTIONS, TRANSCRIPTS


def test_the_view_has_a_section_for_each_kind_of_metric(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    main(["dashboard", "team/speech", f"--output={tmp_path / 'view.json'}"])
    view = json.loads((tmp_path / "view.json").read_text())
    assert (view["entity"], view["project"]) == ("team", "speech")
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    drawn = {
        section["name"]: [metric for panel in section["panels"] for metric in panel["config"].get("metrics", [])]
        for section in sections
    }
    for name, charts in SECTIONS.items():
        assert drawn[name] == [metric for _, metrics in charts for metric in metrics]
    [inertia] = [
        panel
        for section in sections
        for panel in section["panels"]
        if panel["config"].get("metrics") == ["labels/kmeans_inertia"]
    ]
    assert inertia["config"]["xAxis"] == "labels/kmeans_round"
    assert TRANSCRIPTS in json.dumps(sections)
    [runs] = view["spec"]["section"]["runSets"]
    assert runs["runFeed"]["columnOrder"] == list(COLUMNS)
    assert not runs["grouping"]


def test_every_metric_of_the_view_is_logged_somewhere() -> None:
    code = "".join(path.read_text() for path in (ROOT / "hubert_lightning/training").rglob("*.py"))
    parts = {name for _, charts in SECTIONS.items() for _, metrics in charts for name in metrics}
    for name in parts:
        section, _, metric = name.partition("/")
        assert metric.removeprefix("masked_").removeprefix("unmasked_").rpartition("gradient_norm_")[2] in code, name
        assert section in SECTIONS


@pytest.mark.parametrize("project", ["speech", "/speech", "team/", "team/speech/run"])
def test_a_project_without_its_entity_is_refused(project: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["dashboard", project])
    assert stopped.value.code == 2
    assert "give the entity and the project, as in team/" in capsys.readouterr().err
