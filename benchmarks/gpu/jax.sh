#!/usr/bin/env bash
# ViT-Base/16-224 in JAX on one GPU against non-private training and jax-privacy, bf16, TF32 and fp32. About ten
# minutes.
source "$(dirname "$0")/common.sh"
bench throughput --model vit-base --batch-size 32 --precision bf16 tf32 fp32 --seconds 15 \
    --method jax:auto jax:per-example-vmap jax-privacy:DP
