#!/usr/bin/env bash
# The main job on the request lengths that ship with the package: sets up .venv with what fits this machine, then runs
# `cupy-mla decode`, on the Hopper GPU if there is one and with NumPy otherwise. Arguments go to `cupy-mla decode`.
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

detect_gpu
say "$GPU_NOTE"
ensure_environment "$CUDA_EXTRA"
say "cupy-mla decode $*"
exec "$VENV/bin/cupy-mla" decode "$@"
