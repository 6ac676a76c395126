"""Submit a training: python -m pretrain.launch --config NAME --data ... --out RUN --nodes N --gpus-per-node M

Where `sbatch` exists the job goes to Slurm, elsewhere it runs as local processes; both through Submitit. One task for
each GPU, or --tasks-per-node of them on processors; `key=value` as for pretrain.train. --dry-run prints the plan of the
training and what would be submitted.

Two minutes before its time is up, the job saves a checkpoint, queues itself again and continues (SIGUSR2, which
`scancel --signal=USR2 JOB` also sends). Preemption by requeueing does the same: SIGTERM saves, Slurm queues it again.
RUN must be seen by every node. SEEDBED_PYTHON names the interpreter of the job (default: this one).
"""

import argparse
import atexit
import importlib
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from configs.messages import named_folder, sentence
from pretrain.data.sources import DATA_HELP
from pretrain.stopping import StopRequest, stop_signals

FINISHED, STOPPED = 0, 75  # of pretrain.train.main
TRAIN = "pretrain.train"
STATUS = "status.txt"
"""in the folder of a job whose training did not finish: what it ended with"""
REQUEUE_SIGNAL = signal.SIGUSR2
# Below the range that Linux gives to outgoing connections (32768 and up), above what services listen on.
_PORTS = range(20_000, 32_000)
log = logging.getLogger("seedbed.launch")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What to ask for."""

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 0
    """processes on each node; 0: one a GPU, or one"""
    cpus_per_task: int = 0
    """0: one for each of the loader's workers and one more (execution.threads more) on Slurm, no limit locally"""
    mem_gb: float = 0
    """of a node; 0: the cluster's default"""
    time_min: int = 24 * 60
    """after which the job saves a checkpoint, queues itself again and continues"""
    partition: str = ""
    account: str = ""
    qos: str = ""
    signal_delay_s: int = 120
    """from the signal to the end: the step that runs and a checkpoint must fit in"""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 0 or self.tasks_per_node < 0:
            raise ValueError(f"--nodes {self.nodes} --gpus-per-node {self.gpus_per_node} ask for nothing to run on.")
        if self.cpus_per_task < 0 or self.signal_delay_s < 0 or not 0 <= self.mem_gb < math.inf:
            raise ValueError(
                f"--cpus-per-task {self.cpus_per_task}, --mem-gb {self.mem_gb:g} and --signal-delay-s "
                f"{self.signal_delay_s} must be 0 or more."
            )
        if self.gpus_per_node and self.tasks_per_node not in (0, self.gpus_per_node):
            raise ValueError(
                f"--tasks-per-node {self.tasks_per_node} differs from --gpus-per-node {self.gpus_per_node}: every task "
                "has one GPU; leave --tasks-per-node out."
            )
        if self.time_min * 60 <= self.signal_delay_s:
            raise ValueError(
                f"--time-min {self.time_min} leaves no time before the signal {self.signal_delay_s} s earlier."
            )

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Training:
    """What a job runs; pickled by Submitit, called in every task, and again after each requeue.

    Args:
        arguments: of the `main` of `module`.
        cpus: of one task, without its loader's workers; what its kernels may use. 0: no limit.
    """

    arguments: list[str]
    cpus: int = 0
    module: str = TRAIN

    def __call__(self) -> int:
        """Returns when the training is finished; else leaves by SystemExit with its status, which is kept for `follow`:
        the training has said why in one sentence, and an exception would hide that behind a traceback.
        """
        environment = submitit.JobEnvironment()
        os.environ.update(rendezvous(environment))
        if self.cpus:
            os.environ.setdefault("OMP_NUM_THREADS", str(self.cpus))
        with received_signals() as received:
            status = importlib.import_module(self.module).main(self.arguments)
            if status == STOPPED and REQUEUE_SIGNAL in received():
                self._requeue(environment)
        end_process = importlib.import_module("pretrain.distributed.collectives").end_process
        atexit.register(end_process, status)  # after submitit has written the result
        if status != FINISHED:
            if environment.global_rank == 0:
                (environment.paths.folder / STATUS).write_text(str(status), encoding="utf-8")
            sys.exit(status)  # no result: submitit takes the job for one that is not over
        return status

    def _requeue(self, environment: Any) -> None:
        """The first task queues the job again, where all tasks have saved: they stop at the same step."""
        if environment.global_rank == 0:
            try:
                environment._requeue(0)  # Slurm: scontrol requeue; local: exit with the status that restarts
            except (subprocess.SubprocessError, OSError) as error:
                log.error("the job could not queue itself again (%s); submit the same command to continue", error)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """For a signal before the training handles it itself, while it is still importing: the same again."""
        return submitit.helpers.DelayedSubmission(self)


