"""Models of every system come in and go out with the numbers that they had there, heads included.

The references are built by transformers and torchaudio themselves, with random weights. fairseq and s3prl cannot be
installed beside them: their layout is written out here, from fairseq's models/hubert and s3prl's upstream/hubert, and
read back by torchaudio's own importer.
"""

import json
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import torchaudio
import transformers
from foreign_models import (
    ATOL,
    FAIRSEQ_LETTERS,
    LENGTHS,
    NORMS,
    assert_layers_equal,
    beside_a_model,
    fairseq_heads,
    fairseq_settings,
    fairseq_state,
    fine_tuned_state,
    normalized_input,
    of_torchaudio,
    of_transformers,
    random_weights,
    save_ours,
    small_config,
)
from hypothesis import given as given_by
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchaudio.models.wav2vec2.utils.import_fairseq import _convert_state_dict

from hubert_lightning.asr.ctc_model import load_ctc
from hubert_lightning.asr.decoding import greedy
from hubert_lightning.frames import num_frames
from hubert_lightning.interchange.import_export import ExportFormat, export_model, import_model
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.dialect import from_ours
from hubert_lightning.pretrained.formats import FORMATS, FormatName
from hubert_lightning.pretrained.formats import transformers as transformers_format
from hubert_lightning.pretrained.formats.fairseq import DIALECT as FAIRSEQ
from hubert_lightning.pretrained.load import load_encoder, read_weights
from hubert_lightning.pretrained.weights import PretrainedWeights, build_ctc_head, build_encoder, build_predictors
from hubert_lightning.vocabulary import Vocabulary


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def waveform() -> Tensor:
    rows = torch.randn(2, 16_000)
    rows[1, 9_000:] = 0
    return rows


# transformers


def test_every_format_can_be_read_and_chosen_for_an_export() -> None:
    assert list(FORMATS) == list(get_args(FormatName))
    assert {*get_args(ExportFormat)} == {*FORMATS, "onnx"}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stored", ["whole", "shards", "pickle", "pickled shards"])
def test_an_encoder_of_transformers_is_imported(tmp_path: Path, waveform: Tensor, norm: str, stored: str) -> None:
    theirs = of_transformers(small_config(norm))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if "shards" in stored else "5GB")
    if "pickle" in stored:
        pickle_weights(tmp_path)
    assert len(list(tmp_path.glob("*.index.json"))) == ("shards" in stored)
    assert_layers_equal(load_encoder(tmp_path), theirs, waveform)


