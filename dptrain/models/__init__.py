"""Models by name, their weights, and the choice of what is trained."""

from dptrain.models.build import build, build_with_report
from dptrain.models.errors import ModelError
from dptrain.models.forward import Inputs, logits
from dptrain.models.head import head_name, in_head
from dptrain.models.lora import add_lora
from dptrain.models.names import PAPER_MODELS, timm_name
from dptrain.models.preferences import Preferences, preferences
from dptrain.models.small import SMALL
from dptrain.models.split import Backbone, in_first_blocks, split_blocks, split_head
from dptrain.models.trainable import Trainable, select_trainable
from dptrain.models.transformers_classifier import Text
from dptrain.models.weights import WeightReport, load_weights

__all__ = [
    "PAPER_MODELS",
    "SMALL",
    "Backbone",
    "Inputs",
    "ModelError",
    "Preferences",
    "Text",
    "Trainable",
    "WeightReport",
    "add_lora",
    "build",
    "build_with_report",
    "head_name",
    "in_first_blocks",
    "in_head",
    "load_weights",
    "logits",
    "preferences",
    "select_trainable",
    "split_blocks",
    "split_head",
    "timm_name",
]
