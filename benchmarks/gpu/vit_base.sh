#!/usr/bin/env bash
# ViT-Base/16-224 on one GPU: every method, fp32, TF32 and bf16, eager. About ten minutes.
source "$(dirname "$0")/common.sh"
methods=auto,bk-ghost,bk-mixed-ghost,bk-mix-opt,ghost,mixed-ghost,fast-gradient,per-example
for precision in bf16 tf32 fp32; do
    speed vit-base --batch 64 --precision $precision --method $methods --seconds 100 \
        --out "$out/gpu-speed-vit-base-$precision.json"
done
