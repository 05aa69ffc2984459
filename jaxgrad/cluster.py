"""Where this process stands among several: by flags, or by its environment.

SLURM, Open MPI, TPU pods and Kubernetes tell their processes, and JAX reads it. It is asked only where
the environment says that there are several, so that a single process never waits for a server of
metadata that is not there.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

from jaxgrad.errors import UserError

FLAGS = "--coordinator, --num_processes and --process_id"


@dataclass(frozen=True)
class Place:
    """One process of a group.

    Attributes:
        coordinator: HOST:PORT of process 0, where JAX's coordination service listens.
        num_processes: how many there are, at least 2.
        process_id: which one this is, from 0.
        local_device_ids: the devices of this host that are its own; None for all.
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
    """This process's place: as given, or else as its environment tells. None for a process on its own.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: 1 for a process on its own whatever the environment tells.
        process_id: from 0.
        timeout: seconds that a coordinator's name may take to be known.

    Raises:
        UserError: what is given is incomplete or out of range, or the environment tells of several
            processes but not enough of them.
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


def _detected(timeout: int) -> Place | None:
    name = next((name for name, told in _ENVIRONMENTS.items() if told()), None)
    if name is None:
        return None
    try:
        from jax._src import clusters  # JAX's own detection has no public name

        environment = getattr(clusters, name)
        if not environment.is_env_present():
            return None
        num_processes = environment.get_process_count()
        if num_processes < 2:
            return None
        coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
        if coordinator is None:
            coordinator = environment.get_coordinator_address(
                timeout_secs=timeout,
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
            )
        process_id = environment.get_process_id()
        local = environment.get_local_process_id()
    except Exception as error:  # of the environment's own libraries: requests, kubernetes, sockets
        raise UserError(
            f"this is one of several processes by {_SAID_BY[name]}, but JAX cannot find its place "
            f"({type(error).__name__}: {error}); give {FLAGS}, or --num_processes=1 for a process on "
            "its own"
        ) from error
    # JAX gives a task of SLURM or Open MPI the one device of its number. Alone on its host it has all.
    one_device = local is not None and not _ALONE_ON_HOST[name]()
    return Place(coordinator, num_processes, process_id, [local] if one_device else None)


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
    # Where the hosts are told, the metadata need not be asked.
    told = ("TPU_SKIP_MDS_QUERY", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    if not _wants_tpu() or any(name in os.environ for name in told):
        return False
    from jax._src import cloud_tpu_init  # set while JAX is imported: libtpu and chips are there

    return getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False)


def _in_indexed_job() -> bool:
    if "KUBERNETES_SERVICE_HOST" not in os.environ or "JOB_COMPLETION_INDEX" not in os.environ:
        return False
    if importlib.util.find_spec("kubernetes"):
        return True
    # Without the package nobody knows how many there are: the first may be on its own.
    if _number("JOB_COMPLETION_INDEX") > 0:
        raise UserError(
            "this is a pod of an indexed Kubernetes job (JOB_COMPLETION_INDEX="
            f"{os.environ['JOB_COMPLETION_INDEX']}): give {FLAGS}, or --num_processes=1 for a process "
            "on its own; or `pip install kubernetes`, with which JAX asks the cluster"
        )
    return False


# JAX's class of an environment -> whether the environment tells of several processes; in JAX's order.
_ENVIRONMENTS: dict[str, Callable[[], bool]] = {
    "OmpiCluster": lambda: _number("OMPI_COMM_WORLD_SIZE") > 1,
    "SlurmCluster": lambda: "SLURM_PROCID" in os.environ and _number("SLURM_NTASKS") > 1,
    "GkeTpuCluster": _in_tpu_pod,
    "GceTpuCluster": _on_tpu_vm,
    "K8sCluster": _in_indexed_job,
}
_SAID_BY = {
    "OmpiCluster": "Open MPI",
    "SlurmCluster": "SLURM",
    "GkeTpuCluster": "the TPU pod's variables",
    "GceTpuCluster": "the TPU VM's metadata",
    "K8sCluster": "Kubernetes",
}
_ALONE_ON_HOST: dict[str, Callable[[], bool]] = {
    "OmpiCluster": lambda: _number("OMPI_COMM_WORLD_LOCAL_SIZE") == 1,
    "SlurmCluster": lambda: _number("SLURM_STEP_NUM_NODES") == _number("SLURM_NTASKS"),
    "GkeTpuCluster": lambda: True,
    "GceTpuCluster": lambda: True,
    "K8sCluster": lambda: True,
}
