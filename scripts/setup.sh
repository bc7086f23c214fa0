# Sourced by demo.sh and test.sh: finds Python and the GPU, makes the virtual environment, installs the package into it.
#   PYTHON  the Python to use (default: the first on the PATH that is 3.10 or newer)
#   VENV    where the virtual environment goes (default: .venv in the checkout)

set -euo pipefail
unset CDPATH # cd would look there first, and print where it went

ROOT=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac # test.sh changes the folder
export CUPY_CACHE_DIR=${CUPY_CACHE_DIR:-$VENV/cupy} # CuPy is not even imported where HOME cannot be written

say() { printf '==> %s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_python_310() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Prints the Python to make the environment with.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_python_310 "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.10 or newer"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if is_python_310 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python of version 3.10 or newer on the PATH; name one with PYTHON=..."
}

# Sets CUDA_EXTRA to the extra that fits the GPU and its driver, or to nothing, and GPU_NOTE to the reason in words.
detect_gpu() {
    CUDA_EXTRA=""
    local gpus cuda
    if ! gpus=$(nvidia-smi --query-gpu=compute_cap,name --format=csv,noheader 2>/dev/null) || [ -z "$gpus" ]; then
        GPU_NOTE="no NVIDIA GPU: the NumPy backend only"
        return
    fi
    if ! grep -q '^9\.0' <<<"$gpus"; then
        GPU_NOTE="no Hopper GPU (found: $(cut -d, -f2- <<<"$gpus" | sed "s/^ *//" | sort -u | paste -sd, -)): the NumPy backend only"
        return
    fi
    cuda=$(nvidia-smi | sed -nE 's/.*CUDA[A-Za-z ]*Version: *([0-9]+).*/\1/p' | head -n 1)
    if [ "${cuda:-0}" -ge 13 ]; then
        CUDA_EXTRA=cuda13
    elif [ "${cuda:-0}" -eq 12 ]; then
        CUDA_EXTRA=cuda12
    else
        GPU_NOTE="the driver supports CUDA ${cuda:-?}, CUDA 12 is needed (driver 525 or newer): the NumPy backend only"
        return
    fi
    GPU_NOTE="Hopper GPU, driver for CUDA $cuda: extra $CUDA_EXTRA"
}

# ensure_environment EXTRAS: makes VENV and installs the checkout into it, editable, with these extras ("" for none,
# torch never the first).
# Done again only when pyproject.toml, the extras, the Python or the place changes: a stamp in VENV shows it.
ensure_environment() {
    local extras=$1 cuda stamp key
    if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
        fail "$VENV is there and is not a virtual environment: name another place with VENV=..."
    fi
    if [ -e "$VENV" ] && environment_is_stale "$extras"; then
        say "removing the old environment in $VENV"
        rm -rf "$VENV"
    fi
    if [ ! -e "$VENV" ]; then
        make_environment
    fi
    stamp="$VENV/.installed${extras:+-$extras}"
    key=$(environment_key)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
        return
    fi
    say "installing cupy-mla${extras:+[$extras]} into $VENV; downloads $(download_size "$extras"), less what pip has cached"
    # torch first and by itself: beside cuda12, pip refuses the NVRTC of one or of the other (README, Install).
    if [[ ,$extras, == *,torch,* ]]; then
        install_torch
        extras=${extras/,torch/}
    fi
    pip_install -e "$ROOT${extras:+[$extras]}"
    for cuda in cuda12 cuda13; do
        case ",$extras," in *,$cuda,*) touch "$VENV/.has-$cuda" ;; esac
    done
    echo "$key" >"$stamp"
}

# Roughly what an environment with these extras takes off the network, in words.
download_size() {
    local extra megabytes=25 more=
    for extra in ${1//,/ }; do
        case $extra in
        cuda12) megabytes=$((megabytes + 225)) ;;
        cuda13) megabytes=$((megabytes + 140)) ;;
        test) megabytes=$((megabytes + 35)) ;;
        jax) megabytes=$((megabytes + 120)) ;;
        transformers) megabytes=$((megabytes + 30)) ;;
        torch) more=" and torch (0.2 GB built for the CPU, some 3 GB with CUDA)" ;;
        esac
    done
    echo "about $megabytes MB$more"
}

# A torch that is there stays. Without a GPU the CPU build will do, if pip finds one (PyPI has none).
install_torch() {
    local version=""
    if "$VENV/bin/python" -m pip show --quiet torch 2>/dev/null; then
        return
    fi
    if [ -z "${CUDA_EXTRA:-}" ]; then
        version=$("$VENV/bin/python" -m pip index versions torch 2>/dev/null | grep -oE '[0-9.]+\+cpu' | head -n 1) || true
    fi
    pip_install "torch${version:+==$version}"
}

# pip's progress for people, and nothing but errors for logs; the output of the scripts stays their own.
pip_install() {
    local quiet=--quiet
    [ ! -t 2 ] || quiet=
    "$VENV/bin/python" -m pip install $quiet --disable-pip-version-check "$@" >&2
}

# Whether VENV must go: its Python is broken or not the one that PYTHON names, or it has the other CuPy
# (cupy-cuda12x and cupy-cuda13x are installed in the same place and break each other).
environment_is_stale() {
    is_python_310 "$VENV/bin/python" || return 0
    if [ -n "${PYTHON:-}" ]; then
        local version='import sys; print(sys.version_info[:3])'
        is_python_310 "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.10 or newer"
        [ "$("$PYTHON" -c "$version")" = "$("$VENV/bin/python" -c "$version")" ] || return 0
    fi
    case ",$1," in
    *,cuda12,*) [ -e "$VENV/.has-cuda13" ] ;;
    *,cuda13,*) [ -e "$VENV/.has-cuda12" ] ;;
    *) return 1 ;;
    esac
}

make_environment() {
    local python
    python=$(find_python)
    say "making a virtual environment in $VENV with $("$python" --version)"
    # Debian and Ubuntu keep ensurepip in a package of its own (python3-venv): without it, the pip outside helps.
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$VENV"
    elif ! { "$python" -m venv --without-pip "$VENV" &&
        "$python" -m pip --python "$VENV/bin/python" install --quiet pip; }; then
        rm -rf "$VENV"
        fail "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    fi
}

environment_key() {
    "$VENV/bin/python" - "$ROOT" "$VENV" <<'PYTHON'
import hashlib, pathlib, sys

root, venv = sys.argv[1:]
text = pathlib.Path(root, "pyproject.toml").read_text()
print(hashlib.sha256("\0".join((sys.version, root, venv, text)).encode()).hexdigest())
PYTHON
}