def pickle_weights(folder: Path) -> None:
    """As transformers saved its models until 2023."""
    for file in [*folder.glob("*.safetensors")]:
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(transformers_format.read_tensors(file), folder / name)
        file.unlink()
    for index in folder.glob("*.index.json"):
        text = index.read_text().replace("model", "pytorch_model").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def test_a_model_of_the_hub_is_imported_by_its_name(
    tmp_path: Path, waveform: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--hubert" / "snapshots" / "0123"  # where a download lies
    theirs = of_transformers(small_config("group"))
    theirs.save_pretrained(snapshot)
    (tmp_path / "models--some--hubert" / "refs").mkdir()
    (tmp_path / "models--some--hubert" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_layers_equal(load_encoder("some/hubert"), theirs, waveform)
    with pytest.raises(ValueError, match="some/other does not exist here, and the Hugging Face hub did not send it"):
        load_encoder("some/other")


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["encoder", "clusters", "letters"])
def test_transformers_opens_an_export(tmp_path: Path, waveform: Tensor, norm: str, kind: str) -> None:
    trained = random_weights(norm, kind)
    export_model(str(save_ours(trained, tmp_path / "ours.ckpt")), tmp_path / "theirs")
    model = transformers.HubertForCTC if kind == "letters" else transformers.HubertModel
    theirs, report = model.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    encoder = build_encoder(trained, tmp_path)
    assert_layers_equal(encoder, theirs.eval(), waveform)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "theirs")
    rows = [row[:count].numpy() for row, count in zip(waveform, LENGTHS)]
    inputs = extractor(rows, sampling_rate=16_000, padding=True, return_tensors="pt")
    assert ("attention_mask" in inputs) == (norm == "layer")
    # They add 1e-7 to the variance, where fairseq and we add 1e-5
    assert_close(inputs["input_values"], normalized_input(waveform, LENGTHS, encoder.config), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_fine_tuned_model_has_its_processor_and_its_transcripts_in_transformers(
    tmp_path: Path, waveform: Tensor, norm: str
) -> None:
    trained = random_weights(norm, "letters")
    checkpoint = save_ours(trained, tmp_path / "ours.ckpt")
    export_model(str(checkpoint), tmp_path / "theirs")
    theirs = transformers.HubertForCTC.from_pretrained(tmp_path / "theirs").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "theirs")
    model = load_ctc(checkpoint)
    for row in waveform:
        inputs = processor(row.numpy(), sampling_rate=16_000, return_tensors="pt")
        logits = theirs(inputs.input_values).logits
        assert_close(model(row[None]), logits.log_softmax(dim=-1), rtol=0, atol=ATOL)
        [said] = processor.batch_decode(logits.argmax(dim=-1))
        frames = torch.tensor([logits.shape[1]])
        assert " ".join(said.split()) == greedy(model(row[None]), frames, model.vocabulary)[0]
    assert processor.tokenizer("ab é")["input_ids"] == model.vocabulary.encode("ab é")
    loss = theirs(waveform, labels=torch.tensor([[2, 3, 1, 4], [5, 2, 2, 3]])).loss
    log_probs = model(
        normalized_input(waveform, None, model.encoder.config) if norm == "layer" else waveform
    ).transpose(0, 1)
    sizes = torch.full((2,), len(log_probs)), torch.tensor([4, 4])
    expected = F.ctc_loss(log_probs, torch.tensor([[2, 3, 1, 4], [5, 2, 2, 3]]), *sizes, blank=0, reduction="mean")
    if norm == "group":  # layer: the waveform is not normalised by the model, theirs or ours
        assert_close(loss, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_processor_of_transformers_decides_whether_audio_is_normalised(
    tmp_path: Path, norm: str, normalize: bool
) -> None:
    of_transformers(small_config(norm), "HubertForCTC", vocab_size=4, pad_token_id=0).save_pretrained(tmp_path)
    (tmp_path / "given.json").write_text(json.dumps({"<pad>": 0, "|": 1, "a": 2, "<unk>": 3}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(tmp_path / "given.json", bos_token=None, eos_token=None)
    features = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
    transformers.Wav2Vec2Processor(features, tokenizer).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()  # the processor's own file has its settings
    model = load_ctc(tmp_path)
    assert model.encoder.config.normalize_waveform == normalize
    assert model.vocabulary.tokens == ("<pad>", "|", "a", "<unk>")


# torchaudio


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wrapped", ["", "model."])
def test_a_pretrained_model_of_torchaudio_is_imported_with_its_head(
    tmp_path: Path, waveform: Tensor, norm: str, wrapped: str
) -> None:
    theirs = of_torchaudio(small_config(norm), num_classes=20, final_dim=24)
    state = {wrapped + name: value for name, value in theirs.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "theirs.pt")
    trained = read_weights(tmp_path / "theirs.pt", num_heads=4)
    encoder = build_encoder(trained, tmp_path)
    assert_layers_equal(encoder, theirs.wav2vec2, waveform)
    assert_close(encoder.mask_embedding, theirs.mask_generator.mask_embedding, rtol=0, atol=0)
    [head] = build_predictors(trained, tmp_path)
    frames = encoder(waveform)
    everywhere = torch.ones(frames.shape[:2], dtype=torch.bool)
    labels = torch.randint(20, frames.shape[:2])
    masked, _ = theirs.logit_generator(frames, labels, everywhere, ~everywhere)
    # torchaudio puts the true cluster first, and all of them after it, the true one again at -inf
    assert_close(head(frames).flatten(0, 1).gather(1, labels.flatten()[:, None]), masked[:, :1], rtol=0, atol=ATOL)
    others = masked[:, 1:]
    assert_close(head(frames).flatten(0, 1)[others.isfinite()], others[others.isfinite()], rtol=0, atol=ATOL)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tokens", [29, 32])
def test_a_fine_tuned_model_of_torchaudio_is_imported(tmp_path: Path, waveform: Tensor, norm: str, tokens: int) -> None:
    theirs = of_torchaudio(small_config(norm), aux_num_out=tokens)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    import_model(str(tmp_path / "theirs.safetensors"), tmp_path / "ours.ckpt", num_heads=4)
    model = load_ctc(tmp_path / "ours.ckpt")
    labels = torchaudio.pipelines.HUBERT_ASR_LARGE.get_labels()
    assert [token for token in model.vocabulary.tokens if len(token) == 1] == list(labels)
    assert_layers_equal(model.encoder, theirs, waveform)
    logits = theirs(normalized_input(waveform, None, model.encoder.config))[0]
    assert_close(model(waveform), logits.log_softmax(dim=-1), rtol=0, atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "layers"), [("base", 12), ("large", 24)])
def test_released_sizes_of_torchaudio_imply_their_attention_heads(tmp_path: Path, size: str, layers: int) -> None:
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in getattr(torchaudio.models, f"hubert_{size}")().state_dict().items()
        }
    torch.save({name: torch.zeros(()).expand(shape).half() for name, shape in shapes.items()}, tmp_path / "theirs.pt")
    config = read_weights(tmp_path / "theirs.pt").config
    released = EncoderConfig()
    if size == "large":
        released = replace(released, conv_norm="layer", dim=1024, num_layers=24, num_heads=16, ffn_dim=4096)
        released = replace(released, pre_norm=True, normalize_waveform=True, feature_grad_mult=1.0)
        # torchaudio.models.hubert_large, and fairseq's hubert_large_librivox.yaml
        released = replace(released, dropout=0.0, attention_dropout=0.0, input_dropout=0.0, layer_drop=0.0)
    assert config == released
    assert config.num_layers == layers


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["encoder", "clusters", "letters"])
def test_torchaudio_opens_an_export(tmp_path: Path, waveform: Tensor, norm: str, kind: str) -> None:
    trained = random_weights(norm, kind)
    export_model(str(save_ours(trained, tmp_path / "ours.ckpt")), tmp_path / "theirs", "torchaudio")
    about = json.loads((tmp_path / "theirs" / "model.json").read_text())
    theirs = getattr(torchaudio.models, about["function"].split(".")[-1])(**about["arguments"]).eval()
    theirs.load_state_dict(torch.load(tmp_path / "theirs" / "model.pt", weights_only=True))
    assert about["normalize_waveform"] == (norm == "layer")
    assert_layers_equal(build_encoder(trained, tmp_path), theirs.wav2vec2 if kind == "clusters" else theirs, waveform)
    if kind == "letters":
        head = build_ctc_head(trained, tmp_path)[0]
        frames = build_encoder(trained, tmp_path)(waveform)
        assert_close(head(frames), theirs(normalized_input(waveform, None, trained.config))[0], rtol=0, atol=ATOL)
        assert about["labels"] == list(trained.vocabulary.tokens) if trained.vocabulary else False


# fairseq and s3prl


def fairseq_frames(length: Tensor, longest: int) -> Tensor:
    """Frames that fairseq takes for audio, by its rule (models/hubert/hubert.py, forward_padding_mask).

    The samples, cut to a multiple of the frames, are parted evenly among them; a frame is padding if its whole part is.
    """
    frames = num_frames(longest)
    padding = torch.arange(longest) >= length[:, None]
    parts = padding[:, : longest - longest % frames].view(len(length), frames, -1)
    return (~parts.all(dim=-1)).sum(dim=1)


@given_by(st.integers(400, 40 * 16_000), st.data())
def test_fairseq_keeps_up_to_two_frames_of_padding(longest: int, data: st.DataObject) -> None:
    length = torch.tensor([data.draw(st.integers(400, longest))])
    more = int(fairseq_frames(length, longest) - num_frames(length))
    assert 0 <= more <= 2


@pytest.mark.parametrize("norm", NORMS)
def test_a_padded_row_is_that_of_fairseq_with_as_many_frames_as_fairseq_keeps(
    tmp_path: Path, waveform: Tensor, norm: str
) -> None:
    """torchaudio's encoder, which is told how many frames are audio, stands for fairseq's."""
    theirs = of_torchaudio(small_config(norm))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    encoder = build_encoder(read_weights(tmp_path / "theirs.pt", num_heads=4), tmp_path)
    given, frames = normalized_input(waveform, LENGTHS, encoder.config), fairseq_frames(LENGTHS, waveform.shape[1])
    assert (frames - num_frames(LENGTHS)).tolist() == [0, 1]
    expected = theirs.encoder(theirs.feature_extractor(given, None)[0], frames)
    mine = encoder.contextual(encoder.local_features(waveform, LENGTHS), frames)
    for row, count in enumerate(frames.tolist()):
        assert_close(mine[row, :count], expected[row, :count], rtol=0, atol=ATOL)
    kept = num_frames(LENGTHS).tolist()
    differences = [(encoder(waveform, LENGTHS) - expected)[row, :count].abs().max() for row, count in enumerate(kept)]
    assert differences[0] < ATOL
    assert differences[1] > 0.01