def rendezvous(environment: Any) -> dict[str, str]:
    """What torch.distributed reads, for a Submitit task; the port depends on the job, as jobs share nodes."""
    return {
        "MASTER_ADDR": environment.hostnames[0] if environment.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(_PORTS[zlib.crc32(str(environment.job_id).encode()) % len(_PORTS)]),
        "RANK": str(environment.global_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "LOCAL_RANK": str(environment.local_rank),
        "LOCAL_WORLD_SIZE": str(environment.num_tasks // environment.num_nodes),
    }


@contextmanager
def received_signals() -> Iterator[Any]:
    """A function that lists the signals that arrived so far, whoever handles them.

    The training's own handlers only set a flag; which signal it was decides whether the job is to be queued again.
    Python writes every handled signal's number to the wake-up descriptor.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    seen: set[int] = set()

    def received() -> set[int]:
        try:
            while content := os.read(reader, 4096):
                seen.update(content)
        except BlockingIOError:
            pass
        return seen

    try:
        yield received
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def make_executor(folder: Path, resources: Resources, name: str, cluster: str) -> submitit.Executor:
    """A Submitit executor that writes its logs and pickles to `folder`/JOB.

    Args:
        cluster: slurm or local.
    """
    python = os.environ.get("SEEDBED_PYTHON", sys.executable)
    common = {"name": name, "nodes": resources.nodes, "tasks_per_node": resources.ranks_per_node}
    common |= {"timeout_min": resources.time_min, "stderr_to_stdout": True}
    if resources.gpus_per_node:
        common["gpus_per_node"] = resources.gpus_per_node
    if cluster == "local":
        executor: submitit.Executor = submitit.LocalExecutor(folder / "%j", python=python)
        executor.update_parameters(**common, signal_delay_s=resources.signal_delay_s)
        return executor
    optional = {
        "cpus_per_task": resources.cpus_per_task,
        "mem_gb": resources.mem_gb,
        "slurm_partition": resources.partition,
        "slurm_account": resources.account,
        "slurm_qos": resources.qos,
    }
    # Submitit counts the times that a job ran out of time; a training of weeks does so every day.
    executor = submitit.AutoExecutor(folder / "%j", cluster="slurm", slurm_python=python, slurm_max_num_timeout=10_000)
    executor.update_parameters(
        **common,
        **{key: value for key, value in optional.items() if value},
        # Since 22.05 srun does not take it from sbatch: each task would get one core.
        slurm_srun_args=[f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else None,
        slurm_signal_delay_s=resources.signal_delay_s,
        slurm_additional_parameters={"requeue": True},
    )
    return executor


def submission_text(folder: Path, resources: Resources, name: str, cluster: str, training: Training) -> str:
    """What would be submitted: the batch script of Slurm, or the command of each local process. Writes nothing."""
    command = f"python -m {training.module} {' '.join(training.arguments)}"
    if cluster == "local":
        return f"{resources.ranks_per_node} local processes of {command}"
    if shutil.which("srun") is None:
        return (
            f"one job of {resources.nodes} nodes (its batch script is shown where Slurm is), in every task: {command}"
        )
    slurm = make_executor(folder, resources, name, cluster)._executor
    return f"{slurm._make_submission_file_text(slurm._submitit_command_str, 'JOB')}# in every task: {command}"


def follow(job: submitit.Job, stop: StopRequest | None = None, every_s: float = 0.5) -> int:
    """Copy the first task's log to standard output until the job is over.

    Args:
        stop: what was received here is passed on once as SIGTERM: the job saves and ends.

    Returns:
        The status of the training: 0 finished, 75 stopped after a checkpoint, 1 failed.
    """
    position, over, passed_on = 0, False, False
    while not over:
        if stop and not passed_on:
            log.info("asked to stop: the job ends after a checkpoint; a second Ctrl-C leaves it alone")
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)
            passed_on = True
        over = job.done()
        if job.paths.stdout.exists():
            with job.paths.stdout.open() as file:
                file.seek(position)
                sys.stdout.write(file.read())
                sys.stdout.flush()
                position = file.tell()
        if not over:
            time.sleep(every_s)
    if not job.paths.result_pickle.exists():
        ended = job.paths.folder / STATUS
        status = int(ended.read_text(encoding="utf-8")) if ended.is_file() else STOPPED
        return STOPPED if status == STOPPED else 1
    error = job.exception()
    if error is not None:
        reasons = [line for line in str(error).splitlines() if re.match(r"\w*(Error|Exception)\b.*:", line)]
        log.error("the job failed: %s (its log: %s)", reasons[-1] if reasons else error, job.paths.stdout)
    return FINISHED if error is None else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0: submitted (locally: finished), 75: a local run was stopped, 1: it failed, 2: a mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = _parser()
    asked = parser.parse_intermixed_args(argv)
    try:
        return _launch(asked)
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2


def _launch(asked: argparse.Namespace) -> int:
    from pretrain import plan
    from pretrain.checks import check_numbers, check_run
    from pretrain.config import load_train_config
    from pretrain.machine import loader_cpus
    from pretrain.run_folder import check_run_folder

    names = {name for name in Resources.__dataclass_fields__ if getattr(asked, name) is not None}
    resources = Resources(**{name: getattr(asked, name) for name in names})
    is_plan_for_nodes = asked.dry_run and resources.nodes > 1
    cluster = asked.cluster or ("slurm" if shutil.which("sbatch") or is_plan_for_nodes else "local")
    config = load_train_config(asked.config, asked.overrides, asked.data)
    if cluster == "slurm":
        needed = loader_cpus(config)
        resources = replace(resources, cpus_per_task=resources.cpus_per_task or needed)
        if resources.cpus_per_task < needed:
            log.warning(
                "--cpus-per-task %d leaves execution.loader.num_workers=%d too few cores: %d would do",
                resources.cpus_per_task,
                config.execution.loader.num_workers,
                needed,
            )
    check_numbers(config, resources.world_size)  # now, not after a day in the queue
    if not asked.dry_run and not all(config.phase(phase).data.datasets for phase in config.phase_names):
        raise ValueError("data.datasets is empty: give --data PATH, or data.datasets.NAME.shards=PATH.")
    if not asked.skip_data_check:
        try:
            check_run(config, resources.world_size, asked.out)
        except ValueError as error:
            raise ValueError(f"{error} (If the nodes see what this machine does not: --skip-data-check.)") from None
    if cluster == "slurm" and not asked.dry_run and shutil.which("sbatch") is None:
        raise ValueError("--cluster slurm needs sbatch, which is not here: submit on a login node, or --cluster local.")
    if asked.out.exists() and not asked.out.is_dir():
        raise ValueError(f"--out {asked.out} is a file; name a folder, or one that does not exist yet.")
    if cluster == "local" and resources.nodes > 1:
        raise ValueError(f"--nodes {resources.nodes} needs Slurm, and there is no sbatch here; use --nodes 1.")
    data = [argument for path in asked.data for argument in ("--data", path)]
    allowed = [argument for key in asked.allow_changed for argument in ("--allow-changed", key)]
    arguments = ["--config", asked.config, *data, "--out", str(asked.out), *allowed, *asked.overrides]
    cpus = resources.cpus_per_task and max(1, resources.cpus_per_task - config.execution.loader.num_workers)
    training = Training(arguments, cpus=cpus)
    check_run_folder(asked.out)
    folder, name = asked.out / "jobs", f"seedbed-{Path(asked.config).stem}"
    if asked.dry_run:
        print(plan.describe(config, resources.world_size, asked.out))
        print(f"\nwould submit to {cluster}:\n{submission_text(folder, resources, name, cluster, training)}")
        return FINISHED
    folder.mkdir(parents=True, exist_ok=True)
    executor = make_executor(folder, resources, name, cluster)
    try:
        with _shielded():
            job = executor.submit(training)
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError) as error:
        raise ValueError(f"{cluster} did not take the job: {error}") from None
    log.info("job %s on %s; its log: %s", job.job_id, cluster, job.paths.stdout)
    if cluster == "slurm":
        return FINISHED
    log.info("it ends after a checkpoint with Ctrl-C, or: kill %s", job.job_id)
    with stop_signals() as stop:
        return follow(job, stop)


@contextmanager
def _shielded() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which Submitit would answer by killing them: `follow` stops them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.launch", description="Submit a training to Slurm, or run it as local processes."
    )
    parser.add_argument("--config", required=True, help="a name in configs/pretrain/ or a YAML file")
    parser.add_argument(
        "--out", type=named_folder, required=True, metavar="RUN", help="the run folder, seen by every node"
    )
    parser.add_argument("--data", "--shards", dest="data", action="append", default=[], help=DATA_HELP)
    for name, kind, text in (
        ("nodes", int, "how many"),
        ("gpus-per-node", int, "and as many tasks"),
        ("tasks-per-node", int, "without GPUs: processes on each node"),
        ("cpus-per-task", int, "the loader's workers share them"),
        ("mem-gb", float, "of each node"),
        ("time-min", int, "of one stretch; the job queues itself again (default: a day)"),
        ("signal-delay-s", int, "kept at the end of a stretch for the last checkpoint (default: 120)"),
        ("partition", str, ""),
        ("account", str, ""),
        ("qos", str, ""),
    ):
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument(
        "--allow-changed", action="append", default=[], metavar="KEY", help="as for pretrain.train; repeatable"
    )
    parser.add_argument("--cluster", choices=("slurm", "local"), help="default: slurm where there is sbatch")
    parser.add_argument(
        "--skip-data-check",
        action="store_true",
        help="submit although this machine cannot see shards that the nodes do",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the submission, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for pretrain.train")
    return parser


if __name__ == "__main__":
    # Under its own name, so that the job's pickle refers to this module and not to a script.
    sys.exit(importlib.import_module("pretrain.launch").main())
