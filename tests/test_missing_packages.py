"""A package that was not installed is named in one sentence, before work starts. `.ci/install` removes them really."""

import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from helpers import refused
from lightning import Trainer
from lightning.pytorch.loggers import Logger

from hubert_lightning import errors
from hubert_lightning.errors import UserError, answer_to, not_installed
from hubert_lightning.recipes.pretrain import pretrain
from hubert_lightning.training.media import check_drawing
from hubert_lightning.units.kmeans import KMeans, ScikitKMeans
from hubert_lightning.units.label_recipe import LabelRecipe


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let packages look as if they were not installed, whatever has imported them."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("module", "way"),
    [
        ("plotly.graph_objects", "plotly is not installed; install it with: pip install 'plotly<7,>=6'"),
        ("sklearn.cluster", "scikit-learn is not installed; install it with: pip install 'scikit-learn<2,>=1.6'"),
        ("PIL", "pillow is not installed; install it with: pip install 'pillow>=11'"),
        ("tokenizers", "tokenizers is not installed; install it with: pip install 'hubert-lightning[bpe]'"),
    ],
)
def test_the_sentence_names_the_package_and_the_versions(
    module: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, module.split(".")[0])
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert answer_to(error) == (way, 2)


def test_a_module_that_this_package_does_not_require_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hubert_lightning.nothing", "torch.nothing", "nothing_at_all", None):
        assert answer_to(ModuleNotFoundError("No module", name=name)) is None

    def unknown(package: str) -> list[str]:
        raise PackageNotFoundError(package)

    without(monkeypatch, "plotly")
    monkeypatch.setattr(errors, "requires", unknown)  # the sources without an installation
    assert not_installed("plotly") is None


@pytest.mark.parametrize(
    ("package", "module", "command"),
    [
        ("plotly", "hubert_lightning.report.page", ["report", "run"]),
        ("optuna", "hubert_lightning.asr.tune_decoder", ["tune-decoder", "model.ckpt", "a.jsonl.gz", "out.json"]),
        ("matplotlib", "hubert_lightning.asr.tune_decoder", ["tune-decoder", "model.ckpt", "a.jsonl.gz", "out.json"]),
        ("kaldingram", "hubert_lightning.asr.ngram", ["ngram", "text.txt", "words.arpa"]),
        ("matplotlib", "hubert_lightning.units.quality_command", ["quality", "mfcc", "recordings"]),
        ("matplotlib", "hubert_lightning.demo.demo", ["demo"]),
        ("sklearn", "hubert_lightning.units.quality_command", ["quality", "mfcc", "recordings"]),
        ("sklearn", "hubert_lightning.units.kmeans_commands", ["kmeans", "export", "a.safetensors", "a.joblib"]),
    ],
)
def test_a_verb_says_which_package_it_needs(
    package: str, module: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, package)
    monkeypatch.delitem(sys.modules, module, raising=False)
    loaded = [name for name in sys.modules if name.startswith(f"{package}.")]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    name = errors.PACKAGES.get(package, package)
    assert refused(capsys, *command).startswith(
        f"hubert: {name} is not installed; install it with: pip install '{name}"
    )


def test_a_recipe_without_its_page_needs_no_plotly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "plotly")
    with pytest.raises(UserError, match=r"plotly is not installed.*or write no page: --report false"):
        pretrain(tmp_path / "none", tmp_path / "run")
    with pytest.raises(UserError, match="none: "):
        pretrain(tmp_path / "none", tmp_path / "run", report=False)


def test_a_config_that_logs_to_wandb_needs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "wandb")
    typed = ["fit", "--config", "pretrain/base", "--output", str(tmp_path / "run")]
    assert "wandb is not installed; install it with: pip install 'wandb>=0.19', or edit" in refused(capsys, *typed)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_logger_of_pictures_needs_matplotlib_on_every_rank(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pictures(Logger):
        name, version = "pictures", "1"

        def log_metrics(self, metrics: object, step: object = None) -> None: ...

        def log_hyperparams(self, params: object) -> None: ...

        def log_image(self) -> None: ...

    without(monkeypatch, "matplotlib")
    monkeypatch.setattr(Trainer, "is_global_zero", is_first)
    check_drawing(Trainer(logger=False, accelerator="cpu", enable_checkpointing=False))
    with pytest.raises(UserError, match="matplotlib is not installed"):
        check_drawing(Trainer(logger=Pictures(), accelerator="cpu", enable_checkpointing=False))


def test_k_means_of_this_package_needs_no_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "sklearn")
    assert LabelRecipe(kmeans=KMeans()).kmeans is not None
    with pytest.raises(UserError, match="scikit-learn is not installed"):
        LabelRecipe(kmeans=ScikitKMeans())


@pytest.mark.parametrize("setting", ["--iterations.2.layer=auto", "--iterations.1.clusters=auto"])
def test_an_automatic_choice_needs_scikit_learn_before_the_first_iteration(
    setting: str, monkeypatch: pytest.MonkeyPatch, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "sklearn")
    data = ("--heldout", "0", "--output", str(tmp_path / "run"), "--report", "false")
    sentence = refused(capsys, "pretrain", str(manifests / "train.jsonl.gz"), *data, setting)
    assert re.search(
        r"iterations\.[12]: scikit-learn is not installed; .*, or name the layer and the number of clusters", sentence
    )
    assert not [*tmp_path.glob("run/**/*.ckpt")]
