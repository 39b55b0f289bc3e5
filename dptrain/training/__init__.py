"""The training run."""

from dptrain.training.config import ConfigError, TrainConfig, read_config
from dptrain.training.evaluation import Score, evaluate
from dptrain.training.listener import Listener, Silent
from dptrain.training.outcome import Outcome
from dptrain.training.prepare import Run, prepare
from dptrain.training.run_folder import RunFolder
from dptrain.training.session import StorageError
from dptrain.training.train import resume, train

__all__ = [
    "ConfigError",
    "Listener",
    "Outcome",
    "Run",
    "RunFolder",
    "Score",
    "Silent",
    "StorageError",
    "TrainConfig",
    "evaluate",
    "prepare",
    "read_config",
    "resume",
    "train",
]
