"""LAPACK on one thread while batches are measured."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import scipy.linalg  # noqa: F401 - jaxlib loads it at its first LAPACK call, too late to be limited
from threadpoolctl import ThreadpoolController

_blas_lock = threading.Lock()


_blas_users = 0


_blas_limit = contextlib.ExitStack()


# threadpoolctl 3.8 lets only the first thread that sets OpenBLAS's number change it, and ignores all others
# without a word. So one thread of ours sets and lifts the limit for all.
_blas_keeper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blas limit")


@contextlib.contextmanager
def single_threaded_blas() -> Iterator[None]:
    """While any thread is inside, OpenBLAS runs on the thread that calls it.

    jaxlib takes LAPACK from SciPy's OpenBLAS. Its threads wait by spinning and fight with XLA's for the
    cores (T = 256 on two busy cores: 20 s an example instead of 3). Their results also differ in the last
    digits from those of one thread. The limit is the process's, so the last thread to leave lifts it.

    Warns:
        RuntimeWarning: another thread of the process holds a limit of its own, which stays.
    """
    global _blas_users
    with _blas_lock:
        if not _blas_users:
            _blas_keeper.submit(_limit_blas).result()
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if not _blas_users:
                _blas_keeper.submit(_blas_limit.close).result()


def _limit_blas() -> None:
    controller = ThreadpoolController()
    _blas_limit.enter_context(controller.limit(limits=1, user_api="blas"))
    pools = [pool for pool in controller.info() if pool["user_api"] == "blas"]
    if any(pool["num_threads"] > 1 for pool in pools):
        warnings.warn(
            "OpenBLAS keeps several threads, because another thread of this process controls their number "
            "(threadpoolctl): the run is slower, and its last digits may differ from another run's",
            RuntimeWarning,
            stacklevel=2,
        )
