"""K-means: seconds until an inertia is reached, ours and those of other libraries, on the same rows.

    uv run python benchmarks/kmeans.py --features layer.npy --clusters 500 --repeats 3
    uv run python benchmarks/kmeans.py --rows 300000 --clusters 500 --contestants ours scikit
    uv run python benchmarks/kmeans.py --rows 8000000 --draw_on cuda --only torch

Every contestant runs with several settings of its own, from quick to thorough, one after the other in each round.
It prints the median seconds (of the clock, and of all processors) and the inertia of each, and then, for each of these
inertias, the contestant that reached it first. Contestants that are not installed are left out: faiss-cpu, superkmeans,
fastkmeans; flash-kmeans runs on GPUs only.

Without --features, rows are those of a hidden layer in shape only: 2000 unlike sounds in 64 dimensions, mixed into 768,
with noise.
"""

import argparse
import importlib.util
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans as ScikitLloyd
from threadpoolctl import threadpool_limits
from torch import Tensor

from hubert_lightning.units.kmeans import KMeans, ScikitKMeans

CONTESTANTS = ["ours", "scikit", "lloyd", "faiss", "superkmeans", "fastkmeans", "flash"]
ROUNDS = [3, 6, 12, 25, 50]
"""Rounds of the contestants that are told how many."""


class Trial(NamedTuple):
    """A contestant with settings of its own.

    Args:
        contestant: Name of the library.
        settings: What differs from its defaults.
        fit: Function from rows (n, dim) and a number of clusters to centroids (clusters, dim).
    """

    contestant: str
    settings: str
    fit: Callable[[Tensor, int], Tensor]


def trials(contestants: list[str], device: torch.device, threads: int) -> Iterator[Trial]:
    """List the settings of each contestant."""
    for name in contestants:
        package = {"flash": "flash_kmeans"}.get(name, name)
        if name not in ("ours", "scikit", "lloyd") and importlib.util.find_spec(package) is None:
            print(f"{name} is not installed, and is left out")
        elif name == "flash" and device.type != "cuda":
            print("flash-kmeans needs a GPU, and is left out")
        else:
            for settings, fit in MAKERS[name](device, threads):
                yield Trial(name, settings, fit)


Fits = Iterator[tuple[str, Callable[[Tensor, int], Tensor]]]


def _ours(device: torch.device, threads: int) -> Fits:
    for settings in ({}, {"restarts": 1, "tolerance": 1e-2}, {"restarts": 1, "tolerance": 2e-3}, {"tolerance": 1e-4}):
        fit = KMeans(**settings).fit
        yield (
            ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults",
            partial(lambda fit, rows, clusters: fit(rows, clusters, seed=0, device=device), fit),
        )


def _scikit(device: torch.device, threads: int) -> Fits:
    yield "MiniBatchKMeans as fairseq", lambda rows, clusters: ScikitKMeans().fit(rows, clusters, seed=0)


def _lloyd(device: torch.device, threads: int) -> Fits:
    def fit(rounds: int, rows: Tensor, clusters: int) -> Tensor:
        lloyd = ScikitLloyd(clusters, n_init=1, max_iter=rounds, tol=0, random_state=0)
        return torch.from_numpy(lloyd.fit(rows.numpy()).cluster_centers_).float()

    for rounds in ROUNDS[:3]:
        yield f"scikit-learn's KMeans, {rounds} rounds", partial(fit, rounds)


def _faiss(device: torch.device, threads: int) -> Fits:
    import faiss

    def fit(options: dict[str, int], rows: Tensor, clusters: int) -> Tensor:
        faiss.omp_set_num_threads(threads)
        kmeans = faiss.Kmeans(rows.shape[1], clusters, seed=0, gpu=device.type == "cuda", **options)
        kmeans.train(rows.numpy())
        return torch.from_numpy(kmeans.centroids)

    seeds = {"random": faiss.ClusteringInitMethod_RANDOM, "AFK-MC2": faiss.ClusteringInitMethod_AFK_MC2}
    for rounds in ROUNDS:
        for seeding, method in seeds.items():
            for points in (256, 10**9):
                options = {"niter": rounds, "init_method": method, "max_points_per_centroid": points}
                sample = "256 rows a cluster" if points == 256 else "all rows"
                yield f"{seeding}, {rounds} rounds on {sample}", partial(fit, options)
    if hasattr(faiss.ClusteringParameters(), "use_super_kmeans"):
        for rounds in ROUNDS[1:4]:
            options = {"niter": rounds, "use_super_kmeans": True, "max_points_per_centroid": 10**9}
            yield f"super, {rounds} rounds", partial(fit, options)


