#!/usr/bin/env bash
# What docs/benchmarks.md measures on a GPU, in eight minutes, most worth knowing first:
#     benchmarks/gpu.sh AUDIO OUT          AUDIO: a folder of some hundred flac files; OUT: where results.txt goes
#     benchmarks/gpu.sh AUDIO OUT --tiny   the same on a processor, with sizes that measure nothing, to see it run
#     benchmarks/gpu.sh --missing          what this machine lacks for it, one a line, as `pip download -r` takes it;
#                                          of .venv, or of python3 where there is none
# Each part has a time limit and writes its results as soon as it has them; the limits of the first parts add up to eight
# minutes, the later ones run in what is left. scikit-learn's K-means runs beside all of it on half of the cores, and
# nothing else does. PYTHON says which python, if not uv's; BUDGET, how many seconds; MINIMAL_HUBERT, where a checkout of
# minimal-hubert is, which needs Python 3.12.
set -u
cd "$(dirname "$0")/.."
read -ra python <<<"${PYTHON:-uv run python}"
if [ "${1:-}" = --missing ]; then
    if [ -z "${PYTHON:-}" ]; then  # `uv run` would make a virtual environment where there is none
        python=(python3) && [ -x .venv/bin/python ] && python=(.venv/bin/python)
    fi
    for tool in taskset timeout nvidia-smi; do command -v "$tool" >/dev/null || echo "# the command $tool"; done
    "${python[@]}" - <<'PYTHON'
import re, sys
if sys.version_info < (3, 11):
    sys.exit(f"# Python {sys.version.split()[0]} is too old; name another one with PYTHON, at least 3.11")
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

settings = tomllib.loads(Path("pyproject.toml").read_text())
pinned = {re.split("[=<> ;@]", line)[0].lower(): line for line in settings["tool"]["uv"]["constraint-dependencies"]}
try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:
    Requirement = None
found, ahead = {}, [*settings["project"]["dependencies"], "pytest"]
while ahead:
    line = ahead.pop()
    name = re.split(r"[^\w.-]", line)[0].lower()
    if name in found or "extra ==" in line:
        continue
    if Requirement and (marker := Requirement(line).marker) and not marker.evaluate():
        continue
    try:
        ahead += requires(name) or []
        found[name] = None
    except PackageNotFoundError:
        found[name] = re.split(" *;", pinned.get(name, line))[0]
missing = sorted(filter(None, found.values()))
print(*missing, sep="\n")
print(f"# {len(missing)} of {len(found)} packages are missing from Python {sys.version.split()[0]}; unpack wheels on PYTHONPATH")
PYTHON
    exit
fi
audio=$(realpath "$1") && mkdir -p "$2" && out=$(realpath "$2") || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=160
budget=${BUDGET:-480} patience=1
work=$(mktemp -d)
trap 'kill "${scikit:-}" 2>/dev/null; rm -rf "$work"' EXIT

device=cuda rows=1000000 many=8000000 host=4000000 times=20 files=1000 rounds=5 steps=60 frames=200000 clusters=500
base=(--batch 7 --seconds 12.5) four=(--batch 28 --seconds 12.5) eight=(--batch 56 --seconds 12.5)  # 87.5, 350, 700 s
large=(--size large --batch 5 --seconds 11.25) xlarge=(--size xlarge --batch 2 --seconds 11.25)  # 56.25 and 22.5 s
accelerator=gpu precision=bf16-mixed layer=6 workers=12 long=350 model=()
if [ "${3:-}" = --tiny ]; then
    device=cpu rows=20000 many=30000 host=20000 times=1 files=4 rounds=1 steps=2 frames=2000 clusters=20
    base=(--batch 1 --seconds 1) four=("${base[@]}") eight=("${base[@]}")
    large=(--size large "${base[@]}") xlarge=("${base[@]}")
    accelerator=cpu precision=32-true layer=2 workers=2 long=20 budget=${BUDGET:-3000} patience=6
    model=(--config tests/smoke.yaml)
