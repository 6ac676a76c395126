"""The page: one HTML file with its pictures, features, style and script inside; nothing is fetched from anywhere."""

import base64
import hashlib
import html
import json
import zlib
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch

from pretrain.downstream.explore.pictures import Compact, Embedded
from pretrain.downstream.pca import HEAT

_NAMED = 200  # of the pictures that were left out


@dataclass(frozen=True)
class About:
    """What the page says of itself."""

    backbone: str
    images: str
    """the set, as it was named"""
    chosen: int
    """images that were to be shown"""
    of: int
    """images of the set"""
    short_px: int
    left_out: list[tuple[str, str]]
    """key and reason"""


def page(pictures: Embedded, features: Compact, about: About) -> str:
    """The whole file. No name becomes markup, and no script runs but the one beside this file."""
    template, style, script = (
        resources.files("pretrain.downstream.explore").joinpath(f"explore.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    cls = torch.stack(pictures.cls)
    cosines = (cls @ cls.T).clamp(-1, 1).mul(32767).round().to(torch.int16).numpy()
    described = {
        "dims": len(features.values),
        "step": features.step,
        "heat": HEAT.astype(int).tolist(),
        "pictures": [
            {"key": key, "rows": rows, "columns": columns, "jpeg": base64.b64encode(jpeg).decode()}
            for key, (rows, columns), jpeg in zip(pictures.keys, pictures.grids, pictures.jpegs, strict=True)
        ],
    }
    blobs = {"patches": features.values, "colours": features.colours, "cls": cosines.astype("<i2")}
    data = f"<script type='application/json' id='described'>{_json(described)}</script>" + "".join(
        f"<script type='text/plain' id='{name}'>{_packed(values)}</script>" for name, values in blobs.items()
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )
    return template.format(
        policy=policy,
        style=style,
        data=data,
        script=script,
        backbone=html.escape(about.backbone),
        shown=_shown(len(pictures.keys), about),
        sizes=f"{about.short_px} px on the shorter side, {features.values.shape[1]:,} patches in all",
        compression=(
            f"{len(features.values)} of {pictures.patches[0].shape[1]} dimensions of each patch are in this file, in 8 "
            f"bits; they hold {features.kept:.1%} of its squared length. Cosines shown here differ from exact ones by "
            f"{features.mean_error:.3f} at the mean, and 99% of them by less than {features.high_error:.3f}. Those of "
            "whole pictures are exact to four decimals."
        ),
        left_out=_left_out(about.left_out),
    )


def _json(value: object) -> str:
    """For a script element, which `</script>` or `<!--` in a string would end or change."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def _shown(count: int, about: About) -> str:
    where = f"<b>{html.escape(about.images)}</b>"
    if about.chosen == about.of:
        return f"{count:,} pictures of {where}"
    return f"{count:,} of the {about.of:,} pictures of {where}, evenly spaced"


def _left_out(left_out: list[tuple[str, str]]) -> str:
    if not left_out:
        return ""
    lines = "".join(
        f"<li>{html.escape(key)} <small>{html.escape(reason)}</small></li>" for key, reason in left_out[:_NAMED]
    )
    more = f"<li>and {len(left_out) - _NAMED:,} more</li>" if len(left_out) > _NAMED else ""
    return f"<details><summary>{len(left_out):,} could not be read</summary><ul>{lines}{more}</ul></details>"
