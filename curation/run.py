"""python -m curation.run --seed NAME_OR_PATH: a raw image pool -> curated WebDataset shards, a report, an account."""

import _thread
import argparse
import contextlib
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

from configs.loader import config_names, load_config, whole_number
from configs.messages import os_sentence
from curation.account.report.account import open_account
from curation.account.report.wording import plural, words
from curation.config import CurationConfig
from curation.engine.earlier import Earlier
from curation.engine.folder import Folder
from curation.engine.lock import hold
from curation.engine.ownership import check_run_folder
from curation.engine.progress import duration
from curation.engine.workers import WorkerLost
from curation.pipeline import run_pipeline
from curation.reading.again import LOST_REASONS
from curation.reading.listing import choose_column, find_parts
from curation.reading.seeds import SeedSet, locate_seed, set_name
from curation.state import Inputs, Run, set_label
from curation.steps import STAGES, plan_steps

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
        print(f"error: {os_sentence(error)}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    _refuse_empty(options)
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
    seeds, truth, is_described = options.seed or [], None, options.images is not None
    is_demo = "demo" in seeds
    for flag in ("cluster", "images", "evaluation_images"):
        if getattr(options, flag) is not None and not options.dry_run:
            raise ValueError(f"--{flag.replace('_', '-')} describes what --dry-run reckons with: give it with that.")
    if is_described and (is_demo or options.pool or options.extend or options.exclude):
        raise ValueError(
            "--images stands for a pool that need not exist: give it without --pool, --extend, --exclude and demo."
        )
    if options.evaluation_images is not None and not is_described:
        raise ValueError("--evaluation-images goes with --images; give real sets by --evaluation.")
    if is_demo:
        from curation.demo.pool import make_demo

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
        if not options.pool and not is_described:
            raise ValueError("--pool is missing: the URL of the raw images (tars, Parquet files, a folder, or a glob).")
        pool, sets, evaluations = options.pool or [], {}, {}
        for name in seeds:
            seed = locate_seed(name, options.seed_root or ("{root}" if is_described else None), config.retrieve)
            unique = set_name(seed.name, list(sets))
            sets[unique] = seed
        if (
            seeds
            and not config.balance.is_wanted()
            and not any(s.rule.mode != "none" or s.include_as_is for s in sets.values())
        ):
            raise ValueError(
                "retrieve.mode=none draws nothing, and no seed set is included as it is: choose sample or cluster."
            )
        for url in options.evaluation or []:
            evaluations[set_name(url, list(evaluations))] = url
    if is_described:
        from curation.planning.described import describe_pool
        from curation.planning.machines import load_cluster

        cluster = load_cluster(options.cluster) if options.cluster else None
        asked_about = options.images, options.evaluation_images or 0
        print(describe_pool(out, config, *asked_about, sets, evaluations, cluster))
        return 0
    # The demo's own pool lies in the run folder; of anyone else's images, what lies there is what a run wrote.
    run_folder = None if is_demo else out.url
    groups = [pool, *(seed.urls for seed in sets.values()), *([url] for url in evaluations.values())]
    listings = [find_parts(urls, config.embed.images_per_folder_part, run_folder) for urls in groups]
    if options.image_column is not None:
        listings = choose_column(listings, options.image_column)
    inputs = Inputs(
        pool=listings[0],
        seeds={name: (seed, listing) for (name, seed), listing in zip(sets.items(), listings[1:], strict=False)},
        evaluations=dict(zip(evaluations, listings[1 + len(sets) :], strict=True)),
    )
    earlier = extended(options.extend, out, config)
    run = Run(out, config, inputs, earlier=earlier, excluded=excluded(options.exclude or [], out, earlier))
    if options.dry_run:
        from curation.planning.machines import load_cluster
        from curation.planning.plan import describe

        print(describe(run, load_cluster(options.cluster) if options.cluster else None))
        return 0
    steps = plan_steps(run)  # before anything is written, so that a wrong input leaves no trace
    if not is_demo:
        until_done.enter_context(hold(out, _stop_main))
    asked = {"seeds": seeds, "pool": pool, "evaluations": evaluations, "config": asdict(config)}
    if options.extend:
        asked["extend"] = options.extend[0]
    if options.exclude:
        asked["exclude"] = options.exclude
    out.write_bytes("run.json", json.dumps(asked, indent=1).encode())
    for step, seconds in run_pipeline(run, options.until, steps):
        print(f"{step:<28} {'as before' if seconds is None else duration(seconds)}", file=sys.stderr)
    if options.until == "report":
        status = run.manifests["report"].counts
        print(f"kept {status['kept']:,} of {status['images']:,} images: {out.url}/shards, {out.url}/report.html")
    for line in [*changes(run), *losses(run)]:
        print(line)
    if options.until == "report" and truth is not None:
        from curation.account.truth import NEEDED, format_score, read_truth, score

        decisions = out.read_table("decisions.parquet", list(NEEDED))
        print(format_score(score(decisions, read_truth(truth))))
    return 0


def extended(urls: Sequence[str] | None, out: Folder, config: CurationConfig) -> Earlier | None:
    """The finished run that --extend names.

    Raises:
        ValueError: it is none, or is --out itself, or was cut or written in another way; two are named; or none is, and
            what lies in --out extends one, which would be replaced by a run that knows of no release.
    """
    if not urls:
        had = json.loads(out.read_bytes("run.json")).get("extend") if out.exists("run.json") else None
        if had:
            raise ValueError(f"{out.url} is a release that extends {had}: give --extend {had} again, or another --out.")
        return None
    if len(urls) > 1:
        raise ValueError(f"--extend is given {len(urls)} times ({', '.join(urls)}): a run extends one, give the last.")
    [url] = urls
    earlier = finished_run(url)
    if earlier.folder.path() == out.path():
        raise ValueError(f"--extend and --out are both {url}: a release has a folder of its own, give another --out.")
    for name, had, wanted in (
        ("range_rows", earlier.range_rows, config.range_rows),
        ("shard.format", earlier.manifests["shards"].settings["format"], config.shard.format),
    ):
        if had != wanted:
            raise ValueError(
                f"--extend {url} was made with {name}={had}, and this run has {wanted}: give {name}={had}, or start a "
                "run of its own."
            )
    return earlier


def excluded(urls: Sequence[str], out: Folder, earlier: Earlier | None) -> dict[str, Earlier]:
    """The finished runs that --exclude names, by short names.

    Raises:
        ValueError: one is none, is --out itself, or is given twice or by --extend too.
    """
    runs: dict[str, Earlier] = {}
    for url in urls:
        run = finished_run(url)
        if run.folder.path() == out.path():
            raise ValueError(f"--exclude and --out are both {url}: a run cannot exclude what it keeps itself.")
        if earlier is not None and run.folder.path() == earlier.folder.path():
            raise ValueError(f"--extend and --exclude are both {url}: its images stay, or are left out; choose one.")
        if any(run.folder.path() == other.folder.path() for other in runs.values()):
            raise ValueError(f"--exclude names {url} twice: once is enough.")
        runs[set_name(run.folder.url, list(runs))] = run
    return runs


def finished_run(url: str) -> Earlier:
    """Raises ValueError where it is none."""
    account = open_account(url)
    manifests = {step: account.manifest(step) for step in [*account.steps, "report"]}
    return Earlier(account.folder, manifests["decide"].settings["release"], account.pool.num_images, manifests)


def changes(run: Run) -> list[str]:
    """What a release adds to the one that it extends, and what it drops."""
    if run.earlier is None or "report" not in run.manifests:
        return []
    release = json.loads(run.folder.read_bytes("report.json"))["release"]
    reasons = ", ".join(f"{number:,} {words(why)}" for why, number in release["dropped"].items())
    why = (
        f" ({reasons}; they stay in its tars, left out by index/ and listed in shards/dropped.parquet)"
        if reasons
        else ""
    )
    return [
        f"release {run.release}, extending {run.earlier.folder.url}: {release['added']:,} added, {release['stay']:,} "
        f"stay, {sum(release['dropped'].values()):,} dropped{why}"
    ]


def losses(run: Run) -> list[str]:
    """What a run did not read or write: damaged shards and what is lost in them, files left out, changed images."""
    lines = []
    written = run.manifests["shards"].counts if "shards" in run.manifests else {}
    if lost := {reason: written[reason] for reason in LOST_REASONS if reason in written}:
        reasons = ", ".join(f"{count:,} {words(reason)}" for reason, count in lost.items())
        lines.append(
            f"{plural(sum(lost.values()), 'chosen image')} not in the shards ({reasons}); decisions.parquet says "
            "which, and the same command reads anew what changed."
        )
    for step, listing in run.inputs.listings().items():
        if step not in run.manifests:
            continue
        counts = run.manifests[step].counts
        names = ("damaged shards", "unread bytes", "unread images")
        damaged, unread_bytes, unread_images = (counts.get(name, 0) for name in names)
        about = f", about {plural(unread_images, 'image')}" if unread_images else ""
        lines.append(
            f"{set_label(step)}: {plural(damaged, 'damaged shard')} of {plural(len(listing), 'part')}, "
            f"{plural(unread_bytes, 'byte')} not read{about}; {plural(listing.num_ignored, 'file')} ignored"
        )
        lines += [f"  {note}" for note in listing.notes()]
    return lines


def _number_of_images(text: str) -> int:
    value = whole_number(text)
    if not isinstance(value, int) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images, such as 1e8 or 100_000_000")
    return value


def _refuse_empty(options: argparse.Namespace) -> None:
    """An empty value is mostly a shell variable that is not set, and would mean the working directory."""
    for flag in (
        "seed",
        "seed_root",
        "pool",
        "evaluation",
        "out",
        "config",
        "image_column",
        "extend",
        "exclude",
        "cluster",
    ):
        value = getattr(options, flag)
        if any(not text.strip() for text in ([value] if isinstance(value, str) else value or [])):
            raise ValueError(f"--{flag.replace('_', '-')} is empty: give a value, or leave the flag out.")


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
    parser.add_argument(
        "--image-column", metavar="NAME", help="column of the images in Parquet files, dotted where nested; else found"
    )
    parser.add_argument(
        "--extend",
        action="append",
        metavar="RUN",
        help="a finished run: keep what it kept, embed and write only what is new; --out is the new release",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="RUN",
        help="a finished run: keep no image that it keeps, of the same bytes or equal perceptual hashes; a near copy "
        "may stay; repeatable",
    )
    parser.add_argument("--out", metavar="RUN", help="run folder, local or any fsspec URL (default: runs/<seed>)")
    parser.add_argument(
        "--config", metavar="NAME_OR_PATH", help=f"one of {', '.join(config_names('curation'))}, or a file"
    )
    parser.add_argument("--until", choices=STAGES, default="report", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="say what would be read, done and written, and its cost")
    parser.add_argument(
        "--cluster",
        metavar="NAME_OR_PATH",
        help=f"with --dry-run: what to reckon with, one of {', '.join(config_names('clusters'))}, or a file; else this "
        "machine",
    )
    parser.add_argument(
        "--images",
        type=_number_of_images,
        metavar="N",
        help="with --dry-run, instead of --pool: so many web images of 110 kB",
    )
    parser.add_argument(
        "--evaluation-images", type=_number_of_images, metavar="N", help="with --images: so many in evaluation sets"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, for example dedup.similarity_threshold=0.9"
    )
    return parser


def _stop_main() -> None:
    """From another thread: end what the main thread does, as a signal would."""
    _thread.interrupt_main(signal.SIGTERM)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
