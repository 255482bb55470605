#!/usr/bin/env bash
# Installs gkd with the named extras into a virtual environment: launch/install.sh .venv cpu,dev
set -euo pipefail
venv=$1
extras=$2

# PyTorch's CPU builds live on an index of their own. It is asked only when the plain install finds none.
torch_cpu_index=https://download.pytorch.org/whl/cpu

find_python() {
    for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "gkd needs Python 3.11 to 3.14: none was found. Install it, or name it with PYTHON=/path/to/python3.11." >&2
    exit 2
}

command -v g++ >/dev/null || {
    echo "gkd needs a C++ compiler (DeepSpeed builds a small extension at its first run): install g++." >&2
    exit 2
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv" # what a failed attempt left is no virtual environment
    python=$(find_python)
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        echo "Could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv." >&2
        exit 2
    }
fi

"$venv/bin/python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' || {
    echo "gkd needs Python's C headers (the same extension). On Debian and Ubuntu: apt-get install python3-dev." >&2
    exit 2
}

echo "Installing gkd[$extras] into $venv (about 2 minutes and 4 GB the first time)"
log=$venv/install.log
pip=("$venv/bin/python" -m pip install --disable-pip-version-check -e ".[$extras]")
if ! "${pip[@]}" >"$log" 2>&1; then
    case ",$extras," in
    *,cpu,*)
        echo "The plain install failed; trying again with PyTorch's CPU index."
        if ! "${pip[@]}" --extra-index-url "$torch_cpu_index" >>"$log" 2>&1; then
            tail -n 20 "$log" >&2
            exit 1
        fi
        ;;
    *)
        tail -n 20 "$log" >&2
        exit 1
        ;;
    esac
fi

# The CPU build of vLLM pulls vision and audio packages that do not match the CPU build of torch: with torchvision
# present, transformers and vLLM fail to import. This system is text-only and needs none of them.
case ",$extras," in
*,cpu,*) "$venv/bin/python" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec >>"$log" 2>&1 ;;
esac
"$venv/bin/python" - <<'PY'
from importlib.metadata import version
names = ["torch", "transformers", "deepspeed", "ray"]
print("Installed:", ", ".join(f"{name} {version(name)}" for name in names))
PY
