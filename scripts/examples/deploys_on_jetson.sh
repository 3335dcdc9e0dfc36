#!/usr/bin/env bash
# For those who deploy on a Jetson: everything that needs PyTorch happens here, the engine is built on the device.
#
#   scripts/examples/deploys_on_jetson.sh MODEL OUT TARGET [DEVICE]
#
# MODEL   a model.pt or a Hugging Face folder with a VQ-Logits head
# OUT     the folder to write: OUT/graphs, OUT/kit
# TARGET  compute capability and TensorRT of the device: sm87-trt10.3 for an Orin with JetPack 6 (docs/jetson.md has a table)
# DEVICE  where to copy it and build, as ssh knows it; without it the kit stays here
set -euo pipefail
usage="usage: $0 MODEL OUT TARGET [DEVICE]"
model=${1:?$usage} out=${2:?$usage} target=${3:?$usage} device=${4:-}

# Half precision, and a graph that gives the best tokens of the last position: what a decoder on the device reads.
export-vq "$model" -o "$out/graphs" --dtype fp16 --output topk --top-k 50 --last-token
export-vq build "$out/graphs" --for "$target" -o "$out/kit"

if [ -n "$device" ]; then
    rsync -a "$out/kit/" "$device:export-vq-kit/"
    ssh "$device" export-vq-kit/build.sh
fi