fi
peers=(ours torchaudio transformers) goal=(ours)
[ -n "${MINIMAL_HUBERT:-}" ] && peers+=(minimal-hubert) goal+=(minimal-hubert)

say() { echo "$*" | tee -a "$out/results.txt"; }

part() { # title, seconds at most, command
    local title=$1 limit=$2 left=$((budget - SECONDS)) since=$SECONDS status
    shift 2
    say "" && say "== $title"
    ((limit = limit * patience))
    ((limit = limit < left ? limit : left))
    ((limit < 10)) && say "left out: no time" && return
    timeout -k 5 "$limit" "${python[@]}" "$@" 2>"$work/errors.txt" | tee -a "$out/results.txt"
    status=${PIPESTATUS[0]}
    { echo "== $title" && cat "$work/errors.txt"; } >>"$out/errors.txt"
    ((status == 0)) || { say "ended with $status:" && tail -n 15 "$work/errors.txt" | tee -a "$out/results.txt"; }
    say "($((SECONDS - since)) s of at most $limit)"
}

cores=$(getconf _NPROCESSORS_ONLN) half=$((cores > 1 ? cores / 2 : 1))
OMP_NUM_THREADS=$half taskset -c "$((cores - half))-$((cores - 1))" "${python[@]}" benchmarks/kmeans.py --rows "$rows" \
    --clusters "$clusters" --device cpu --only scikit >"$work/scikit.txt" 2>&1 &
scikit=$!
taskset -pc "0-$((half - 1))" $$ >/dev/null

step=(benchmarks/train_step.py --device "$device" --precision bf16 --optimizer --rounds "$rounds" --clusters "$clusters"
    ${MINIMAL_HUBERT:+--minimal_hubert "$MINIMAL_HUBERT"})
kmeans=(benchmarks/kmeans.py --device "$device" --clusters "$clusters" --only torch)
relabel=(benchmarks/relabelling.py --manifest "$work/one.jsonl.gz" --times "$times" --clusters "$clusters"
    --max_frames "$frames" --num_workers "$((half < workers ? half : workers))")
quiet=(--trainer.accelerator="$accelerator" --trainer.devices=1 --trainer.precision="$precision"
    --trainer.log_every_n_steps=$((steps / 6 + 1)) --trainer.enable_progress_bar=false --trainer.logger=false
    --trainer.enable_model_summary=false --data.init_args.num_workers="$workers")

fit() { # output, seconds of a batch, more options: a compiled fit of configs/pretrain/base.yaml, both iterations
    local output=$1 seconds=$2
    shift 2
    part "configs/pretrain/base.yaml, batches of $seconds s, compiled, $workers workers" 110 -m hubert_lightning fit \
        --config configs/pretrain/base.yaml "${model[@]}" --trainer.accumulate_grad_batches=1 \
        "--iterations=[{features: mfcc, clusters: 100, max_frames: $frames, max_steps: $steps}, {features: previous,
            layer: $layer, clusters: $clusters, max_frames: $frames, max_steps: $steps}]" \
        "--data.init_args.train=[$work/eight.jsonl.gz]" --data.init_args.validation=null "--output=$output" \
        --data.init_args.max_duration="$seconds" --trainer.callbacks=null "${quiet[@]}" "$@"
}

speeds() { # output
    part "its speed: whole steps, with the exact mean over the batch and clipping" 10 - "$1" <<'PYTHON'
import csv, sys
from pathlib import Path

for file in sorted(Path(sys.argv[1]).rglob("metrics.csv")):
    print(file.relative_to(sys.argv[1]))
    for row in csv.DictReader(file.open()):
        names = ("step", "speed/audio_seconds_per_second", "speed/mfu", "speed/data_wait", "speed/memory_gib", "train/loss")
        if row.get("speed/mfu"):
            print(*(f"{name.rpartition('/')[2]} {float(row[name]):.4g}" for name in names if row.get(name)), sep=", ")
PYTHON
}

part "a step of Base, 87.5 s" 45 "${step[@]}" "${base[@]}" --contestants "${peers[@]}" --json "$out/base.json"
part "a step of Base, 87.5 s, compiled" 75 "${step[@]}" "${base[@]}" --compile --contestants "${goal[@]}" \
    --json "$out/base-compiled.json" --profile "$out/base-profile.txt"
