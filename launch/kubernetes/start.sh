#!/usr/bin/env bash
# What each pod runs (launch/kubernetes), and what two machines without a scheduler can run by hand:
#
#   PET_NNODES=2 PET_NODE_RANK=0 PET_NPROC_PER_NODE=8 PET_MASTER_ADDR=10.0.0.1 PET_MASTER_PORT=29500 \
#     bash launch/kubernetes/start.sh configs/quickstart.yaml runs_dir=/shared/runs
#
# and the same with PET_NODE_RANK=1 on the second. The PET_ variables are those that Kubeflow's torch runtime sets.
# MAX_RESTARTS is how often dead workers are restarted without a word to the outside [0: the scheduler restarts].
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: $0 CONFIG... [path=value]..." >&2; exit 2; }
: "${PET_NNODES:?}" "${PET_NODE_RANK:?}" "${PET_NPROC_PER_NODE:?}" "${PET_MASTER_ADDR:?}" "${PET_MASTER_PORT:?}"
# After 60 s a replaced node would end its peers if the store were shared with the workers (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
launch=(--config_file "launch/accelerate/${LAUNCH:-fsdp2}.yaml" --num_processes $((PET_NNODES * PET_NPROC_PER_NODE))
  --num_machines "$PET_NNODES" --machine_rank "$PET_NODE_RANK"
  --main_process_ip "$PET_MASTER_ADDR" --main_process_port "$PET_MASTER_PORT" --max_restarts "${MAX_RESTARTS:-0}")
[ "$PET_NNODES" -eq 1 ] || launch+=(--rdzv_backend c10d
  --rdzv_conf "is_host=$((PET_NODE_RANK == 0)),join_timeout=${JOIN_TIMEOUT_S:-600}")
exec accelerate launch "${launch[@]}" -m mcir train "$@" --resume auto
