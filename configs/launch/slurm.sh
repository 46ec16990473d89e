#!/usr/bin/env bash
# Fit on the nodes of a SLURM cluster, one process per GPU; Lightning takes rank and address from SLURM.
# Before: `uv sync` in a folder that all nodes share; then, from there, for the paper's 32 GPUs,
#   uv run sbatch --nodes=4 configs/launch/slurm.sh \
#     --trainer.accumulate_grad_batches 1 --trainer.val_check_interval 10000
# Options before the script are sbatch's and replace those below; arguments after it go to `hubert fit`.
# Set, for your cluster: --account, --partition, --time, --cpus-per-task, and GPUs of a node, twice:
#   --gpus-per-node and --ntasks-per-node (not --gpus-per-task: every process chooses its GPU from all of the node).
# CONFIG: what is trained, configs/pretrain/base.yaml unless set; trainer.num_nodes and trainer.devices are SLURM's.
#SBATCH --job-name=hubert
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
# For each GPU, the process and 8 that read audio (data.num_workers)
#SBATCH --cpus-per-task=9
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# A requeued job, here after a node failed, goes on from the last checkpoint in the run's folder.
#SBATCH --requeue
# So does one that runs out of time: 180 s before, SLURM signals this shell ("B:"). Without "B:" the signal would go to
# the processes at once.
#SBATCH --signal=B:USR1@180
set -uo pipefail

trap 'told=${told:-$SECONDS}' USR1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it from sbatch

srun --kill-on-bad-exit=1 hubert fit --config "${CONFIG:-configs/pretrain/base.yaml}" "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" &
srun=$!
# Looked for, since bash's `wait` can miss an end that comes together with a signal
while kill -0 "$srun" 2>/dev/null; do
  if [[ ${told:-} ]]; then
    [[ ${asked:=} ]] || kill -TERM "$srun" # the processes save after the step and end, upon which the job is requeued
    asked=1
    ((SECONDS - told < 150)) || break # without them, if that takes too long
  fi
  sleep 1
done
[[ ${told:-} ]] && scontrol requeue "$SLURM_JOB_ID"
wait "$srun"
