"""Every evaluation by name: what it measures, of which sets, by which source."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.downstream.evals.dense import depth, discovery, segmentation
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.pooled import copies, knn, linear, logistic, retrieval
from pretrain.downstream.evals.result import Result
from pretrain.downstream.evals.sets import (
    CopySet,
    DepthSet,
    LabelledSet,
    ObjectSet,
    RetrievalSet,
    SegmentationSet,
)


@dataclass(frozen=True)
class Protocol:
    """An evaluation: `run` takes a backbone, a set of the kind that it takes, and its settings."""

    metric: str
    """the headline figure"""
    takes: type[Any]
    settings: type[Any]
    run: Callable[[Frozen, Any, Any], Result]
    source: str
    is_better_high: bool = True
    num_layers: int = 1
    """last blocks whose CLS tokens it asks for"""


PROTOCOLS = {
    "knn": Protocol("accuracy", LabelledSet, knn.KnnConfig, knn.run, "arXiv:2104.14294, arXiv:2304.07193"),
    "linear": Protocol(
        "accuracy", LabelledSet, linear.LinearConfig, linear.run, "arXiv:2304.07193, section 7.1", num_layers=4
    ),
    "logistic": Protocol(
        "accuracy", LabelledSet, logistic.LogisticConfig, logistic.run, "arXiv:2304.07193, section 7.1"
    ),
    "fewshot": Protocol(
        "accuracy", LabelledSet, logistic.FewShotConfig, logistic.run_few, "arXiv:2204.07141, section 5"
    ),
    "retrieval": Protocol("mAP, medium", RetrievalSet, retrieval.RetrievalConfig, retrieval.run, "arXiv:1803.11285"),
    "copies": Protocol(
        "micro-AP", CopySet, copies.CopiesConfig, copies.run, "arXiv:2106.09672, normalised as arXiv:2202.10261"
    ),
    "segmentation": Protocol(
        "mIoU",
        SegmentationSet,
        segmentation.SegmentationConfig,
        segmentation.run,
        "arXiv:2304.07193, section 7.4; whole pictures",
    ),
    "depth": Protocol(
        "RMSE, m",
        DepthSet,
        depth.DepthConfig,
        depth.run,
        "arXiv:2304.07193, section 7.4; whole pictures",
        is_better_high=False,
    ),
    "discovery": Protocol("CorLoc", ObjectSet, discovery.DiscoveryConfig, discovery.run, "arXiv:2202.11539; patches"),
}
