#!/usr/bin/env bash
# Opacus and FastDP beside ours, on one GPU: ViT-Base and BiT-ResNet-50x1. About ten minutes.
# Opacus is installed with pip; FASTDP names a checkout of awslabs/fast-differential-privacy.
source "$(dirname "$0")/common.sh"
for precision in tf32 bf16; do
    speed vit-base --batch 32 --precision $precision --peers opacus,opacus-ghost,fastdp --seconds 80 \
        --out "$out/gpu-peers-vit-base-$precision.json"
    speed bit-50x1 --batch 16 --precision $precision --peers opacus,fastdp --seconds 80 \
        --out "$out/gpu-peers-bit-50x1-$precision.json"
done
