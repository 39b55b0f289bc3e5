"""Memory that a training process frees and takes again at every step."""

import ctypes
import sys

#: glibc's ``mallopt``: how much may lie free at the end of the heap, and how many blocks come straight from
#: the system
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_WITHOUT_LIMIT, _NONE = -1, 0


def keep_freed_memory() -> bool:
    """Have the C library keep memory that is freed, for the whole process; False where it cannot be told.

    By itself glibc gives large blocks back to the system, which finds and clears their pages again when the
    next step asks for them: some 7 us for each 4 KiB, a tenth of a step of a vision transformer. The process
    then stays as large as it has ever been. What the user has set (``MALLOC_ARENA_MAX`` and its kin aside) is
    overruled; other allocators take no notice.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _WITHOUT_LIMIT) and mallopt(_MMAP_MAX, _NONE))
