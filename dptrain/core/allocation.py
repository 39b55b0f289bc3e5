"""Memory that a training process frees and takes again at every step."""

import ctypes
import os
import sys

#: glibc's ``mallopt``: how much may lie free at the end of the heap, and how many blocks come straight from
#: the system
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_WITHOUT_LIMIT, _NONE = -1, 0


def keep_freed_memory() -> bool:
    """Have the C library keep memory that is freed, for the whole process; False where it is not told.

    By itself glibc gives large blocks back to the system, which has to find and clear their pages again when
    the next step asks for them. The process then stays as large as it has ever been. Whoever has set
    variables of glibc's allocator keeps their choice.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _WITHOUT_LIMIT) and mallopt(_MMAP_MAX, _NONE))
