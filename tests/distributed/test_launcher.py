import pytest

from gptoss_jax.distributed.launcher import Place, find
from gptoss_jax.errors import DistributedError

SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.7,10.1.0.7:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch):
    def launch(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def test_process_that_nothing_started_is_alone() -> None:
    assert find() is None


def test_process_told_that_it_is_the_only_one_is_alone(launched) -> None:
    launched(SLURM)
    assert find(num_processes=1) is None
    assert find("node0:1234", 1, 0) is None


def test_slurm_says_where_process_0_is(launched) -> None:
    launched(SLURM)
    assert find() == Place("gpu03", 61440, num_processes=2, process_id=1, local_id=0)


def test_open_mpi_says_where_process_0_is(launched) -> None:
    launched(OPEN_MPI)
    assert find() == Place("10.0.0.7", 61441, num_processes=4, process_id=3, local_id=1)


def test_the_port_can_be_chosen(launched) -> None:
    launched(SLURM | {"JAX_COORDINATOR_PORT": "1234"})
    place = find()
    assert place is not None
    assert place.port == 1234


def test_step_of_one_task_is_alone(launched) -> None:
    launched(SLURM | {"SLURM_NTASKS": "1"})
    assert find() is None


def test_arguments_go_before_the_launcher(launched) -> None:
    launched(SLURM)
    assert find("[fe80::1]:99", 3, 2) == Place("fe80::1", 99, num_processes=3, process_id=2)


def test_pod_of_no_indexed_job_is_alone(launched) -> None:
    launched({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert find() is None


def test_launcher_that_does_not_tell_enough_is_named(launched) -> None:
    launched({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "4096.0;usock"})
    with pytest.raises(DistributedError, match=r"cannot tell the processes apart .*Open MPI.*: ompi: give coordinator"):
        find()
