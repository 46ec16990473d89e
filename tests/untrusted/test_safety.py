"""No file of somebody else's runs code, fills the memory or reaches outside of itself; a sentence says why."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import tiny_hubert
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hubert_lightning.cli import main
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.formats.own import to_safetensors
from hubert_lightning.pretrained.load import encoder_config, load_encoder, load_hubert, read_weights


class Runs:
    """What a pickle calls when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def content() -> dict[str, Any]:
    """Of a checkpoint that opens."""
    state = {f"encoder.{name}": value for name, value in HubertEncoder(TINY).state_dict().items()}
    return {"state_dict": state, "hyper_parameters": {"encoder": asdict(TINY)}}


def refused(path: Path) -> str:
    """The sentence that a file is refused with, by the function that all of them go through."""
    with pytest.raises(ValueError, match=r"; |: ") as refusal:
        load_encoder(path)
    sentence = str(refusal.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    assert len(sentence) < 600
    return sentence


def test_the_originals_of_the_mutations_open(tmp_path: Path) -> None:
    sound = content()
    torch.save(sound, tmp_path / "a.ckpt")
    for name, value in load_hubert(tmp_path / "a.ckpt").state_dict().items():
        assert torch.equal(value, sound["state_dict"][f"encoder.{name}"])


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "a bare pickle"])
@pytest.mark.parametrize("place", ["whole", "settings", "cfg", "task_state", "state_dict"])
def test_a_pickle_that_runs_something_does_not(tmp_path: Path, form: str, place: str, protocol: int) -> None:
    trace, path = tmp_path / "ran", tmp_path / "evil.pt"
    evil: Any = Runs(trace)
    if place == "settings":
        evil = content() | {"hyper_parameters": {"encoder": asdict(TINY), "more": evil}}
    elif place in ("cfg", "task_state"):
        evil = {"model": content()["state_dict"], "cfg": {"model": {}, "task": {}}} | {place: {"dictionaries": [evil]}}
    elif place == "state_dict":
        evil = content()["state_dict"] | {"encoder.norm.weight": evil}
    if form == "a bare pickle":
        path.write_bytes(pickle.dumps(evil, protocol))
    else:
        torch.save(evil, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    sentence = refused(path)
    assert not trace.exists()
    assert "would call posix.system" in sentence or (form == "a bare pickle" and "is corrupt" in sentence)
    pickle_module_runs_it(path, form, trace)


def pickle_module_runs_it(path: Path, form: str, trace: Path) -> None:
    """The file is as bad as it is meant to be: whoever trusts it is caught."""
    if form == "a bare pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("name", ["fairseq.os.system", "omegaconf.x.eval", "fairseq.data.dictionary.Dictionary"])
def test_a_name_of_fairseq_is_never_looked_up(tmp_path: Path, name: str) -> None:
    """Whatever it is called, a stand-in takes its place: fairseq need not be there, and is not imported if it is."""
    module, _, attribute = name.rpartition(".")
    body = b"\x80\x02" + f"c{module}\n{attribute}\n".encode() + b"X\x04\x00\x00\x00echo\x85R."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", body)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    assert "holds no HuBERT" in refused(tmp_path / "a.pt")


def rewritten(path: Path, change: Callable[[zipfile.ZipFile, str, bytes], None], protocol: int = 2) -> None:
    """A checkpoint whose archive is written anew, entry by entry."""
    torch.save(content(), path, pickle_protocol=protocol)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in entries.items():
            change(archive, name, body)


def test_an_archive_that_unpacks_to_more_than_it_has_is_refused(tmp_path: Path) -> None:
    def bomb(archive: zipfile.ZipFile, name: str, body: bytes) -> None:
        body = bytes(2**26) if name.endswith("data/0") else body
        archive.writestr(name, body, zipfile.ZIP_DEFLATED)

    path = tmp_path / "bomb.ckpt"
    rewritten(path, bomb)
    assert path.stat().st_size < 2**20
    assert "has a compressed entry" in refused(path)


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a\\..\\..\\outside"])
def test_an_archive_with_an_entry_outside_of_it_is_refused(tmp_path: Path, name: str) -> None:
    def more(archive: zipfile.ZipFile, entry: str, body: bytes) -> None:
        archive.writestr(entry, body)
        if entry.endswith("version"):
            archive.writestr(name, b"")

    rewritten(tmp_path / "a.ckpt", more)
    assert "outside of itself" in refused(tmp_path / "a.ckpt")


@pytest.mark.parametrize("protocol", [2, 5])
def test_an_entry_that_is_shorter_than_its_tensor_is_refused(tmp_path: Path, protocol: int) -> None:
    def shortened(archive: zipfile.ZipFile, name: str, body: bytes) -> None:
        archive.writestr(name, body[:4] if "/data/" in name else body)

    rewritten(tmp_path / "a.ckpt", shortened, protocol)
    assert "is corrupt" in refused(tmp_path / "a.ckpt") or "asks for" in refused(tmp_path / "a.ckpt")


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("new_form", [True, False])
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path, new_form: bool, protocol: int) -> None:
    evil = content()
    evil["state_dict"]["encoder.norm.weight"] = torch.zeros(1).expand(10**12)  # 4 TB once it is copied
    torch.save(evil, tmp_path / "a.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=new_form)
    assert "has a tensor of shape (1000000000000,), of which it holds 4 bytes" in refused(tmp_path / "a.ckpt")


@pytest.mark.parametrize("protocol", [2, 3])  # frames of later ones are counted
def test_tensors_that_an_old_file_does_not_have_are_not_made(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pt"
    content = {"model": {"a": torch.zeros(77)}}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    body = path.read_bytes()
    assert body.count(b"K\x4d") >= 2  # the 77 elements of its storage, and the size of its tensor
    path.write_bytes(body.replace(b"K\x4d", b"J\xff\xff\xff\x7f"))  # 2³¹ - 1
    assert "asks for 8589934588 of tensors" in refused(path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_layers": 10**6}, "its settings ask for 1000000 layers, and it has 2"),
        ({"dim": 2**40}, "describes no encoder: dim is 1099511627776"),
        ({"ffn_dim": 2**20}, "its settings ask for (1048576, 32)"),
        ({"dim": "32"}, "sets the encoder's dim to '32'"),
        ({"dim": [32]}, r"sets the encoder's dim to [32]"),
        ({"pos_kernel": -1}, "pos_kernel is -1"),
        ({"pre_norm": 1}, "sets the encoder's pre_norm to 1"),
    ],
)
def test_settings_that_do_not_fit_the_weights_cost_nothing(
    tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    evil = content()
    evil["hyper_parameters"]["encoder"] |= settings
    torch.save(evil, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"; |: ") as refusal:
        load_encoder(tmp_path / "a.ckpt")
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float, form: str) -> None:
    path = tmp_path / "a.ckpt"
    evil = content()
    evil["state_dict"]["encoder.layers.1.ffn_input.weight"][3, 4] = value
    torch.save(evil, path)
    if form == "safetensors":
        small_transformers(tmp_path / "theirs")
        path = tmp_path / "theirs"
        state = load_file(path / "model.safetensors")
        state["encoder.layers.0.feed_forward.intermediate_dense.weight"][0, 0] = value
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    assert "has values that are NaN or infinite; use an earlier checkpoint" in refused(path)


def small_transformers(folder: Path, **options: Any) -> None:
    tiny_hubert().save_pretrained(folder, **options)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", ".."])
def test_an_index_that_points_outside_of_its_directory_is_refused(tmp_path: Path, shard: str) -> None:
    small_transformers(tmp_path / "theirs", max_shard_size="5KB")
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"] = dict.fromkeys(places["weight_map"], shard)
    index.write_text(json.dumps(places))
    assert f"names {shard!r}, a file outside of its directory" in refused(tmp_path / "theirs")


@pytest.mark.parametrize("what", ["a number", "a list"])
def test_a_corrupt_index_is_refused(tmp_path: Path, what: str) -> None:
    small_transformers(tmp_path / "theirs", max_shard_size="5KB")
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": 3 if what == "a number" else {"a": [1]}}))
    assert "does not say which weight is where" in refused(tmp_path / "theirs")


def test_settings_of_a_thousand_brackets_are_refused(tmp_path: Path) -> None:
    small_transformers(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text("[" * 100_000)
    assert "is not JSON" in refused(tmp_path / "theirs")


def test_settings_of_a_gigabyte_are_not_read(tmp_path: Path) -> None:
    small_transformers(tmp_path / "theirs")
    with (tmp_path / "theirs" / "config.json").open("r+b") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="has more than 16777216 characters, where settings have a few"):
        encoder_config(tmp_path / "theirs")


def test_a_recursive_pickle_is_refused(tmp_path: Path) -> None:
    evil: dict[str, Any] = {}
    evil["model"] = evil
    torch.save(evil, tmp_path / "a.pt")
    assert "holds no HuBERT" in refused(tmp_path / "a.pt")


def nested(depth: int) -> Any:
    """What takes 2 ** depth steps to walk through, and depth to write down."""
    value: Any = "x"
    for _ in range(depth):
        value = [value, value]
    return value


def test_settings_that_hold_a_thing_many_times_are_walked_through_once(tmp_path: Path) -> None:
    torch.save({"cfg": {"model": {"more": nested(60)}}, "model": {"a": torch.zeros(1)}}, tmp_path / "a.pt")
    assert "lacks weights of the encoder" in refused(tmp_path / "a.pt")


def test_settings_that_hold_themselves_are_refused(tmp_path: Path) -> None:
    evil: dict[str, Any] = {}
    evil["model"] = evil
    torch.save({"cfg": evil, "model": {"a": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="settings that hold themselves"):
        load_encoder(tmp_path / "a.pt")


@pytest.mark.parametrize("new_form", [True, False])
def test_a_pickle_that_asks_for_a_gigabyte_does_not_get_it(tmp_path: Path, new_form: bool) -> None:
    class Large:
        def __reduce__(self) -> tuple[Any, ...]:
            return bytearray, (2**30,)

    torch.save(content() | {"more": Large()}, tmp_path / "a.pt", _use_new_zipfile_serialization=new_form)
    assert "the pickle would call builtins.bytearray" in refused(tmp_path / "a.pt")


NO_MODEL = "holds something that such a model never has"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hyper_parameters": []}, "does not say how large its encoder is"),
        ({"hyper_parameters": {"encoder": []}}, "does not say how large its encoder is"),
        ({"hyper_parameters": {"encoder": asdict(TINY), "temperature": None}}, NO_MODEL),
        ({"imported": [1]}, NO_MODEL),
        ({"state_dict": []}, NO_MODEL),
        ({"state_dict": {1: torch.zeros(1)}}, NO_MODEL),
        ({"state_dict": {"encoder.norm.weight": "x"}}, "holds something else than weights (norm.weight)"),
        (
            {"state_dict": {"encoder.norm.weight": torch.zeros(2, 2).to_sparse()}},
            "would call torch._utils._rebuild_sparse",
        ),
        ({"model": [], "cfg": {}, "state_dict": None}, NO_MODEL),
        ({"model": {1: torch.zeros(1)}, "cfg": {}}, NO_MODEL),
        ({"model": {}, "cfg": {}}, "lacks weights of the encoder"),
        ({"model": {}, "cfg": {"model": []}}, "lacks weights of the encoder"),
        ({"model": {}, "cfg": {"model": {}}, "task_state": {"dictionaries": [1]}}, NO_MODEL),
        ({"model_weight": {}, "model_cfg": []}, NO_MODEL),
    ],
)
def test_values_of_another_type_are_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    evil = {name: value for name, value in content().items() if not {"cfg", "model_cfg"} & change.keys()} | change
    torch.save(evil, tmp_path / "a.pt")
    assert sentence in refused(tmp_path / "a.pt")


@given(st.sampled_from(["ckpt", "old", "ckpt5", "old5", "safetensors"]), st.data())
def test_a_damaged_file_opens_as_it_should_or_is_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    if form == "safetensors":
        trained = read_weights(sound(tmp_path_factory, "ckpt"))
        path.write_bytes(to_safetensors(trained))
    else:
        path.write_bytes(sound(tmp_path_factory, form).read_bytes())
    damaged = bytearray(path.read_bytes())
    ahead = data.draw(st.integers(100, 4000))  # of where names and shapes are, more often than numbers
    for _ in range(3):
        damaged[data.draw(st.integers(0, min(ahead, len(damaged) - 1)))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    said = ""
    try:
        load_encoder(path)
    except ValueError as error:
        said = str(error)
    assert not said or (str(path) in said and "\n" not in said)


def sound(folders: pytest.TempPathFactory, form: str) -> Path:
    path = folders.getbasetemp() / f"sound.{form}"
    if not path.exists():
        protocol = 5 if form.endswith("5") else 2
        torch.save(content(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=form.startswith("ckpt"))
    return path


@pytest.mark.parametrize("cut", [10, 1000, 5000])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    torch.save(content(), tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole[:-cut])
    assert "is corrupt" in refused(tmp_path / "a.ckpt")


def test_the_verb_refuses_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Runs(tmp_path / "ran"), tmp_path / "evil.pt")
    with pytest.raises(SystemExit) as end:
        main(["import", str(tmp_path / "evil.pt"), str(tmp_path / "out.ckpt")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    sentence = (
        "refused, the pickle would call posix.system; save the state_dict alone: torch.save(model.state_dict(), ...)"
    )
    assert said == f"hubert: {tmp_path / 'evil.pt'}: {sentence}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]


def test_code_in_a_layout_of_convolutions_is_read_as_text(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    layout = f"__import__('os').system('touch {trace}')"
    state = {"feature_extractor.conv_layers.0.0.weight": torch.zeros(1)}
    torch.save({"cfg": {"model": {"conv_feature_layers": layout}, "task": {}}, "model": state}, tmp_path / "a.pt")
    assert "has convolutions __import__" in refused(tmp_path / "a.pt")
    assert not trace.exists()