@contextmanager
def fairseq_installed() -> Iterator[Callable[[list[str]], Any]]:
    """While a file is written, and no longer: what makes the objects that fairseq pickles into `task_state`."""
    kind = type("Dictionary", (), {"__module__": "fairseq.data.dictionary"})
    names = ("fairseq", "fairseq.data", "fairseq.data.dictionary")
    modules = {name: types.ModuleType(name) for name in names}
    vars(modules[names[-1]])["Dictionary"] = kind

    def dictionary(symbols: list[str]) -> Any:
        made = kind()
        vars(made).update(symbols=symbols, count=[1] * len(symbols), indices={}, bos_word="<s>")
        return made

    sys.modules.update(modules)
    yield dictionary
    for name in names:
        del sys.modules[name]


def assert_heads_equal(
    trained: PretrainedWeights, state: dict[str, Tensor], clusters: list[int], frames: Tensor
) -> None:
    """fairseq models/hubert/hubert.py, compute_nce: cosine of each stream's projection and its dictionary's rows."""
    heads, projected = (
        build_predictors(trained, Path()),
        F.linear(frames, state["final_proj.weight"], state["final_proj.bias"]),
    )
    streams = zip(heads, projected.chunk(len(clusters), dim=-1), strict=True)
    first = 0
    for (head, stream), number in zip(streams, clusters, strict=True):
        rows = state["label_embs_concat"][first + 4 : first + 4 + number]
        expected = F.cosine_similarity(stream[..., None, :], rows, dim=-1) / 0.1
        assert_close(head(frames), expected, rtol=0, atol=ATOL)
        first += 4 + number


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("clusters", [[20], [20, 33]])
@pytest.mark.parametrize("form", ["zip", "before torch 1.6"])
def test_a_pretrained_model_of_fairseq_is_imported_without_its_own_symbols(
    tmp_path: Path, waveform: Tensor, norm: str, clusters: list[int], form: str
) -> None:
    theirs = of_transformers(small_config(norm))
    state = fairseq_heads(fairseq_state(theirs), clusters)
    model, task = fairseq_settings(small_config(norm))
    symbols = [["<s>", "<pad>", "</s>", "<unk>", *map(str, range(number))] for number in clusters]
    content = {"args": None, "cfg": {"model": model, "task": task}, "model": state, "extra_state": {"epoch": 3}}
    with fairseq_installed() as dictionary:
        content["task_state"] = {"dictionaries": [dictionary(of) for of in symbols]}
        torch.save(content, tmp_path / "theirs.pt", _use_new_zipfile_serialization=form == "zip")
    trained = read_weights(tmp_path / "theirs.pt")
    encoder = build_encoder(trained, tmp_path)
    assert trained.num_clusters == clusters
    assert_layers_equal(encoder, theirs, waveform)
    assert_close(encoder.mask_embedding, state["mask_emb"], rtol=0, atol=0)
    assert_heads_equal(trained, state, clusters, encoder(waveform))


@pytest.mark.parametrize("norm", NORMS)
def test_a_model_of_s3prl_is_imported(tmp_path: Path, waveform: Tensor, norm: str) -> None:
    theirs = of_transformers(small_config(norm))
    state = fairseq_heads(fairseq_state(theirs), [20])
    model, task = fairseq_settings(small_config(norm))
    symbols = [["<s>", "<pad>", "</s>", "<unk>", *map(str, range(20))]]
    content = {"task_cfg": task, "model_cfg": model, "model_weight": state, "dictionaries_symbols": symbols}
    torch.save(content, tmp_path / "theirs.pt")
    trained = read_weights(tmp_path / "theirs.pt")
    encoder = build_encoder(trained, tmp_path)
    assert_layers_equal(encoder, theirs, waveform)
    assert_heads_equal(trained, state, [20], encoder(waveform))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("spelt", ["in the file", "beside it"])
@pytest.mark.parametrize("settings", ["cfg", "args"])
def test_a_fine_tuned_model_of_fairseq_is_imported_with_its_letters(
    tmp_path: Path, waveform: Tensor, norm: str, spelt: str, settings: str
) -> None:
    theirs = of_transformers(small_config(norm))
    head = nn.Linear(64, 32)
    state = {f"w2v_encoder.w2v_model.{name}": value for name, value in fairseq_state(theirs).items()}
    state |= {f"w2v_encoder.proj.{name}": value for name, value in head.state_dict().items()}
    state["w2v_encoder.w2v_model.label_embs_concat"] = torch.rand(504, 24)  # which fairseq leaves there, alone
    model, task = fairseq_settings(small_config(norm))
    if settings == "cfg":
        inside: Any = {"model": model, "task": task}
        described = {"args": None, "cfg": {"model": {"_name": "hubert_ctc", "w2v_args": inside}, "task": task}}
    else:  # as before fairseq had hydra
        described = {"args": Namespace(arch="hubert_ctc", w2v_args=Namespace(**model | task)), "cfg": None}
    content = {**described, "model": state, "task_state": {}}
    if spelt == "beside it":
        (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in FAIRSEQ_LETTERS[4:]))
    with fairseq_installed() as dictionary:
        if spelt == "in the file":
            content["task_state"] = {"target_dictionary": dictionary(FAIRSEQ_LETTERS)}
        torch.save(content, tmp_path / "theirs.pt")
    loaded = load_ctc(tmp_path / "theirs.pt")
    assert loaded.vocabulary == Vocabulary(tuple(FAIRSEQ_LETTERS), "upper", "space")
    assert_layers_equal(loaded.encoder, theirs, waveform)
    last = theirs(normalized_input(waveform, None, small_config(norm))).last_hidden_state
    assert_close(loaded(waveform), head(last).log_softmax(dim=-1), rtol=0, atol=ATOL)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["encoder", "clusters", "ensemble", "letters"])
def test_torchaudio_reads_an_export_to_fairseq(tmp_path: Path, waveform: Tensor, norm: str, kind: str) -> None:
    trained = random_weights(norm, kind)
    export_model(str(save_ours(trained, tmp_path / "ours.ckpt")), tmp_path / "theirs", "fairseq")
    content = torch.load(tmp_path / "theirs" / "checkpoint.pt", weights_only=True)
    state = {name.removeprefix("w2v_encoder."): value for name, value in content["model"].items()}
    clusters = state.pop("w2v_model.label_embs_concat", state.pop("label_embs_concat", None))
    theirs = of_torchaudio(small_config(norm), aux_num_out=11 if kind == "letters" else None)
    state = {name: value for name, value in _convert_state_dict(state).items() if not name.startswith("label_embs")}
    loaded = theirs.load_state_dict(renamed_weight_norm(state), strict=False)
    assert not loaded.unexpected_keys
    assert not loaded.missing_keys
    encoder = build_encoder(trained, tmp_path)
    assert_layers_equal(encoder, theirs, waveform)
    if kind == "letters":  # three symbols more, which fairseq has and nothing spells
        log_probs = theirs(normalized_input(waveform, None, trained.config))[0].log_softmax(dim=-1)
        expected = build_ctc_head(trained, tmp_path)[0](encoder(waveform)).log_softmax(dim=-1)
        assert_close(log_probs[..., [0, *range(4, 11)]], expected, rtol=0, atol=ATOL)
        symbols = (tmp_path / "theirs" / "dict.ltr.txt").read_text().split()
        assert symbols[::2] == ["|", *"abcdé'"]
    elif kind != "encoder":
        numbers = [len(of["codewords"]) for of in trained.predictors]
        assert len(clusters) == sum(numbers) + 4 * len(numbers)
        assert_heads_equal(
            replace(trained, temperature=0.1),
            {**content["model"], "label_embs_concat": clusters},
            numbers,
            encoder(waveform),
        )


