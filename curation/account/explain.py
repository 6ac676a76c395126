"""python -m curation.explain RUN KEY: one image's story in words, from decisions.parquet and the stages' files."""

import argparse
import difflib
import sys
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.account.fates import Duplicates, duplicates_of, leaks_of, representatives_of
from curation.account.report.account import Account, open_account
from curation.account.report.wording import plural, reason_meaning, step_words, unread, visible, words
from curation.engine.ranges import range_file
from curation.engine.store import INDEX_SCHEMA
from curation.ops.hashes import hash_distances
from curation.reading.again import LOST_REASONS
from curation.stages import exclude
from curation.stages.cluster import Clustering
from curation.stages.exclude import EXCLUDED
from curation.stages.groups import STEPS
from curation.stages.join import Joined
from curation.stages.members import unit_rows
from curation.writing.placed import index_name

_LISTED = 5  # copies, links and draws told one by one
_LARGEST_PATH_SEARCH = 5000  # images of a component through which a chain of links is looked for
_WIDTH, _INDENT = 100, 14
_ALIKE = {"exact": "the very same bytes", "perceptual": "equal perceptual hashes"}


def explain(run: str, key: str | None = None, gid: int | None = None) -> str:
    """What became of a pool image, and why.

    Args:
        run: folder or URL of a finished run.
        key: of the image; where several images of the pool share it, all are told.
        gid: the image's row number, instead of a key.

    Raises:
        ValueError: not a finished run; no such key (the nearest are named) or gid.
    """
    account = open_account(run)
    if gid is not None:
        num = account.pool.num_images
        if not 0 <= gid < num:
            raise ValueError(f"gid {gid} is not in {run}: its pool has the gids 0 to {num - 1:,}.")
        return story(account, gid)
    gids = account.decisions(pc.field("key") == key, ["gid"])["gid"].to_pylist()
    if not gids:
        raise ValueError(_unknown_key(account, str(key)))
    told = [story(account, gid) for gid in gids]
    several = [f"{len(gids):,} images of the pool have the key {visible(key)}.\n"] if len(gids) > 1 else []
    return "\n".join(several + told)


