#!/usr/bin/env bash
# Everything that cupy_mla/docs/reliability.md says of a Hopper GPU, run again: prints a line for each part with the
# seconds it took, and what it printed. About four minutes on 16 cores, and two more where kernels are not in the cache
# yet. Exits with 1 if anything is found.
#   PYTHON   the Python to use (default: python3)
#   OUT      folder for what the parts print (default: a temporary one)
#   PARTS    which of them (default: memory campaign repeats sanitizers racecheck every)
#   RANDOM_PROBLEMS, REPEATS, CALLS   how much (default: 20000, 10000, 100000)
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

PARTS=${PARTS:-memory campaign repeats sanitizers racecheck every}
if [[ " $PARTS " = *" memory "* ]]; then # alone: it also looks at the memory of the whole device
    part memory scripts/races.py --calls "${CALLS:-100000}"
    report memory
fi
others=()
for name in $PARTS; do # they wait for the host more than for the GPU
    case $name in
    memory) continue ;;
    campaign) part campaign -m cupy_mla check --random "${RANDOM_PROBLEMS:-20000}" --backend cuda & ;;
    repeats) part repeats scripts/races.py --repeats "${REPEATS:-10000}" --jobs 5 & ;;
    sanitizers) part sanitizers scripts/races.py --tool memcheck --tool synccheck --tool initcheck --jobs 6 & ;;
    racecheck) part racecheck scripts/races.py --tool racecheck --jobs 6 & ;;
    every) part every scripts/races.py --every --jobs 8 & ;;
    *)
        echo "$name: there is no such part" >&2
        exit 2
        ;;
    esac
    others+=("$name")
done
wait
report ${others[@]+"${others[@]}"}
exit "$status"