def renamed_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    at = "encoder.transformer.pos_conv_embed.conv."
    return {
        at + new.get(name.removeprefix(at), "") if name.removeprefix(at) in new else name: v
        for name, v in state.items()
    }


@pytest.mark.parametrize("blank", ["<pad>", "-"])
def test_tokens_that_fairseq_has_for_itself_keep_their_weights_there(
    tmp_path: Path, waveform: Tensor, blank: str
) -> None:
    tokens = [blank, "<s>", "</s>", "<unk>", "|", *"abc"]  # as of transformers
    head, vocabulary = dict(nn.Linear(64, 8).state_dict()), Vocabulary(tuple(tokens), "lower", "space")
    trained = replace(random_weights("group", "encoder"), head=head, vocabulary=vocabulary)
    export_model(str(save_ours(trained, tmp_path / "ours.ckpt")), tmp_path / "theirs", "fairseq")
    symbols = (tmp_path / "theirs" / "dict.ltr.txt").read_text().split()[::2]
    assert not set(symbols) & set(FAIRSEQ_LETTERS[:4])  # which fairseq refuses there
    head = torch.load(tmp_path / "theirs" / "checkpoint.pt", weights_only=True)["model"]["w2v_encoder.proj.weight"]
    named = dict(zip([*FAIRSEQ_LETTERS[:4], *symbols], head, strict=True))
    expected = dict(zip(tokens, (trained.head or {})["weight"], strict=True))
    for token in ("</s>", "<unk>", "|", *"abc"):
        assert_close(named[token], expected[token], rtol=0, atol=0)
    assert_close(named["<s>"], expected[blank], rtol=0, atol=0)
    assert_close(load_ctc(tmp_path / "theirs")(waveform), load_ctc(tmp_path / "ours.ckpt")(waveform), rtol=0, atol=0)


def test_an_exported_encoder_has_the_head_that_fairseq_and_s3prl_need(tmp_path: Path) -> None:
    export_model(
        str(save_ours(random_weights("group", "encoder"), tmp_path / "ours.ckpt")), tmp_path / "theirs", "fairseq"
    )
    content = torch.load(tmp_path / "theirs" / "checkpoint.pt", weights_only=True)
    assert content["model"]["label_embs_concat"].shape == (5, 256)
    assert content["model"]["final_proj.weight"].shape == (256, 64)
    assert content["dictionaries_symbols"] == [["<s>", "<pad>", "</s>", "<unk>", "0"]]
    (tmp_path / "theirs" / "hubert_lightning.safetensors").unlink()
    assert not read_weights(tmp_path / "theirs").predictors


@pytest.mark.parametrize(("dim", "heads"), [(768, 12), (1024, 16), (1280, 16)])
def test_bare_weights_of_fairseq_have_the_heads_of_the_released_size(tmp_path: Path, dim: int, heads: int) -> None:
    config = replace(EncoderConfig(), dim=dim, num_layers=1, num_heads=heads, ffn_dim=8, conv_channels=4, pos_kernel=4)
    state = from_ours(HubertEncoder(config).state_dict(), FAIRSEQ, old_names=True)
    torch.save(state, tmp_path / "theirs.pt")
    assert read_weights(tmp_path / "theirs.pt").config == config  # with the dropouts of Base, as its group norm tells
    torch.save(fairseq_state(of_transformers(small_config("group"))), tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match="width of 64, and does not state its number of attention heads; give it"):
        read_weights(tmp_path / "narrow.pt")


def test_several_dictionaries_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    state = fairseq_heads(fairseq_state(of_transformers(small_config("group"))), [20, 33])
    model, task = fairseq_settings(small_config("group"))
    content = {"cfg": {"model": model, "task": task | {"labels": ["a", "b"]}}, "args": None, "model": state}
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match="predicts 2 streams of clusters, and does not hold the dictionaries"):
        read_weights(tmp_path / "theirs.pt")


def test_a_tied_head_serves_every_stream_and_is_exported(tmp_path: Path, waveform: Tensor) -> None:
    state = fairseq_heads(fairseq_state(of_transformers(small_config("group"))), [20, 33])
    state |= {"final_proj.weight": torch.randn(24, 64), "final_proj.bias": torch.randn(24)}
    model, task = fairseq_settings(small_config("group"))
    symbols = [["<s>", "<pad>", "</s>", "<unk>", *map(str, range(number))] for number in (20, 33)]
    content = {"model_cfg": model | {"untie_final_proj": False}, "task_cfg": task, "model_weight": state}
    torch.save(content | {"dictionaries_symbols": symbols}, tmp_path / "theirs.pt")
    trained = read_weights(tmp_path / "theirs.pt")
    twice = {f"final_proj.{part}": torch.cat([state[f"final_proj.{part}"]] * 2) for part in ("weight", "bias")}
    assert_heads_equal(trained, state | twice, [20, 33], build_encoder(trained, tmp_path)(waveform))
    import_model(str(tmp_path / "theirs.pt"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "out", "safetensors")


@pytest.mark.parametrize("system", ["fairseq", "s3prl"])
def test_clusters_have_the_codewords_that_the_dictionary_names(tmp_path: Path, system: str) -> None:
    """fairseq's dictionaries may list clusters by how frequent they are."""
    state = fairseq_heads(fairseq_state(of_transformers(small_config("group"))), [20, 33])
    model, task = fairseq_settings(small_config("group"))
    orders = [torch.randperm(20).tolist(), torch.randperm(33).tolist()]
    symbols = [["<s>", "<pad>", "</s>", "<unk>", *map(str, order)] for order in orders]
    if system == "fairseq":
        content = {"cfg": {"model": model, "task": task}, "args": None, "model": state}
        with fairseq_installed() as dictionary:
            torch.save(content | {"task_state": {"dictionaries": [*map(dictionary, symbols)]}}, tmp_path / "theirs.pt")
    else:
        content = {"model_cfg": model, "task_cfg": task, "model_weight": state, "dictionaries_symbols": symbols}
        torch.save(content, tmp_path / "theirs.pt")
    trained = read_weights(tmp_path / "theirs.pt")
    assert all(note.startswith("not used here, kept for an export: ") for note in trained.notes)
    first = 0
    for predictor, order in zip(trained.predictors, orders, strict=True):
        for place, cluster in enumerate(order):
            row = state["label_embs_concat"][first + 4 + place]
            assert_close(predictor["codewords"][cluster], row, rtol=0, atol=0)
        first += 4 + len(order)


def test_clusters_that_are_not_numbered_from_zero_are_noted(tmp_path: Path) -> None:
    state = fairseq_heads(fairseq_state(of_transformers(small_config("group"))), [20])
    model, task = fairseq_settings(small_config("group"))
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(str, [*range(7), *range(8, 21)])]  # the eighth never occurred
    content = {"model_cfg": model, "task_cfg": task, "model_weight": state, "dictionaries_symbols": [symbols]}
    torch.save(content, tmp_path / "theirs.pt")
    trained = read_weights(tmp_path / "theirs.pt")
    assert trained.notes[0] == "its dictionary calls cluster 7 '8': labels are rows of the dictionary"
    assert_close(trained.predictors[0]["codewords"], state["label_embs_concat"][4:], rtol=0, atol=0)


