#!/usr/bin/env bash
# The largest physical batch of ViT-Base/16-224 in an emulated 40 GB, or as many as the argument says.
# Each try is a process of its own. About ten minutes.
#
#   benchmarks/gpu/largest_batch.sh 40
#   benchmarks/gpu/largest_batch.sh 32
source "$(dirname "$0")/common.sh"
bench batch-size --model vit-base --batch-size 16 --memory-gib "${1:-40}" \
    --method non-private auto bk-ghost bk-mix-opt ghost per-example opacus:O-flat
