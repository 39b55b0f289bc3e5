"""Labelled data sets addressed by index."""

from dptrain.data.features import Features, cache_features, in_order
from dptrain.data.preprocess import Preprocess
from dptrain.data.protocol import Batch, DataError, Dataset, Splits
from dptrain.data.resident import ResidentImages
from dptrain.data.sources import NAMES, default_data_dir, load
from dptrain.data.split import stratified

__all__ = [
    "NAMES",
    "Batch",
    "DataError",
    "Dataset",
    "Features",
    "Preprocess",
    "ResidentImages",
    "Splits",
    "cache_features",
    "default_data_dir",
    "in_order",
    "load",
    "stratified",
]
