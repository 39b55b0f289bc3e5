"""Keys: where all randomness comes from.

A key is 256 secret bits. Named child keys are derived from it by a keyed hash, so that
sampling, noise and initialisation never share a stream, and step 7 of a resumed run
draws what step 7 of an uninterrupted one would have drawn.
"""

import hashlib
import os

import numpy as np

from dptrain.core import checks

_BYTES = 32

Label = str | int


class Key:
    """A 256-bit secret, and whether the run that it belongs to is reproducible.

    Make one with `Key.from_entropy()`; or with `Key.from_seed(seed)` for a run that is
    marked reproducible: whoever knows its seed can subtract its noise, so its ε holds
    only against those who don't. The secret is never printed.
    """

    __slots__ = ("_reproducible", "_secret")

    def __init__(self, secret: bytes, *, reproducible: bool) -> None:
        if not isinstance(secret, bytes) or len(secret) != _BYTES:
            raise ValueError(f"a key needs {_BYTES} secret bytes; use Key.from_entropy().")
        self._secret = secret
        self._reproducible = reproducible

    @classmethod
    def from_entropy(cls) -> "Key":
        """A fresh key from the operating system's entropy."""
        return cls(os.urandom(_BYTES), reproducible=False)

    @classmethod
    def from_seed(cls, seed: int) -> "Key":
        """The key of a run marked reproducible: the same for the same non-negative seed.

        Raises:
            TypeError, ValueError: `seed` is not an integer of at least 0.
        """
        seed = checks.whole("seed", seed, minimum=0)
        return cls(_hash(b"dptrain seed", _encode(seed)), reproducible=True)

    @property
    def reproducible(self) -> bool:
        """Whether this key, or the one that it descends from, was made from a seed."""
        return self._reproducible

    def child(self, *labels: Label) -> "Key":
        """The key derived for a purpose, such as ``key.child("noise", step)``.

        Different labels give independent keys; ``child("a", "b")`` is neither
        ``child("ab")`` nor ``child("a").child("b")``, and ``child(1)`` is not
        ``child("1")``. Neither parent nor siblings can be computed from it.

        Raises:
            ValueError: no label was given.
            TypeError: a label is neither a string nor an integer.
        """
        if not labels:
            raise ValueError("a child key needs at least one label; name its purpose.")
        message = b"".join(_encode(label) for label in labels)
        secret = _hash(b"dptrain child", message, key=self._secret)
        return Key(secret, reproducible=self._reproducible)

    def numpy_generator(self) -> np.random.Generator:
        """A NumPy generator seeded with 256 bits derived from this key.

        Its stream (PCG64) is of statistical, not of cryptographic, quality.
        """
        derived = _hash(b"dptrain numpy", b"", key=self._secret)
        return np.random.Generator(np.random.PCG64(int.from_bytes(derived, "big")))

    def seed64(self) -> int:
        """64 derived bits, in [0, 2⁶⁴), for generators that take no more.

        ``torch.Generator.manual_seed`` accepts all of this range.
        """
        return int.from_bytes(_hash(b"dptrain 64", b"", key=self._secret)[:8], "big")

    def cipher_key(self) -> bytes:
        """256 derived bits, the key of a cipher whose keystream is as secret as this key."""
        return _hash(b"dptrain cipher", b"", key=self._secret)

    def secret_hex(self) -> str:
        """The secret itself, for `dptrain.core.key_file` and nothing else."""
        return self._secret.hex()

    def __repr__(self) -> str:
        kind = "reproducible" if self._reproducible else "secret"
        return f"<Key, {kind}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return self._secret == other._secret and self._reproducible == other._reproducible

    def __hash__(self) -> int:
        return hash((self._secret, self._reproducible))


def _hash(purpose: bytes, message: bytes, key: bytes = b"") -> bytes:
    # `person` separates the uses of one secret from each other (at most 16 bytes).
    return hashlib.blake2b(message, digest_size=_BYTES, key=key, person=purpose).digest()


def _encode(label: Label) -> bytes:
    """A prefix-free encoding: no two sequences of labels concatenate to the same bytes."""
    if isinstance(label, str):
        kind, content = b"s", label.encode()
    elif isinstance(label, (int, np.integer)) and not isinstance(label, bool):
        kind, content = b"i", str(int(label)).encode()
    else:
        raise TypeError(f"a key's label must be a string or an integer, but it is {label!r}.")
    return kind + len(content).to_bytes(8, "big") + content
