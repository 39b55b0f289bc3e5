"""Published archives: where they are, and their checksums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

from torchvision.datasets.utils import download_and_extract_archive, download_url

from dptrain.data.protocol import DataError


def fetch_file(url: str, folder: Path, md5: str) -> None:
    """Download one file into `folder` and verify it."""
    _guarded(lambda: download_url(url, str(folder), md5=md5), url)


def fetch_archive(url: str, folder: Path, md5: str) -> None:
    """Download an archive, verify it, then unpack it into `folder`."""
    _guarded(lambda: download_and_extract_archive(url, str(folder), md5=md5), url)


def _guarded(download: Callable[[], None], url: str) -> None:
    try:
        download()
    except (URLError, RuntimeError, OSError) as error:
        raise DataError(
            f"Could not download {url} ({error}); check the network, or put the files into the "
            "data directory."
        ) from error
