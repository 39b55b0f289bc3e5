#!/usr/bin/env bash
# Opacus and FastDP beside ours, on one GPU: ViT-Base and BiT-ResNet-50x1. About ten minutes.
# Opacus is installed with pip; FASTDP names a checkout of awslabs/fast-differential-privacy.
source "$(dirname "$0")/common.sh"
bench throughput --model vit-base --batch-size 32 --precision tf32 bf16 --seconds 15 \
    --method auto opacus:O-flat opacus:O-ghost fastdp:BK-MixOpt
bench throughput --model bit-50x1 --batch-size 16 --precision tf32 bf16 --seconds 15 \
    --method auto opacus:O-flat fastdp:BK-MixOpt