@pytest.mark.parametrize("part", ["label_embs_concat", "final_proj.weight", "final_proj.bias"])
def test_half_a_head_of_fairseq_is_refused(tmp_path: Path, part: str) -> None:
    state = fairseq_heads(fairseq_state(of_transformers(small_config("group"))), [20])
    del state[part]
    model, task = fairseq_settings(small_config("group"))
    torch.save({"cfg": {"model": model, "task": task}, "args": None, "model": state}, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match="has half a head of pre-training"):
        read_weights(tmp_path / "theirs.pt")


def test_omitted_weights_and_assumptions_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = of_transformers(small_config("group"), "HubertForSequenceClassification")
    classifier.save_pretrained(tmp_path / "classifier")
    import_model(str(tmp_path / "classifier"), tmp_path / "a.ckpt")
    assert "left out, because this package cannot use it: classifier.bias and 3 more" in capsys.readouterr().out
    torch.save(of_torchaudio(small_config("group"), aux_num_out=29).state_dict(), tmp_path / "letters.pt")
    import_model(str(tmp_path / "letters.pt"), tmp_path / "b.ckpt", num_heads=4)
    said = capsys.readouterr().out
    assert "assumed to be those of torchaudio.pipelines, - | E T A O N" in said
    assert "it has no mask embedding, which is drawn at random" in said
    assert 0 < read_weights(tmp_path / "b.ckpt").encoder["mask_embedding"].std() < 1


def test_a_given_vocabulary_removes_the_note_about_assumed_letters_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = of_torchaudio(small_config("group"), aux_num_out=29).state_dict()
    torch.save(state | {"head--vocabulary.weight": torch.zeros(1)}, tmp_path / "letters.pt")
    Vocabulary().write(tmp_path / "vocabulary.json")
    import_model(str(tmp_path / "letters.pt"), tmp_path / "a.ckpt", 4, tmp_path / "vocabulary.json")
    said = capsys.readouterr().out
    assert "left out, because this package cannot use it: head--vocabulary.weight" in said
    assert "it has no mask embedding" in said
    assert "assumed to be those of torchaudio.pipelines" not in said


# Settings that this package does not use


FAIRSEQ_MODEL = {
    **{"mask_prob": 0.65, "mask_length": 7, "mask_selection": "poisson", "mask_other": 1.5, "no_mask_overlap": True},
    **{"mask_channel_prob": 0.25, "mask_channel_length": 8, "mask_channel_selection": "uniform"},
    **{"mask_channel_other": 0.5, "no_mask_channel_overlap": True, "mask_min_space": 2, "mask_channel_min_space": 3},
    **{"dropout_features": 0.2, "skip_masked": False, "skip_nomask": True, "latent_temp": [2, 0.5, 0.99]},
    **{"attention_dropout": 0.2, "activation_dropout": 0.05, "dropout_input": 0.15, "feature_grad_mult": 0.3},
    **{"conv_bias": False, "target_glu": False, "conv_pos_batch_norm": False, "untie_final_proj": False},
}
FAIRSEQ_TASK = {"label_rate": 100, "max_sample_size": 240_000, "min_sample_size": 16_000, "random_crop": True}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("by_way_of", ["nothing", "transformers", "torchaudio", "safetensors"])
def test_the_settings_of_a_pretrained_model_of_fairseq_come_back_there(
    tmp_path: Path, norm: str, by_way_of: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = fairseq_heads(fairseq_state(of_transformers(small_config(norm))), [20])
    model, task = fairseq_settings(small_config(norm))
    model, task = model | FAIRSEQ_MODEL | {"logit_temp": 0.2}, task | FAIRSEQ_TASK
    torch.save({"args": None, "cfg": {"model": model, "task": task}, "model": state}, tmp_path / "theirs.pt")
    import_model(str(tmp_path / "theirs.pt"), tmp_path / "ours.ckpt")
    said = capsys.readouterr().out
    assert "not used here, kept for an export" in said
    assert "model.dropout_features 0.2" in said
    assert "model.mask_prob 0.65" in said
    assert "model.skip_nomask True" in said
    source = tmp_path / "ours.ckpt"
    if by_way_of != "nothing":
        export_model(str(source), tmp_path / "between", by_way_of)  # type: ignore[arg-type]
        source = tmp_path / "between"
    export_model(str(source), tmp_path / "back", "fairseq")
    back = torch.load(tmp_path / "back" / "checkpoint.pt", weights_only=True)["cfg"]
    assert {name: back["model"].get(name) for name in model if name != "conv_feature_layers"} == {
        name: value for name, value in model.items() if name != "conv_feature_layers"
    }
    assert {name: back["task"].get(name) for name in FAIRSEQ_TASK} == FAIRSEQ_TASK
    assert back["task"]["normalize"] == (norm == "layer")
    assert back["model"]["label_rate"] == 100


@pytest.mark.parametrize("form", ["cfg", "args"])
def test_a_fine_tuned_model_of_fairseq_has_the_dropouts_and_masks_of_its_fine_tuning(tmp_path: Path, form: str) -> None:
    state = {
        f"w2v_encoder.w2v_model.{of}": value
        for of, value in fairseq_state(of_transformers(small_config("group"))).items()
    }
    state |= {f"w2v_encoder.proj.{name}": value for name, value in nn.Linear(64, 32).state_dict().items()}
    model, task = fairseq_settings(small_config("group"))
    model |= FAIRSEQ_MODEL
    tuned = {"dropout": 0.01, "attention_dropout": 0.02, "activation_dropout": 0.03, "dropout_input": 0.04}
    tuned |= {"layerdrop": 0.06, "feature_grad_mult": 0.0, "final_dropout": 0.07, "freeze_finetune_updates": 500}
    tuned |= {"mask_prob": 0.75, "mask_channel_prob": 0.5, "mask_channel_length": 64, "apply_mask": False}
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in FAIRSEQ_LETTERS[4:]))
    if form == "cfg":
        inside: Any = {"model": model, "task": task}
        described = {"args": None, "cfg": {"model": tuned | {"w2v_args": inside}, "task": task}}
    else:
        described = {"args": Namespace(**tuned, w2v_args=Namespace(**model | task)), "cfg": None}
    torch.save({**described, "model": state}, tmp_path / "theirs.pt")
    import_model(str(tmp_path / "theirs.pt"), tmp_path / "ours.ckpt")
    config = read_weights(tmp_path / "ours.ckpt").config
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.01, 0.02, 0.03)
    assert (config.input_dropout, config.layer_drop, config.feature_grad_mult) == (0.04, 0.06, 0.0)
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back", "fairseq")
    back = torch.load(tmp_path / "back" / "checkpoint.pt", weights_only=True)["cfg"]
    assert {name: back["model"].get(name) for name in tuned} == tuned
    assert back["model"]["w2v_args"]["model"]["mask_prob"] == 0.65
    assert back["task"]["single_target"]  # which fairseq's CTC asks for


