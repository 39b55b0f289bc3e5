"""The paper's models for JAX, on timm's parameters: a dictionary with timm's names and shapes."""

from .bit import BiTResNet
from .build import architecture, load
from .translated import translated
from .vit import ViT

__all__ = ["BiTResNet", "ViT", "architecture", "load", "translated"]
