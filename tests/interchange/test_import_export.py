"""`hubert import` and `export` as their users call them; ONNX; cards; training that goes on from any system's model."""

import ast
import json
import logging
import os
import resource
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
import transformers
import yaml
from foreign_models import (
    NORMS,
    fairseq_heads,
    fairseq_settings,
    fairseq_state,
    of_torchaudio,
    of_transformers,
    random_weights,
    save_ours,
    small_config,
)
from helpers import ROOT, TINY
from torch.testing import assert_close

from hubert_lightning.asr.ctc_model import load_ctc
from hubert_lightning.cli import main
from hubert_lightning.frames import num_frames
from hubert_lightning.interchange.import_export import export_model, import_model
from hubert_lightning.pretrained.formats.torchaudio import LETTERS
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder, read_weights
from hubert_lightning.pretrained.weights import build_encoder
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.units.kmeans_file import load_kmeans, save_kmeans

COPIED = ("conv_channels", "conv_norm", "dim", "num_layers", "num_heads", "ffn_dim", "pre_norm", "pos_kernel")
COPIED += ("pos_groups", "normalize_waveform", "conv_bias")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ONNX


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("kind", "layer", "family"),
    [
        ("encoder", None, {}),
        ("letters", None, {}),
        ("letters", 2, {}),
        ("letters", None, {"position_buckets": 32, "position_distance": 20}),
        ("encoder", 2, {"position_buckets": 32, "position_distance": 20}),
        ("encoder", None, {"pos_batch_norm": True}),
    ],
    ids=["encoder", "letters", "layer", "WavLM's letters", "WavLM's layer", "batch norm"],
)
@torch.no_grad()
def test_onnxruntime_computes_the_same_for_batches_of_every_size(
    tmp_path: Path,
    norm: str,
    kind: str,
    layer: int | None,
    family: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    monkeypatch.setattr(logging.getLogger("torch"), "handlers", [caplog.handler])
    checkpoint = save_ours(random_weights(norm, kind, **family), tmp_path / "ours.ckpt")
    export_model(str(checkpoint), tmp_path / "theirs", "onnx", layer=layer)
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not loud  # attempts of the exporter that fail, and succeed in another way
    session = onnxruntime.InferenceSession(tmp_path / "theirs" / "model.onnx")
    letters = kind == "letters" and layer is None
    for lengths in ([400], [16_000], [719, 720, 721], [48_123, 400]):
        waveform, length = torch.randn(len(lengths), max(lengths)), torch.tensor(lengths)
        output, *others = session.run(None, {"waveform": waveform.numpy(), "length": length.numpy()})
        assert not others
        if letters:
            expected = load_ctc(checkpoint)(waveform, length)
        else:
            encoder = load_encoder(checkpoint)
            expected = encoder.features(waveform, length, layer=layer) if layer else encoder(waveform, length)
        assert output.shape == expected.shape
        for found, wanted, frames in zip(torch.from_numpy(output), expected, num_frames(length), strict=True):
            assert_close(found[:frames], wanted[:frames], rtol=0, atol=1e-5)
    about = json.loads(session.get_modelmeta().custom_metadata_map["hubert_lightning"])
    assert about["encoder"]["num_layers"] == 3
    assert session.get_outputs()[0].name == ("log_probabilities" if letters else "frames")
    if letters:
        vocabulary = json.loads((tmp_path / "theirs" / "vocabulary.json").read_text())
        assert vocabulary["tokens"] == list(load_ctc(checkpoint).vocabulary.tokens)


def test_a_layer_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint = save_ours(random_weights("group", "encoder"), tmp_path / "ours.ckpt")
    with pytest.raises(ValueError, match="layer 4 of an encoder of 3 layers"):
        export_model(str(checkpoint), tmp_path / "theirs", "onnx", layer=4)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.ckpt"]


# The verbs


def test_a_model_is_imported_and_exported_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_transformers(small_config("group")).save_pretrained(tmp_path / "theirs")
    main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours.ckpt")])
    main(["export", str(tmp_path / "ours.ckpt"), str(tmp_path / "back"), "--format", "torchaudio"])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'ours.ckpt'}: an encoder of 3 layers of 64, from {tmp_path / 'theirs'}" in said
    assert f"{tmp_path / 'back'}: an encoder of 3 layers of 64, for torchaudio" in said
    assert (tmp_path / "back" / "model.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["import", "nowhere.pt", "out.ckpt"], "nowhere.pt does not exist; give a .ckpt of `hubert fit`"),
        (["import", "{ours}", "{ours}"], "exists already; remove it or choose another OUT"),
        (["export", "{ours}", "{folder}"], "exists already; remove it or choose another OUT"),
        (
            ["export", "{ours}", "out", "--layer", "2"],
            "layer 2 of transformers: only onnx can have the output of one layer",
        ),
        (["export", "{ours}", "out", "--kmeans", "{kmeans}"], "was fitted on mfcc, and this is encoder "),
        (
            ["import", "{letters}", "out.ckpt"],
            "does not say what its 11 tokens are; put",
        ),
        (
            ["import", "{narrow}", "out.ckpt"],
            "has a width of 64, and does not state its number of attention heads; give",
        ),
        (["import", "{narrow}", "out.ckpt", "--num_heads", "5"], "dim 64 is not divisible by num_heads 5"),
        (["import", "{narrow}", "out.ckpt", "--num_heads", "0"], "num_heads is 0; give a number from 1 to"),
        (["import", "{ours}", "out.ckpt", "--num_heads", "2"], "states 4 attention heads, not 2; leave it out"),
        (
            ["import", "{ours}", "out.ckpt", "--vocabulary", "x.json"],
            "has no CTC head, so it needs no vocabulary",
        ),
        (["import", "{onnx}", "out.ckpt"], "holds an ONNX graph, which cannot be read back"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    save_ours(random_weights("group", "encoder"), made / "ours.ckpt")
    save_kmeans(made / "kmeans.safetensors", [torch.randn(5, 39)], {"features": "mfcc"})
    of_transformers(small_config("group"), "HubertForCTC", vocab_size=11).save_pretrained(made / "letters")
    torch.save(of_torchaudio(small_config("group")).state_dict(), made / "narrow.pt")
    paths = {"ours": made / "ours.ckpt", "folder": made, "kmeans": made / "kmeans.safetensors"}
    paths |= {"letters": made / "letters", "narrow": made / "narrow.pt", "onnx": made / "onnx"}
    (made / "onnx").mkdir()
    (made / "onnx" / "model.onnx").touch()
    capsys.readouterr()  # their progress bars
    before = sorted(made.rglob("*"))
    filled = [word.format(**paths) for word in arguments]
    filled = [str(tmp_path / word) if word in ("out", "out.ckpt") else word for word in filled]
    with pytest.raises(SystemExit) as end:
        main(filled)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert sorted(made.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_letters_that_a_format_does_not_know_can_be_given(tmp_path: Path) -> None:
    of_transformers(small_config("group"), "HubertForCTC", vocab_size=4).save_pretrained(tmp_path / "theirs")
    (tmp_path / "letters.json").write_text(json.dumps({"tokens": ["_", "|", "a", "b"], "case": "lower"}))
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt", vocabulary=tmp_path / "letters.json")
    assert load_ctc(tmp_path / "ours.ckpt").vocabulary.tokens == ("_", "|", "a", "b")


def test_an_imported_checkpoint_states_its_source(tmp_path: Path) -> None:
    of_transformers(small_config("group")).save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    source = read_weights(tmp_path / "ours.ckpt").provenance
    assert source["source"] == str(tmp_path / "theirs")
    assert len(source["sha256"]) == 64
    assert len(source["encoder"]) == 16


def test_k_means_of_another_model_does_not_go_along(tmp_path: Path) -> None:
    checkpoint = save_ours(random_weights("group", "clusters"), tmp_path / "ours.ckpt")
    save_kmeans(
        tmp_path / "kmeans.safetensors", [torch.randn(5, 64)], {"features": "layer 2 of encoder 0123456789abcdef"}
    )
    with pytest.raises(ValueError, match="was fitted on layer 2 of encoder 0123456789abcdef, and this is encoder"):
        export_model(str(checkpoint), tmp_path / "out", "safetensors", kmeans=tmp_path / "kmeans.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_state_dict_of_an_export_opens_without_its_folder(tmp_path: Path) -> None:
    checkpoint = save_ours(random_weights("group", "letters"), tmp_path / "ours.ckpt")
    export_model(str(checkpoint), tmp_path / "out", "torchaudio")
    assert read_weights(tmp_path / "out" / "model.pt").config.num_heads == 4


def test_k_means_goes_along(tmp_path: Path) -> None:
    checkpoint = save_ours(random_weights("group", "clusters"), tmp_path / "ours.ckpt")
    centroids = [torch.randn(5, 64)]
    name = encoder_fingerprint(load_encoder(checkpoint))
    save_kmeans(tmp_path / "kmeans.safetensors", centroids, {"features": f"layer 2 of encoder {name}"})
    export_model(str(checkpoint), tmp_path / "out", "safetensors", kmeans=tmp_path / "kmeans.safetensors")
    back, source = load_kmeans(tmp_path / "out" / "kmeans.safetensors")
    assert_close(back, centroids, rtol=0, atol=0)
    assert source["features"] == f"layer 2 of encoder {name}"
    load_encoder(tmp_path / "out")


# Cards


def test_a_card_has_the_facts_and_scores_of_a_run(tmp_path: Path) -> None:
    checkpoint = save_ours(random_weights("group", "letters"), tmp_path / "run.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"global_step": 321}, checkpoint)
    relabel = {"class_path": "hubert_lightning.Relabel", "init_args": {"features": "mfcc", "clusters": 77}}
    config = {"data": {"init_args": {"train": ["manifests/mine.jsonl.gz"]}}, "trainer": {"callbacks": [relabel]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "metrics.json").write_text(json.dumps({"steps": 321, "val/wer": 0.125}))
    scores = {"words": {"rate": 0.042, "low": 0.031, "high": 0.055}, "letters": {"rate": 0.0123}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "layers.json").write_text(json.dumps({"layer 2": {"pnmi": 0.4567}}))
    export_model(str(checkpoint), tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "automatic-speech-recognition"
    assert front["library_name"] == "transformers"
    for fact in (
        "| steps | 321 |",
        "| trained on | mine.jsonl.gz |",
        "| labels | features mfcc, clusters 77 |",
    ):
        assert fact in card
    for number in ("| WER in its run's last test | 4.2 % (3.1 to 5.5) |", "| CER in its run's last test | 1.2 % |"):
        assert number in card
    assert "| PNMI, layer 2 | 0.457 |" in card
    assert "| val/wer | 0.125 |" in card
    assert read_weights(tmp_path / "card").provenance["steps"] == 321


EVIL = "a|b`c\n\n# h\n<script>alert(1)</script> [l](http://e.org) ![i](x) *s* _u_ www.e.org me@e.org & \u202e \\\" '"


def rendered(card: str) -> str:
    """Markdown as HTML, by the rules of GitHub: tables and bare addresses too."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like" if find_spec("linkify_it") else "commonmark")
    return markdown.enable("table").render(card.split("---\n", 2)[2])


def test_a_card_escapes_names(tmp_path: Path) -> None:
    checkpoint = save_ours(random_weights("group", "letters"), tmp_path / "run.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"global_step": 321}, checkpoint)
    relabel = {"class_path": "hubert_lightning.Relabel", "init_args": {"features": EVIL, "clusters": EVIL}}
    config = {"data": {"init_args": {"train": [f"/home/me/{EVIL}.gz", 3]}}, "trainer": {"callbacks": [relabel]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "metrics.json").write_text(json.dumps({"steps": 321, f"val/{EVIL}": 0.125, "val/wer": EVIL}))
    (tmp_path / "scores.json").write_text(json.dumps({"words": {"rate": EVIL, "low": 0}, "letters": [EVIL]}))
    (tmp_path / "layers.json").write_text(json.dumps({EVIL: {"pnmi": 0.4567}, "layer 2": {"pnmi": EVIL}}))
    out = tmp_path / """a"'); import os; [`x`] <b> | #"""
    export_model(str(checkpoint), out, "safetensors")
    card = (out / "README.md").read_text("utf-8")
    assert set(yaml.safe_load(card.split("---")[1])) == {"library_name", "pipeline_tag", "tags"}
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert [row.replace("\\|", "").count("|") for row in rows] == [3] * len(rows)
    html = rendered(card)
    for tag in ("<script", "<a ", "<img", "<em>", "<strong>", "<b>"):
        assert tag not in html.replace('<a href="https://arxiv.org/abs/2106.07447"', "")
    assert html.count("<h1>") == 1
    code = card.split("```python\n")[1].split("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(argument) for call in calls for argument in call.args] == [out.name]


def foreign_run(folder: Path, **content: Any) -> Path:
    """A checkpoint of others with these entries, at step 321 if it does not say so."""
    checkpoint = save_ours(random_weights("group", "letters"), folder / "run.ckpt")
    torch.save(torch.load(checkpoint, weights_only=True) | {"global_step": 321} | content, checkpoint)
    return checkpoint


def facts_of_card(checkpoint: Path, out: Path) -> str:
    export_model(str(checkpoint), out, "safetensors")
    return (out / "README.md").read_text("utf-8")


EVIL_STEPS = "x](javascript:alert(1))<img src=x onerror=1>\n---\n# H"
ODD = (EVIL_STEPS, -5, 10**400, float("nan"), float("inf"), True, [3], {"a": 3}, None)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:12])
def test_a_card_has_possible_numbers_alone(tmp_path: Path, odd: Any) -> None:
    audio = {"hours": odd, "speakers": odd, "utterances": 12}
    checkpoint = foreign_run(tmp_path, global_step=odd, TranscribedData={"audio": audio})
    for name, content in (
        ("metrics.json", {"steps": odd, "val/loss": odd, "val/wer": 0.5}),
        ("scores.json", {"words": {"rate": odd, "low": odd, "high": 0.1}, "letters": {"rate": 0.25, "low": odd}}),
        (
            "layers.json",
            {"layer 1": {"pnmi": odd}, "layer 2": {"pnmi": 0.5}} | {f"x{n}": {"pnmi": 0.1} for n in range(999)},
        ),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    card = facts_of_card(checkpoint, tmp_path / "out")
    for wrong in ("javascript", "<img", "# H", "-5", "inf", "nan", "00000000", "True", "| steps |", "| WER", "layer 1"):
        assert wrong not in card, wrong
    assert "| CER in its run's last test | 25.0 % |" in card
    assert "| PNMI, layer 2 | 0.500 |" in card
    assert "| audio | 12 utterances |" in card
    assert len(card.splitlines()) < 150
    source = read_weights(tmp_path / "out").provenance
    assert "steps" not in source


@pytest.mark.parametrize("kind", ["pipe", "device", "4 GB", "aliases", "deep"])
def test_a_card_is_written_despite_unreadable_files_beside_the_checkpoint(tmp_path: Path, kind: str) -> None:
    checkpoint = foreign_run(tmp_path)
    for name in ("config.yaml", "metrics.json", "scores.json", "layers.json"):
        path = tmp_path / name
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "4 GB":
            path.touch()
            os.truncate(path, 2**32)
        elif kind == "aliases":
            path.write_text("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 10}]\n" for n in range(1, 10)))
        else:
            path.write_text("[" * 200_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    card = facts_of_card(checkpoint, tmp_path / "out")
    assert "| steps | 321 |" in card
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # kB


def test_a_card_names_no_folder(tmp_path: Path) -> None:
    imported = {
        "source": "https://me:SECRET@example.org/x?token=SECRET#SECRET",
        "made": ["/home/SECRET/a", {"/home/SECRET/k": "C:\\\\SECRET\\\\b"}, "file:///home/SECRET/c", "SECRET/d"],
        "special": [],
    }
    checkpoint = foreign_run(tmp_path, imported=imported)
    labels = {
        "features": "home/SECRET/x.ckpt",
        "clusters": ["/home/SECRET/x"],
        "layer": {"a": "/SECRET/s", "/SECRET/k": 1},
    }
    relabel = {"class_path": "hubert_lightning.Relabel", "init_args": labels}
    train = ["SECRET/train.jsonl", "https://example.org/train.jsonl?token=SECRET"]
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"data": {"init_args": {"train": train}}, "trainer": {"callbacks": relabel}})
    )
    (tmp_path / "layers.json").write_text(json.dumps({"/home/SECRET/m.ckpt": {"pnmi": 0.5}}))
    card = facts_of_card(checkpoint, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert b"SECRET" not in file.read_bytes(), file.name
    assert "| source | https&#58;//example.org/x |" in card
    assert "| PNMI, m.ckpt | 0.500 |" in card
    assert "train.jsonl, https&#58;//example.org/train.jsonl |" in card


@pytest.mark.slow
@pytest.mark.parametrize("format", ["transformers", "torchaudio", "fairseq", "safetensors", "onnx"])
def test_no_file_of_an_export_names_the_folder_of_its_model(tmp_path: Path, format: Any) -> None:
    private = tmp_path / "home-of-somebody"
    private.mkdir()
    checkpoint = save_ours(random_weights("group", "clusters"), private / "run.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content |= {"global_step": 321, "averaged": [str(private / "best.ckpt")]}
    content["imported"] = {"source": str(private / "their.pt"), "special": []}
    content["PretrainingData"] = {"audio": {"utterances": 12, "hours": 3.5, "speakers": 4}}
    content["hyper_parameters"]["pretrained"] = str(private / "before.ckpt")
    torch.save(content, checkpoint)
    relabel = {"class_path": "hubert_lightning.Relabel", "init_args": {"features": str(private / "before.ckpt")}}
    config = {"data": {"init_args": {"train": [str(private / "mine.jsonl.gz")]}}, "trainer": {"callbacks": [relabel]}}
    (private / "config.yaml").write_text(yaml.safe_dump(config))
    export_model(str(checkpoint), tmp_path / "out", format)
    for file in (tmp_path / "out").iterdir():
        for place in (b"home-of-somebody", str(ROOT).encode(), os.path.dirname(torch.__file__).encode()):
            assert place not in file.read_bytes(), file.name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| trained on | mine.jsonl.gz |" in card
    assert "| audio | 3.5 hours, 4 speakers, 12 utterances |" in card
    assert "| source | their.pt |" in card
    assert "| labels | features before.ckpt |" in card


@pytest.mark.slow
@pytest.mark.parametrize("format", ["transformers", "torchaudio", "safetensors", "onnx"])
@pytest.mark.parametrize("kind", ["clusters", "letters"])
def test_the_lines_of_a_card_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any, kind: str) -> None:
    checkpoint = save_ours(random_weights("layer", kind), tmp_path / "ours.ckpt")
    export_model(str(checkpoint), tmp_path / "mine", format)
    lines = (tmp_path / "mine" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"waveform": np.zeros((1, 16_000), np.float32)}
    exec(lines, names)
    expected = {"transformers": "model", "torchaudio": "model", "safetensors": "encoder", "onnx": "output"}[format]
    assert names[expected] is not None
    if format == "onnx":
        assert names["output"].shape[1] == num_frames(16_000)


# Training that goes on


def model_of(system: str, folder: Path) -> Path:
    """A tiny pre-trained model as a system keeps it."""
    config = small_config("group")
    if system == "transformers":
        of_transformers(config).save_pretrained(folder)
        return folder
    if system == "torchaudio":
        torch.save(of_torchaudio(config, num_classes=20, final_dim=24).state_dict(), folder.with_suffix(".pt"))
        import_model(str(folder.with_suffix(".pt")), folder.with_suffix(".ckpt"), num_heads=4)
        return folder.with_suffix(".ckpt")
    state = fairseq_heads(fairseq_state(of_transformers(config)), [20])
    model, task = fairseq_settings(config)
    content = {"cfg": {"model": model, "task": task}, "args": None, "model": state}
    if system == "s3prl":
        symbols = [["<s>", "<pad>", "</s>", "<unk>", *map(str, range(20))]]
        content = {"model_cfg": model, "task_cfg": task, "model_weight": state, "dictionaries_symbols": symbols}
    torch.save(content, folder.with_suffix(".pt"))
    return folder.with_suffix(".pt")


@pytest.mark.slow
@pytest.mark.parametrize("system", ["transformers", "torchaudio", "fairseq", "s3prl"])
@torch.no_grad()
def test_pre_training_continues_from_any_system_with_its_head(tmp_path: Path, system: str) -> None:
    path = model_of(system, tmp_path / "theirs")
    trained = read_weights(path)
    has_head = system != "transformers"
    model = HubertPretraining(trained.config, 20, 24, pretrained=path, keep_head=has_head).eval()
    waveform, encoder = torch.randn(2, 8000), build_encoder(trained, path)
    assert_close(model.encoder(waveform), encoder(waveform), rtol=0, atol=0)
    assert "keep_head" not in model.hparams
    if has_head:
        assert_close(model.predictors[0].get_parameter("codewords"), trained.predictors[0]["codewords"], rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"codewords of \[\(20, 24\)\] .* to train \[\(30, 24\)\]"):
            HubertPretraining(trained.config, 30, 24, pretrained=path, keep_head=True)
    else:
        with pytest.raises(ValueError, match=r"keep_head, but .* has no head of pre-training"):
            HubertPretraining(trained.config, 20, 24, pretrained=path, keep_head=True)


def test_a_head_of_nothing_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="keep_head, but nothing"):
        HubertPretraining(TINY, 20, keep_head=True)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["transformers", "torchaudio", "fairseq", "s3prl"])
def test_a_fit_continues_from_any_system_in_yaml(tmp_path: Path, manifests: Path, system: str) -> None:
    path = model_of(system, tmp_path / "theirs")
    config = read_weights(path).config
    size = {name: getattr(config, name) for name in COPIED}
    iteration = {"features": str(path), "layer": 2, "clusters": 20, "max_frames": 2000, "max_steps": 2}
    layers = ["--config", str(ROOT / "configs/pretrain/small.yaml"), "--config", str(ROOT / "tests/smoke.yaml")]
    data = [f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]", "--data.init_args.validation=null"]
    kept = [] if system == "transformers" else ["--model.init_args.keep_head=true", "--model.init_args.final_dim=24"]
    main(
        [
            *("fit", *layers, *data, *kept, "--model.init_args.temperature=0.1"),
            f"--iterations={json.dumps([iteration | {'weights': str(path)}])}",
            f"--model.init_args.encoder={json.dumps(size)}",
            f"--output={tmp_path / 'run'}",
        ]
    )
    metrics = json.loads((tmp_path / "run" / "iteration1" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    tuned = ["--config", str(ROOT / "configs/finetune/small.yaml"), "--config", str(ROOT / "tests/smoke-finetune.yaml")]
    main(
        [
            *("fit", *tuned, f"--model.init_args.pretrained={path}"),
            f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]",
            f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
            f"--output={tmp_path / 'tuned'}",
        ]
    )
    assert json.loads((tmp_path / "tuned" / "metrics.json").read_text())["steps"] == 2


def test_fine_tuning_continues_from_letters_of_torchaudio(tmp_path: Path) -> None:
    from hubert_lightning.training.finetuning import CTCFinetuning

    theirs = of_torchaudio(small_config("group"), aux_num_out=29)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    import_model(str(tmp_path / "theirs.pt"), tmp_path / "ours.ckpt", num_heads=4)
    model = CTCFinetuning(pretrained=tmp_path / "ours.ckpt", keep_head=True)
    assert model.vocabulary.tokens == LETTERS == torchaudio.pipelines.HUBERT_ASR_LARGE.get_labels()
    assert_close(model.head.weight, theirs.aux.weight, rtol=0, atol=0)


@pytest.mark.slow
def test_an_imported_model_is_tested_as_if_it_had_been_fitted_here(tmp_path: Path, manifests: Path) -> None:
    theirs = of_transformers(small_config("group"), "HubertForCTC", vocab_size=29)
    theirs.save_pretrained(tmp_path / "theirs")
    letters = {"tokens": list(LETTERS)}
    (tmp_path / "letters.json").write_text(json.dumps(letters))
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt", vocabulary=tmp_path / "letters.json")
    tuned = ["--config", str(ROOT / "configs/finetune/small.yaml"), "--config", str(ROOT / "tests/smoke-finetune.yaml")]
    main(
        [
            *(
                "test",
                *tuned,
                f"--ckpt_path={tmp_path / 'ours.ckpt'}",
                f"--model.init_args.pretrained={tmp_path}/ours.ckpt",
            ),
            f"--model.init_args.vocabulary={tmp_path / 'letters.json'}",
            f"--data.init_args.test=[{manifests / 'dev.jsonl.gz'}]",
            f"--output={tmp_path / 'tested'}",
        ]
    )
    assert "words" in json.loads((tmp_path / "tested" / "scores.json").read_text())
    assert isinstance(theirs, transformers.PreTrainedModel)
