#!/usr/bin/env bash
# Run `hubert fit` on several hosts without SLURM. torchrun starts one process per GPU and tells it rank and address.
# Needs: `uv sync` in a folder that all hosts share.
# Run, from that folder, on the first host:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 uv run configs/launch/torchrun.sh
#   and on the second host the same with NODE_RANK=1. Arguments go to `hubert fit`.
# NODES: number of hosts. NODE_RANK: number of this host, from 0.
# MASTER_ADDR, MASTER_PORT: address of host 0 that the others reach, and a free port on host 0.
# DEVICES: GPUs of each host, 8 by default. The script sets trainer.devices and trainer.num_nodes.
# CONFIG: the config, configs/pretrain/base.yaml by default.
# PET_LOCAL_ADDR: address of this host, if hosts do not find each other by name.
# If a process dies, torchrun restarts all processes, and the run resumes from its last checkpoint.
set -euo pipefail

: "${NODES:?is not set; give the number of hosts}"
: "${NODE_RANK:?is not set; give the number of this host, from 0 to NODES - 1}"
: "${MASTER_ADDR:?is not set; give the address of host 0 that the others reach}"
: "${MASTER_PORT:?is not set; give a port that is free on host 0, such as 29500}"
if ((NODE_RANK >= NODES)); then
  echo "torchrun.sh: NODE_RANK $NODE_RANK is none of $NODES hosts; they count from 0" >&2
  exit 2
fi
devices=${DEVICES:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Each restart meets at a new port: at a shared one, processes would find the addresses of dead processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "$NODES" --nproc-per-node "$devices" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id hubert --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
  --rdzv-conf "is_host=$((NODE_RANK == 0))" \
  -m hubert_lightning fit --config "${CONFIG:-configs/pretrain/base.yaml}" "$@" \
  --trainer.num_nodes "$NODES" --trainer.devices "$devices"
