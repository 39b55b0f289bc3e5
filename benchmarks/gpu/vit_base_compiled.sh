#!/usr/bin/env bash
# ViT-Base/16-224 on one GPU: compiled private against compiled non-private. About ten minutes.
source "$(dirname "$0")/common.sh"
bench throughput --model vit-base --batch-size 64 --precision bf16 tf32 fp32 --compile --seconds 15 --method auto
