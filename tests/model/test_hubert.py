"""The encoder against two other implementations, and what must hold of any HuBERT."""

import gc
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchaudio
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from hubert_lightning.frames import CLOCK, WINDOW, Clock, num_frames
from hubert_lightning.model.config import KERNELS, STRIDES, EncoderConfig
from hubert_lightning.model.dropout import Dropout, attend_to, attention_bias
from hubert_lightning.model.hubert import HubertEncoder, PositionalConvolution
from hubert_lightning.pretrained.dialect import to_ours
from hubert_lightning.pretrained.formats import torchaudio as torchaudio_format
from hubert_lightning.pretrained.formats import transformers as transformers_format

NO_DROPOUT: dict[str, Any] = {
    "dropout": 0,
    "attention_dropout": 0,
    "activation_dropout": 0,
    "input_dropout": 0,
    "layer_drop": 0,
    "feature_grad_mult": 1,
}
# HuBERT Table I, fairseq examples/hubert/config/pretrain
BASE = EncoderConfig()
LARGE = EncoderConfig(
    conv_norm="layer", dim=1024, num_layers=24, num_heads=16, ffn_dim=4096, pre_norm=True, normalize_waveform=True
)
XLARGE = replace(LARGE, dim=1280, num_layers=48, ffn_dim=5120)
SMALL = EncoderConfig(
    conv_channels=16, dim=24, num_layers=3, num_heads=4, ffn_dim=40, pos_kernel=8, pos_groups=4, **NO_DROPOUT
)
SMALL_CONFIGS = {
    "base-like": SMALL,
    "large-like": replace(SMALL, conv_norm="layer", pre_norm=True),
    "large-like, biased convolutions, odd positional kernel": replace(
        SMALL, conv_norm="layer", pre_norm=True, conv_bias=True, pos_kernel=7
    ),
    "base-like, 25 Hz by an eighth convolution": replace(SMALL, conv_kernels=(*KERNELS, 2), conv_strides=(*STRIDES, 2)),
    "large-like, 25 Hz by a stride of 4": replace(
        SMALL,
        conv_norm="layer",
        pre_norm=True,
        conv_bias=True,
        conv_kernels=(*KERNELS[:-1], 5),
        conv_strides=(*STRIDES[:-1], 4),
    ),
    "base-like, five convolutions": replace(SMALL, conv_kernels=(16, 9, 7, 5, 4), conv_strides=(8, 5, 2, 2, 2)),
}
LENGTH = torch.tensor([8000, 5003, 6400])


