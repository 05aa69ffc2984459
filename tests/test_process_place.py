"""`find_place`: flags, and the variables of schedulers."""

import pytest

from jaxgrad.errors import UserError
from jaxgrad.processes import place
from jaxgrad.processes.place import Place, find_place

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[004-005],node9",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.0.0.7:1234",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """Removes the variables of a scheduler that runs these tests."""
    for name in (*SLURM, *OPEN_MPI, "TPU_WORKER_HOSTNAMES", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nobody_asked(monkeypatch):
    """The test fails if it uses JAX's detection, which may ask servers."""
    from jax._src import clusters

    def asked(*_):
        raise AssertionError("JAX was asked")

    for environment in place._ENVIRONMENTS:
        monkeypatch.setattr(getattr(clusters, environment.jax_class), "is_env_present", asked)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"coordinator": "h:1"}, "--num_processes and --process_id missing"),
        ({"process_id": 0}, "--coordinator and --num_processes missing"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator missing"),
        ({"num_processes": 1, "process_id": 1, "coordinator": "h:1"}, "not one of 1 processes"),
        ({"num_processes": 0, "process_id": 0, "coordinator": "h:1"}, "give 1 or more"),
        ({"num_processes": 4, "process_id": 4, "coordinator": "h:1"}, "give 0 to 3"),
        ({"num_processes": 4, "process_id": -1, "coordinator": "h:1"}, "give 0 to 3"),
        *(
            ({"num_processes": 2, "process_id": 0, "coordinator": where}, "not HOST:PORT")
            for where in ("host", ":8476", "host:", "host:zero", "host:0", "host:65536", "")
        ),
    ],
)
def test_flags_that_do_not_make_a_place(given, told):
    with pytest.raises(UserError, match=told):
        find_place(**given)


def test_flags_win_over_the_environment(monkeypatch, nobody_asked):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_place("host:8476", 3, 2) == Place("host:8476", 3, 2)
    assert find_place(num_processes=1) is None


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        # In a batch script before any srun.
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_single_process_asks_nobody(monkeypatch, nobody_asked, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_place() is None


def test_slurm(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    # JAX makes the port from the job's number, so that two jobs on a node do not meet.
    port = 4097 % 4096 + 65536 - 4096
    assert find_place() == Place(f"node004:{port}", 2, 1, None)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "777")
    # Two tasks on a node: each has the device of its number.
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert find_place() == Place("node004:777", 2, 1, [0])


def test_open_mpi(monkeypatch):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    coordinator = f"10.0.0.7:{8192 // 4096 + 65536 - 4096}"
    assert find_place() == Place(coordinator, 8, 5, [1])
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    assert find_place() == Place(coordinator, 8, 5, None)


def test_a_pod_of_several_tpu_hosts(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    variables = {"TPU_WORKER_HOSTNAMES": "localhost,other", "TPU_WORKER_ID": "1"}
    variables |= {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    variables |= {"MEGASCALE_COORDINATOR_ADDRESS": "localhost"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_place() == Place("localhost:8482", 2, 1, None)
    # A run on the CPU of such a host is on its own.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert find_place() is None


def test_a_pod_of_an_indexed_job(monkeypatch):
    """Without the package that asks the cluster, only the first may go on: it may be alone."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    monkeypatch.setattr(place.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"JOB_COMPLETION_INDEX=2.*--num_processes=1"):
        find_place()
    assert find_place(num_processes=1) is None
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert find_place() is None


def test_an_environment_that_jax_cannot_read(monkeypatch):
    for name, value in (SLURM | {"SLURM_JOB_ID": "none"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"by SLURM, but JAX cannot find its place.*--coordinator"):
        find_place()
