"""The head of pre-training, which predicts the cluster of each frame (HuBERT §II-B, §II-E)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_lightning.model.compilation import compilable
from hubert_lightning.model.products import Linear


class ClusterPredictor(nn.Module):
    """Logits of the clusters: cosine similarity of a projected frame and each cluster's codeword.

    Their cross entropy equals the reference's, which scores the true codeword against all others, in value and
    gradient (tests/model/test_prediction.py).

    Args:
        dim: Width of the encoder.
        num_clusters: K-means clusters to choose from.
        final_dim: Width of the codewords and of the projected frames.
        temperature: Divisor of the cosine logits.
        normal_codewords: Whether codewords are drawn from a normal distribution, with about unit length, instead of
            U(0, 1) as in fairseq.
        norm: Whether frames are normalised first: those of an intermediate layer of an encoder with `pre_norm` are not
            normalised yet.
    """

    def __init__(
        self,
        dim: int,
        num_clusters: int,
        final_dim: int = 256,
        temperature: float = 0.1,
        normal_codewords: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_clusters, self.temperature = num_clusters, temperature
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.projection = Linear(dim, final_dim)
        self.codewords = nn.Parameter(torch.empty(num_clusters, final_dim))
        if normal_codewords:
            nn.init.normal_(self.codewords, std=final_dim**-0.5)  # Adam turns longer vectors more slowly
        else:
            nn.init.uniform_(self.codewords)

    @compilable((0, 1))
    def forward(self, frames: Tensor) -> Tensor:
        """Score the clusters of frames.

        Args:
            frames: (…, dim).

        Returns:
            (…, clusters) float32 logits.
        """
        x = self.projection(self.norm(frames))
        with torch.autocast(x.device.type, enabled=False):  # a cosine in bf16 is off by up to 0.4 %, a logit by 0.04
            similarity = F.normalize(x.float(), dim=-1) @ F.normalize(self.codewords.float(), dim=-1).T
        logits: Tensor = similarity / self.temperature  # eq. 3
        return logits
