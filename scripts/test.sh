#!/usr/bin/env bash
# All tests that this machine can run: sets up .venv with the test extra and, GPU or not, the CUDA wheels, with which
# the kernels compile anywhere. Arguments go to pytest.
#   FRAMEWORKS  install these as well and run their tests: torch, jax, transformers, with commas between (default: none)
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

detect_gpu
say "$GPU_NOTE"
extras=test,${CUDA_EXTRA:-cuda12}
if [ "$(uname -s)" != Linux ]; then
    extras=test # CuPy has no wheels here
fi
FRAMEWORKS=${FRAMEWORKS:-}
for framework in ${FRAMEWORKS//,/ }; do
    case $framework in
    torch | jax | transformers) extras+=,$framework ;;
    *) fail "FRAMEWORKS=$FRAMEWORKS has others than torch, jax and transformers" ;;
    esac
done
ensure_environment "$extras"
export CUPY_MLA_CACHE_DIR=$VENV/kernels # not among the user's own

cd "$ROOT"
report=$(mktemp)
trap 'rm -f "$report"' EXIT
status=0
"$VENV/bin/python" -m pytest -ra --junitxml="$report" "$@" || status=$?

# What of tests/gpu ran, and why the rest did not.
"$VENV/bin/python" - "$report" <<'PYTHON'
import ast
import sys
from collections import Counter
from xml.etree import ElementTree

try:
    cases = list(ElementTree.parse(sys.argv[1]).iter("testcase"))
except ElementTree.ParseError:  # pytest stopped before it wrote its report
    sys.exit()


def reason_of(skip):
    if skip.get("message") != "collection skipped":
        return skip.get("message")
    return ast.literal_eval(skip.text)[2].removeprefix("Skipped: ")  # (file, line, reason) of a module skipped whole


# A module that is skipped whole has its dotted name as the name of its one test case.
gpu = [case for case in cases if f"{case.get('classname')}.{case.get('name')}".lstrip(".").startswith("tests.gpu.")]
skips = [skip for case in gpu for skip in case.iter("skipped") if skip.get("type") != "pytest.xfail"]
print(f"GPU tests: {len(gpu) - len(skips)} run, {len(skips)} skipped")
for reason, count in Counter(map(reason_of, skips)).most_common():
    print(f"  {count} skipped: {reason}")
PYTHON
exit "$status"
