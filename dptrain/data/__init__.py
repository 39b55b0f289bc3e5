"""Labelled data sets addressed by index."""

from dptrain.data.feature_store import FeatureStore, digest_of_weights
from dptrain.data.features import Features, cache_features, in_order
from dptrain.data.huggingface import Columns, Tokenization
from dptrain.data.preprocess import Preprocess
from dptrain.data.protocol import Batch, DataError, Dataset, Inputs, Splits
from dptrain.data.resident import ResidentImages
from dptrain.data.scattering import scattered
from dptrain.data.sources import NAMES, default_data_dir, load
from dptrain.data.split import stratified
from dptrain.data.text import ResidentTexts

__all__ = [
    "NAMES",
    "Batch",
    "Columns",
    "DataError",
    "Dataset",
    "FeatureStore",
    "Features",
    "Inputs",
    "Preprocess",
    "ResidentImages",
    "ResidentTexts",
    "Splits",
    "Tokenization",
    "cache_features",
    "default_data_dir",
    "digest_of_weights",
    "in_order",
    "load",
    "scattered",
    "stratified",
]
