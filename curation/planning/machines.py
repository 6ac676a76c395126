"""What a run would run on, a file of configs/clusters or this machine, and how long a step takes there."""

import importlib.util
import os
from dataclasses import dataclass

from configs.loader import load_config
from configs.ranges import check_ranges
from curation.engine.workers import ExecutionConfig
from curation.planning.costs import A100_PEAK, Work

_PEAKS = {"a100": A100_PEAK, "h100": 989e12, "h200": 989e12}
"""dense bfloat16 products, from the makers' data sheets"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes that are alike, and what they read from. 0: as much as it takes."""

    nodes: int = 1
    cores: int = 1
    """of a node"""
    gpus: int = 0
    """of a node"""
    gpu: str = "a100"
    """a100, h100 or h200"""
    memory_gb: float = 0.0
    """of a node"""
    network_gb_per_s: float = 0.0
    """of a node: to the store, and to the files that all nodes share"""
    store_gb_per_s: float = 0.0
    """of all nodes together"""
    store_requests_per_s: float = 0.0

    def __post_init__(self) -> None:
        amounts = ("gpus", "memory_gb", "network_gb_per_s", "store_gb_per_s", "store_requests_per_s")
        check_ranges("", self, nodes="[1, inf)", cores="[1, inf)", **dict.fromkeys(amounts, "[0, inf)"))
        if self.gpu not in _PEAKS:
            raise ValueError(f"gpu={self.gpu!r} is not known to the plan: choose {', '.join(_PEAKS)}.")

    @property
    def num_cores(self) -> int:
        return self.nodes * self.cores

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus

    def gpu_s(self, work: Work) -> float:
        """Seconds of one of the cluster's GPUs; 0 where it has none."""
        return work.gpu_s * A100_PEAK / _PEAKS[self.gpu] if self.gpus else 0.0

    def core_s(self, work: Work) -> float:
        """Seconds of one core, beside the GPUs where there are any."""
        return work.core_s - (work.movable_s if self.gpus else 0.0)

    def seconds(self, work: Work, num_tasks: float, driver_s: float, num_bytes: float, num_requests: float) -> float:
        """Time of a step: of what it has least of, computing or moving, and of the driver, for which all wait."""
        rate = min((rate for rate in (self.nodes * self.network_gb_per_s, self.store_gb_per_s) if rate), default=0.0)
        return driver_s + max(
            self.core_s(work) / max(min(self.num_cores, num_tasks), 1),
            self.gpu_s(work) / max(min(self.num_gpus, num_tasks), 1),
            num_bytes / (rate * 1e9) if rate else 0.0,
            num_requests / self.store_requests_per_s if self.store_requests_per_s else 0.0,
        )

    def told(self) -> str:
        """In words."""
        nodes = f"{self.nodes:,} {'node' if self.nodes == 1 else 'nodes'} of {self.cores:,} cores"
        if self.gpus:
            nodes += f" and {self.gpus:,} {self.gpu.upper()}"
        moved = {
            "GB/s a node": self.network_gb_per_s,
            "GB/s of the store": self.store_gb_per_s,
            "requests/s": self.store_requests_per_s,
        }
        return ", ".join([nodes, *(f"{value:,g} {what}" for what, value in moved.items() if value)])


def load_cluster(name_or_path: str) -> Cluster:
    """A name in configs/clusters or a YAML file.

    Raises:
        ValueError: no such file, or an unknown or impossible value in it.
    """
    return load_config(Cluster, "clusters", name_or_path)


def this_machine(execution: ExecutionConfig) -> Cluster:
    """What is here: input and output are taken to be as fast as it takes."""
    gpus, kind = 0, "a100"
    if importlib.util.find_spec("torch"):
        import torch

        gpus = torch.cuda.device_count()
        name = torch.cuda.get_device_name(0).lower() if gpus else ""
        kind = next((known for known in _PEAKS if known in name), kind)
    return Cluster(cores=execution.workers or os.cpu_count() or 1, gpus=gpus, gpu=kind)