def test_a_model_of_fairseq_for_another_sampling_rate_is_refused(tmp_path: Path) -> None:
    model, task = fairseq_settings(small_config("group"))
    cfg = {"model": model, "task": task | {"sample_rate": 8000}}
    torch.save(
        {"args": None, "cfg": cfg, "model": fairseq_state(of_transformers(small_config("group")))}, tmp_path / "8k.pt"
    )
    with pytest.raises(ValueError, match=r"8k.pt sets sample_rate to 8000; this encoder only supports 16000 Hz"):
        read_weights(tmp_path / "8k.pt")


def test_an_export_to_fairseq_has_the_masks_of_the_recipe_unless_they_are_known(tmp_path: Path) -> None:
    export_model(
        str(save_ours(random_weights("group", "clusters"), tmp_path / "ours.ckpt")), tmp_path / "theirs", "fairseq"
    )
    model = torch.load(tmp_path / "theirs" / "checkpoint.pt", weights_only=True)["cfg"]["model"]
    # fairseq examples/hubert/config/pretrain/hubert_base_librispeech.yaml; its HubertConfig would take 0.65
    assert (model["mask_prob"], model["mask_length"], model["mask_channel_prob"]) == (0.8, 10, 0)
    assert (model["skip_masked"], model["skip_nomask"]) == (False, False)


def test_the_settings_of_a_model_of_transformers_come_back_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"mask_time_prob": 0.65, "mask_time_length": 5, "mask_time_min_masks": 1, "mask_feature_prob": 0.25}
    kept |= {"mask_feature_length": 8, "mask_feature_min_masks": 1, "apply_spec_augment": False, "final_dropout": 0.3}
    kept |= {"ctc_loss_reduction": "sum", "ctc_zero_infinity": False, "initializer_range": 0.01}
    theirs = of_transformers(small_config("layer"), "HubertForCTC", vocab_size=32, pad_token_id=0)
    theirs.config.update(kept)
    theirs.save_pretrained(tmp_path / "theirs")
    letters = {letter: place for place, letter in enumerate(["<pad>", "<s>", *FAIRSEQ_LETTERS[2:]])}
    (tmp_path / "theirs" / "vocab.json").write_text(json.dumps(letters))
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    assert "ctc_loss_reduction sum" in capsys.readouterr().out
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back")
    back = transformers.HubertForCTC.from_pretrained(tmp_path / "back").config
    assert {name: getattr(back, name) for name in kept} == kept


@pytest.mark.parametrize("norm", NORMS)
def test_the_arguments_of_a_model_of_torchaudio_come_back_without_our_file_beside_it(tmp_path: Path, norm: str) -> None:
    trained = random_weights(norm, "clusters")
    changed = replace(trained.config, dropout=0.2, layer_drop=0.3, pre_norm=norm == "group", normalize_waveform=True)
    export_model(str(save_ours(replace(trained, config=changed), tmp_path / "ours.ckpt")), tmp_path / "a", "torchaudio")
    (tmp_path / "a" / "hubert_lightning.safetensors").unlink()
    about = json.loads((tmp_path / "a" / "model.json").read_text())
    about["arguments"] |= {"mask_prob": 0.65, "skip_nomask": True}
    (tmp_path / "a" / "model.json").write_text(json.dumps(about))
    import_model(str(tmp_path / "a"), tmp_path / "back.ckpt")
    assert read_weights(tmp_path / "back.ckpt").config == changed
    export_model(str(tmp_path / "back.ckpt"), tmp_path / "b", "torchaudio")
    assert json.loads((tmp_path / "b" / "model.json").read_text()) == about


# Round trips


@pytest.mark.parametrize("format", ["transformers", "torchaudio", "fairseq", "safetensors"])
@pytest.mark.parametrize("kind", ["encoder", "clusters", "ensemble", "letters", "LibriSpeech's letters"])
@pytest.mark.parametrize("norm", NORMS)
def test_an_exported_model_is_imported_again_to_the_bit(
    tmp_path: Path, format: ExportFormat, kind: str, norm: str
) -> None:
    trained = random_weights(norm, kind)
    checkpoint = save_ours(trained, tmp_path / "ours.ckpt")
    if format == "torchaudio" and kind == "ensemble":
        with pytest.raises(ValueError, match="predicts 2 streams of clusters, torchaudio's one"):
            export_model(str(checkpoint), tmp_path / "theirs", format)
        assert not (tmp_path / "theirs").exists()
        return
    export_model(str(checkpoint), tmp_path / "theirs", format)
    import_model(str(tmp_path / "theirs"), tmp_path / "back.ckpt")
    back, before = (torch.load(tmp_path / name, weights_only=True) for name in ("back.ckpt", "ours.ckpt"))
    assert back["state_dict"].keys() == before["state_dict"].keys()
    assert_close(back["state_dict"], before["state_dict"], rtol=0, atol=0)
    assert back["hyper_parameters"] == before["hyper_parameters"]
    assert back["imported"]["note"] == "random"


