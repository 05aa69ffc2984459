"""JAX's distributed runtime. No other file uses `jax.distributed` or its private parts.

Two things have no public name in JAX: the client of the coordination service, and the level from which
C++ code prints. Both are taken from where JAX 0.10.2 has them. With a JAX that has moved the client,
several processes are refused; with one that has moved the level, more lines are printed.
"""

import ctypes
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxgrad.errors import UserError
from jaxgrad.processes.place import Place

# The methods of JAX's client that are used here.
_CLIENT_METHODS = (
    "key_value_set",
    "key_value_try_get",
    "blocking_key_value_get",
    "key_value_dir_get",
    "key_value_increment",
    "key_value_delete",
    "get_live_nodes",
)


class Service:
    """JAX's coordination service: the group's keys and values, and which processes are alive.

    It is the `KeyValues` of `jaxgrad.processes.exchange`, for several processes.

    Attributes:
        heard: when the service last answered, by `time.monotonic`.
    """

    def __init__(self, client: Any, on_silence: Callable[[], None]) -> None:
        """A service that this process has joined.

        Args:
            client: JAX's.
            on_silence: called when the service does not answer a question. If it returns, the question
                raises JAX's error.
        """
        self._client, self._on_silence = client, on_silence
        self.heard = 0.0

    def put(self, key: str, value: str) -> bool:
        """Sets a key. False, and no change, if it is set already or the service does not answer."""
        try:
            self._ask(self._client.key_value_set, key, value)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def get(self, key: str, wait: float = 0.0) -> str | None:
        """The value of a key. None if it is not set within `wait` seconds, or nobody answers."""
        try:
            if wait:
                return self._ask(self._client.blocking_key_value_get, key, int(wait * 1000))
            return self._ask(self._client.key_value_try_get, key)
        except jax.errors.JaxRuntimeError:
            return None

    def folder(self, name: str) -> dict[int, str]:
        """The values of the keys `name`/K, by process K."""
        found = self._ask(self._client.key_value_dir_get, f"{name}/")
        return {int(key.rpartition("/")[2]): value for key, value in found}

    def add(self, key: str, amount: int) -> int:
        """Adds to a shared number, 0 at first. Returns the sum."""
        return self._ask(self._client.key_value_increment, key, amount)

    def drop(self, name: str) -> None:
        """Removes the keys `name`/K."""
        self._ask(self._client.key_value_delete, f"{name}/")

    def live(self, process_ids: Sequence[int]) -> dict[int, int]:
        """Those of the processes that are alive, each with a number that changes when it is restarted.

        The call returns once all live processes have made it.
        """
        return self._ask(self._client.get_live_nodes, list(process_ids))

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            found = function(*arguments)
        except jax.errors.JaxRuntimeError as error:
            answers = ("NOT_FOUND", "ALREADY_EXISTS", "DEADLINE_EXCEEDED")
            if not str(error).startswith(answers):
                self._on_silence()
            raise
        self.heard = time.monotonic()
        return found


class AbortHook:
    """Calls a Python function when native code aborts the process, in the thread that aborts.

    JAX's C++ client ends a process that has lost process 0 by `LOG(FATAL)`: a stack trace, and no exit
    code of its own. It cannot call Python instead: a callback fails on a type that it does not convert.
    Python's own signal handlers run too late, after the C handler has returned.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action())
        self._signal = ctypes.CDLL(None).signal
        self._signal.restype = ctypes.c_void_p
        self._signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        handler = ctypes.cast(self._function, ctypes.c_void_p)
        self._replaced_handler = self._signal(signal.SIGABRT, handler)

    def remove(self) -> None:
        """Puts the handler back that was there before this one."""
        self._signal(signal.SIGABRT, self._replaced_handler)


def print_native_from(level: int) -> None:
    """Sets the level from which C++ code prints: 1 is warnings, JAX's default; 4 is nothing."""
    try:
        from jaxlib import utils  # it has no public name

        # JAX's import leaves "1" there. Another value is the user's own choice.
        if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
            utils.absl_set_min_log_level(level)
    except (ImportError, AttributeError):
        pass  # more lines are printed


def reach(address: str) -> None:
    """Opens and closes a connection to HOST:PORT.

    Raises:
        OSError: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()


def connect(
    place: Place, *, join_timeout: int, heartbeat_timeout: int, on_silence: Callable[[], None]
) -> Service:
    """Joins the group's coordination service, which process 0 starts.

    Args:
        place: of this process.
        join_timeout: seconds that the group may take to assemble.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
        on_silence: see `Service`.

    Raises:
        UserError: JAX says that it cannot join. (Most often JAX aborts the process instead.)
    """
    try:
        # By default JAX's C++ code aborts all processes when one dies. With this, only when process 0 does.
        jax.config.update("jax_enable_recoverability", True)
        # JAX's preemption service would take SIGTERM for itself.
        jax.config.update("jax_enable_preemption_service", False)
        from jax._src.distributed import global_state  # the client has no public name
    except (ImportError, AttributeError) as error:
        raise _unknown_jax(str(error)) from error
    host, _, port = place.coordinator.rpartition(":")
    # By default JAX listens on all addresses of the host. For a group on one host, loopback is enough.
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
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"process {place.process_id} of {place.num_processes} cannot join the others at "
            f"{place.coordinator}: {first_line}"
        ) from error
    missing = [name for name in _CLIENT_METHODS if not hasattr(global_state.client, name)]
    if missing:
        raise _unknown_jax(f"no {missing[0]}")
    return Service(global_state.client, on_silence)


def _refuse_taken_port(loopback: bool, port: int) -> None:
    """Raises if somebody listens on the port, because JAX's service would crash (a segmentation fault)."""
    kind, address = (socket.AF_INET, "127.0.0.1") if loopback else (socket.AF_INET6, "::")
    try:
        with socket.socket(kind) as listener:
            # The port of a group that has just ended is free, though its connections are remembered.
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


def _unknown_jax(difference: str) -> UserError:
    return UserError(
        f"several processes need JAX's distributed runtime as of 0.10.2; JAX {jax.__version__} differs "
        f"({difference})"
    )
