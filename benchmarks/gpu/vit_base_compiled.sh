#!/usr/bin/env bash
# ViT-Base/16-224 on one GPU: compiled private against compiled non-private. About ten minutes.
source "$(dirname "$0")/common.sh"
for precision in bf16 tf32 fp32; do
    speed vit-base --batch 64 --precision $precision --method auto,auto+compiled \
        --ordinary kept,fresh,kept+compiled,kept+graphs --seconds 60 \
        --out "$out/gpu-speed-vit-base-compiled-$precision.json"
done
