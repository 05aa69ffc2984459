"""glibc's allocator on huge pages, which it has to be told before the process begins."""

import os
import sys


def restart_with_huge_pages() -> None:
    """Start this process anew with glibc on huge pages, unless it has them or is not on Linux.

    XLA takes new memory for every batch and reads all weights twice. With pages of 4 KB a fifth of the
    time of a short example goes into page faults and look-ups.

    For the first line of a program only: what the process did before is lost. GLIBC_TUNABLES keeps it
    from a second restart, and a user who sets that variable keeps what it says.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
