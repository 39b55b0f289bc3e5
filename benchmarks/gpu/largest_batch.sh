#!/usr/bin/env bash
# The largest physical batch of ViT-Base/16-224 in an emulated 40 GB, or as many as the argument says.
# Each try is a process of its own. About ten minutes.
#
#   benchmarks/gpu/largest_batch.sh 40
#   benchmarks/gpu/largest_batch.sh 32
source "$(dirname "$0")/common.sh"
gib=${1:-40}
largest "$gib" --model vit-base --precision fp32 \
    --contestants "non-private fresh,non-private kept,auto,bk-ghost,bk-mix-opt,ghost,per-example,opacus" \
    --out "$out/gpu-largest-vit-base-$gib.json"