def story(account: Account, gid: int) -> str:
    """The story of one pool image: a verdict, then a labelled sentence or two for each stage that it came through."""
    row = account.decision(gid)
    index = account.pool.take(np.array([gid]), INDEX_SCHEMA.names).to_pylist()[0]
    parts = [("origin", _origin(index)), ("image", _image(index, row))]
    if row["reason"] == EXCLUDED:
        parts.append(("excluded", _excluded(account, gid)))
    if row["status"] != "rejected" or row["reason"] in LOST_REASONS:
        parts.append(("duplicates", _duplicates(account, gid, row)))
        if account.names("embed/evaluation-"):
            parts.append(("evaluation", _evaluation(account, gid, row)))
        if row["cluster"] is not None:
            parts.append(("cluster", _cluster(account, row)))
            parts.append(("drawn by", " ".join(_draws(account, gid, row["cluster"])) or "nothing."))
        if row["status"] == "kept":
            parts.append(("shard", _shard(account, gid, row)))
    release = account.manifest("decide").settings["release"]
    if release > 1 and row["release"] is not None:
        parts.append(("release", _release(row, release)))
    lines = [f"{visible(row['key'])} (gid {gid}): {_verdict(row)}"]
    for label, text in parts:
        filled = textwrap.wrap(text, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {label if i == 0 else '':<{_INDENT - 2}}{line}" for i, line in enumerate(filled)]
    return "\n".join(lines) + "\n"


def _verdict(row: dict[str, Any]) -> str:
    status, reason = row["status"], row["reason"]
    if status == "kept":
        return f"kept ({reason})."
    if status == "rejected":
        return f"rejected as {words(str(reason))}."
    if status == "duplicate":
        return f"dropped as a duplicate of {visible(row['duplicate_of'])}."
    if status == "leak":
        return f"dropped, because it leaks {visible(row['eval_match'])} of the evaluation set {row['evaluation']}."
    return "not kept: nothing drew it."


def _origin(index: dict[str, Any]) -> str:
    member = index["image"]
    if index["unread_bytes"] is not None:
        return f"{visible(index['source'])}; {unread(index['unread_bytes'], index['unread_images'])}."
    if member is None:
        return f"{visible(index['source'])}; no image could be located there."
    if index["source_kind"] == "parquet":
        where = f"row {member['offset']:,} of the column {visible(member['name'])} in {visible(index['source'])}"
    elif index["source_kind"] == "tar":
        where = f"{visible(member['name'])} at byte {member['offset']:,} of {visible(index['source'])}"
    else:
        where = f"{visible(member['name'])} in {visible(index['source'])}"
    others = [visible(other["suffix"] or other["name"]) for other in index["others"] or []]
    beside = f"; beside it {', '.join(others[:_LISTED])}" if others else ""
    return f"{where}, {plural(max(member['size'], 0), 'byte')}{beside}."


def _image(index: dict[str, Any], row: dict[str, Any]) -> str:
    size = f"{index['width']:,} x {index['height']:,} px" if index["width"] else ""
    what = ", ".join(word for word in (index["format"], size, index["mode"]) if word)
    digest = f" sha256 {index['sha256'].hex()}." if index["sha256"] else ""
    odd = f" {words(index['warning']).capitalize()}, but good." if index["warning"] and index["status"] == "ok" else ""
    if row["status"] != "rejected":
        return f"{what}.{odd}{digest} It was read, and passed the filters."
    meaning = reason_meaning(str(row["reason"]))
    why = f"{words(str(row['reason']))}{f' ({meaning})' if meaning else ''}"
    if row["reason"] in LOST_REASONS:
        return f"{what}.{odd}{digest} It was read, and passed the filters; it was {meaning}."
    verdict = f"A filter rejected it: {why}." if index["status"] == "ok" else f"It could not be used: {why}."
    return f"{what + '.' if what else ''}{odd}{digest} {verdict}".strip()


def _excluded(account: Account, gid: int) -> str:
    told = []
    for name in account.names("exclude/"):
        found = exclude.reason_for(account.folder / f"exclude/{name}", gid // account.ranges.size, gid)
        if found is not None:
            run = visible(account.manifest(f"exclude/{name}").figures["run"])
            told.append(f"{run} has image {visible(found[0])} ({_ALIKE[found[1]]}).")
    return " ".join(told)


# --- duplicates ------------------------------------------------------------------------------------------------------


def _duplicates(account: Account, gid: int, row: dict[str, Any]) -> str:
    if row["component"] is None:
        return "no other image of the pool is a near-duplicate of it."
    duplicates = duplicates_of(account.folder, account.ranges, gid, gid + 1)
    members = account.decisions(pc.field("component") == row["component"], ["gid"])["gid"].to_numpy()
    elected = int(duplicates.representative[0])
    final = int(representatives_of(account.folder, account.ranges, gid, gid + 1)[0])
    name = "itself" if elected == gid else f"{account.key(account.pool, elected)} (gid {elected})"
    text = [f"one of {plural(len(members), 'near-duplicate')}, component {row['component']}, represented by {name}."]
    if elected != gid:
        text.append(_link_to(account, gid, elected, members, duplicates))
    if final not in (-1, elected):
        taken = "this one" if final == gid else f"{account.key(account.pool, final)} (gid {final})"
        text.append(f"That one matched an evaluation image, so {taken} stands for the group instead.")
    if len(members) > 2:
        text.append(_strongest_links(account, gid, members))
    return " ".join(part for part in text if part)


def _link_to(account: Account, gid: int, elected: int, members: np.ndarray, duplicates: Duplicates) -> str:
    """How an image hangs together with its representative."""
    similarity, name = duplicates.similarity[0], STEPS[duplicates.step[0]]
    if name == "exact":
        return "Both have the very same bytes."
    if name == "perceptual":
        bits = f"{_hash_distance(account, gid, elected)} of 256 bits of their perceptual hashes differ"
        return f"They were linked by perceptual hash: {bits}" + (
            "." if np.isnan(similarity) else f", cosine {similarity:.3f}."
        )
    if name == "embedding":
        return f"They were linked by embedding, cosine {similarity:.3f}."
    path = _path(account, gid, elected, members)
    if not path:
        return "They are linked through other images of the group."
    told = [f"{account.key(account.pool, b)} ({value:.3f})" for b, value in path]
    if len(told) > 2 * _LISTED:
        told = [*told[:_LISTED], "…", *told[-_LISTED:]]
    return (
        f"They are no match of each other; a chain of {plural(len(path), 'match', 'matches')} joins them (cosines), "
        f"the weakest {min(value for _, value in path):.3f}: {', '.join(told)}."
    )


def _hash_distance(account: Account, a: int, b: int) -> int:
    """Bits in which two images' hashes differ, or one's and that of the other's mirror image."""
    table = account.pool.take(np.array([a, b]), ["pdq", "pdq_mirrored"])
    own, other, mirrored = (
        np.frombuffer(value, np.uint8)[None]
        for value in (table["pdq"][0].as_py(), table["pdq"][1].as_py(), table["pdq_mirrored"][1].as_py())
    )
    return int(min(hash_distances(own, other)[0], hash_distances(own, mirrored)[0]))


def _edges(account: Account, condition: pc.Expression) -> Iterator[dict[str, Any]]:
    """Links (a, b, similarity, step) that meet a condition on a and b."""
    linked = pc.field("similarity") >= account.manifest("dedup").figures["similarity_threshold"]
    files = [("perceptual", f"dedup/edges/{name}", condition) for name in (account.folder / "dedup/edges").names()]
    files += [
        ("embedding", f"join/edges/{piece}", condition & linked) for piece in Joined(account.folder / "join").pieces()
    ]
    for step, file, asked in files:
        for edge in account.rows(file, asked, ["a", "b", "similarity"]).to_pylist():
            yield {**edge, "step": step}


def _same_bytes(account: Account, gid: int, members: np.ndarray) -> list[int]:
    """gids of a component with this image's bytes, ascending; the first stands for them in the links."""
    digests = account.pool.take(members, ["sha256"])["sha256"].to_pylist()
    own = digests[int(np.searchsorted(members, gid))]
    return [int(m) for m, digest in zip(members, digests, strict=True) if digest == own]


def _strongest_links(account: Account, gid: int, members: np.ndarray) -> str:
    same = _same_bytes(account, gid, members)
    at = same[0]
    best: dict[int, tuple[float, str]] = {}
    for edge in _edges(account, (pc.field("a") == at) | (pc.field("b") == at)):
        other = edge["b"] if edge["a"] == at else edge["a"]
        if other != at:
            best[other] = max(best.get(other, (-2.0, "")), (edge["similarity"], edge["step"]))
    text = ""
    if len(same) > 1:
        others = [account.key(account.pool, m) for m in same if m != gid]
        text = f"Same bytes: {_listed(others)}. "
    if best:
        order = sorted(best, key=lambda other: (-best[other][0], other))
        links = [
            f"{account.key(account.pool, o)} ({step_words(best[o][1])}, cosine {best[o][0]:.3f})"
            for o in order[:_LISTED]
        ]
        text += f"Its own links: {_listed(links, len(order))}."
    return text.strip()


def _path(account: Account, gid: int, target: int, members: np.ndarray) -> list[tuple[int, float]]:
    """shortest_chain between two images of a component; empty when the component is too large to look through."""
    if len(members) > _LARGEST_PATH_SEARCH:
        return []
    start, end = (_same_bytes(account, g, members)[0] for g in (gid, target))
    edges = _edges(account, pc.field("a").isin(pa.array(members)))
    return shortest_chain([(edge["a"], edge["b"], edge["similarity"]) for edge in edges], start, end)


def shortest_chain(links: Iterable[tuple[int, int, float]], start: int, end: int) -> list[tuple[int, float]]:
    """The fewest links (a, b, cosine) that lead from one image to another; the nearer neighbour first among equals.

    Returns:
        (image, cosine to the one before it) for each step, `end` last; empty where no chain leads there.
    """
    neighbours: dict[int, dict[int, float]] = {}
    for a, b, similarity in links:
        neighbours.setdefault(a, {})[b] = similarity
        neighbours.setdefault(b, {})[a] = similarity
    came_from = {start: start}
    queue = deque([start])
    while queue and end not in came_from:
        here = queue.popleft()
        for there in sorted(neighbours.get(here, {}), key=lambda n: (-neighbours[here][n], n)):
            if there not in came_from:
                came_from[there] = here
                queue.append(there)
    chain = []
    while end in came_from and end != start:
        chain.append((end, neighbours[came_from[end]][end]))
        end = came_from[end]
    return chain[::-1]


# --- evaluation, cluster, draws, shard -------------------------------------------------------------------------------


def _evaluation(account: Account, gid: int, row: dict[str, Any]) -> str:
    sets = account.names("embed/evaluation-")
    if row["status"] != "leak":
        return f"no match in {_listed(sets)}."
    leak = leaks_of(account.folder, account.ranges, gid, gid + 1).to_pylist()[0]
    match = f"{visible(row['eval_match'])} of {leak['evaluation']}"
    if leak["step"] == "component":
        via = f"{account.key(account.pool, leak['via'])} (gid {leak['via']})"
        return f"{via}, of its component, matches {match} ({leak['similarity']:.3f}); the whole component was dropped."
    if leak["step"] == "exact":
        return f"it has the very same bytes as {match}."
    if leak["step"] == "perceptual":
        return f"it matches {match} by perceptual hash: {round((1 - leak['similarity']) * 256)} of 256 bits differ."
    return f"it matches {match} by embedding, cosine {leak['similarity']:.3f}."


def _cluster(account: Account, row: dict[str, Any]) -> str:
    sizes = Clustering(account.folder / "cluster").sizes()
    return f"{row['cluster']} of {len(sizes):,}, with {plural(int(sizes[row['cluster']]), 'surviving image')}."


def _draws(account: Account, gid: int, cluster: int) -> Iterator[str]:
    """Every draw of this image by every seed set and by balance; where a set did not draw it, how near it came."""
    for name in account.names("retrieve/"):
        rule = account.manifest(f"retrieve/{name}").settings
        draws = account.rows(f"retrieve/{name}/matches.parquet", pc.field("gid") == gid).to_pylist()
        seeds = account.images(f"embed/seed-{name}")
        if rule["mode"] == "sample" and draws:
            draws.sort(key=lambda draw: (-draw["similarity"], draw["seed_gid"]))
            told = [
                f"{account.key(seeds, d['seed_gid'])} (its no. {d['rank'] + 1}, cosine {d['similarity']:.3f})"
                for d in draws[:_LISTED]
            ]
            yield f"{plural(len(draws), 'seed image')} of {name}: {_listed(told, len(draws))}."
        elif rule["mode"] == "sample":
            yield f"no seed image of {name}. {_nearest_seed(account, gid, name, rule)}"
        elif rule["mode"] == "cluster" and draws:
            yield f"the seed set {name}, which hit its cluster."
        elif rule["mode"] == "cluster":
            hit = account.rows(f"retrieve/{name}/matches.parquet", pc.field("cluster") == cluster, ["gid"]).num_rows
            why = (
                f"it hit the cluster, but drew {plural(hit, 'other image')} from it"
                if hit
                else f"fewer than {plural(rule['min_hits'], 'seed image')} fell into its cluster"
            )
            yield f"not by the seed set {name}: {why}."
    if "balance" in account.steps:
        drawn = account.rows(
            f"balance/{range_file('balanced', gid // account.ranges.size)}", pc.field("gid") == gid
        ).num_rows
        yield "the balanced sample." if drawn else "not by the balanced sample."


def _nearest_seed(account: Account, gid: int, name: str, rule: dict[str, Any]) -> str:
    """The seed image most similar to this one, and what it drew instead."""
    seeds = account.images(f"embed/seed-{name}")
    encoder = next(
        f.path.split("/")[0] for f in account.manifest(f"embed/seed-{name}").files if f.path.endswith(".npy")
    )
    own = unit_rows(account.pool.take_embeddings(encoder, np.array([gid])))[0]
    best, best_gid = -2.0, -1
    for part in range(seeds.num_parts):
        rows = seeds.embeddings(encoder, part)
        similarity = np.where(rows.any(axis=1), unit_rows(rows) @ own, -2)
        if len(rows) and similarity.max() > best:
            best, best_gid = float(similarity.max()), int(seeds.part_base[part] + similarity.argmax())
    if best_gid < 0:
        return ""
    drawn = account.rows(f"retrieve/{name}/matches.parquet", pc.field("seed_gid") == best_gid, ["similarity"])
    text = f"The nearest is {account.key(seeds, best_gid)}, cosine {best:.3f}"
    if best < rule["min_similarity"]:
        return f"{text}, below the least that counts, {rule['min_similarity']:g}."
    if drawn.num_rows >= rule["k"]:
        return f"{text}; its {rule['k']} draws all have {pc.min(drawn['similarity']).as_py():.3f} or more."
    return f"{text}."


def _release(row: dict[str, Any], release: int) -> str:
    if row["status"] != "kept":
        return f"release {row['release']} first kept it; release {release} drops it."
    if row["release"] == release:
        return f"release {release}, this one, keeps it first."
    return f"release {row['release']} kept it first, and it stays."


def _shard(account: Account, gid: int, row: dict[str, Any]) -> str:
    if row["shard"] is None:
        return "not written to one."
    index = f"shards/{index_name(row['shard'])}"
    members = account.rows(index, (pc.field("gid") == gid) & (pc.field("set") == "pool")).to_pylist()
    if not members:
        return f"shards/{row['shard']}."
    image = members[0]
    suffixes = ", ".join(visible(member["suffix"]) for member in members[1:])
    beside = f", with {suffixes}" if suffixes else ""
    name = f"{visible(image['key'])}.{visible(image['suffix'])}"
    return f"{name} at byte {image['offset']:,} of shards/{row['shard']}{beside}."


# --- words -----------------------------------------------------------------------------------------------------------


def _unknown_key(account: Account, key: str) -> str:
    longest = {pc.starts_with: 0, pc.ends_with: 0}  # beginning, and end, that some key shares
    candidates: dict[Any, set[str]] = {matches: set() for matches in longest}
    some = ""
    for name in account.decision_files:
        keys = account.folder.read_table(name, ["key"])["key"]
        some = some or str(keys[0].as_py())
        for matches, most in longest.items():
            for length in range(len(key), most - 1, -1):
                piece = key[:length] if matches is pc.starts_with else key[len(key) - length :]
                found = keys.filter(matches(keys, piece)).slice(0, 2000)
                if len(found):
                    kept = candidates[matches] if length == most else set()
                    longest[matches], candidates[matches] = length, kept | set(found.to_pylist())
                    break
    near = sorted(set().union(*candidates.values()))
    nearest = difflib.get_close_matches(key, near, n=3, cutoff=0.4)
    hint = f"the nearest are {', '.join(map(visible, nearest))}" if nearest else f"it has keys such as {visible(some)}"
    row = f"; for a row number say --gid {key}" if key.isdecimal() else ""
    return f"no image of {account.folder.url} has the key {visible(key)}: {hint}{row}."


def _listed(names: Sequence[str], total: int | None = None) -> str:
    shown = list(names[:_LISTED])
    more = (total if total is not None else len(names)) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 told, 1 an error in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m curation.explain", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("run", metavar="RUN", help="run folder, local or any fsspec URL")
    parser.add_argument("key", metavar="KEY", nargs="?", help="key of a pool image")
    parser.add_argument("--gid", type=int, help="row number of the image, instead of its key")
    options = parser.parse_args(arguments)
    if (options.key is None) == (options.gid is None):
        parser.error("give KEY or --gid N, one of the two")
    try:
        print(explain(options.run, options.key, options.gid), end="")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
