"""Which process of how many this is, and where process 0 waits: as told, or as the cluster's launcher says."""

import dataclasses
import os

from gptoss_jax.errors import DistributedError

_ALL_THREE = "give coordinator, num-processes and process-id, or none of them where a launcher says so"


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of a run."""

    host: str
    """Where process 0 waits for the others."""
    port: int
    num_processes: int
    process_id: int
    local_id: int | None = None
    """Its number on its own host, if a launcher says so."""


def find(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """The place that the arguments name, or without any the one that Slurm, Open MPI, Kubernetes or a TPU pod gives.

    None for a process that is alone: told `num_processes=1`, or nothing, on a machine without such a launcher. Raises
    DistributedError for arguments that are incomplete or out of range, and a launcher that does not tell enough.

    Example:
        >>> find("node0:1234", 2, 1)
        Place(host='node0', port=1234, num_processes=2, process_id=1, local_id=None)
    """
    told = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    given = [name for name, value in told.items() if value is not None]
    if not given:
        return _launched()
    if num_processes is not None and num_processes < 1:
        raise DistributedError(f"{num_processes} processes", where="num-processes", fix="give 1 or more")
    if num_processes == 1 and not process_id:
        return None
    if coordinator is None or num_processes is None or process_id is None:
        missing = [name for name in told if name not in given]
        raise DistributedError(f"{given[0]} without {missing[0]}", where="processes", fix=_ALL_THREE)
    if not 0 <= process_id < num_processes:
        raise DistributedError(
            f"process {process_id} of {num_processes}", where="process-id", fix=f"choose 0 to {num_processes - 1}"
        )
    return Place(*_address(coordinator), num_processes, process_id)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise DistributedError(
            f"cannot read {coordinator!r}", where="coordinator", fix="write HOST:PORT, as in node0:1234"
        )
    return host, int(port)


def _launched() -> Place | None:
    """What JAX's own detection finds, which its public `initialize` offers only together with what follows."""
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or _is_lone_pod(cluster) or not cluster.is_env_present():
            continue
        try:
            if (num_processes := cluster.get_process_count()) == 1:
                return None
            address = cluster.get_coordinator_address(
                timeout_secs=60, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
            )
            return Place(*_address(address), num_processes, cluster.get_process_id(), cluster.get_local_process_id())
        except Exception as error:  # each cluster's library has errors of its own
            reason = " ".join(str(error).split())
            raise DistributedError(
                f"cannot tell the processes apart ({reason or error!r:.300})",
                where=cluster.name or cluster.__name__,
                fix=_ALL_THREE,
            ) from error
    return None


def _is_lone_pod(cluster: type) -> bool:
    """Every pod knows that it runs in Kubernetes; only those of an indexed job are parts of one run."""
    return cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
