"""K-means in torch against scikit-learn's MiniBatchKMeans with the reference settings, on the same rows.

    uv run python benchmarks/kmeans.py --rows 300000 --clusters 500

Prints the seconds and the inertia of both, their ratio, and how near to plain matrix products the torch one comes. The
rows are those of a hidden layer in shape only: 2000 unlike sounds in 64 dimensions, mixed into 768, with noise.
"""

import argparse
import time

import torch

from hubert_lightning.clustering.kmeans import KMeans, ScikitKMeans


def rows_like_features(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sounds = torch.randn(2000, 64, generator=generator)
    mixing = torch.randn(64, dim, generator=generator) / 8
    rows = torch.empty(count, dim)
    for part in rows.split(50_000):
        sound = sounds[torch.randint(len(sounds), (len(part),), generator=generator)]
        speaker = 0.6 * torch.randn(len(part), 64, generator=generator)
        part.copy_((sound + speaker) @ mixing + 0.5 * torch.randn(len(part), dim, generator=generator))
    return rows


def inertia(rows: torch.Tensor, centroids: torch.Tensor) -> float:
    parts = (torch.cdist(part.to(centroids.device), centroids).min(dim=1).values for part in rows.split(10_000))
    return sum(float(part.square().double().sum()) for part in parts) / len(rows)


def timed(fit, rows: torch.Tensor, clusters: int) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    centroids = fit(rows, clusters, seed=0)
    if rows.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, centroids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_scikit", action="store_true", help="only ours")
    args = parser.parse_args()
    rows = rows_like_features(args.rows, args.dim)
    on_device = rows.to(args.device)
    print(f"{args.rows} rows of {args.dim}, {args.clusters} clusters, {args.device}, {torch.get_num_threads()} threads")

    timed(KMeans(max_rounds=1).fit, on_device[:20_000], args.clusters)  # kernels are loaded, threads started
    ours, centroids = timed(KMeans().fit, on_device, args.clusters)
    reached = inertia(rows, centroids)
    print(f"torch         {ours:8.2f} s   inertia a row {reached:.3f}", flush=True)

    x, weights = on_device[:8192].contiguous(), centroids.T.contiguous().to(args.device)
    products, _ = timed(lambda x, *_, seed: ([x @ weights for _ in range(20)], x), x, args.clusters)
    one_pass = products / 20 / len(x) * args.rows
    print(f"one pass of matrix products alone {one_pass:.3f} s: the fit takes as long as {ours / one_pass:.1f} passes")

    if not args.no_scikit:
        theirs, centroids = timed(ScikitKMeans().fit, rows, args.clusters)
        their_inertia = inertia(rows, centroids)
        print(f"scikit-learn  {theirs:8.2f} s   inertia a row {their_inertia:.3f}")
        print(f"torch is {theirs / ours:.1f} times as fast; its inertia is {reached / their_inertia:.4f} of that")


if __name__ == "__main__":
    main()