def _superkmeans(device: torch.device, threads: int) -> Fits:
    from superkmeans import SuperKMeans

    def fit(options: dict[str, float], rows: Tensor, clusters: int) -> Tensor:
        kmeans = SuperKMeans(clusters, rows.shape[1], n_threads=threads, early_termination=False, **options)
        return torch.from_numpy(kmeans.train(rows.numpy()))

    every = {"sampling_fraction": 1.0, "max_points_per_cluster": 2**30}
    for rounds in ROUNDS:
        yield f"{rounds} rounds on all rows", partial(fit, every | {"hierarchical": False, "iters": rounds})
    for rounds in (0, 3, 10, 25):
        options = every | {"hierarchical": True, "iters_refinement": rounds}
        yield f"hierarchical, {rounds} rounds of refinement", partial(fit, options)
    yield "defaults", partial(fit, {})


def _fastkmeans(device: torch.device, threads: int) -> Fits:
    from fastkmeans import FastKMeans

    def fit(rounds: int, rows: Tensor, clusters: int) -> Tensor:
        kmeans = FastKMeans(rows.shape[1], clusters, niter=rounds, gpu=device.type == "cuda", dtype=torch.float32)
        kmeans.train(rows.numpy())
        return torch.from_numpy(kmeans.centroids)

    for rounds in ROUNDS:
        yield f"{rounds} rounds", partial(fit, rounds)


def _flash(device: torch.device, threads: int) -> Fits:
    from flash_kmeans import FlashKMeans

    def fit(rounds: int, rows: Tensor, clusters: int) -> Tensor:
        kmeans = FlashKMeans(rows.shape[1], clusters, niter=rounds, device=device)
        kmeans.train(rows.to(device))
        return kmeans.centroids.view(clusters, -1).float()

    for rounds in ROUNDS:
        yield f"{rounds} rounds", partial(fit, rounds)


MAKERS = {
    "ours": _ours,
    "scikit": _scikit,
    "lloyd": _lloyd,
    "faiss": _faiss,
    "superkmeans": _superkmeans,
    "fastkmeans": _fastkmeans,
    "flash": _flash,
}


def rows_like_features(count: int, dim: int, drawn_on: str, kept_on: str, seed: int = 0) -> Tensor:
    """Draw rows (count, dim)."""
    options = {"generator": torch.Generator(drawn_on).manual_seed(seed), "device": drawn_on}
    sounds = torch.randn(2000, 64, **options)
    mixing = torch.randn(64, dim, **options) / 8
    rows = torch.empty(count, dim, device=kept_on)
    for part in rows.split(50_000):
        sound = sounds[torch.randint(len(sounds), (len(part),), **options)]
        speaker = 0.6 * torch.randn(len(part), 64, **options)
        part.copy_((sound + speaker) @ mixing + 0.5 * torch.randn(len(part), dim, **options))
    return rows


def inertia(rows: Tensor, centroids: Tensor) -> float:
    """Compute the mean squared distance of a row to the nearest centroid."""
    centre = centroids.mean(dim=0)
    parts = (
        torch.cdist(part.to(centroids.device) - centre, centroids - centre).min(dim=1).values
        for part in rows.split(10_000)
    )
    return sum(float(part.square().double().sum()) for part in parts) / len(rows)


def timed(fit: Callable[..., Tensor], rows: Tensor, clusters: int, **options: object) -> tuple[float, float, Tensor]:
    """Fit, and return the seconds of the clock and of all processors, and the centroids."""
    began, began_cpu = time.perf_counter(), time.process_time()
    centroids = fit(rows, clusters, **options)
    if centroids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - began_cpu, centroids


