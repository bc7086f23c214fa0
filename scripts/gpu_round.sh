#!/usr/bin/env bash
# GPU tests, then the speed tables, in one go, with the python3 that is there (no network). Arguments go to tune.py:
# suites (all unless some are named) and options.
#   PYTHON        the Python to use (default: python3)
#   TEST_SECONDS  limit on the tests (default: 240); 0 leaves them out
#   TUNE_SECONDS  limit on the tables (default: 300); 0 leaves them out
#   PYTEST_ARGS   more arguments to pytest, e.g. "-x -k heads"
#   PEERS         folder with the peers, if any
#   OUT           folder for results (default: none are written)
set -uo pipefail
unset CDPATH

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
TEST_SECONDS=${TEST_SECONDS:-240}
TUNE_SECONDS=${TUNE_SECONDS:-300}
status=0

if [ "$TEST_SECONDS" -gt 0 ]; then
    workers=()
    threads=()
    # 4,732 tests took 166 s on 16 cores so: 16 s to import and collect, and most of the rest to compile kernels as they
    # are met. With BLAS threads in each worker they take several times as long.
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        threads=(OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1)
        workers=(-n auto --dist worksteal)
    else
        "$PYTHON" -m cupy_mla compile >/dev/null || status=$? # in parallel; the tests would compile one after the other
    fi
    # The README's commands, among the longest tests, come first: no worker is at one of them when the others are done.
    # shellcheck disable=SC2086  # PYTEST_ARGS is several words
    timeout -k 10 "$TEST_SECONDS" env ${threads[@]+"${threads[@]}"} "$PYTHON" -m pytest tests/test_readme.py \
        tests/gpu tests/test_cache_ops.py tests/test_kv_cache.py tests/test_own_call.py tests/test_bench_peers.py \
        -q --tb=short --durations=8 \
        ${workers[@]+"${workers[@]}"} ${PYTEST_ARGS:-} || status=$?
fi
if [ "$TUNE_SECONDS" -gt 0 ]; then
    PYTHONUNBUFFERED=1 timeout -k 10 "$TUNE_SECONDS" "$PYTHON" scripts/tune.py ${PEERS:+--peers-path "$PEERS"} \
        ${OUT:+--save "$OUT"} "$@" || status=$?
fi
exit "$status"
