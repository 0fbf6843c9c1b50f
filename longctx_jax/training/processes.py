"""Starting JAX's multi-controller runtime: who the other processes are, from flags or environment.

`jax.distributed` finds Slurm, Open MPI, Kubernetes and TPU pods by itself; what is decided here is
only whether to ask it, so that a run on one machine never waits for others.
"""

import os
from collections.abc import Mapping

import jax
from absl import logging

MODES = ("auto", "on", "off")
START_TIMEOUT_S = 300
HEARTBEAT_TIMEOUT_S = 60  # after which a process that does not answer counts as dead


def start_processes(
    mode: str = "auto",
    *,
    coordinator_address: str = "",
    num_processes: int = 0,
    process_id: int = -1,
) -> None:
    """Connects to the other processes of the run, if there are any; before any other use of JAX.

    Args:
        mode: "auto" (where the environment or the other arguments speak of several processes),
            "on" (always; what is not given is taken from the environment) or "off".
        coordinator_address: host:port of process 0; "" = from the environment.
        num_processes: of the run; 0 = from the environment.
        process_id: of this one, from 0; -1 = from the environment.

    Raises:
        ValueError: arguments that contradict each other, or an environment that does not tell.
        RuntimeError: the others were not there in time.
    """
    if mode not in MODES:
        raise ValueError(f"--distributed must be one of {MODES}: got {mode!r}; use auto")
    given = (bool(coordinator_address), num_processes > 0, process_id >= 0)
    if any(given) and not all(given):
        raise ValueError(
            "--coordinator_address, --num_processes and --process_id go together: got "
            f"{coordinator_address!r}, {num_processes}, {process_id}; give all three or none"
        )
    if all(given) and process_id >= num_processes:
        raise ValueError(
            f"--process_id must be below --num_processes: got {process_id} of {num_processes}; "
            "count from 0"
        )
    if mode == "off" or (mode == "auto" and not any(given) and not several_are_meant(os.environ)):
        return
    known = from_environment(os.environ)
    if all(given):
        known = (coordinator_address, num_processes, process_id)
    address, count, index = known or (None, None, None)
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=index,
            initialization_timeout=START_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except ValueError as error:
        raise ValueError(
            "--distributed needs an environment that tells the processes of the run (Slurm, Open "
            f"MPI, Kubernetes, TPU, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, "
            f"JAX_PROCESS_ID): {error}; give --coordinator_address, --num_processes and "
            "--process_id, or --distributed=off"
        ) from error
    logging.info("process=%d of=%d", jax.process_index(), jax.process_count())


def from_environment(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Returns (address, number, index) from JAX's own variables; None if they are not all set."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = (environment.get(name, "") for name in names)
    if not (address and all(number.isdecimal() for number in numbers)):
        return None
    return address, int(numbers[0]), int(numbers[1])


def several_are_meant(environment: Mapping[str, str]) -> bool:
    """Whether a cluster's variables speak of more than one process of this very job step."""
    known = from_environment(environment)
    if known:
        return known[1] > 1
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    numbers = [environment.get(name, "") for name in counts]
    if any(number.isdecimal() and int(number) > 1 for number in numbers):
        return True
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return len([host for host in hosts.split(",") if host]) > 1


def is_main_process() -> bool:
    """Whether this process is the one that writes what all know."""
    return jax.process_index() == 0
