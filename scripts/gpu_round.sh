#!/usr/bin/env bash
# GPU tests, then the benchmark, in one go, with the python3 that is there (no network). Arguments go to gpu_bench.py.
#   PYTHON        the Python to use (default: python3)
#   TEST_SECONDS  limit on the tests (default: 240); 0 leaves them out
#   BENCH_SECONDS limit on the benchmark (default: 300); 0 leaves it out
#   PYTEST_ARGS   more arguments to pytest, e.g. "-x -k heads"
#   PEERS         folder with the peers, if any
#   OUT           folder for results (default: none are written)
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
TEST_SECONDS=${TEST_SECONDS:-240}
BENCH_SECONDS=${BENCH_SECONDS:-300}
status=0

if [ "$TEST_SECONDS" -gt 0 ]; then
    # shellcheck disable=SC2086  # PYTEST_ARGS is several words
    timeout -k 10 "$TEST_SECONDS" "$PYTHON" -m pytest tests/gpu -q --tb=short --durations=8 ${PYTEST_ARGS:-} || status=$?
fi
if [ "$BENCH_SECONDS" -gt 0 ]; then
    timeout -k 10 "$BENCH_SECONDS" "$PYTHON" scripts/gpu_bench.py ${PEERS:+--peers "$PEERS"} \
        ${OUT:+--json "$OUT/gpu_bench.json"} "$@" || status=$?
fi
exit "$status"