def compare(rows: Tensor, clusters: int, chosen: list[Trial], repeats: int, most: float) -> None:
    """Time all trials in turn, and print who reaches each inertia first."""
    seconds, cpu_seconds, reached = defaultdict(list), defaultdict(list), {}
    for number in range(repeats):
        for trial in chosen:
            if number and seconds[trial][0] > most:
                continue
            clock, cpu, centroids = timed(trial.fit, rows, clusters)
            seconds[trial].append(clock)
            cpu_seconds[trial].append(cpu)
            if not number:
                reached[trial] = inertia(rows, centroids)
            note = f"{clock:8.2f} s  {cpu:8.2f} s of processors  inertia {reached[trial]:.5g}"
            print(f"  {trial.contestant:12}{trial.settings:44}{note}", flush=True)
    for unit, taken in (("seconds", seconds), ("seconds of processors", cpu_seconds)):
        print(
            f"\n{unit} until an inertia is reached (median of {repeats}); the inertia is that of KMeans by default, ×"
        )
        names = list(dict.fromkeys(trial.contestant for trial in chosen))
        print(f"{'':10}" + "".join(f"{name:>13}" for name in names))
        ours = next((value for trial, value in reached.items() if trial.settings == "defaults"), min(reached.values()))
        for share in (0.997, 0.998, 0.999, 1.0, 1.001, 1.002, 1.005, 1.01, 1.02):
            row = []
            for name in names:
                good = [t for t in chosen if t.contestant == name and reached[t] <= share * ours * (1 + 1e-6)]
                row.append(min((statistics.median(taken[t]) for t in good), default=None))
            print(f"{share:<10}" + "".join(f"{'–' if value is None else f'{value:.2f}':>13}" for value in row))


def products(rows: Tensor, centroids: Tensor, device: torch.device) -> float:
    """Return the seconds that one pass of plain matrix products over all rows takes."""
    x, weights = rows[:8192].to(device).contiguous(), centroids.T.contiguous().to(device)
    seconds, _, _ = timed(lambda x, *_: [x @ weights for _ in range(20)][-1], x, len(centroids))
    return seconds / 20 / len(x) * len(rows)


def only(rows: Tensor, clusters: int, device: torch.device, name: str, where: str) -> None:
    """Time one fit of `KMeans` or of scikit-learn, on its own."""
    if name == "scikit":
        seconds, _, centroids = timed(ScikitKMeans().fit, rows.cpu(), clusters, seed=0)
        print(f"scikit-learn  {seconds:8.2f} s   inertia a row {inertia(rows, centroids):.3f}")
        return
    timed(KMeans(max_rounds=1).fit, rows[:20_000], clusters, seed=0, device=device)  # kernels are loaded
    seconds, _, centroids = timed(KMeans().fit, rows, clusters, seed=0, device=device)
    print(f"torch         {seconds:8.2f} s   inertia a row {inertia(rows, centroids):.3f}{where}", flush=True)
    one_pass = products(rows, centroids, device)
    print(f"one pass of matrix products alone {one_pass:.3f} s: the fit takes as long as {seconds / one_pass:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", help="a .npy of rows (n, dim), of which the first --rows are used")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--settings", nargs="+", default=[""], help="only trials whose settings contain one of these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most", type=float, default=60, help="seconds; slower trials run once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw_on", default="cpu", help="where rows are drawn, which also says which rows")
    parser.add_argument("--keep_on", help="where rows lie, from where they go to the device in chunks; on it at first")
    parser.add_argument("--only", choices=["torch", "scikit"], help="one fit of KMeans or scikit-learn, no comparison")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    kept_on = args.keep_on or (args.device if args.draw_on == args.device else "cpu")
    if args.features:
        rows = torch.from_numpy(np.load(args.features)[: args.rows]).float()
    else:
        rows = rows_like_features(args.rows, args.dim, args.draw_on, kept_on)
    size = f"{len(rows)} rows of {rows.shape[1]}, {args.clusters} clusters"
    print(f"{size}, {args.device}, {args.threads} threads", flush=True)
    with threadpool_limits(args.threads):
        if args.only:
            there = rows if args.keep_on else rows.to(args.device)
            only(there, args.clusters, device, args.only, f", from rows on {args.keep_on}" if args.keep_on else "")
            return
        chosen = [
            trial
            for trial in trials(args.contestants, device, args.threads)
            if any(part in trial.settings for part in args.settings)
        ]
        KMeans(max_rounds=1).fit(rows[:20_000], args.clusters, seed=0, device=device)  # kernels are loaded
        compare(rows, args.clusters, chosen, args.repeats, args.most)


if __name__ == "__main__":
    main()