class Reference:
    """Another implementation: what each layer makes of a batch, what all make of it, and its state under our names."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, rename: Callable[[dict[str, Tensor]], Any]) -> None:
        self.model, self.layers, self.rename = model.eval(), layers, rename

    def __call__(self, waveform: Tensor, length: Tensor | None) -> tuple[list[Tensor], Tensor]:
        outputs: list[Tensor] = []

        def keep(module: nn.Module, arguments: object, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        last = self.run(waveform, length)
        for hook in hooks:
            hook.remove()
        return outputs, last

    def run(self, waveform: Tensor, length: Tensor | None) -> Tensor:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return self.rename(dict(self.model.state_dict()))

    def gradients(self) -> dict[str, Tensor]:
        return self.rename({name: p.grad for name, p in self.model.named_parameters() if p.grad is not None})


class Transformers(Reference):
    def __init__(self, config: EncoderConfig) -> None:
        model = transformers.HubertModel(transformers_config(config))
        super().__init__(model, model.encoder.layers, partial(to_ours, dialect=transformers_format.DIALECT))

    def run(self, waveform: Tensor, length: Tensor | None, **kwargs: Tensor) -> Tensor:
        valid = None if length is None else (torch.arange(waveform.shape[1]) < length[:, None]).long()
        return self.model(waveform, attention_mask=valid, **kwargs).last_hidden_state


class Torchaudio(Reference):
    def __init__(self, config: EncoderConfig) -> None:
        model = torchaudio.models.wav2vec2_model(
            extractor_mode=f"{config.conv_norm}_norm",
            extractor_conv_layer_config=[
                (config.conv_channels, kernel, stride)
                for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True)
            ],
            extractor_conv_bias=config.conv_bias,
            encoder_embed_dim=config.dim,
            encoder_projection_dropout=config.input_dropout,
            encoder_pos_conv_kernel=config.pos_kernel,
            encoder_pos_conv_groups=config.pos_groups,
            encoder_num_layers=config.num_layers,
            encoder_num_heads=config.num_heads,
            encoder_attention_dropout=config.attention_dropout,
            encoder_ff_interm_features=config.ffn_dim,
            encoder_ff_interm_dropout=config.activation_dropout,
            encoder_dropout=config.dropout,
            encoder_layer_norm_first=config.pre_norm,
            encoder_layer_drop=config.layer_drop,
            aux_num_out=None,
        )
        super().__init__(model, model.encoder.transformer.layers, partial(to_ours, dialect=torchaudio_format.DIALECT))

    def run(self, waveform: Tensor, length: Tensor | None) -> Tensor:
        return self.model(waveform, length)[0]


class Ours(Reference):
    def __init__(self, encoder: HubertEncoder) -> None:
        super().__init__(encoder, encoder.layers, dict)

    def run(self, waveform: Tensor, length: Tensor | None) -> Tensor:
        return self.model(waveform, length)


def transformers_config(config: EncoderConfig) -> transformers.HubertConfig:
    return transformers.HubertConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ffn_dim,
        hidden_dropout=config.dropout,
        activation_dropout=config.activation_dropout,
        attention_dropout=config.attention_dropout,
        feat_proj_dropout=config.input_dropout,
        layerdrop=config.layer_drop,
        feat_extract_norm=config.conv_norm,
        conv_dim=(config.conv_channels,) * len(config.conv_kernels),
        conv_kernel=config.conv_kernels,
        conv_stride=config.conv_strides,
        conv_bias=config.conv_bias,
        num_conv_pos_embeddings=config.pos_kernel,
        num_conv_pos_embedding_groups=config.pos_groups,
        do_stable_layer_norm=config.pre_norm,
    )


def with_weights_of(reference: Reference, config: EncoderConfig) -> HubertEncoder:
    with torch.device("meta"):
        encoder = HubertEncoder(config)
    state = {"mask_embedding": torch.zeros(config.dim), **reference.state()}
    encoder.load_state_dict(state, assign=True)  # both read the same numbers, also after .double()
    return encoder.eval()


def valid_frames(output: Tensor, length: Tensor | None, clock: Clock = CLOCK) -> Tensor:
    return (
        output.flatten(0, 1)
        if length is None
        else torch.cat([row[:frames] for row, frames in zip(output, num_frames(length, clock).tolist(), strict=True)])
    )


def audio(batch: int, samples: int, length: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    waveform = torch.randn(batch, samples, dtype=dtype)
    return waveform if length is None else waveform.masked_fill(torch.arange(samples) >= length[:, None], 0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def freed() -> Iterator[None]:
    """Before a model of true size is built, the one before is gone."""
    gc.collect()
    yield
    gc.collect()


@pytest.mark.parametrize("length", [None, LENGTH], ids=["unpadded", "padded"])
@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS)
@pytest.mark.parametrize("implementation", [Transformers, Torchaudio])
def test_values_and_gradients_equal(
    implementation: Callable[[EncoderConfig], Reference], config: EncoderConfig, length: Tensor | None
) -> None:
    reference = implementation(config)
    reference.model.double()  # so that nothing but a different formula makes a difference
    encoder = with_weights_of(reference, config)
    waveform = audio(3, 8000, length, torch.float64)

    results = []
    for run in (reference, lambda *batch: (encoder.all_layers(*batch), encoder(*batch))):
        given = waveform.clone().requires_grad_()
        layers, last = run(given, length)
        everything = [valid_frames(output, length, config.clock) for output in (*layers, last)]
        torch.manual_seed(1)
        torch.stack([(output * torch.randn_like(output)).mean() for output in everything]).sum().backward()
        results.append((everything, given.grad))
    assert len(results[0][0]) == config.num_layers + 1
    assert_close(results[1], results[0])

    expected = reference.gradients()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert set(gradients) == set(dict(encoder.named_parameters())) - {"mask_embedding"}
    assert_close(gradients, expected)


@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS)
def test_masked_values_and_gradients_equal(config: EncoderConfig) -> None:
    reference = Transformers(config)
    reference.model.double()
    encoder = with_weights_of(reference, config)
    waveform, mask = audio(3, 8000, LENGTH, torch.float64), torch.rand(3, num_frames(8000, config.clock)) < 0.5
    expected = valid_frames(reference.run(waveform, LENGTH, mask_time_indices=mask), LENGTH, config.clock)
    output = valid_frames(encoder(waveform, LENGTH, mask), LENGTH, config.clock)
    assert_close(output, expected)
    for result in (output, expected):
        (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    assert_close({name: p.grad for name, p in encoder.named_parameters()}, reference.gradients())


@pytest.mark.slow
@pytest.mark.usefixtures("freed")
@pytest.mark.parametrize("implementation", [Transformers, Torchaudio])
def test_base_equals(implementation: Callable[[EncoderConfig], Reference]) -> None:
    config = replace(BASE, **NO_DROPOUT)
    reference = implementation(config)
    encoder = with_weights_of(reference, config)
    for length in (None, torch.tensor([8000, 6111])):
        waveform = audio(2, 8000, length)
        assert_layers_and_gradients_equal(reference, encoder, waveform, waveform, length, learning="")


@pytest.mark.slow
@pytest.mark.usefixtures("freed")
@pytest.mark.parametrize("implementation", [Transformers, Torchaudio])
def test_large_equals(implementation: Callable[[EncoderConfig], Reference]) -> None:
    config = replace(LARGE, **NO_DROPOUT)
    reference = implementation(config)
    encoder = with_weights_of(reference, config)
    learning = r"convolutions\.0|conv_layers\.0|local_norm|feature_projection\.layer_norm|layers\.(0|23)\."
    for model in (encoder, reference.model):  # the gradients of all would take as much memory again
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(learning, name) is not None)
    for length in (None, torch.tensor([4000, 2821])):
        waveform = 2 + 0.1 * audio(2, 4000)
        samples = [4000, 4000] if length is None else length.tolist()
        rows = [F.layer_norm(row[:count], (count,)) for row, count in zip(waveform, samples, strict=True)]
        normal = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # both leave it to their user
        assert_layers_and_gradients_equal(reference, encoder, normal, waveform, length, learning)


def assert_layers_and_gradients_equal(
    reference: Reference,
    encoder: HubertEncoder,
    their_waveform: Tensor,
    our_waveform: Tensor,
    length: Tensor | None,
    learning: str,
) -> None:
    ours = Ours(encoder)
    results = []
    for model, waveform in ((reference, their_waveform), (ours, our_waveform)):
        model.model.zero_grad()
        layers, last = model(waveform, length)
        outputs = [valid_frames(output, length) for output in (*layers, last)]
        assert len(outputs) == encoder.config.num_layers + 1
        (outputs[-1] * torch.linspace(-1, 1, last.shape[-1])).mean().backward()
        results.append([output.detach() for output in outputs])
    # Ten times the default: the rounding of 24 layers adds up in a stream of ±10
    assert_close(results[1], results[0], rtol=1.3e-6, atol=1e-5 if encoder.config.num_layers <= 12 else 1e-4)
    expected = {name: value for name, value in reference.gradients().items() if re.search(learning, name)}
    gradients = ours.gradients()
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # float32 sums over all frames in another order: relative to the largest number of the tensor
        assert_close(gradient, expected[name], rtol=0, atol=1e-4 * float(expected[name].abs().max()) + 1e-9)


@pytest.mark.parametrize(
    ("config", "millions"), [(BASE, 94.37), (LARGE, 315.43), (XLARGE, 962.49)], ids=["base", "large", "xlarge"]
)
def test_the_sizes_of_the_paper_have_its_number_of_parameters(config: EncoderConfig, millions: float) -> None:
    with torch.device("meta"):
        encoder = HubertEncoder(config)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


with torch.device("meta"):
    ON_NO_DEVICE = [HubertEncoder(config) for config in SMALL_CONFIGS.values()]  # shapes without numbers


@given(encoder=st.sampled_from(ON_NO_DEVICE), num_samples=st.integers(3 * WINDOW, 100_000))
def test_the_convolutions_keep_the_clock(encoder: HubertEncoder, num_samples: int) -> None:
    local = encoder.local_features(torch.empty(1, num_samples, device="meta"))
    length = num_samples
    for convolution in encoder.convolutions:
        [kernel], [stride] = convolution.conv.kernel_size, convolution.conv.stride
        length = (length - kernel) // stride + 1
    assert local.shape == (1, length, SMALL.conv_channels)
    assert num_frames(num_samples, encoder.config.clock) == length


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(WINDOW, 6000), min_size=2, max_size=3), pre_norm=st.booleans())
def test_padding_changes_no_frame_of_a_layer_norm_encoder(lengths: list[int], pre_norm: bool) -> None:
    torch.manual_seed(0)
    encoder = HubertEncoder(replace(SMALL, conv_norm="layer", pre_norm=pre_norm, normalize_waveform=True)).eval()
    length = torch.tensor(lengths)
    waveform = 3 + audio(len(lengths), 6000)  # what lies in the padding must not matter either
    together = encoder(waveform, length)
    for row, samples in enumerate(lengths):
        alone = encoder(waveform[row : row + 1, :samples])[0]
        assert_close(together[row, : len(alone)], alone)


@settings(max_examples=12, deadline=None)
@given(
    config=st.sampled_from([*SMALL_CONFIGS.values()]),
    first=st.integers(0, 7),
    num_samples=st.integers(3 * WINDOW, 3000),
)
def test_crops_on_the_frame_grid_have_the_frames_of_the_whole(
    config: EncoderConfig, first: int, num_samples: int
) -> None:
    torch.manual_seed(0)
    encoder = HubertEncoder(replace(config, conv_norm="layer"))
    waveform = audio(1, 8000)
    crop = encoder.local_features(waveform[:, first * config.clock.hop :][:, :num_samples])
    assert_close(crop, encoder.local_features(waveform)[:, first : first + crop.shape[1]])


@pytest.mark.parametrize("channels", [2, 4, 6, 8, 12, 16, 48])
def test_positions_in_bfloat16_are_those_in_float32_but_for_rounding(channels: int) -> None:
    positions = PositionalConvolution(EncoderConfig(dim=16 * channels, num_heads=1, pos_kernel=32))
    x = torch.randn(2, 124, 16 * channels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = positions(x).float()
    exact = positions(x)
    assert (rounded - exact).norm() < 0.01 * exact.norm()  # bfloat16 keeps 8 bits: 0.4 %


def test_each_utterance_is_normalized_over_its_own_samples() -> None:
    encoder = HubertEncoder(replace(SMALL, normalize_waveform=True))
    waveform = 5 + 3 * audio(3, 8000)
    alone = [F.layer_norm(row[:samples], (samples,)) for row, samples in zip(waveform, LENGTH.tolist(), strict=True)]
    seen: list[Tensor] = []
    encoder.convolutions[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    encoder(waveform, LENGTH)
    assert_close(seen[0], nn.utils.rnn.pad_sequence(alone, batch_first=True))


def test_masks_replace_exactly_the_masked_frames() -> None:
    encoder = HubertEncoder(SMALL)
    seen: list[Tensor] = []
    encoder.positions.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    waveform, frames = audio(3, 8000), num_frames(8000)
    mask, channel_mask = torch.rand(3, frames) < 0.5, torch.rand(3, SMALL.dim) < 0.3
    encoder(waveform, LENGTH)
    encoder(waveform, LENGTH, mask, channel_mask)
    plain, masked = seen
    padding = torch.arange(frames) >= num_frames(LENGTH)[:, None]
    expected = torch.where(mask[..., None], encoder.mask_embedding, plain)
    expected[channel_mask[:, None].expand_as(expected)] = 0
    expected[padding] = 0
    assert_close(masked, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("conv_norm", ["group", "layer"])
def test_feature_grad_mult_scales_the_gradients_of_convolutions_alone(conv_norm: Any) -> None:
    def gradients(scale: float) -> dict[str, Tensor | None]:
        torch.manual_seed(0)
        encoder = HubertEncoder(replace(SMALL, conv_norm=conv_norm, feature_grad_mult=scale))
        local = encoder.local_features(audio(2, 4000))
        (encoder.contextual(local).square().mean() + local.square().mean()).backward()  # the penalty is scaled too
        return {name: parameter.grad for name, parameter in encoder.named_parameters()}

    whole, tenth, none = gradients(1.0), gradients(0.1), gradients(0.0)
    for name, gradient in whole.items():
        if gradient is None:
            assert name == "mask_embedding"
        elif name.startswith("convolutions."):
            assert none[name] is None
            assert_close(tenth[name], 0.1 * gradient)
        else:
            assert_close(tenth[name], gradient)
            assert_close(none[name], gradient)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_features_of_a_layer_are_those_of_all_layers_and_no_later_layer_runs(pre_norm: bool) -> None:
    encoder = HubertEncoder(replace(SMALL, pre_norm=pre_norm)).eval()
    waveform = audio(3, 8000, LENGTH)
    outputs = encoder.all_layers(waveform, LENGTH)
    assert_close(encoder.all_layers(waveform, LENGTH, with_input=True)[1:], outputs, rtol=0, atol=0)
    ran: list[int] = []

    def note(number: int, module: nn.Module, arguments: object, output: object) -> None:
        ran.append(number)

    for number, layer in enumerate(encoder.layers, start=1):
        layer.register_forward_hook(partial(note, number))
    for number, expected in enumerate(outputs, start=1):
        ran.clear()
        assert_close(encoder.features(waveform, LENGTH, layer=number), expected, rtol=0, atol=0)
        assert ran == list(range(1, number + 1))
    last = encoder.norm(outputs[-1]) if pre_norm else outputs[-1]
    assert_close(encoder(waveform, LENGTH), last, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [0, -1, 4])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} of an encoder of 3 layers"):
        HubertEncoder(SMALL).features(audio(1, 400), layer=layer)


def test_layer_drop_leaves_each_layer_out_as_often_as_asked_and_only_in_training() -> None:
    encoder, ran, steps = HubertEncoder(replace(SMALL, layer_drop=0.3)), torch.zeros(3), 200

    def count(index: int, module: nn.Module, arguments: object) -> None:
        ran[index] += 1

    for index, layer in enumerate(encoder.layers):
        layer.register_forward_pre_hook(partial(count, index))
    waveform = audio(1, WINDOW)
    with torch.no_grad():
        for _ in range(steps):
            encoder(waveform)
        assert_close(ran / steps, torch.full((3,), 0.7), rtol=0, atol=0.1)  # three standard deviations
        ran.zero_()
        encoder.eval()(waveform)
    assert ran.tolist() == [1, 1, 1]


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    for name in ("dropout", "attention_dropout", "activation_dropout", "input_dropout"):
        encoder, waveform = HubertEncoder(replace(SMALL, **dict[str, Any]({name: 0.5}))), audio(1, 4000)
        assert not torch.equal(encoder(waveform), encoder(waveform)), name
        encoder.eval()
        assert_close(encoder(waveform), encoder(waveform), rtol=0, atol=0)


def test_fresh_weights_have_the_distributions_of_the_reference() -> None:
    encoder = HubertEncoder(replace(BASE, num_layers=2))
    spread = {name: (value.mean().item(), value.std().item()) for name, value in encoder.named_parameters()}
    position = encoder.positions.conv.weight
    expected = {
        "convolutions.0.conv.weight": (2 / 10) ** 0.5,  # Kaiming: 2 / (channels · kernel)
        "convolutions.3.conv.weight": (2 / (512 * 3)) ** 0.5,
        "layers.0.query_key_value.weight": 0.02,
        "layers.1.attention_output.weight": 0.02,
        "layers.0.ffn_input.weight": 0.02,
        "layers.1.ffn_output.weight": 0.02,
        "projection.weight": (1 / (3 * 512)) ** 0.5,  # U(±1 / sqrt(512))
    }
    for name, std in expected.items():
        assert spread[name] == pytest.approx((0, std), rel=0.04, abs=0.04 * std), name
    assert position.std().item() == pytest.approx((4 / (128 * 768)) ** 0.5, rel=0.01)
    assert 0 <= encoder.mask_embedding.min() < 0.05
    assert 0.95 < encoder.mask_embedding.max() <= 1
    for name, value in encoder.named_parameters():
        if name.endswith("bias") and name != "projection.bias":
            assert not value.any(), name
        if name.endswith("norm.weight"):
            assert (value == 1).all(), name


def test_a_batch_that_is_too_short_or_too_long_is_refused() -> None:
    encoder = HubertEncoder(SMALL)
    with pytest.raises(ValueError, match="399 samples are shorter than one frame"):
        encoder(audio(1, 399))
    for samples in (399, 8001):
        with pytest.raises(ValueError, match=f"row 1 has length {samples}"):
            encoder(audio(2, 8000), torch.tensor([8000, samples]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 7}, "dim 768 is not divisible by num_heads 7"),
        ({"pos_groups": 7}, "dim 768 is not divisible by pos_groups 7"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"conv_norm": "batch"}, "conv_norm is 'batch'"),
        ({"feature_grad_mult": -1.0}, "feature_grad_mult is -1.0"),
        ({"position_buckets": 30}, "position_buckets is 30; give a multiple of 4"),
        ({"position_buckets": 320, "position_distance": 80}, "position_distance is 80 for 320 position_buckets; give"),
    ],
)
def test_settings_that_make_no_encoder_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**change)


@pytest.mark.parametrize(("pre_norm", "buckets"), [(False, 0), (True, 0), (False, 16)])
def test_a_layer_that_is_computed_again_gives_the_same_gradients_dropout_included(pre_norm: bool, buckets: int) -> None:
    config = replace(
        SMALL, position_buckets=buckets, pre_norm=pre_norm, dropout=0.3, attention_dropout=0.2, activation_dropout=0.1
    )
    encoder, waveform = HubertEncoder(config), audio(2, 4000)
    gradients = []
    for checkpointing in (False, True):
        encoder.checkpointing = checkpointing
        encoder.zero_grad()
        torch.manual_seed(0)
        encoder(waveform, kept=[True, False, True]).square().mean().backward()
        gradients.append({name: value.grad for name, value in encoder.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_a_dropped_layer_changes_nothing_and_has_a_gradient_of_zero() -> None:
    encoder, waveform = HubertEncoder(replace(SMALL, dropout=0.0, attention_dropout=0.0)), audio(2, 4000)
    encoder(waveform, kept=[True, False, True]).square().mean().backward()
    for name, value in encoder.layers[1].named_parameters():
        assert value.grad is not None, name
        assert not value.grad.any(), name
    without = HubertEncoder(replace(SMALL, num_layers=2, dropout=0.0, attention_dropout=0.0))
    state = {
        name.replace("layers.2", "layers.1"): value
        for name, value in encoder.state_dict().items()
        if "layers.1" not in name
    }
    without.load_state_dict(state)
    without(waveform).square().mean().backward()
    assert_close(without.eval()(waveform), encoder(waveform, kept=[True, False, True]))
    for ours, theirs in zip(without.layers[1].parameters(), encoder.layers[2].parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, conv_norm="layer", pre_norm=True, normalize_waveform=True)])
def test_a_compiled_encoder_computes_the_same_for_every_length(config: EncoderConfig) -> None:
    config = replace(config, dropout=0.0, attention_dropout=0.0, input_dropout=0.0)
    encoder, compiled = HubertEncoder(config), HubertEncoder(config)
    compiled.load_state_dict(encoder.state_dict())
    compiled.compile_parts()
    assert compiled.state_dict().keys() == encoder.state_dict().keys()
    for samples in (4000, 5200):
        waveform, mask = audio(2, samples), torch.rand(2, num_frames(samples)) < 0.5
        results = []
        for which in (encoder, compiled):
            which.zero_grad()
            output = which(waveform, mask=mask, kept=[True, True, False])
            output.square().mean().backward()
            results.append((output, {name: value.grad for name, value in which.named_parameters()}))
        assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_as_often_as_asked_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    dropout, x = Dropout(p), torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    once = dropout(x)
    torch.manual_seed(0)
    assert_close(dropout(x), once, rtol=0, atol=0)
    dropped = (once == 0).float()
    assert dropped.mean().item() == pytest.approx(p, abs=1e-3)  # three standard deviations and more
    assert dropped.mean(dim=0).std().item() == pytest.approx((p * (1 - p) / 999) ** 0.5, rel=0.1)  # independent
    assert_close(once[once != 0], torch.full_like(once[once != 0], 1 / (1 - p)), rtol=1e-2, atol=0)
    once.sum().backward()
    assert_close(x.grad, once.detach())
    assert dropout.eval()(x) is x


@pytest.mark.slow
def test_attention_with_dropout_differs_from_torch_in_the_dropped_weights_alone() -> None:
    query, key, value = torch.randn(3, 2, 4, 50, 16)
    padding = torch.arange(50) >= torch.tensor([50, 30])[:, None]
    biases = (None, None), (~padding[:, None, None], attention_bias(padding, torch.float32))
    for attended, bias in biases:
        exact = F.scaled_dot_product_attention(query, key, value, attended)
        assert_close(attend_to(query, key, value, bias, 1e-9), exact)  # too seldom to be drawn
        many = torch.stack([attend_to(query, key, value, bias, 0.2) for _ in range(2000)])
        assert_close(many.mean(dim=0), exact, rtol=0, atol=0.1)


def test_the_first_norm_is_torchs_for_quiet_audio_with_an_offset() -> None:
    [first, *_] = HubertEncoder(SMALL).convolutions
    nn.init.normal_(first.norm.weight)
    nn.init.normal_(first.norm.bias)
    waveform = 0.5 + audio(3, 8000) / 1000
    exact = deepcopy(first).double()
    expected = F.gelu(exact.norm(exact.conv(waveform.double()[:, None])))
    frames = 64 * num_frames(8000)
    assert_close(first(waveform)[:, :frames], expected.mT[:, :frames].float(), rtol=1e-4, atol=1e-4)
    silent = torch.zeros(1, 8000)
    assert_close(first(silent)[:, :frames], F.gelu(first.norm(first.conv(silent[:, None]))).mT[:, :frames])


def test_alone_is_still_accepted_for_ignore_padding() -> None:
    encoder = HubertEncoder(EncoderConfig(8, dim=16, num_layers=1, num_heads=2, ffn_dim=16, pos_kernel=4, pos_groups=2))
    encoder.eval()
    waveform, length = torch.randn(2, 2000), torch.tensor([2000, 900])
    calls = (
        encoder,
        partial(encoder.features, layer=1),
        lambda *given, **named: encoder.all_layers(*given, **named)[0],
    )
    for call in calls:
        expected = call(waveform, length, ignore_padding=True)
        with pytest.warns(DeprecationWarning, match="alone is now ignore_padding"):
            assert_close(call(waveform, length, alone=True), expected, rtol=0, atol=0)
        assert not torch.equal(expected, call(waveform, length))
