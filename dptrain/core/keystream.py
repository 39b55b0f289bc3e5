"""Secret random words at known places: AES-256 in counter mode."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dptrain.core.entropy import Key

COUNTER_BYTES = 16  # of keystream for each value of the counter

_PREFIX_BYTES = 12  # of the counter's 16; the other 4 count within a stream


def streams(name: str, count: int) -> tuple[int, ...]:
    """Where ``count`` (at most 5) streams of ``name`` begin among the 2^128 values of the counter.

    The upper 96 bits are a hash of the name. Two of n streams of 2^32 counters (64 GiB) overlap
    with probability below n^2 / 2^96.
    """
    size = _PREFIX_BYTES * count
    digest = hashlib.blake2b(name.encode(), digest_size=size, person=b"dptrain streams").digest()
    prefixes = (digest[i : i + _PREFIX_BYTES] for i in range(0, size, _PREFIX_BYTES))
    return tuple(int.from_bytes(prefix, "big") << 32 for prefix in prefixes)


@lru_cache
def _zeros(size: int) -> memoryview:
    return memoryview(bytes(size))


class Keystream:
    """The keystream of one key, at any value of the counter. Not to be shared by threads.

    AES-256-CTR (NIST SP 800-38A, section 6.5): whoever tells its bytes from random ones breaks AES.
    The counter says where a byte stands, so any part can be drawn by itself.
    """

    def __init__(self, key: Key, most_bytes: int) -> None:
        self._zeros = _zeros(most_bytes)
        self._cipher = Cipher(algorithms.AES(key.cipher_key()), modes.CTR(bytes(COUNTER_BYTES))).encryptor()

    def fill(self, buffer: memoryview, counter: int) -> None:
        """Fill ``buffer``, of at most ``most_bytes`` bytes, with those that begin at ``counter``."""
        self._cipher.reset_nonce((counter % 2**128).to_bytes(COUNTER_BYTES, "big"))
        self._cipher.update_into(self._zeros[: len(buffer)], buffer)
