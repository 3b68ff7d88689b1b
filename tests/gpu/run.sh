#!/usr/bin/env bash
# Checks and times this checkout on the GPU at hand in at most eight minutes: bash tests/gpu/run.sh [FOLDER]
# FOLDER (gpu-results, or $OUT) gets results.json and report.md, the GPU section of BENCHMARKS.md. Without a GPU the same
# code runs with small sizes. Golden numbers come from ../shared (or $MCIR_SHARED), or lie all in .gpu/.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-${OUT:-gpu-results}}
mkdir -p "$folder"
if [ -z "${MCIR_SHARED:-}" ] && [ -d .gpu ]; then
  MCIR_SHARED=$(mktemp -d)
  ln -s "$PWD/.gpu" "$MCIR_SHARED/golden"
  ln -s "$PWD/.gpu" "$MCIR_SHARED/data"
  export MCIR_SHARED
fi
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "$python" -m tests.gpu.check "$folder"
