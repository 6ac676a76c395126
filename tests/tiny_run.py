"""A small finished run with everything in it that a report or a story has to deal with; made once a session."""

import functools
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from curation.config import CurationConfig
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig
from curation.pipeline import run_pipeline
from curation.reading.listing import find_parts
from curation.reading.seeds import RetrievalRule, SeedSet
from curation.stages.balance import BalanceConfig
from curation.stages.embed import EmbedConfig
from curation.state import Inputs, Run

HOSTILE = ["<script>alert(1)<", 'a" onmouseover="alert(1)', "it's & <b>bold", "turn\u202eback", "esc\x1b[2Jape"]
REASON = "score_<img src=x>"


def picture(number: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A smooth picture that looks like no other number's."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_tar(path, samples: dict[str, dict[str, bytes]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def curate(out, pool, seeds=None, evaluations=None, **config) -> Run:
    seeds = {name: (seed, find_parts(seed.urls)) for name, seed in (seeds or {}).items()}
    evaluations = {name: find_parts([url]) for name, url in (evaluations or {}).items()}
    settings = CurationConfig(
        embed=EmbedConfig(encoder="descriptors", max_rejected_fraction=0.9),
        execution=ExecutionConfig(workers=2),
        **config,
    )
    run = Run(Folder(str(out)), settings, Inputs(find_parts([pool]), seeds, evaluations))
    run_pipeline(run)
    return run


@functools.cache
def full_run(folder: Path) -> Run:
    """Hostile keys, copies, leaks, damaged files, two seed sets of both modes, and the balanced branch."""
    root = folder / "tiny-run"
    pool = {f"p{i:02d}": {"jpg": jpeg(picture(i))} for i in range(24)}
    pool |= {key: {"jpg": jpeg(picture(100 + i))} for i, key in enumerate(HOSTILE)}
    pool |= {f"{key}-copy": {"jpg": jpeg(picture(100 + i), 40)} for i, key in enumerate(HOSTILE)}
    pool["p00-same"] = pool["p00"]
    pool["twice"] = {"jpg": jpeg(picture(210))}
    pool["<i>broken"] = {"jpg": b"\xff\xd8\xff not really"}
    pool["<i>nothing"] = {"txt": b"no picture"}
    pool["tiny"] = {"jpg": jpeg(picture(200, (8, 8)))}
    pool["scored"] = {"jpg": jpeg(picture(201)), "json": b'{"<img src=x>": 5}'}
    for i in range(4):
        pool[f"leak{i}"] = {"jpg": jpeg(picture(300 + i), 90 if i else 95)}
    other = {"twice": {"jpg": jpeg(picture(211))}}  # the same key in another shard
    seeds = {f"s{i:02d}": {"jpg": jpeg(picture(i, (90, 80)))} for i in range(12)}
    evaluation = {f"<e>{i}": {"jpg": jpeg(picture(300 + i))} for i in range(6)}
    seed_url = write_tar(root / "seed" / "seed.tar", seeds)
    write_tar(root / "pool" / "second.tar", other)
    return curate(
        root / "run",
        str(Path(write_tar(root / "pool" / "pool.tar", pool)).parent),
        {
            "near<b>": SeedSet(name="near<b>", urls=(seed_url,), rule=RetrievalRule(k=3)),
            "hit": SeedSet(
                name="hit", urls=(seed_url,), rule=RetrievalRule(mode="cluster", min_hits=1, images_per_cluster=2)
            ),
        },
        {"held-out": write_tar(root / "evaluation" / "held.tar", evaluation)},
        balance=BalanceConfig(num_images=6),
        filters=[{"kind": "size"}, {"kind": "score", "column": "<img src=x>", "max": 1.0}],
    )
