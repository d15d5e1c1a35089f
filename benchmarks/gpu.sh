#!/usr/bin/env bash
# Measures and checks this repository on a GPU, within ten minutes, on a machine that has Python and jax for CUDA:
#
#     DATA=FOLDER [WHEELS=FOLDER] [OUT=FOLDER] bash benchmarks/gpu.sh [engine] [cells] [training] [checks] [--FLAG=...]
#
# DATA holds the four IDX files of MNIST. WHEELS holds wheels of packages that the machine lacks; they go into a folder
# of their own. OUT gets gpu.json and the logs. PYTHON names another Python. For the parts and flags see gpu.py;
# `bash benchmarks/gpu.sh --rehearse` tries all of it at tiny sizes, without a GPU too.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$SCRATCH/site" "$WHEELS"/*.whl
  export PYTHONPATH=$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}
fi
[ -z "${DATA:-}" ] || SEQMNIST_DATA_DIR=$(cd "$DATA" && pwd)
export SEQMNIST_DATA_DIR
"$PYTHON" -m benchmarks.gpu --scratch="$SCRATCH" --out="${OUT:-runs/gpu}" "$@"
