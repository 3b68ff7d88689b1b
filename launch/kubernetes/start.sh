#!/usr/bin/env bash
# What each pod runs (launch/kubernetes), and what machines without a scheduler can run by hand:
#
#   PET_NNODES=2 PET_NODE_RANK=0 PET_NPROC_PER_NODE=8 PET_MASTER_ADDR=10.0.0.1 PET_MASTER_PORT=29500 \
#     bash launch/kubernetes/start.sh configs/quickstart.yaml runs_dir=/shared/runs
#
# and the same with PET_NODE_RANK=1 on the second. The PET_ variables are those that Kubeflow's torch runtime sets.
# With PET_NNODES=1:2 a node may be lost and come back (launch/README.md, "Fewer nodes, and more again"). Then
# PET_RDZV_ENDPOINT may name where the nodes meet instead of on the first: /shared/file, or host:port of a store.
# MAX_RESTARTS is how often dead workers are restarted without a word to the outside [0: the scheduler restarts; with a
# range 20: each lost node is one].
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: $0 CONFIG... [path=value]..." >&2; exit 2; }
: "${PET_NNODES:?}" "${PET_NODE_RANK:?}" "${PET_NPROC_PER_NODE:?}" "${PET_MASTER_ADDR:?}" "${PET_MASTER_PORT:?}"
# After 60 s a replaced node would end its peers if the store were shared with the workers (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120} # to finish a step and save after SIGTERM
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
launch=(--config_file "launch/accelerate/${LAUNCH:-fsdp2}.yaml")
meet=is_host=$((PET_NODE_RANK == 0))
if [[ $PET_NNODES == *:* ]]; then
  # A batch that some number of nodes cannot share is said now, and not when a node is lost.
  processes=()
  for ((nodes = ${PET_NNODES%:*}; nodes <= ${PET_NNODES#*:}; nodes++)); do
    processes+=(--processes $((nodes * PET_NPROC_PER_NODE)))
  done
  python -m mcir train "$@" --dry-run "${processes[@]}" >/dev/null
  case ${PET_RDZV_ENDPOINT:-} in
    "") PET_RDZV_ENDPOINT=$PET_MASTER_ADDR:$PET_MASTER_PORT ;;
    /*) meet=store_type=file ;;
    *) meet=is_host=0 ;;
  esac
  # Accelerate knows no range: it is told of this node alone, and torchrun takes the others from these variables.
  export PET_NNODES PET_RDZV_ENDPOINT
  launch+=(--num_processes "$PET_NPROC_PER_NODE" --num_machines 1 --main_process_port 0
    --parallelism_config_dp_shard_size "$PET_NPROC_PER_NODE" --max_restarts "${MAX_RESTARTS:-20}")
else
  launch+=(--num_processes $((PET_NNODES * PET_NPROC_PER_NODE))
    --num_machines "$PET_NNODES" --machine_rank "$PET_NODE_RANK"
    --main_process_ip "$PET_MASTER_ADDR" --main_process_port "$PET_MASTER_PORT" --max_restarts "${MAX_RESTARTS:-0}")
fi
[ "$PET_NNODES" = 1 ] || launch+=(--rdzv_backend c10d --rdzv_conf "$meet,join_timeout=${JOIN_TIMEOUT_S:-600}")
exec accelerate launch "${launch[@]}" -m mcir train "$@" --resume auto
