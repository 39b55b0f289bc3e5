"""Metrics for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dptrain.training.config import ConfigError


class TensorBoard:
    """Writes each number of a metrics record as `event/name` at its step."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


def open_tensorboard(folder: Path) -> TensorBoard:
    """Event files in `folder`. Raises ConfigError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboard; install it with `pip install tensorboard`."
        ) from error
    return TensorBoard(SummaryWriter(str(folder)))
