#!/bin/sh
# Builds .venv and installs swift into it, with what the demo and the tests need. `make setup` calls it; a second
# run brings an existing .venv up to date. PYTHON and TORCH_INDEX are explained in the Makefile.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv/bin/python
quiet=--quiet
if [ -t 1 ]; then quiet=; fi # a person at a terminal sees the progress bars, a log stays short

pip() {
    "$venv" -m pip --disable-pip-version-check "$@"
}

stop() {
    echo "setup: $1" >&2
    exit 1
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    stop "$python is not Python 3.10 or newer; name one with: make setup PYTHON=python3.12"

if ! "$venv" -m pip --version >/dev/null 2>&1; then
    echo "setup: making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv || stop "no virtual environment; on Debian and Ubuntu: apt install python3-venv"
fi

# torch comes first and by itself, because the right build depends on the machine: left to a dependency, pip on
# Linux brings the CUDA build, gigabytes that a machine without a GPU cannot use.
install_torch() {
    if [ -n "${TORCH_INDEX:-}" ]; then
        pip install $quiet --index-url "$TORCH_INDEX" torch
    elif nvidia-smi -L >/dev/null 2>&1; then
        pip install $quiet torch
    else
        # the release this project is developed with; where pip knows a CPU build of it, pip prefers that build
        pip install $quiet 'torch==2.13.0' || pip install $quiet torch
    fi
}

if ! "$venv" -c 'import torch' >/dev/null 2>&1; then
    echo "setup: installing torch (the largest part; minutes on a slow line)"
    install_torch || stop "torch could not be installed"
fi

echo "setup: installing swift and its tools"
pip install $quiet -e '.[dev]' || stop "swift could not be installed"
echo "setup: done. .venv/bin/swift is the command; 'source .venv/bin/activate' puts it on your PATH"
