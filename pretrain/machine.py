"""What a training's loaders need of a machine: cores, and shared memory for the batches that wait in it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from pretrain.config import TrainConfig
from pretrain.data.crops import CropsConfig, empty_crops

SHARED = Path("/dev/shm")


def loader_cpus(config: TrainConfig) -> int:
    """Cores of one rank: one for each worker, and those that the training itself computes on, or feeds its GPU with."""
    return config.execution.loader.num_workers + max(1, config.execution.threads)


def waiting_bytes(config: TrainConfig, world_size: int) -> int:
    """Bytes of one rank's batches in shared memory, in one phase, when its workers are as far ahead as they may be.

    Crops of uint8, at the largest sizes of the phase; 0 without workers.
    """
    loader = config.execution.loader
    batch = max(_crop_bytes(config.crops, index) for index in range(len(config.crops.all_sizes())))
    return loader.num_workers * loader.prefetch * batch * (config.global_batch_size // world_size)


def _crop_bytes(crops: CropsConfig, index: int) -> int:
    with torch.device("meta"):
        return sum(room.numel() for room in empty_crops(crops, crops.all_sizes()[index], 1))


def check_shared_memory(config: TrainConfig, world_size: int, ranks_here: int) -> None:
    """
    Raises:
        ValueError: what this machine has free is less than its ranks' batches take; a worker would be killed for it.
    """
    if not SHARED.is_dir():  # a system that shares memory otherwise
        return
    phases = {name: waiting_bytes(config.phase(name), world_size) for name in config.phase_names}
    name = max(phases, key=lambda phase: phases[phase])
    needed, free = phases[name] * ranks_here, shutil.disk_usage(SHARED).free
    if needed > free:
        loader = config.execution.loader
        raise ValueError(
            f"phase {name}: batches that wait take {needed / 1e9:.3g} GB of shared memory on this machine "
            f"({ranks_here} ranks, execution.loader.num_workers={loader.num_workers} with prefetch={loader.prefetch} "
            f"each), and {SHARED} has {free / 1e9:.3g} GB: lower one of them, or give it more (docker: --shm-size)."
        )


def notes(config: TrainConfig, world_size: int, ranks_here: int) -> Iterator[str]:
    """What falls short here without being an error, a sentence each."""
    workers = config.execution.loader.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available() and workers * ranks_here > cores:
        yield (
            f"{ranks_here} rank(s) with execution.loader.num_workers={workers} have {cores} core(s) here: images will "
            f"not come fast enough; ask for {loader_cpus(config)} cores a rank, or start fewer workers"
        )
    handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")
    if handled is not None and "SLURM_JOB_ID" in os.environ and not {"SIGUSR1", "SIGUSR2"} <= set(handled.split(",")):
        yield (
            "torchrun passes neither SIGUSR1 nor SIGUSR2 on, and ends by them: start it with --signals-to-handle "
            "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout 600"
        )
