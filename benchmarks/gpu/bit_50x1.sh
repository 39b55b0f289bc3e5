#!/usr/bin/env bash
# BiT-ResNet-50x1 at 224 pixels on one GPU, eager and compiled, bf16, TF32 and fp32. About fifteen minutes.
source "$(dirname "$0")/common.sh"
bench throughput --model bit-50x1 --batch-size 32 --precision bf16 tf32 fp32 --seconds 15 \
    --method auto bk-mix-opt per-example
bench throughput --model bit-50x1 --batch-size 32 --precision bf16 tf32 fp32 --seconds 15 --method auto --channels-last
bench throughput --model bit-50x1 --batch-size 32 --precision bf16 tf32 fp32 --seconds 15 --method auto --compile
