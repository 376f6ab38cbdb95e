"""The C library's allocator, set for tensors: memory that a step frees is kept for the next one.

glibc gives every block above 32 MB back to the system when it is freed, and the next one costs a page fault for each
4 KB: on a CPU a sixth to a third of the time of long sequences, whose tensors are that large.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = -1
# Who sets one of these has decided about the allocator.
_DECIDED = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Have glibc keep what is freed until the process ends. False where there is no glibc or the user has chosen."""
    if any(name.startswith(_DECIDED) and value for name, value in environment.items()):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - other libraries have a mallopt that means something else
        settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, 64 * 2**20))
        return all([library.mallopt(name, value) for name, value in settings])
    except (OSError, AttributeError, TypeError):
        return False
