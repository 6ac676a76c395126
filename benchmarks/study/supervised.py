"""The ceiling: the same backbone with a linear layer on its CLS token, trained with labels.

Images, their order, crops, optimizer, rates and precision are those of the config; of each image the first global crop
is seen, whole. Cross-entropy; no teacher, so that the network itself is judged.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curation.reading.folders import split_name
from pretrain.config import TrainConfig
from pretrain.data.collate import Batch, prepare
from pretrain.data.loader import Loader, read_tables
from pretrain.downstream.evals.errors import of_share
from pretrain.downstream.evals.frozen import Frozen, numbered
from pretrain.downstream.evals.labelled import samples
from pretrain.downstream.evals.result import Result, both_halves, counted
from pretrain.downstream.evals.sets import LabelledSet
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.optim.clip import clip_by_module
from pretrain.optim.param_groups import adamw, apply_schedule, param_groups
from pretrain.optim.schedules import values_at
from pretrain.phase import fresh_network, phase_loader, seeded

_HEAD, _DEPTH = 3, 4  # streams of randomness beside those of pretrain.phase


class LabelledCrops(NamedTuple):
    """Normalised crops [B, 3, H, W] and the class of each, int64 [B]."""

    crops: Tensor
    classes: Tensor


class Supervised:
    """A backbone and its classifier; see `loop.Learner`.

    Args:
        config: of one phase.
        num_classes: 2 or more.
    """

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self.config = config
        vit = fresh_network(config).backbone
        head = nn.Linear(vit.embed_dim, num_classes)
        nn.init.normal_(head.weight, std=0.01, generator=seeded(config.seed, _HEAD))
        nn.init.zeros_(head.bias)
        self.vit, self.head = vit, head
        self.network = nn.ModuleDict({"backbone": vit, "head": head}).train()
        optim = config.optim
        groups = param_groups(
            self.network.named_parameters(), vit.depth, optim.layerwise_decay, optim.patch_embed_lr_multiplier
        )
        self.optimizer = adamw(groups, optim)

    def step(self, batch: LabelledCrops, step: int) -> dict[str, Tensor | float]:
        config = self.config
        apply_schedule(self.optimizer, values_at(config.optim, step, config.steps, config.global_batch_size))
        self.network.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            cls = self.vit([batch.crops], generator=seeded(config.seed, _DEPTH, step))[0].cls
            logits = self.head(cls)
        loss = F.cross_entropy(logits.float(), batch.classes)
        loss.backward()
        modules = {name: list(child.parameters()) for name, child in self.network.named_children()}
        norms = clip_by_module(modules, config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        right = (logits.argmax(dim=1) == batch.classes).float().mean()
        return {"loss": loss.detach(), "loss/right": right, "grad_norm/backbone": norms["backbone"]}

    def backbone(self) -> VisionTransformer:
        self.network.eval()
        return self.vit

    def state(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def accuracy(self, frozen: Frozen, data: LabelledSet, classes: Sequence[str]) -> Result:
        """How often its own classifier is right on `val`."""
        val = both_halves(frozen, data)["val"]
        with torch.no_grad():
            answers = self.head(val.last).argmax(dim=1)
        share = float((answers == torch.from_numpy(numbered(val.labels, classes))).float().mean())
        found = counted({"val": val})
        return Result(value=share, standard_error=of_share(share, len(answers)), figures={}, **found)


class LabelledLoader:
    """The trainer's batches with the labels of their images.

    Args:
        config: of one phase.
        labels: key of an image -> its label.
    """

    def __init__(self, config: TrainConfig, labels: dict[str, str]) -> None:
        self.labels, self.classes = labels, sorted(set(labels.values()))
        crops, masks = replace(config.crops, num_local_crops=0), replace(config.masks, probability=0.0)
        self.config = replace(config, crops=crops, masks=masks)
        self.tables = read_tables(config.data)
        self.known: dict[tuple[int, int], int] = {}

    def batches(self, start: int) -> Iterable[LabelledCrops]:
        """Of this step and all later ones."""
        loader = phase_loader(self.config, 0, start, self.tables)
        return self._labelled(loader)

    def _labelled(self, loader: Loader) -> Iterator[LabelledCrops]:
        for step, batch in zip(loader.numbers, loader, strict=True):
            if batch.skipped:
                raise ValueError(f"{batch.skipped[0].image} is damaged: another would have its label; take it out.")
            datasets, rows = loader.steps.order.batch(step)
            pairs = zip(datasets.tolist(), rows.tolist(), strict=True)
            yield LabelledCrops(_first_crop(batch), torch.tensor([self._class(loader, *pair) for pair in pairs]))

    def _class(self, loader: Loader, dataset: int, row: int) -> int:
        if (dataset, row) not in self.known:
            name = loader.steps.readers[dataset].name(row)
            key = split_name(name.rpartition(":")[2])[0]
            if key not in self.labels:
                raise ValueError(f"{name} has no label: the set of `labels` has none for the key {key!r}.")
            self.known[dataset, row] = self.classes.index(self.labels[key])
        return self.known[dataset, row]


def read_all_labels(data: LabelledSet) -> dict[str, str]:
    """key -> label of the training half of a set.

    Raises:
        ValueError: one key with two labels.
    """
    found: dict[str, str] = {}
    for sample in samples(data.train, data.train_labels):
        if sample.label is not None and found.setdefault(sample.key, sample.label) != sample.label:
            raise ValueError(f"{data.train} has two images {sample.key!r} with different labels.")
    return found


def _first_crop(batch: Batch) -> Tensor:
    """[B, 3, H, W]: the first global crop of each image, distorted and normalised."""
    one = replace(
        batch, global_crops=batch.global_crops[:1], global_photometric=batch.global_photometric[:1], gram_crops=None
    )
    return prepare(one, "cpu")[0]
