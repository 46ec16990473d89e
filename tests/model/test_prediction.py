"""One normalised product and a cross entropy are the loss of the paper and of the reference code."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torchaudio.models.wav2vec2.components import LogitGenerator

from hubert_lightning.model.prediction import ClusterPredictor

DIM, CLUSTERS, FRAMES = 24, 11, 40


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def with_gradients(loss: Tensor, predictor: ClusterPredictor, frames: Tensor) -> list[Tensor]:
    learning = [predictor.projection.weight, predictor.projection.bias, predictor.codewords, frames]
    return [loss.detach(), *torch.autograd.grad(loss, learning)]


@pytest.mark.parametrize("normal_codewords", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_and_gradients_are_those_of_the_paper(normal_codewords: bool, temperature: float) -> None:
    predictor = ClusterPredictor(DIM, CLUSTERS, 16, temperature, normal_codewords).double()
    frames = torch.randn(FRAMES, DIM, dtype=torch.float64, requires_grad=True)
    cluster = torch.randint(CLUSTERS, (FRAMES,))

    # eq. 3: p(c | o) = exp(sim(A o, e_c) / τ) / Σ_c' exp(sim(A o, e_c') / τ); eq. 1: the mean of -log p
    projected = frames @ predictor.projection.weight.T + predictor.projection.bias
    similarity = torch.stack([F.cosine_similarity(projected, codeword, dim=-1) for codeword in predictor.codewords], 1)
    scores = (similarity / temperature).exp()
    paper = -(scores[torch.arange(FRAMES), cluster] / scores.sum(dim=1)).log().mean()

    ours = F.cross_entropy(predictor(frames), cluster)
    # Our logits are float32 whatever the model is, so the defaults of float32
    assert_close(
        with_gradients(ours, predictor, frames),
        with_gradients(paper, predictor, frames),
        rtol=1.3e-6,
        atol=1e-5,
        check_dtype=False,
    )


def test_loss_and_gradients_are_those_of_positives_against_negatives() -> None:
    predictor = ClusterPredictor(DIM, CLUSTERS, 16)
    reference = LogitGenerator(DIM, CLUSTERS, 16, skip_masked=False, skip_nomask=True)
    predictor.projection.load_state_dict(reference.final_proj.state_dict())
    predictor.codewords.data.copy_(reference.label_embeddings.data)
    frames = torch.randn(1, FRAMES, DIM, requires_grad=True)
    cluster, mask = torch.randint(CLUSTERS, (1, FRAMES)), torch.rand(1, FRAMES) < 0.5

    logits, _ = reference(frames, cluster, mask, ~mask)  # the true codeword first, then all, itself at -inf
    theirs = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    learning = [reference.final_proj.weight, reference.final_proj.bias, reference.label_embeddings, frames]
    expected = [theirs.detach(), *torch.autograd.grad(theirs, learning)]

    ours = F.cross_entropy(predictor(frames[mask]), cluster[mask])
    assert_close(with_gradients(ours, predictor, frames), expected)


def test_logits_are_float32_and_exact_under_bf16_autocast() -> None:
    predictor = ClusterPredictor(DIM, CLUSTERS)
    frames = torch.randn(2, FRAMES, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        logits, projected = predictor(frames), predictor.projection(frames)
    assert projected.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert logits.shape == (2, FRAMES, CLUSTERS)
    cosine = F.cosine_similarity(projected.float()[..., None, :], predictor.codewords, dim=-1)
    assert_close(logits, cosine / 0.1)


def test_codewords_start_in_one_corner_or_all_around() -> None:
    reference, normal = (ClusterPredictor(DIM, 100, normal_codewords=normal).codewords for normal in (False, True))
    assert 0 <= reference.min() < 0.01
    assert 0.99 < reference.max() <= 1
    lengths = normal.norm(dim=1)
    assert lengths.mean().item() == pytest.approx(1, abs=0.05)
    assert normal.mean().item() == pytest.approx(0, abs=0.01)