@pytest.mark.parametrize("norm", NORMS)
def test_a_model_of_transformers_goes_back_to_the_bit(tmp_path: Path, norm: str) -> None:
    theirs = of_transformers(small_config(norm), "HubertForCTC", vocab_size=32, pad_token_id=0)
    theirs.save_pretrained(tmp_path / "theirs")
    letters = {letter: place for place, letter in enumerate(["<pad>", "<s>", *FAIRSEQ_LETTERS[2:]])}
    (tmp_path / "theirs" / "vocab.json").write_text(json.dumps(letters))
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back")
    back = transformers.HubertForCTC.from_pretrained(tmp_path / "back")
    assert_close(dict(back.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    assert json.loads((tmp_path / "back" / "vocab.json").read_text()) == letters
    names = transformers_format.SETTINGS.values()
    kept, original = (json.loads(model.config.to_json_string(use_diff=False)) for model in (back, theirs))
    assert {name: kept[name] for name in names} == {name: original[name] for name in names}


@pytest.mark.parametrize("norm", NORMS)
def test_a_model_of_torchaudio_goes_back_to_the_bit(tmp_path: Path, norm: str) -> None:
    theirs = of_torchaudio(small_config(norm), num_classes=20, final_dim=24).state_dict()
    torch.save(theirs, tmp_path / "theirs.pt")
    import_model(str(tmp_path / "theirs.pt"), tmp_path / "ours.ckpt", num_heads=4)
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back", "torchaudio")
    back = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
    assert_close(back, dict(theirs), rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["pretrained", "fine-tuned"])
def test_a_model_of_fairseq_goes_back_to_the_bit(tmp_path: Path, norm: str, kind: str) -> None:
    state = fairseq_state(of_transformers(small_config(norm)))
    model, task = fairseq_settings(small_config(norm))
    if kind == "pretrained":
        state = fairseq_heads(state, [20])
        settings = {"model": model, "task": task}
    else:
        state = {f"w2v_encoder.w2v_model.{name}": value for name, value in state.items()}
        state |= {f"w2v_encoder.proj.{name}": value for name, value in nn.Linear(64, 32).state_dict().items()}
        settings = {"model": {"w2v_args": {"model": model, "task": task}}, "task": task}
        (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in FAIRSEQ_LETTERS[4:]))
    torch.save({"args": None, "cfg": settings, "model": state}, tmp_path / "theirs.pt")
    import_model(str(tmp_path / "theirs.pt"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back", "fairseq")
    back = torch.load(tmp_path / "back" / "checkpoint.pt", weights_only=True)["model"]
    if kind == "fine-tuned":  # fairseq builds a model with clusters before it takes them away
        del back["w2v_encoder.w2v_model.label_embs_concat"]
    assert_close(back, state, rtol=0, atol=0)


def test_an_encoder_that_was_fine_tuned_in_transformers_has_no_head_of_pre_training(tmp_path: Path) -> None:
    export_model(str(save_ours(random_weights("group", "clusters"), tmp_path / "ours.ckpt")), tmp_path / "theirs")
    theirs = transformers.HubertForCTC.from_pretrained(tmp_path / "theirs", vocab_size=5)
    theirs.save_pretrained(tmp_path / "theirs")
    trained = read_weights(tmp_path / "theirs")
    assert trained.head is not None
    assert not trained.predictors


def test_a_folder_that_was_trained_on_in_transformers_comes_back_as_it_is_now(tmp_path: Path) -> None:
    checkpoint = save_ours(random_weights("group", "letters"), tmp_path / "ours.ckpt")
    export_model(str(checkpoint), tmp_path / "theirs")
    theirs = transformers.HubertForCTC.from_pretrained(tmp_path / "theirs")
    theirs.lm_head.weight.add_(1)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(load_ctc(tmp_path / "theirs").head.weight, theirs.lm_head.weight, rtol=0, atol=0)


# Files that training scripts made, whose settings or keys are not those of the system that the weights are of


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "bare": lambda state: state,
    "a key for the model": lambda state: {"model": state, "optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3},
    "the model's arguments": lambda state: {"model": state, "args": Namespace(lr=0.1)},
    "PyTorch's tutorial": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "loss": 0.1},
    "Lightning": lambda state: {"state_dict": state, "hyper_parameters": {"lr": 0.1}, "epoch": 3},
    "module": lambda state: {"module": state},
    "net": lambda state: {"net": state},
    "weights": lambda state: {"weights": state},
    "two keys": lambda state: {"ema": {"decay": 0.9, "shadow": state}},
    "an average beside it": lambda state: {"ema": {of: 2 * value for of, value in state.items()}, "model": state},
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_state_of_fairseq_is_found_under_any_key(tmp_path: Path, wrapped: str, prefix: str) -> None:
    _, head, state = fine_tuned_state("group", prefix)
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in FAIRSEQ_LETTERS[4:]))
    torch.save(state, tmp_path / "bare.pt")
    torch.save(WRAPPED[wrapped](state), tmp_path / "theirs.pt")
    trained, bare = (read_weights(tmp_path / name, 4) for name in ("theirs.pt", "bare.pt"))
    assert_close(trained.encoder, bare.encoder, rtol=0, atol=0)
    assert trained.config == bare.config
    assert trained.head is not None
    assert_close(trained.head, dict(head.state_dict()), rtol=0, atol=0)
    assert trained.vocabulary is not None
    assert list(trained.vocabulary.tokens) == FAIRSEQ_LETTERS
    several = "it has several states, of which model is read, not ema"
    assert (several in trained.notes) == (wrapped == "an average beside it")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_state_of_torchaudio_is_found_under_any_key(tmp_path: Path, wrapped: str, prefix: str) -> None:
    theirs = of_torchaudio(small_config("group"), num_classes=20, final_dim=24)
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    torch.save(WRAPPED[wrapped](state), tmp_path / "theirs.pt")
    trained = read_weights(tmp_path / "theirs.pt", 4)
    assert trained.num_clusters == [20]
    assert_close(
        trained.encoder["projection.weight"], state[f"{prefix}wav2vec2.encoder.feature_projection.projection.weight"]
    )


def test_a_whole_pretrained_model_of_fairseq_keeps_its_head_inside_of_a_module(tmp_path: Path) -> None:
    state = fairseq_heads(fairseq_state(of_transformers(small_config("group"))), [20])
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "theirs.pt")
    assert read_weights(tmp_path / "theirs.pt", 4).num_clusters == [20]


def test_a_missing_or_recursive_state_is_refused(tmp_path: Path) -> None:
    around: dict[str, Any] = {"model": {"layer.weight": torch.ones(2)}}
    around["self"] = around
    torch.save(around, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=r"theirs\.pt holds no HuBERT; give"):
        read_weights(tmp_path / "theirs.pt")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inside", [None, {}, "absent"])
