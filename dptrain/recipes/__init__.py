"""Named runs and studies."""

from dptrain.recipes.seeds import seed_cases, seed_methods
from dptrain.recipes.studies import STUDIES, all_cases, estimate_s, manifest, study
from dptrain.recipes.study import SCALES, Scale, Study
from dptrain.recipes.table import RECIPES, recipe

__all__ = [
    "RECIPES",
    "SCALES",
    "STUDIES",
    "Scale",
    "Study",
    "all_cases",
    "estimate_s",
    "manifest",
    "recipe",
    "seed_cases",
    "seed_methods",
    "study",
]
