#!/usr/bin/env bash
# What docs/benchmarks.md measures on a GPU, in eight minutes, most worth knowing first:
#     benchmarks/gpu.sh AUDIO OUT          AUDIO: a folder of some hundred flac files; OUT: where results.txt goes
#     benchmarks/gpu.sh AUDIO OUT --tiny   the same on a processor, with sizes that measure nothing, to see it run
# Each part has a time limit and writes its results as soon as it has them. scikit-learn's K-means runs beside all of it
# on half of the cores, and nothing else does. PYTHON says which python, if not uv's; BUDGET, how many seconds.
set -u
cd "$(dirname "$0")/.."
audio=$(realpath "$1") && mkdir -p "$2" && out=$(realpath "$2") || exit
read -ra python <<<"${PYTHON:-uv run python}"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=160
budget=${BUDGET:-480}
work=$(mktemp -d)
trap 'kill "${scikit:-}" 2>/dev/null; rm -rf "$work"' EXIT

device=cuda rows=1000000 many=8000000 host=4000000 times=20 files=1000 rounds=7 steps=60 frames=200000 clusters=500
base=(--batch 7 --seconds 12.5) four=(--batch 28 --seconds 12.5)  # 87.5 s, as the paper has on a GPU; four times that
large=(--size large --batch 5 --seconds 11.25) xlarge=(--size xlarge --batch 2 --seconds 11.25)  # 56.25 and 22.5 s
accelerator=gpu precision=bf16-mixed layer=6 model=()
if [ "${3:-}" = --tiny ]; then
    device=cpu rows=20000 many=30000 host=20000 times=1 files=4 rounds=1 steps=2 frames=2000 clusters=20
    base=(--batch 1 --seconds 1) four=("${base[@]}") large=("${base[@]}") xlarge=("${base[@]}")
    accelerator=cpu precision=32-true layer=2
    model=(--config tests/smoke.yaml)
fi

say() { echo "$*" | tee -a "$out/results.txt"; }

part() { # title, seconds at most, command
    local title=$1 limit=$2 left=$((budget - SECONDS)) since=$SECONDS status
    shift 2
    say "" && say "== $title"
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

step=(benchmarks/train_step.py --device "$device" --precision bf16 --optimizer --rounds "$rounds" --clusters "$clusters")
kmeans=(benchmarks/kmeans.py --device "$device" --clusters "$clusters" --only torch)
relabel=(benchmarks/relabelling.py --manifest "$work/one.jsonl.gz" --times "$times" --device "$device"
    --clusters "$clusters" --max_frames "$frames" --num_workers "$half" --batch_duration 87.5)

part "the same numbers as on a processor" 100 -m pytest -n 0 -p no:cacheprovider tests/test_gpu.py tests/units/test_kmeans.py \
    -k "(gpu or cuda) and not compiled"
part "a step of Base" 80 "${step[@]}" "${base[@]}" --contestants ours torchaudio transformers --json "$out/base.json"
part "a step of Large" 80 "${step[@]}" "${large[@]}" --contestants ours torchaudio transformers \
    --json "$out/large.json"
part "a step of Base, also compiled" 120 "${step[@]}" "${base[@]}" --compile --contestants ours torchaudio \
    --profile "$out/base-profile.txt"
part "K-means, rows drawn on a processor, as scikit-learn has them" 60 "${kmeans[@]}" --rows "$rows"
part "manifests of the audio" 30 - "$audio" "$work" <<'PYTHON'
import sys
from pathlib import Path
from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.data.examine import examine

cuts, _, _ = examine(sorted(Path(sys.argv[1]).rglob("*.flac")))
write_manifest(cuts, Path(sys.argv[2], "one.jsonl.gz"))
write_manifest([cut.with_id(f"{copy}-{cut.id}") for copy in range(8) for cut in cuts], Path(sys.argv[2], "eight.jsonl.gz"))
print(f"{len(cuts)} files, {sum(cut.duration for cut in cuts) / 60:.1f} minutes")
PYTHON
part "labels of layer 6 of Base" 45 "${relabel[@]}" --base_layer 6 --precision bf16
part "letters, float32" 45 benchmarks/transcription.py "$audio" --device "$device" --files "$files" --batches 1 8 32
# configs/pretrain/base.yaml as it stands, but for where its log goes
sed '/^  logger:/,/init_args/d' configs/pretrain/base.yaml >"$work/base.yaml"
part "configs/pretrain/base.yaml" 100 -m hubert_lightning fit --config "$work/base.yaml" "${model[@]}" \
    "--iterations=[{features: mfcc, clusters: 100, max_frames: $frames, max_steps: $steps}, {features: previous,
        layer: $layer, clusters: $clusters, max_frames: $frames, max_steps: $steps}]" \
    "--data.init_args.train=[$work/eight.jsonl.gz]" --data.init_args.validation=null "--output=$work/run" \
    --trainer.accelerator="$accelerator" --trainer.devices=1 --trainer.precision="$precision" \
    --trainer.log_every_n_steps=$((steps / 6 + 1)) --trainer.enable_progress_bar=false \
    --trainer.enable_model_summary=false \
    "--trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: $work/run}}"
part "its log" 20 - "$work/run" <<'PYTHON'
import csv, sys
from pathlib import Path

for file in sorted(Path(sys.argv[1]).rglob("metrics.csv")):
    print(file.relative_to(sys.argv[1]))
    for row in csv.DictReader(file.open()):
        names = ("step", "speed/audio_seconds_per_second", "speed/mfu", "speed/data_wait", "train/loss")
        if row.get("speed/mfu"):
            print(*(f"{name.rpartition('/')[2]} {float(row[name]):.4g}" for name in names if row.get(name)), sep=", ")
PYTHON
part "a step of Large, also compiled" 90 "${step[@]}" "${large[@]}" --compile --contestants ours torchaudio
part "a step of X-Large" 80 "${step[@]}" "${xlarge[@]}" --contestants ours torchaudio --json "$out/xlarge.json"
part "a step of Base, four times the audio" 45 "${step[@]}" "${four[@]}" --contestants ours torchaudio
part "K-means, more rows" 40 "${kmeans[@]}" --rows "$many" --draw_on "$device"
part "K-means, rows too many for the GPU" 40 "${kmeans[@]}" --rows "$host" --draw_on "$device" --keep_on cpu
part "letters, bfloat16" 30 benchmarks/transcription.py "$audio" --device "$device" --files "$files" --batches 1 8 32 \
    --precision bf16
part "labels of layer 9 of Base" 40 "${relabel[@]}" --base_layer 9 --precision bf16
part "a compiled fit" 60 -m pytest -n 0 -p no:cacheprovider tests/test_gpu.py -k compiled

say "" && say "== K-means of scikit-learn, on $half cores"
while kill -0 "$scikit" 2>/dev/null && ((SECONDS < budget)); do sleep 1; done
kill "$scikit" 2>/dev/null && say "not done in $SECONDS s"
tee -a "$out/results.txt" <"$work/scikit.txt"
say "$SECONDS s in all"
