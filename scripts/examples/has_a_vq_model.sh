#!/usr/bin/env bash
# For those who have a VQ-Logits model: export it, prove it, time it, and let it write.
#
#   scripts/examples/has_a_vq_model.sh MODEL TEXT OUT
#
# MODEL  a model.pt or a Hugging Face folder with a VQ-Logits head
# TEXT   UTF-8 text to check and measure on, which the model was not trained on
# OUT    the folder to write
set -euo pipefail
usage="usage: $0 MODEL TEXT OUT"
model=${1:?$usage} text=${2:?$usage} out=${3:?$usage}

export-vq inspect "$model" --text "$text"
export-vq "$model" -o "$out" --text "$text"

# The folder is whole, and stays so when it is copied: do this again where it arrives.
export-vq inspect "$out" --verify
export-vq generate "$out" --prompt "The capital of France is" --max-new-tokens 32
