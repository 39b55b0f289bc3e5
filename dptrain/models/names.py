"""Short names for the models of the paper (arXiv 2406.17298), as timm calls them."""

PAPER_MODELS = {
    "vit-tiny": "vit_tiny_patch16_224.augreg_in21k",
    "vit-small": "vit_small_patch16_224.augreg_in21k",
    "vit-base": "vit_base_patch16_224.augreg_in21k",
    "vit-large": "vit_large_patch16_224.augreg_in21k",
    "vit-huge": "vit_huge_patch14_224.orig_in21k",
    "bit-50x1": "resnetv2_50x1_bit.goog_in21k",
    "bit-101x1": "resnetv2_101x1_bit.goog_in21k",
    "bit-50x3": "resnetv2_50x3_bit.goog_in21k",
    "bit-101x3": "resnetv2_101x3_bit.goog_in21k",
    "bit-152x4": "resnetv2_152x4_bit.goog_in21k",
}


def timm_name(name: str) -> str:
    """The timm name behind an alias; any other name is returned unchanged."""
    return PAPER_MODELS.get(name.lower(), name)
