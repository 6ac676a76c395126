"""python -m curation.run --seed NAME_OR_PATH: a raw image pool -> curated WebDataset shards, a report, an account."""

import _thread
import argparse
import contextlib
import errno
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from configs.loader import config_names, load_config
from curation.config import CurationConfig
from curation.folder import Folder
from curation.lock import hold
from curation.ownership import check_run_folder
from curation.pipeline import STAGES, Inputs, Run, run_pipeline
from curation.progress import duration
from curation.reading.listing import find_parts
from curation.seeds import SeedSet, locate_seed, set_name
from curation.workers import WorkerLost

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 an error in one sentence, 2 wrong usage, 130 stopped."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            parser.error(f"unknown flag {word!r}; see --help")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(options, [*options.overrides, *rest])
    except KeyboardInterrupt:
        print("\nStopped. Nothing is lost: the same command continues where this one stopped.", file=sys.stderr)
        return _INTERRUPTED
    except ValueError as error:
        if os.environ.get("SEEDBED_TRACEBACK"):  # for developers: where the sentence came from
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except WorkerLost as error:
        print(f"error: {error}. If memory ran out, lower execution.workers or execution.memory_gb.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {_os_sentence(error)}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    seeds = options.seed or []
    is_demo = "demo" in seeds
    config = load_config(CurationConfig, "curation", options.config or ("demo" if is_demo else "web"), overrides)
    if is_demo and (len(seeds) > 1 or options.pool or options.evaluation):
        raise ValueError("--seed demo brings its own pool, seed and evaluation images; give it alone.")
    out = Folder(options.out or (f"runs/{'-'.join(set_name(seed) for seed in seeds) or 'balanced'}"))
    check_run_folder(out)
    with contextlib.ExitStack() as until_done:
        return _run_in(out, options, config, until_done)


def _run_in(out: Folder, options: argparse.Namespace, config: CurationConfig, until_done: contextlib.ExitStack) -> int:
    seeds, truth = options.seed or [], None
    is_demo = "demo" in seeds
    if is_demo:
        from curation.demo import make_demo

        # A dry run leaves nothing behind, so its demo pool goes to a folder that goes away.
        if options.dry_run:
            root = Path(until_done.enter_context(tempfile.TemporaryDirectory()))
        else:
            until_done.enter_context(hold(out, _stop_main))
            root = Path(out.path("demo"))
        demo = make_demo(root)
        sets = {"demo": SeedSet(name="demo", urls=(str(demo.seed),), rule=config.retrieve)}
        pool, evaluations, truth = [str(demo.pool)], {"demo": str(demo.evaluation)}, demo.truth
    else:
        if not seeds and not config.balance.is_wanted():
            raise ValueError(
                f"nothing says what to keep: give --seed, one of demo, {', '.join(config_names('seeds'))}, or a path; "
                "or set balance.num_images."
            )
        if not options.pool:
            raise ValueError("--pool is missing: the URL of the raw images (tars, Parquet files, a folder, or a glob).")
        pool, sets, evaluations = options.pool, {}, {}
        for name in seeds:
            seed = locate_seed(name, options.seed_root, config.retrieve)
            unique = set_name(seed.name, list(sets))
            sets[unique] = seed
        for url in options.evaluation or []:
            evaluations[set_name(url, list(evaluations))] = url
    per_part = config.embed.images_per_folder_part
    inputs = Inputs(
        pool=find_parts(pool, per_part),
        seeds={name: (seed, find_parts(seed.urls, per_part)) for name, seed in sets.items()},
        evaluations={name: find_parts([url], per_part) for name, url in evaluations.items()},
    )
    run = Run(out, config, inputs)
    if options.dry_run:
        from curation.plan import describe

        print(describe(run))
        return 0
    if not is_demo:  # after the listing, so that a wrong input leaves no trace
        until_done.enter_context(hold(out, _stop_main))
    asked = {"seeds": seeds, "pool": pool, "evaluations": evaluations, "config": asdict(config)}
    out.write_bytes("run.json", json.dumps(asked, indent=1).encode())
    for step, seconds in run_pipeline(run, options.until):
        print(f"{step:<28} {'as before' if seconds is None else duration(seconds)}", file=sys.stderr)
    if options.until == "report":
        status = run.manifests["report"].counts
        print(f"kept {status['kept']:,} of {status['images']:,} images: {out.url}/shards, {out.url}/report.html")
        if truth is not None:
            from curation.truth import format_score, read_truth, score

            print(format_score(score(out.read_table("decisions.parquet"), read_truth(truth))))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m curation.run",
        description="Raw image pool + seed set -> curated WebDataset shards, report.html, decisions.parquet. "
        "Run the same command again to continue after an interruption; finished stages are skipped.",
    )
    parser.add_argument(
        "--seed", action="append", metavar="NAME_OR_PATH", help="demo, a name in configs/seeds, or images; repeatable"
    )
    parser.add_argument("--seed-root", metavar="PATH", help="folder of the named seed sets, each below its name")
    parser.add_argument("--pool", action="append", metavar="URL", help="raw images: tars, Parquet, folders; globs")
    parser.add_argument("--evaluation", action="append", metavar="URL", help="images that must not be kept; repeatable")
    parser.add_argument("--out", metavar="RUN", help="run folder, local or any fsspec URL (default: runs/<seed>)")
    parser.add_argument(
        "--config", metavar="NAME_OR_PATH", help=f"one of {', '.join(config_names('curation'))}, or a file"
    )
    parser.add_argument("--until", choices=STAGES, default="report", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="say what would be read, done and written, and its cost")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, for example dedup.similarity_threshold=0.9"
    )
    return parser


def _stop_main() -> None:
    """From another thread: end what the main thread does, as a signal would."""
    _thread.interrupt_main(signal.SIGTERM)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _os_sentence(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}. Free some space, then run the same command; it continues where it stopped."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission{where}. Change the permissions or choose another --out, then run the same command."
    return f"{' '.join(str(error).split())}. Mend that, then run the same command; it continues where it stopped."


if __name__ == "__main__":
    sys.exit(main())
