#!/usr/bin/env bash
# Everything that needs a GPU, in one command on any machine with a GPU, CUDA, CMake and a Python with torch:
#
#   scripts/gpu_check.sh [-o gpu_check.json] [--ort-include-dir DIR] [--tensorrt-include-dir DIR]
#
# PYTHON names the Python to use. What each part needs and lacks stands in the table that is printed last.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-}"
for candidate in "$here/../.venv/bin/python" python3 python; do
    if [ -z "$python" ] && command -v "$candidate" >/dev/null 2>&1; then python="$candidate"; fi
done
exec "${python:?no Python found; set PYTHON}" "$here/gpu_check.py" "$@"
