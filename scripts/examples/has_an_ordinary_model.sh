#!/usr/bin/env bash
# For those who have an ordinary language model: give it a VQ-Logits head, export it, and see what the head costs.
#
#   scripts/examples/has_an_ordinary_model.sh MODEL TEXT HELD_OUT OUT [OPTION...]
#
# MODEL     a causal language model: a Hugging Face folder or a GGUF file
# TEXT      UTF-8 text to fit the head on, like what the model will meet
# HELD_OUT  other text of the same kind, to measure on
# OUT       the folder to write
# OPTION    further options of `export-vq compress`, such as --num-codebooks
set -euo pipefail
usage="usage: $0 MODEL TEXT HELD_OUT OUT [OPTION...]"
model=${1:?$usage} text=${2:?$usage} held_out=${3:?$usage} out=${4:?$usage}
shift 4

mkdir -p "$out"
export-vq compress "$model" --text "$text" -o "$out/model.pt" "$@"

# With --baseline the report says what the head costs against the original, beside what the export does.
export-vq "$out/model.pt" -o "$out/deploy" --text "$held_out" --baseline "$model"
export-vq inspect "$out/deploy" --verify
export-vq generate "$out/deploy" --prompt "The capital of France is" --max-new-tokens 32
