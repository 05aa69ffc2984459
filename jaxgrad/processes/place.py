"""Where this process stands among several: by flags, or by its environment.

SLURM, Open MPI, TPU pods and Kubernetes tell a process where it stands, and JAX can read it. JAX is asked
only if the environment tells of several processes. So a process on its own never waits for a metadata
server that is not there.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

from jaxgrad.errors import UserError

FLAGS = "--coordinator, --num_processes and --process_id"


@dataclass(frozen=True)
class Place:
    """Where a process stands in its group.

    Attributes:
        coordinator: HOST:PORT of process 0, where JAX's coordination service listens.
        num_processes: how many there are, at least 2.
        process_id: which one this is, from 0.
        local_device_ids: the devices of this host that this process uses; None for all.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> Place | None:
    """This process's place: from the arguments, or else from its environment.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: 1 for a process on its own, whatever the environment tells.
        process_id: from 0.
        timeout: seconds to wait until the coordinator's host name is known.

    Returns:
        The place; None for a process on its own.

    Raises:
        UserError: the arguments are incomplete or out of range, or the environment tells of several
            processes but not where this one stands.
    """
    if num_processes == 1 and process_id in (None, 0):
        return None
    if coordinator is None and num_processes is None and process_id is None:
        return _detected(timeout)
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: give all of {FLAGS}, or none of them")
    assert coordinator is not None and num_processes is not None and process_id is not None
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: give 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} is not one of {num_processes} processes: "
            f"give 0 to {num_processes - 1}"
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"--coordinator={coordinator} is not HOST:PORT: give the address of process 0 and a free "
            "port on it, such as 10.0.0.1:8476"
        )
    return Place(coordinator, num_processes, process_id)


@dataclass(frozen=True)
class _Environment:
    """A scheduler that starts several processes.

    Attributes:
        name: for messages.
        jax_class: the name of JAX's class that reads it.
        has_several: whether it may have started several, as far as is known without asking a server.
            May raise UserError.
        one_process_a_host: whether each process has its host, with all devices, to itself.
    """

    name: str
    jax_class: str
    has_several: Callable[[], bool]
    one_process_a_host: Callable[[], bool] = lambda: True


def _detected(timeout: int) -> Place | None:
    environment = next((known for known in _ENVIRONMENTS if known.has_several()), None)
    if environment is None:
        return None
    try:
        from jax._src import clusters  # JAX's own detection has no public name

        detected = getattr(clusters, environment.jax_class)
        if not detected.is_env_present():
            return None
        num_processes = detected.get_process_count()
        if num_processes < 2:
            return None
        coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
        if coordinator is None:
            coordinator = detected.get_coordinator_address(
                timeout_secs=timeout,
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
            )
        process_id = detected.get_process_id()
        local_id = detected.get_local_process_id()
    except Exception as error:  # from libraries that JAX uses: requests, kubernetes, sockets
        raise UserError(
            f"this is one of several processes by {environment.name}, but JAX cannot find its place "
            f"({type(error).__name__}: {error}); give {FLAGS}, or --num_processes=1 for a process on "
            "its own"
        ) from error
    # As in JAX, a task of SLURM or Open MPI uses the device of its number on the host. But a task that has
    # its host to itself uses all devices.
    one_device = local_id is not None and not environment.one_process_a_host()
    return Place(coordinator, num_processes, process_id, [local_id] if one_device else None)


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def _wants_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return not platforms or "tpu" in platforms.split(",")


def _in_tpu_pod() -> bool:
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return _wants_tpu() and ("," in hosts or _number("MEGASCALE_NUM_SLICES") > 1)


def _on_tpu_vm() -> bool:
    # If a variable gives the hosts, the metadata server need not be asked.
    given = ("TPU_SKIP_MDS_QUERY", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    if not _wants_tpu() or any(name in os.environ for name in given):
        return False
    from jax._src import (
        cloud_tpu_init,  # JAX's import finds out whether libtpu and TPU chips are here
    )

    return getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False)


def _in_indexed_job() -> bool:
    if "KUBERNETES_SERVICE_HOST" not in os.environ or "JOB_COMPLETION_INDEX" not in os.environ:
        return False
    if importlib.util.find_spec("kubernetes"):
        return True
    # Without the package, the number of pods is unknown. The first one may be on its own; others are not.
    if _number("JOB_COMPLETION_INDEX") > 0:
        raise UserError(
            "this is a pod of an indexed Kubernetes job (JOB_COMPLETION_INDEX="
            f"{os.environ['JOB_COMPLETION_INDEX']}): give {FLAGS}, or --num_processes=1 for a process "
            "on its own; or `pip install kubernetes`, with which JAX asks the cluster"
        )
    return False


# In the order in which JAX tries them.
_ENVIRONMENTS = (
    _Environment(
        "Open MPI",
        "OmpiCluster",
        lambda: _number("OMPI_COMM_WORLD_SIZE") > 1,
        lambda: _number("OMPI_COMM_WORLD_LOCAL_SIZE") == 1,
    ),
    _Environment(
        "SLURM",
        "SlurmCluster",
        lambda: "SLURM_PROCID" in os.environ and _number("SLURM_NTASKS") > 1,
        lambda: _number("SLURM_STEP_NUM_NODES") == _number("SLURM_NTASKS"),
    ),
    _Environment("the TPU pod's variables", "GkeTpuCluster", _in_tpu_pod),
    _Environment("the TPU VM's metadata", "GceTpuCluster", _on_tpu_vm),
    _Environment("Kubernetes", "K8sCluster", _in_indexed_job),
)
