#!/usr/bin/env bash
# Everything that cupy_mla/docs/reliability.md says of a Hopper GPU, run again in about three minutes: prints a line for
# each part with the seconds it took, and what each printed. Exits with 1 if anything is found.
#   PYTHON   the Python to use (default: python3)
#   OUT      folder for what the parts print (default: a temporary one)
#   RANDOM_PROBLEMS, REPEATS, CALLS, RACECHECK   how much (20000, 10000, 100000); RACECHECK=0 leaves racecheck out
set -uo pipefail
unset CDPATH

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT"
status=0

part() { # NAME COMMAND...: what it prints goes to NAME.txt, its exit code and seconds to NAME.took
    local begin=$SECONDS name=$1
    shift
    PYTHONUNBUFFERED=1 "$PYTHON" -W ignore "$@" >"$OUT/$name.txt" 2>&1
    echo "$? $((SECONDS - begin))" >"$OUT/$name.took"
}
report() {
    local name code seconds
    for name in "$@"; do
        read -r code seconds <"$OUT/$name.took"
        echo "== $name: exit code $code, $seconds s"
        tail -n 24 "$OUT/$name.txt"
        [ "$code" -eq 0 ] || status=1
    done
}

part memory scripts/races.py --calls "${CALLS:-100000}" # alone: it also looks at the memory of the whole device
report memory
# The rest waits for the host more than for the GPU.
parts=(campaign repeats sanitizers every)
part campaign -m cupy_mla check --random "${RANDOM_PROBLEMS:-20000}" --backend cuda &
part repeats scripts/races.py --repeats "${REPEATS:-10000}" --jobs 5 &
part sanitizers scripts/races.py --tool memcheck --tool synccheck --tool initcheck --jobs 6 &
part every scripts/races.py --every --jobs 8 &
if [ "${RACECHECK:-1}" -ne 0 ]; then
    parts+=(racecheck)
    part racecheck scripts/races.py --tool racecheck &
fi
wait
report "${parts[@]}"
exit "$status"