part "manifests of the audio" 15 - "$audio" "$work" <<'PYTHON'
import sys
from pathlib import Path
from lhotse import SupervisionSegment
from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.data.examine import examine

cuts, _, _ = examine(sorted(Path(sys.argv[1]).rglob("*.flac")))
for cut in cuts:  # fourteen letters a second, as speech has
    text = " ".join(["letters", "spoken"] * int(cut.duration + 1)).upper()[: int(14 * cut.duration)].strip()
    cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0, cut.duration, text=text, speaker="one")]
write_manifest(cuts, Path(sys.argv[2], "one.jsonl.gz"))
write_manifest([cut.with_id(f"{copy}-{cut.id}") for copy in range(8) for cut in cuts], Path(sys.argv[2], "eight.jsonl.gz"))
print(f"{len(cuts)} files, {sum(cut.duration for cut in cuts) / 60:.1f} minutes")
PYTHON
fit "$work/run" "$long" --model.init_args.compile=true
speeds "$work/run"
part "K-means, rows drawn on a processor, as scikit-learn has them" 40 "${kmeans[@]}" --rows "$rows"
part "labels of layer 6 of Base" 30 "${relabel[@]}" --base_layer 6 --precision bf16 --device "$device" --batch_duration 87.5
part "labels of MFCCs" 25 "${relabel[@]}" --mfcc
part "a step of Base, 350 s" 35 "${step[@]}" "${four[@]}" --contestants "${goal[@]}" --json "$out/base-350.json"
part "configs/finetune/10h.yaml" 45 -m hubert_lightning fit --config configs/finetune/10h.yaml \
    "--model.init_args.pretrained=$work/run/iteration2/last.ckpt" --model.init_args.freeze_steps=0 \
    "--data.init_args.train=[$work/eight.jsonl.gz]" --data.init_args.validation=null "--output=$work/tuned" \
    --trainer.max_steps="$steps" --trainer.callbacks=null --trainer.accumulate_grad_batches=1 "${quiet[@]}"
speeds "$work/tuned"
part "the same numbers as on a processor" 60 -m pytest -n 0 -p no:cacheprovider tests/test_gpu.py tests/units/test_kmeans.py \
    -k "(gpu or cuda) and not compiled"

# in what is left
part "a step of Base, 350 s, compiled" 75 "${step[@]}" "${four[@]}" --compile --contestants "${goal[@]}" \
    --json "$out/base-350-compiled.json"
part "a step of Base, 700 s" 30 "${step[@]}" "${eight[@]}" --contestants ours --json "$out/base-700.json"
part "a step of Large" 60 "${step[@]}" "${large[@]}" --contestants ours torchaudio transformers --json "$out/large.json"
part "letters, bfloat16" 30 benchmarks/transcription.py "$audio" --device "$device" --files "$files" --batches 1 8 32 \
    --precision bf16
part "a step of X-Large" 60 "${step[@]}" "${xlarge[@]}" --contestants ours --json "$out/xlarge.json"
part "K-means, more rows" 40 "${kmeans[@]}" --rows "$many" --draw_on "$device"
part "K-means, rows too many for the GPU" 40 "${kmeans[@]}" --rows "$host" --draw_on "$device" --keep_on cpu
part "letters, float32" 45 benchmarks/transcription.py "$audio" --device "$device" --files "$files" --batches 1 8 32
fit "$work/short" 87.5 --model.init_args.compile=true
speeds "$work/short"
part "a compiled fit" 60 -m pytest -n 0 -p no:cacheprovider tests/test_gpu.py -k compiled

say "" && say "== K-means of scikit-learn, on $half cores"
while kill -0 "$scikit" 2>/dev/null && ((SECONDS < budget)); do sleep 1; done
kill "$scikit" 2>/dev/null && say "not done in $SECONDS s"
tee -a "$out/results.txt" <"$work/scikit.txt"
say "$SECONDS s in all"
