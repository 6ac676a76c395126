"""Where a teacher comes from, as its run folder has it: images, phases, the last evaluation; and its licence."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.engine.manifest import MANIFEST_NAME, Manifest
from pretrain.checkpoint import MANIFEST, PREFIX, read_manifest
from pretrain.downstream.backbone import Backbone
from pretrain.watch.lines import read_lines

RELEASED = {"dinov2": "apache-2.0", "dinov3": "dinov3-license"}
"""licences of the weights of each family as their repositories state them, facebookresearch/dinov2 and dinov3"""
EVALUATIONS = "evaluations.jsonl"
"""as pretrain.watch.metrics writes it, which needs more than using a backbone does"""
_TERMS = {"DINO": "dino_weight", "iBOT": "ibot_weight", "KoLeo": "koleo_weight"}
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*")


def provenance(backbone: Backbone) -> dict[str, Any]:
    """What an export's description gains: `data`, `phases` and `evaluation`, as far as the run folder is there.

    Raises:
        ValueError: a checkpoint that is damaged.
    """
    source, step = Path(backbone.source), backbone.description.get("step")
    run = _run_of(source)
    if run is None or step is None:
        return {}
    own = source if (source / MANIFEST).is_file() else None
    newest = max(run.glob(f"checkpoints/{PREFIX}*/{MANIFEST}"), default=None)
    found: dict[str, Any] = {}
    if checkpoint := own or (newest and newest.parent):
        meta = read_manifest(checkpoint)["meta"]
        if meta.get("config"):
            found = {"data": _data(meta, run), "phases": _phases(meta, backbone.description.get("phase"))}
    figures = [line for line in read_lines(run / EVALUATIONS) if line.get("step", 0) <= step and "failed" not in line]
    return found | ({"evaluation": figures[-1]} if figures else {})


def licence_of(backbone: Backbone, stated: str) -> str:
    """The licence of the weights: as stated, else as the export they come from or their release has it; else empty.

    Raises:
        ValueError: a name that is not one word.
    """
    if stated and not _LICENCE.fullmatch(stated):
        raise ValueError(
            f"--licence {stated!r} must be one word, as the Hugging Face hub has them: apache-2.0, cc-by-4.0."
        )
    released = RELEASED[backbone.settings["family"]] if backbone.released else ""
    return stated or backbone.description.get("licence", "") or released


def _run_of(source: Path) -> Path | None:
    """The run folder that a teacher or checkpoint folder lies in."""
    if source.name == "teacher":
        return source.parent
    return source.parent.parent if source.parent.name == "checkpoints" else None


def _data(meta: Mapping[str, Any], run: Path) -> list[dict[str, Any]]:
    """Each set of images of the phases that have begun: its name, place, phases, fingerprint and manifest."""
    config, sets = meta["config"], {}
    for phase, fingerprints in meta.get("data", {}).items():
        own = (config["phases"].get(phase) or {}).get("data", {}).get("datasets", {})
        for name, fingerprint in fingerprints.items():
            shards = (own.get(name) or {}).get("shards") or config["data"]["datasets"].get(name, {}).get("shards", "")
            new = {
                "name": name,
                "shards": shards,
                "fingerprint": fingerprint,
                "phases": [],
                "manifest": _manifest(shards, run),
            }
            sets.setdefault((name, fingerprint), new)["phases"].append(phase)
    return list(sets.values())


def _manifest(shards: str, run: Path) -> dict[str, Any] | None:
    """Of shards that curation wrote, and that are still where training read them: hash and counts of their manifest.

    A relative place is looked for from here, and from the folders around the run: training began in one of them.
    """
    bases = [Path(), *run.resolve().parents] if shards and "://" not in shards else []
    for folder in (base / shards / inner for base in bases for inner in ("", "shards")):
        try:
            manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):  # none, or one of something else: a common name
            continue
        written = [one for one in manifest.files if one.path.startswith("shard-")]
        counts = {"images": sum(one.rows for one in written), "bytes": sum(one.bytes for one in written)}
        return {"sha256": manifest.hash(), "key": manifest.key, "shards": len(written), **counts}
    return None


def _phases(meta: Mapping[str, Any], last: str | None) -> dict[str, int]:
    """Steps of each phase up to the last one."""
    config, steps = meta["config"], {}
    for name in config["phases"] or filter(None, [last]):
        settings = config["phases"].get(name) or {}
        while "steps" not in settings and settings.get("like"):
            settings = config["phases"].get(settings["like"]) or {}
        steps[name] = settings.get("steps", config["steps"])
        if name == last:
            break
    return steps


def settings_of_training(description: Mapping[str, Any]) -> list[str]:
    """The recipe in a few lines, from the config of the last phase."""
    try:
        config = description["config"]
        crops, optim, loss = config["crops"], config["optim"], config["loss"]
        weights = [f"{name} {loss[key]:g}" for name, key in _TERMS.items() if loss[key]]
        weights += [f"Gram {config['gram']['weight']:g}"] if config["gram"]["weight"] else []
        lines = [
            f"last phase: batches of {config['global_batch_size']:,} images, {config['precision']}; crops 2 x "
            f"{crops['global_px']} px and {crops['num_local_crops']} x {crops['local_px']} px",
            f"losses: {' + '.join(weights)}; AdamW, base rate {optim['base_lr']:g} (lr_rule: {optim['lr_rule']}), "
            f"weight decay {optim['weight_decay']:g} to {optim['weight_decay_end']:g}",
        ]
        started = {"started from": config["init_from"], "distilled from": config["distill_from"]}
    except (KeyError, TypeError):  # of another version: the settings are there all the same, for whoever reads them
        return []
    return lines + [f"{how} `{source}`, whose licence applies here too" for how, source in started.items() if source]
