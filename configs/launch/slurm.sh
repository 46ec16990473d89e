#!/usr/bin/env bash
# Run `hubert fit` on the nodes of a SLURM cluster, one process per GPU. Lightning reads rank and address from SLURM.
# Needs: `uv sync` in a folder that all nodes share.
# Run, from that folder, for the paper's 32 GPUs:
#   uv run sbatch --nodes=4 configs/launch/slurm.sh \
#     --trainer.accumulate_grad_batches 1 --trainer.val_check_interval 10000
# Options before the script belong to sbatch and replace those below; arguments after it go to `hubert fit`.
# Set for your cluster: --account, --partition, --time, --cpus-per-task, and the GPUs of a node, twice:
#   --gpus-per-node and --ntasks-per-node (not --gpus-per-task: every process chooses its GPU from all of the node).
# CONFIG: the config, configs/pretrain/base.yaml by default. The script sets trainer.num_nodes and trainer.devices.
#SBATCH --job-name=hubert
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
# For each GPU, the process and 8 that read audio (data.num_workers)
#SBATCH --cpus-per-task=9
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# A job that is requeued after a node failure resumes from the last checkpoint in the run folder.
#SBATCH --requeue
# So does a job that runs out of time: 180 s before, SLURM signals this shell ("B:"). Without "B:", SLURM would signal
# the processes directly.
#SBATCH --signal=B:USR1@180
set -uo pipefail

trap 'signalled=${signalled:-$SECONDS}' USR1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from sbatch

srun --kill-on-bad-exit=1 hubert fit --config "${CONFIG:-configs/pretrain/base.yaml}" "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" &
srun=$!
# Polled, because bash's `wait` can miss an end that coincides with a signal
while kill -0 "$srun" 2>/dev/null; do
  if [[ ${signalled:-} ]]; then
    [[ ${asked:=} ]] || kill -TERM "$srun" # the processes save after the step and exit; then the job is requeued
    asked=1
    ((SECONDS - signalled < 150)) || break # requeue without waiting, if that takes too long
  fi
  sleep 1
done
[[ ${signalled:-} ]] && scontrol requeue "$SLURM_JOB_ID"
wait "$srun"
