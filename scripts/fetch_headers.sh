#!/usr/bin/env bash
# Fetches the headers of ONNX Runtime and TensorRT into a cache folder outside of the tree, by exact version and checksum,
# and prints where they are as CMake options, one a line. Does nothing where they are already, or an SDK of TensorRT is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x $python ] || python=${PYTHON:-python3}
"$python" -c 'import export_vq.plugins' 2>/dev/null || {
    echo "export-vq is not installed for $python; run scripts/setup.sh cpu first, or name another with PYTHON=..." >&2
    exit 2
}
exec "$python" -m export_vq.plugins.headers
