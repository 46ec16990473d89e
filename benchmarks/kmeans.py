"""K-means in torch against scikit-learn's MiniBatchKMeans with the reference settings, on the same rows.

    uv run python benchmarks/kmeans.py --rows 300000 --clusters 500
    uv run python benchmarks/kmeans.py --rows 8000000 --draw_on cuda --only torch

Prints the seconds and the inertia of both, their ratio, and how near to plain matrix products the torch one comes. The
rows are those of a hidden layer in shape only: 2000 unlike sounds in 64 dimensions, mixed into 768, with noise.
"""

import argparse
import time

import torch

from hubert_lightning.units.kmeans import KMeans, ScikitKMeans


def rows_like_features(count: int, dim: int, drawn_on: str, kept_on: str, seed: int = 0) -> torch.Tensor:
    options = {"generator": torch.Generator(drawn_on).manual_seed(seed), "device": drawn_on}
    sounds = torch.randn(2000, 64, **options)
    mixing = torch.randn(64, dim, **options) / 8
    rows = torch.empty(count, dim, device=kept_on)
    for part in rows.split(50_000):
        sound = sounds[torch.randint(len(sounds), (len(part),), **options)]
        speaker = 0.6 * torch.randn(len(part), 64, **options)
        part.copy_((sound + speaker) @ mixing + 0.5 * torch.randn(len(part), dim, **options))
    return rows


def inertia(rows: torch.Tensor, centroids: torch.Tensor) -> float:
    centre = centroids.mean(dim=0)
    parts = (
        torch.cdist(part.to(centroids.device) - centre, centroids - centre).min(dim=1).values
        for part in rows.split(10_000)
    )
    return sum(float(part.square().double().sum()) for part in parts) / len(rows)


def timed(fit, rows: torch.Tensor, clusters: int, **options) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    centroids = fit(rows, clusters, seed=0, **options)
    if centroids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, centroids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw_on", default="cpu", help="where rows are drawn, which also says which rows")
    parser.add_argument("--keep_on", help="where rows lie, from where they go to the device in chunks; on it at first")
    parser.add_argument("--only", choices=["torch", "scikit"])
    args = parser.parse_args()
    kept_on = args.keep_on or (args.device if args.draw_on == args.device else "cpu")
    rows = rows_like_features(args.rows, args.dim, args.draw_on, kept_on)
    size = f"{args.rows} rows of {args.dim}, {args.clusters} clusters"
    print(f"{size}, {args.device}, {torch.get_num_threads()} threads", flush=True)

    if args.only != "scikit":
        there = rows if args.keep_on else rows.to(args.device)
        device = torch.device(args.device)
        timed(KMeans(max_rounds=1).fit, there[:20_000], args.clusters, device=device)  # kernels are loaded
        ours, centroids = timed(KMeans().fit, there, args.clusters, device=device)
        reached = inertia(rows, centroids)
        where = f", from rows on {args.keep_on}" if args.keep_on else ""
        print(f"torch         {ours:8.2f} s   inertia a row {reached:.3f}{where}", flush=True)

        x, weights = there[:8192].to(device).contiguous(), centroids.T.contiguous().to(device)
        products, _ = timed(lambda x, *_, seed: [x @ weights for _ in range(20)][-1], x, args.clusters)
        one_pass = products / 20 / len(x) * args.rows
        print(f"one pass of matrix products alone {one_pass:.3f} s: the fit takes as long as {ours / one_pass:.1f}")

    if args.only != "torch":
        theirs, centroids = timed(ScikitKMeans().fit, rows.cpu(), args.clusters)
        their_inertia = inertia(rows, centroids)
        print(f"scikit-learn  {theirs:8.2f} s   inertia a row {their_inertia:.3f}")
        if args.only is None:
            print(f"torch is {theirs / ours:.1f} times as fast; its inertia is {reached / their_inertia:.4f} of that")


if __name__ == "__main__":
    main()
