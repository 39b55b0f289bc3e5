"""Image files and folders of them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

from PIL import Image

from benchmarks.fuzz import mutate, surroundings, trees
from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.files import of_bytes
from dptrain.data import DataError, Preprocess, load
from dptrain.data.decode import decode

SIDE = 13


def _saved(mode: str, kind: str, **options: object) -> bytes:
    image = Image.effect_noise((SIDE, SIDE + 4), 60).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file that announces what it is told to."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


PLAIN = (
    *(_saved(mode, "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    *(_saved(mode, "JPEG") for mode in ("RGB", "L", "CMYK")),
    _saved(
        "RGB",
        "JPEG",
        progressive=True,
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0",
    ),
    *(
        _saved("RGB", "TIFF", compression=c)
        for c in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    ),
    _saved("RGB", "BMP"),
    _saved("1", "BMP"),
    _saved("RGB", "PPM"),
    _saved("L", "PPM"),
    _saved("1", "PPM"),
    _saved("RGB", "WEBP"),
    _saved("RGBA", "WEBP", lossless=True),
)
STRANGE = (
    _saved("P", "GIF"),
    _saved("RGB", "EPS"),
    _saved("RGB", "PCX"),
    _saved("RGB", "TGA"),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/escape) (w) file pop\nshowpage\n",
    b"P6\n99999 99999\n255\n",
    b"P3\n2 2\n255\n1 2 3 4 5 6 7 8 9 10 11 99999999999999999999\n",
    png(60_000, 60_000, 1, 0, b""),
    png(2**31 - 1, 2**31 - 1, 16, 6, b""),
    png(1, 60_000, 1, 0, b"\0\xff" * 60_000),
    png(20_000, 3000, 1, 0, bytes(2501 * 3000)),  # 60 million pixels in 8 kB
    png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)),
    b"",
)
SEEDS = PLAIN * 50 + STRANGE

CLASSES = ("blue", "red")


def _folder(chance: random.Random) -> list[tuple[str, str, bytes]]:
    """(path, what stands there, content) of a folder of images, with odd names and odd things in it."""
    files = []
    usual = (("train", "test"), ("train", "val")) * 5
    classes = [_name(chance) if chance.random() < 0.1 else label for label in CLASSES]
    for split in chance.choice((*usual, ("train",), ("test",), ())):
        if chance.random() < 0.05:
            classes = [*classes[:1], _name(chance)]
        for label in classes:
            for number in range(chance.choice((0, 1, 1, 1, 2, 2, 2, 3))):
                name = _name(chance) if chance.random() < 0.05 else f"{number}.png"
                hurt = chance.random() < 0.05
                content = mutate.damaged(chance, PLAIN) if hurt else chance.choice(PLAIN[:7])
                kind = surroundings.kind(chance) if chance.random() < 0.1 else "file"
                files.append((f"{split}/{label}/{name}", kind, content))
    return files


def _name(chance: random.Random) -> str:
    text = chance.choice(trees.TEXTS).replace("/", "_").replace("\0", "_")[:200]
    text = text.encode("utf-8", "replace").decode()
    return "x" if text in ("", ".", "..") else text


def _feed_folder(files: list[tuple[str, str, bytes]], scratch: Path) -> None:
    root = scratch / "images"
    surroundings.remove(root)
    root.mkdir()
    for path, kind, content in files:
        surroundings.put(root / path, content, kind)
    splits = load(str(root), preprocess=Preprocess(image_size=8), workers=0)
    import torch

    for part in (splits.train, splits.test):
        part.gather(torch.arange(len(part)))


TARGETS = (
    of_bytes("image", "image.png", SEEDS, lambda path: decode(str(path), 16), (DataError,), speed=900),
    Target("image-folder", _folder, _feed_folder, (DataError,), speed=150),
)
