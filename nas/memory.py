"""How this process holds on to memory while it trains."""

import ctypes
import os
import platform

# Parameters of mallopt(3), as in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed() -> bool:
    """Asks the C library to keep what is freed for the next allocation; whether it does (glibc, so most of Linux).

    XLA allocates the intermediate values of a program when it runs and frees them after, hundreds of megabytes for a
    training step. glibc hands blocks of that size back to the system at once, which then clears every page anew: half
    of the processor time of a small step (measured: 65,000 page faults a step, 1.1-1.3 times the time). The price is
    that the process stays as large as it ever was. It must be asked before the threads of XLA first allocate; where
    NAS_KEEP_MEMORY=0 is set it is not.
    """
    if os.environ.get("NAS_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    # One heap for all threads: that of a single thread is too small for such blocks, and they would not be kept.
    wanted = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}
    library = ctypes.CDLL(None)
    return all(library.mallopt(parameter, value) for parameter, value in wanted.items())
