#!/usr/bin/env bash
# BiT-ResNet-50x1 at 224 pixels on one GPU, eager and compiled, fp32, TF32 and bf16. About ten minutes.
source "$(dirname "$0")/common.sh"
for precision in bf16 tf32 fp32; do
    speed bit-50x1 --batch 32 --precision $precision \
        --method auto,auto+channels_last,auto+compiled,bk-mix-opt,per-example \
        --ordinary kept,fresh,kept+compiled,kept+channels_last+compiled --seconds 60 \
        --out "$out/gpu-speed-bit-50x1-$precision.json"
done
