"""python -m benchmarks.bytes [--label NAME] [--config NAME] [key=value ...]: see the package's own words."""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmarks.bytes
from benchmarks.bytes import backward
from benchmarks.bytes.compiled import backend
from benchmarks.bytes.count import Counter
from benchmarks.bytes.device import described
from benchmarks.train_step import STEP, fixed_batch
from pretrain import compiling
from pretrain.config import TrainConfig, load_train_config
from pretrain.losses.prototypes import compiled_pass
from pretrain.phase import Phase
from pretrain.student_teacher import Network, build_network

RESULTS = Path(__file__).parents[1] / "results"
# Two heads and Sinkhorn-Knopp, as in the full recipes.
STEP_OF = ("heads.tied=false", "loss.centering=sinkhorn", "loss.koleo_group_size=0", "global_batch_size=64")
GB = 1e9
PARTS = {
    "products of the networks": [("blocks", "products"), ("rest", "products")],
    "attention": [("blocks", "attention")],
    "blocks, elementwise": [("blocks", "elementwise")],
    "embedding, heads, norms": [("rest", "elementwise")],
    "cross-entropies": [("cross-entropies", "elementwise"), ("cross-entropies", "products")],
    "Sinkhorn": [("Sinkhorn", "elementwise"), ("Sinkhorn", "products")],
    "clip, AdamW, EMA": [("optimizer", "elementwise")],
    "colours, transfers": [("colours, transfers", "elementwise"), ("colours, transfers", "products")],
}
"""rows of the table, and what of the counts each one is"""


class Unwatched:
    """In place of `FiniteWatch`, whose answer is copied to page-locked memory, which needs a driver."""

    def watch(self, step: int, values: Any) -> Tensor:
        return torch.zeros((), device="cuda")

    def check(self, wait: bool = False) -> None:
        pass


def on_fake_gpu(network: Network) -> Network:
    """Parameters on `meta` to fake CUDA tensors; initial values are nothing to count."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
    return network


def count_step(config: TrainConfig) -> Counter:
    """One step of a phase, counted; compiled as `execution.compile` says."""
    counter, batch = Counter(), fixed_batch(config, most_pictures=2)
    with ExitStack() as stack:
        with torch.device("meta"):
            networks = [build_network(config) for _ in range(2)]
        for context in (
            described(),
            backward.in_python(counter.enter_node),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            stack.enter_context(context)
        stack.callback(compiled_pass.cache_clear)  # what was compiled here only counts
        torch._dynamo.reset()
        stack.enter_context(patch.object(compiling, "BACKEND", backend(counter)))
        phase = Phase(config, 0, *(on_fake_gpu(network) for network in networks))
        phase.finite = Unwatched()  # type: ignore[assignment]  # stands in for the watch
        counter.leave_out(phase.student.parameters())
        stack.enter_context(counter)
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            phase.step(batch, STEP, diagnose=False)
    return counter


def figures(config: TrainConfig, counter: Counter) -> dict[str, Any]:
    """GB and launches of every part, and GB kept for the backward pass."""
    parts = {}
    for part, counts in PARTS.items():
        found = [counter.traffic[count] for count in counts]
        parts[part] = {
            "gb": round(sum(traffic.bytes for traffic in found) / GB, 2),
            "launches": sum(traffic.launches for traffic in found),
        }
    whole = {
        "gb": round(sum(traffic.bytes for traffic in counter.traffic.values()) / GB, 2),
        "launches": sum(traffic.launches for traffic in counter.traffic.values()),
    }
    kept = {"gb": round(counter.saved / GB, 2), "launches": None}
    return {
        "form": "compiled" if config.execution.compile else "eager",
        "parts": parts | {"in all": whole, "kept": kept},
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each part, a column for each form and label."""
    heads = [f"{line['label']}, {line['form']}" for line in lines]
    rows = [["part", *heads], ["---", *["---:"] * len(heads)]]
    for part in lines[0]["parts"]:
        cells = [line["parts"][part] for line in lines]
        named = "kept for the backward" if part == "kept" else part
        rows.append([named, *(_cell(cell) for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(found: dict[str, Any]) -> str:
    launches = "" if found["launches"] is None else f", {found['launches']:,}"
    return f"{found['gb']:,.1f} GB{launches}"


def page(lines: Sequence[dict[str, Any]]) -> str:
    """Everything kept, one table for each step that was counted."""
    blocks = ["# Bytes and launches of a step, counted", (benchmarks.bytes.__doc__ or "").split("\n\n", 2)[2].strip()]
    for step in dict.fromkeys(line["step"] for line in lines):
        blocks += [f"## {step}", table([line for line in lines if line["step"] == step])]
    return "\n\n".join(blocks) + "\n"


def keep(new: Sequence[dict[str, Any]]) -> None:
    """Beside the earlier results, in place of those of the same step, label and form."""
    path = RESULTS / "bytes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    same = {(line["step"], line["label"], line["form"]) for line in new}
    lines = [line for line in lines if (line["step"], line["label"], line["form"]) not in same] + list(new)
    RESULTS.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.with_suffix(".md").write_text(page(lines))


def described_step(config: TrainConfig) -> str:
    sizes = f"2 x {config.crops.global_px} + {config.crops.num_local_crops} x {config.crops.local_px} px"
    model = f"{config.model.architecture}, patch {config.patch_size}"
    prototypes = f"K = {config.heads.dino.num_prototypes:,}"
    return f"{model}, {config.global_batch_size} images of {sizes}, {prototypes}, {config.precision}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bytes",
        description=benchmarks.bytes.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="dinov2_vitl16_short")
    parser.add_argument("--label", help="keep the result, as a column of this name")
    parser.add_argument("--form", choices=("eager", "compiled"), action="append", help="default: both")
    parser.add_argument("--operators", type=int, default=0, help="also list so many operators, the largest first")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_intermixed_args(arguments)
    lines = []
    for form in asked.form or ("eager", "compiled"):
        compiled = f"execution.compile={str(form == 'compiled').lower()}"
        config = load_train_config(asked.config, [*STEP_OF, *asked.overrides, compiled], [])
        counter = count_step(config)
        lines.append({"step": described_step(config), "label": asked.label or "now", **figures(config, counter)})
        largest = sorted(counter.by_operator.items(), key=lambda item: -item[1].bytes)[: asked.operators]
        for (region, operator), traffic in largest:
            print(f"{region:18} {operator:40} {traffic.bytes / GB:8.2f} GB {traffic.launches:6}")
    print(table(lines))
    if asked.label:
        keep(lines)


if __name__ == "__main__":
    main()
