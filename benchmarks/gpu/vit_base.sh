#!/usr/bin/env bash
# ViT-Base/16-224 on one GPU: every method, bf16, TF32 and fp32, eager. About twenty minutes.
source "$(dirname "$0")/common.sh"
bench throughput --model vit-base --batch-size 64 --precision bf16 tf32 fp32 --seconds 15 \
    --method auto bk-ghost bk-mixed-ghost bk-mix-opt ghost mixed-ghost fast-gradient per-example
bench profile --model vit-base --batch-size 64 --precision bf16 tf32 fp32 --method auto
