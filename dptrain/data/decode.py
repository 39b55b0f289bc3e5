"""Image files and their bytes, which anybody may have written, decoded or refused in one sentence."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional

from dptrain.core.files import MIB, Unreadable, size_of
from dptrain.core.printable import reason
from dptrain.data.protocol import DataError

DEFAULT_IMAGE_SIZE = 224
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file's name says: others can do more than hold an image (EPS is a program)."""
LARGEST = 512 * MIB
MOST_PIXELS = 2**26
"""Of one image: a small file may unpack to any number."""


def decode(path: str, image_size: int) -> torch.Tensor:
    """The centre square of an image file, resized: [3, image_size, image_size] uint8."""
    with _readable(path), warnings.catch_warnings(action="ignore"):
        size_of(path, LARGEST)
        return _decoded(path, image_size)


def decode_bytes(content: bytes, name: str, image_size: int) -> torch.Tensor:
    """As `decode`, of the content of a file. `name` is what errors call it.

    May be called by several threads at once, and so leaves the process's filters of warnings alone.
    """
    with _readable(name):
        return _decoded(io.BytesIO(content), image_size)


def check_header(path: str) -> None:
    """Refuse what does not begin like an image, or announces one that is too large. Nothing is decoded."""
    with _readable(path), warnings.catch_warnings(action="ignore"):
        size_of(path, LARGEST)
        _open(path).close()


def square(image: torch.Tensor, size: int) -> torch.Tensor:
    """The centre square of an image [C, H, W] uint8, resized: [C, size, size] uint8."""
    side = min(image.shape[-2:])
    return functional.resize(functional.center_crop(image, [side, side]), [size, size], antialias=True)


def _decoded(source: str | io.BytesIO, image_size: int) -> torch.Tensor:
    with _open(source) as file:
        width, height = file.size
        side = min(width, height)
        left, top = round((width - side) / 2), round((height - side) / 2)  # cut first: the rest costs nothing
        image = functional.pil_to_tensor(file.crop((left, top, left + side, top + side)).convert("RGB"))
    return square(image, image_size)


def _open(source: str | io.BytesIO) -> Image.Image:
    file = Image.open(source, formats=FORMATS)
    width, height = file.size
    if not 0 < width * height <= MOST_PIXELS:
        file.close()
        raise Unreadable(f"has {width} x {height} pixels, and at most {MOST_PIXELS:,} are ever decoded")
    return file


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Whatever a decoder of damaged bytes raises is one sentence."""
    try:
        yield
    except Unreadable as error:
        raise DataError(f"{name} {error}; make it smaller, repair or remove it.") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name} is not a readable image of a known format ({', '.join(FORMATS)}); repair or remove it."
        ) from error
    except Exception as error:
        raise DataError(f"{name} is not a readable image ({reason(error)}); repair or remove it.") from error