def test_a_fine_tuned_model_of_fairseq_without_the_settings_of_its_encoder_has_the_size_of_its_weights(
    tmp_path: Path, waveform: Tensor, norm: str, inside: Any
) -> None:
    theirs, _, state = fine_tuned_state(norm)
    tuned = {"_name": "hubert_ctc", "w2v_path": "/a/b.pt", "dropout": 0.03, "layerdrop": 0.06, "mask_prob": 0.7}
    tuned |= {} if inside == "absent" else {"w2v_args": inside}
    content = {"args": None, "cfg": {"model": tuned, "task": {"_name": "audio_finetuning"}}, "model": state}
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises(
        ValueError, match="has a width of 64, and does not state its number of attention heads; give it: hubert imp"
    ):
        read_weights(tmp_path / "theirs.pt")
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in FAIRSEQ_LETTERS[4:]))
    import_model(str(tmp_path / "theirs.pt"), tmp_path / "ours.ckpt", num_heads=4)
    model = load_ctc(tmp_path / "ours.ckpt")
    assert_layers_equal(model.encoder, theirs, waveform)
    config = read_weights(tmp_path / "ours.ckpt").config
    assert (config.dropout, config.layer_drop) == (0.03, 0.06)
    assert config.normalize_waveform == (norm == "layer")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back", "fairseq")
    back = torch.load(tmp_path / "back" / "checkpoint.pt", weights_only=True)["cfg"]["model"]
    assert (back["mask_prob"], back["w2v_args"]["model"]["mask_prob"]) == (0.7, 0.8)
    assert any("no settings of its encoder" in note for note in read_weights(tmp_path / "theirs.pt", 4).notes)


def test_a_model_of_s3prl_without_settings_has_the_size_of_its_weights(tmp_path: Path, waveform: Tensor) -> None:
    theirs = of_transformers(small_config("layer"))
    torch.save({"model_weight": fairseq_state(theirs), "model_cfg": {}, "task_cfg": {}}, tmp_path / "theirs.pt")
    trained = read_weights(tmp_path / "theirs.pt", 4)
    assert_layers_equal(build_encoder(trained, tmp_path), theirs, waveform)


def test_a_model_of_fairseq_with_half_its_settings_has_the_size_of_its_weights(
    tmp_path: Path, waveform: Tensor
) -> None:
    theirs = of_transformers(small_config("layer"))
    model, task = fairseq_settings(small_config("layer"))
    for name in ("encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_layers", "conv_pos", "conv_pos_groups"):
        del model[name]
    torch.save({"cfg": {"model": model, "task": task}, "model": fairseq_state(theirs)}, tmp_path / "theirs.pt")
    assert_layers_equal(load_encoder(tmp_path / "theirs.pt"), theirs, waveform)


DICTIONARIES = {
    "a mark": ("| 9\nA 1\nB 1\n".encode("utf-8-sig"), ["|", "A", "B"]),
    "UTF-16": ("| 9\r\nA 1\r\nÉ 1\r\n".encode("utf-16"), ["|", "A", "É"]),
    "breaks of lines that are none": ("| 1\n\u2028 1\n\x85 1\n\x1c 1\n".encode(), ["|", "\u2028", "\x85", "\x1c"]),
    "a mark as a symbol": ("\ufeff 1\nA 1\n".encode(), ["\ufeff", "A"]),
    "symbols of spaces": (b"| 1\n  1\na b 1\n", ["|", " ", "a b"]),
    "a flag": (b"| 1\nA 1 #fairseq:overwrite\n", ["|", "A"]),
    "a flag that matters": (b"| 1\nA 1\nB 1\nA 2 #fairseq:overwrite\n", ["|", "<5>", "B", "A"]),
}


@pytest.mark.parametrize("name", DICTIONARIES)
def test_a_dictionary_beside_a_model_is_read_as_in_fairseq(tmp_path: Path, name: str) -> None:
    content, symbols = DICTIONARIES[name]
    assert beside_a_model(tmp_path, content, len(symbols) + 4)[4:] == symbols


def test_fairseqs_own_symbols_may_be_overwritten(tmp_path: Path) -> None:
    tokens = beside_a_model(tmp_path, b"| 1\n<unk> 1 #fairseq:overwrite\n", 6)
    assert tokens == ["<s>", "<pad>", "</s>", "<3>", "|", "<unk>"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"| 1\nA 1\nA 1\n", "line 3: 'A' is listed already; keep it once, or add #fairseq:overwrite"),
        (b"| 1\nA x\n", "line 2: 'x' is not the count that must follow each symbol; correct the line"),
        (b"| 1\n\xe9 1\n", "dict.ltr.txt: is not UTF-8, nor UTF-16 with its mark; convert it"),
        (b"| 1\n", "dict.ltr.txt has 1 symbols, and the model beside it 3"),
    ],
)
def test_a_corrupt_dictionary_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        beside_a_model(tmp_path, content, 7)


@pytest.mark.parametrize("kept", [True, False])
def test_tokens_that_look_like_breaks_of_lines_come_back_from_fairseq(tmp_path: Path, kept: bool) -> None:
    tokens = ["<blank>", "|", "a", "\u2028", "\x85", "\ufeff", "\x1c"]
    head, vocabulary = dict(nn.Linear(64, 7).state_dict()), Vocabulary(tuple(tokens))
    trained = replace(random_weights("group", "encoder"), head=head, vocabulary=vocabulary)
    export_model(str(save_ours(trained, tmp_path / "ours.ckpt")), tmp_path / "there", "fairseq")
    if not kept:
        (tmp_path / "there" / "hubert_lightning.safetensors").unlink()
    again = read_weights(tmp_path / "there").vocabulary
    assert again is not None
    assert [*again.tokens][-6:] == tokens[1:]


def test_settings_that_a_fine_tuned_model_of_fairseq_has_no_use_for_come_back_there(tmp_path: Path) -> None:
    _, _, state = fine_tuned_state("group")
    model, task = fairseq_settings(small_config("group"))
    model |= {"logit_temp": 0.2, "required_seq_len_multiple": 4, "checkpoint_activations": True, "max_positions": 99}
    cfg = {"model": {"_name": "hubert_ctc", "w2v_args": {"model": model, "task": task}}, "task": task}
    torch.save({"args": None, "cfg": cfg, "model": state}, tmp_path / "theirs.pt")
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in FAIRSEQ_LETTERS[4:]))
    import_model(str(tmp_path / "theirs.pt"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back", "fairseq")
    back = torch.load(tmp_path / "back" / "checkpoint.pt", weights_only=True)["cfg"]["model"]["w2v_args"]["model"]
    named = ("logit_temp", "required_seq_len_multiple", "checkpoint_activations", "max_positions")
    assert [back[name] for name in named] == [model[name] for name in named]
    [note] = [note for note in read_weights(tmp_path / "theirs.pt").notes if "kept for an export" in note]
    assert all(name in note for name in named)


@pytest.mark.parametrize(("start", "end"), [(1, 2), (7, 8), (None, None)])
def test_tokens_of_a_sentence_that_have_no_row_keep_their_numbers(tmp_path: Path, start: Any, end: Any) -> None:
    of_transformers(
        small_config("group"), "HubertForCTC", vocab_size=4, pad_token_id=0, bos_token_id=start, eos_token_id=end
    ).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "a": 2, "<unk>": 3}))
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    export_model(str(tmp_path / "ours.ckpt"), tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (start, end)
