"""JAX's distributed runtime: the one file that touches `jax.distributed` and what lies behind it.

The client of its coordination service has no public name, nor has the level of its messages. Both are
looked for where JAX 0.10.2 has them; a JAX that has them elsewhere is refused, or prints more.
"""

import ctypes
import errno
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import jax

from jaxgrad.cluster import Place
from jaxgrad.errors import UserError

# What is asked of JAX's client.
_ASKED = (
    "key_value_set",
    "key_value_try_get",
    "blocking_key_value_get",
    "key_value_dir_get",
    "key_value_increment",
    "get_live_nodes",
)


class AbortHook:
    """Has a function of Python's called when native code aborts the process, in the thread that does.

    JAX's C++ client ends a process that has lost process 0 by `LOG(FATAL)`, a stack trace and no code of
    its own, and takes no callback of Python's instead (a callback fails on a type that it does not
    convert). Python's own handlers come too late: they run after the C one has returned.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action())
        self._signal = ctypes.CDLL(None).signal
        self._signal.restype = ctypes.c_void_p
        self._signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._before = self._signal(signal.SIGABRT, ctypes.cast(self._function, ctypes.c_void_p))

    def remove(self) -> None:
        """As before."""
        self._signal(signal.SIGABRT, self._before)


def quiet(level: int) -> None:
    """From which level on C++ code prints: 1 warnings, as usual; 4 nothing."""
    try:
        from jaxlib import utils  # it has no public name

        # "1" is what JAX's own import leaves there.
        if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
            utils.absl_set_min_log_level(level)
    except (ImportError, AttributeError):
        pass  # then there are more lines


def reach(address: str) -> None:
    """Raises OSError where nobody listens."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()


def connect(place: Place, *, join_timeout: int, heartbeat_timeout: int) -> Any:
    """JAX's client of the group's service, which process 0 starts.

    Args:
        place: of this process.
        join_timeout: seconds that the group may take to assemble.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
        UserError: JAX says that it cannot join. (Most often it aborts the process instead.)
    """
    try:
        # Without it JAX's C++ code aborts all processes when one dies; so only when process 0 does.
        jax.config.update("jax_enable_recoverability", True)
        # It takes SIGTERM for itself.
        jax.config.update("jax_enable_preemption_service", False)
        from jax._src.distributed import global_state  # the client has no public name
    except (ImportError, AttributeError) as error:
        raise _unknown_jax(str(error)) from error
    host, _, port = place.coordinator.rpartition(":")
    # JAX listens on all of the host's addresses, which on loopback nobody asked for.
    loopback = host in ("localhost", "127.0.0.1")
    if place.process_id == 0:
        _refuse_taken_port(loopback, int(port))
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=join_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
            coordinator_bind_address=place.coordinator if loopback else None,
        )
    except (RuntimeError, ValueError) as error:
        told = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"process {place.process_id} of {place.num_processes} cannot join the others at "
            f"{place.coordinator}: {told}"
        ) from error
    missing = [name for name in _ASKED if not hasattr(global_state.client, name)]
    if missing:
        raise _unknown_jax(f"no {missing[0]}")
    return global_state.client


def _refuse_taken_port(loopback: bool, port: int) -> None:
    """Raises where somebody listens there: JAX's service crashes on it (a segmentation fault)."""
    kind, address = (socket.AF_INET, "127.0.0.1") if loopback else (socket.AF_INET6, "::")
    try:
        with socket.socket(kind) as listener:
            # What an earlier group left is free, though the system still remembers its connections.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(
                f"--coordinator: process 0 cannot listen on port {port} ({error.strerror}); give a free "
                "port"
            ) from error


def disconnect() -> None:
    """Leaves the group; in process 0, also ends its service."""
    jax.distributed.shutdown()


def _unknown_jax(what: str) -> UserError:
    return UserError(
        f"several processes need JAX's distributed runtime as of 0.10.2; JAX {jax.__version__} differs "
        f"({what})"
    )
