#!/usr/bin/env bash
# ViT-Base/16-224 and BiT-ResNet-50x1 on one GPU, every precision: about ten minutes.
# Records go to $OUT (default: results).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-results}
for precision in fp32 tf32 bf16; do
    python benchmarks/step_ratio.py --device cuda --precision "$precision" --batch 64 \
        --model vit_base_patch16_224 --method auto,bk-ghost,bk-mix-opt,ghost,per-example \
        --out "$out/gpu-vit-base-$precision.json"
    python benchmarks/step_ratio.py --device cuda --precision "$precision" --batch 32 \
        --model resnetv2_50x1_bit --method auto,bk-mix-opt,per-example \
        --out "$out/gpu-bit-50x1-$precision.json"
done
