"""The sections of the report: figures and chosen examples -> HTML. What comes from the pool passes through `clean`."""

import json
import math
import posixpath
import shlex
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from curation.account.report.charts import bars, clean, jpeg_url, percent, rank_sizes, scatter_map, stacked_bar
from curation.account.report.choices import Group, Leak, Map, Pair, Rejection, Row
from curation.account.report.pictures import Picture, Ref
from curation.account.report.wording import plural, reason_meaning, step_words, unread, words
from curation.engine.progress import duration

Pictures = Mapping[Ref, Picture]

_MAP_ORDER = ("not_retrieved", "duplicate", "leak", "kept", "seed")


def funnel(figures: Mapping[str, Any]) -> str:
    """Bars with counts and shares, then every status and, folded, every reason."""
    stages = figures["funnel"]["stages"]
    whole = stages[0][1]
    rows = [
        (name, count, f"{count:,} · {percent(count, whole)}", "kept" if name == "kept" else "flow")
        for name, count in stages
    ]
    lines = [
        f"<tr><td><i class='{status}'></i>{clean(words(status))}</td>"
        f"<td>{clean(step_words(reason) if reason != 'None' else 'nothing drew it')}</td>"
        f"<td class='num'>{count:,}</td><td class='num'>{percent(count, whole)}</td></tr>"
        for status, reasons in figures["funnel"]["reasons"].items()
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]
    return (
        f"{bars(rows, whole)}<p>Every image of the pool has one fate:</p>{stacked_bar(figures['funnel']['status'])}"
        "<details><summary>All reasons</summary><div class='scroll'><table><tr><th>status</th><th>reason</th>"
        f"<th class='num'>images</th><th class='num'>of the pool</th></tr>{''.join(lines)}</table></div></details>"
    )


def release(figures: Mapping[str, Any]) -> str:
    """What this release adds to the one that it extends, and what it drops, with reasons."""
    f = figures["release"]
    lines = "".join(
        f"<tr><td>{clean(words(why))}</td><td class='num'>{number:,}</td></tr>" for why, number in f["dropped"].items()
    )
    dropped = f"<table><tr><th>dropped</th><th class='num'>images</th></tr>{lines}</table>" if lines else ""
    return (
        f"<p>Release {f['number']:,}, which extends <code>{clean(public_url(f['extends']))}</code>: it adds "
        f"{plural(f['added'], 'image')}, keeps {f['stay']:,} of the earlier release and drops "
        f"{sum(f['dropped'].values()):,}. Shards of the earlier release are as they were; their index leaves out what "
        f"is dropped, which <code>shards/dropped.parquet</code> lists.</p>{dropped}"
    )


def duplicate_groups(groups: list[Group], figures: Mapping[str, Any], pictures: Pictures) -> str:
    """The largest groups and some others, each with its representative marked."""
    counts = figures["dedup"]
    if not groups:
        return "<p class='empty'>No two images of this pool were found to be near-duplicates.</p>"
    gone = counts["images in"] - counts["images out"]
    text = (
        f"<p>{plural(gone, 'image is a copy', 'images are copies')} of another: {counts['exact copies']:,} with the "
        "very same bytes, the others linked by perceptual hash or by embedding. Of each group one image, its "
        "representative (framed in green), goes on to the next stage.</p>"
    )
    parts = []
    for title, is_largest in (("The largest groups", True), ("Others, at random", False)):
        chosen = [group for group in groups if group.is_largest == is_largest]
        if chosen:
            parts.append(f"<h3>{title}</h3><div class='groups'>{''.join(_group(g, pictures) for g in chosen)}</div>")
    return text + "".join(parts)


def _group(group: Group, pictures: Pictures) -> str:
    # Of a pair, the tile's caption says all that there is to say.
    about = []
    if group.size > 2:
        least = (
            f"least cosine {group.least_similarity:.2f}" if math.isfinite(group.least_similarity) else "no direct match"
        )
        how = [f"{count:,} {step_words(name)}" for name, count in group.steps.items() if name]
        about = [f"<b>{group.size:,} images</b>", f"<span>{least}</span>", f"<span>{', '.join(how)}</span>"]
    about.append(f"<span><i class='{clean(group.status)}'></i>representative: {clean(words(group.status))}</span>")
    tiles = [_tile(pictures, group.representative, "representative", "star")]
    for m in group.members:
        value = f"{m.similarity:.3f}" if m.step == "embedding" else step_words(m.step)
        value = f"hash, {m.similarity:.3f}" if m.step == "perceptual" and not math.isnan(m.similarity) else value
        tiles.append(_tile(pictures, m.ref, value))
    more = group.size - 1 - len(group.members)
    if more > 0:
        tiles.append(f"<span class='more'>+ {more:,}<br>more</span>")
    return f"<article><header>{''.join(about)}</header><div class='tiles'>{''.join(tiles)}</div></article>"


def near_pairs(above: list[Pair], below: list[Pair], figures: Mapping[str, Any], pictures: Pictures) -> str:
    """Pairs on both sides of the threshold, side by side: what the threshold means."""
    threshold = figures["dedup"]["similarity_threshold"]
    if not above and not below:
        return f"<p class='empty'>No two images of the sample come near the threshold, cosine {threshold:g}.</p>"
    text = (
        f"<p>Two images are linked when the cosine of their embeddings reaches <b>{threshold:g}</b>. These are the "
        "pairs of a random sample that lie closest to that line: the linked ones should be copies, the others not.</p>"
    )
    sides = []
    for title, colour, pairs in (("Just above: linked", "duplicate", above), ("Just below: kept apart", "kept", below)):
        shown = "".join(_pair(pair, pictures) for pair in pairs) or "<p class='empty'>None in the sample.</p>"
        sides.append(f"<div><h3><i class='{colour}'></i>{title}</h3><div class='pairs'>{shown}</div></div>")
    return f"{text}<div class='sides'>{''.join(sides)}</div>"


def _pair(pair: Pair, pictures: Pictures) -> str:
    note = " · mirrored" if pair.mirrored else ""
    return (
        f"<div class='pair'><div>{_tile(pictures, pair.a)}{_tile(pictures, pair.b)}</div>"
        f"<p>cosine <b>{pair.similarity:.4f}</b>{note}</p></div>"
    )


def leaks(chosen: list[Leak], figures: Mapping[str, Any], pictures: Pictures) -> str:
    """Pool images beside the evaluation images that condemned them."""
    sets = list(figures["inputs"]["evaluations"])
    if not sets:
        return "<p class='empty'>No evaluation set was given, so none could be protected (--evaluation URL).</p>"
    counts = figures["decontaminate"]
    num = figures["funnel"]["status"]["leak"]
    names = ", ".join(f"{clean(name)} ({counts[f'leaks of {name}']:,})" for name in sets)
    if not num:
        return f"<p class='empty'>No image of the pool copies an image of {names}.</p>"
    settings = figures["config"]["decontaminate"]
    scope = "with everything in their near-duplicate groups" if settings["mode"] == "component" else "on their own"
    text = (
        f"<p>{plural(num, 'image')} would have carried evaluation images into training: {names}. Of these, "
        f"{counts['leaks, direct']:,} match one directly (same bytes, near perceptual hashes, or cosine at least "
        f"{settings['similarity_threshold']:g}); they were dropped {scope}.</p>"
    )
    return f"{text}<div class='leaks'>{''.join(_leak(leak, pictures) for leak in chosen)}</div>"


def _leak(leak: Leak, pictures: Pictures) -> str:
    set_name = leak.match.set.removeprefix("evaluation-")
    tiles = [_tile(pictures, leak.image, "pool", "out")]
    if leak.via is not None:
        tiles.append(_tile(pictures, leak.via, "its group"))
    tiles.append(_tile(pictures, leak.match, set_name, "eval"))
    if leak.step == "exact":
        value = "same bytes"
    elif leak.step == "perceptual":
        value = f"perceptual hash, {round((1 - leak.similarity) * 256)} of 256 bits differ"
    elif leak.step == "embedding":
        value = f"embedding, cosine <b>{leak.similarity:.3f}</b>"
    else:
        value = f"grouped with one that matches, <b>{leak.similarity:.3f}</b>"
    return f"<div class='leak'><div>{''.join(tiles)}</div><p>{value}</p></div>"


def retrieval(
    draws: Mapping[str, list[Row]], balanced: list[Row], figures: Mapping[str, Any], pictures: Pictures
) -> str:
    """A row for each chosen seed image or hit cluster, what it drew beside it; the same for the balanced branch."""
    parts = []
    for name, rows in draws.items():
        f = figures["retrieve"][name]
        num = f"{f['num_seeds']:,} seed images"
        if f["mode"] == "sample":
            k = figures["inputs"]["seeds"][name]["rule"]["k"]
            text = (
                f"{num} drew their {k:,} nearest survivors each: {f['num_draws']:,} draws, {f['num_images']:,} "
                f"different images. {_nearest_recall(f)}"
            )
        elif f["mode"] == "cluster":
            text = f"{num} hit {f['num_hit_clusters']:,} clusters, from which {f['num_images']:,} images were drawn."
        else:
            text = f"{num}; this set draws nothing from the pool."
        if f.get("shortfall"):
            text += f" {f['shortfall']:,} fewer than asked for: the pool holds no more."
        as_is = figures["inputs"]["seeds"][name]["include_as_is"]
        text += " The seed images themselves are in the shards too." if as_is else ""
        shown = "".join(_row(row, pictures) for row in rows)
        parts.append(f"<h3><i class='seed'></i>{clean(name)}</h3><p>{text}</p><div class='draws'>{shown}</div>")
    if balanced:
        shown = "".join(_row(row, pictures) for row in balanced)
        num = figures["balance"]["images"]
        text = f"{num:,} images drawn evenly over the concepts of the pool, whatever the seed sets ask for."
        parts.append(
            f"<h3><i class='kept'></i>Balanced sample</h3><p>{text}</p><div class='draws packed'>{shown}</div>"
        )
    return "".join(parts)


def _nearest_recall(f: Mapping[str, Any]) -> str:
    """How many of the nearest survivors were found, and how that is known."""
    if f["basis"] == "exact":
        return "They are the nearest: each seed image was compared with every survivor."
    return (
        f"Each looked into the {f['nprobe']:,} clusters nearest to it. Of the {f['num_pairs']:,} neighbours of "
        f"{f['num_queries']:,} seed images that were compared with every image, {_share(f['recall'])} lie there; with "
        f"95% confidence at least <b>{_share(f['lower_bound'])}</b> of all (asked for: {_share(f['target_recall'])})."
    )


def _row(row: Row, pictures: Pictures) -> str:
    asked = "".join(_tile(pictures, ref, "seed", "seed") for ref in row.asked)
    drawn = "".join(
        _tile(pictures, ref, "" if math.isnan(similarity) else f"{similarity:.3f}") for ref, similarity in row.drawn
    )
    label = f"<p>{clean(row.label)}</p>" if row.label else ""
    arrow = "<span class='arrow' aria-hidden='true'>→</span>" if asked else ""
    return f"<div class='draw'>{label}<div class='tiles'>{asked}{arrow}{drawn}</div></div>"


def clusters(figures: Mapping[str, Any]) -> str:
    """Sizes by rank, and what the common measures say of them."""
    f = figures["clusters"]
    chart = rank_sizes(f["sizes"]["before"], f["sizes"]["after"])
    levels = " → ".join(f"{level:,}" for level in f["levels"])
    rows = [
        ("Effective number of clusters", "effective_number", "{:,.1f}", "as many equally large ones have this entropy"),
        ("Entropy", "entropy", "{:.3f}", "1 is even, 0 is a single cluster"),
        ("Gini", "gini", "{:.3f}", "0 is even, near 1 is a single cluster"),
        ("Largest cluster, images", "largest", "{:,.0f}", ""),
        ("Clusters without an image", "num_empty", "{:,.0f}", f"of {f['levels'][0]:,}"),
    ]
    lines = "".join(
        f"<tr><td>{label}<br><small>{note}</small></td><td class='num'>{form.format(f['before'][name])}</td>"
        f"<td class='num'>{form.format(f['after'][name])}</td></tr>"
        for label, name, form, note in rows
    )
    return (
        f"<p>The survivors fall into concepts by k-means ({levels}). A steep line means that a few concepts own the "
        f"pool, a flat one that all have their share.</p><div class='split'><div>{chart}"
        "<ul class='legend'><li><i class='line before'></i>survivors of deduplication and decontamination</li>"
        "<li><i class='line after'></i>kept</li></ul></div>"
        "<table><tr><th></th><th class='num'>survivors</th><th class='num'>kept</th></tr>"
        f"{lines}</table></div>"
    )


def pool_map(chosen: Map | None, pictures: Pictures) -> str:
    """The map: near means alike to the retrieval encoder."""
    if chosen is None:
        return "<p class='empty'>Too few readable images for a map.</p>"
    placed = [
        (n, p.jpeg, f"{p.key} · {words(chosen.status[n])}") for n, ref in chosen.pictures if (p := pictures[ref]).jpeg
    ]
    present, num = set(chosen.status), int((chosen.status != "seed").sum())
    legend = "".join(
        f"<li><i class='{s}'></i>{'seed image' if s == 'seed' else words(s)}</li>" for s in _MAP_ORDER if s in present
    )
    drawn = scatter_map(chosen.points, chosen.status, _MAP_ORDER, placed)  # type: ignore[arg-type]  # no jpeg is None
    return (
        f"<p>A random sample of {num:,} readable pool images, laid out so that images which "
        "the retrieval encoder finds alike lie together (a neighbour embedding; directions and long distances mean "
        f"nothing).</p>{drawn}"
        f"<ul class='legend'>{legend}</ul>"
    )


def rejections(chosen: list[Rejection], figures: Mapping[str, Any], pictures: Pictures) -> str:
    """Every reason with its count and a few of its images; first, what damaged shards hold that nobody could read."""
    if not chosen:
        return "<p class='empty'>Nothing was rejected: every image could be read and passed the filters.</p>"
    parts = []
    for r in chosen:
        tiles = "".join(_tile(pictures, ref, _dimensions(pictures[ref])) for ref in r.examples)
        meaning = f"<span>{clean(reason_meaning(r.reason))}</span>"
        head = f"<header><b>{clean(words(r.reason))} · {r.count:,}</b>{meaning}</header>"
        parts.append(f"<article>{head}<div class='tiles'>{tiles}</div></article>")
    text = "<p>Nothing is lost silently: each of these is a row with a reason.</p>"
    damage = figures["funnel"]["unread"]
    if damage["damaged shards"]:
        told = unread(damage["unread bytes"], damage["unread images"])
        shards = plural(damage["damaged shards"], "damaged shard")
        text += f"<p>{shards}: {told}. What stands around the damage was read.</p>"
    return f"{text}<div class='rejections'>{''.join(parts)}</div>"


def _dimensions(picture: Picture) -> str:
    return f"{picture.width} × {picture.height}" if picture.width else ""


def recall(figures: Mapping[str, Any]) -> str:
    """What share of the near-duplicate pairs was found, and how that is known."""
    f = figures["dedup"]
    told = _recall(figures)
    if "new_images" not in f:
        return told
    return told + (
        f"<p>That is about pairs of which an image is new in this release ({f['new_images']:,} were compared with "
        f"all): {f['earlier_edges']:,} edges among the others are those of the run that this one extends, of whose "
        f"pairs at least {_share(f['earlier_lower_bound'])} were found with 95% confidence.</p>"
    )


def _recall(figures: Mapping[str, Any]) -> str:
    f, target = figures["dedup"], figures["config"]["dedup"]["target_recall"]
    pairs = (
        f"{f['embedding pairs']:,} pairs of images at or above cosine {f['similarity_threshold']:g} were linked, each "
        "re-scored exactly"
    )
    if f["basis"] == "exact" and "new_images" in f:
        why = "No pair was missed: the new images are few enough to compare each with every other."
        return f"<p class='claim'>100%</p><p>{pairs}. {why}</p>"
    if f["basis"] == "exact":
        why = "No pair was missed: the pool is small enough to compare every image with every other."
        return f"<p class='claim'>100%</p><p>{pairs}. {why}</p>"
    probing = f"Each image was compared with the {f['nprobe']:,} groups of images nearest to it"
    if f["basis"] == "law" and not f["num_queries"]:
        return (
            f"<p class='claim'>≥ {_share(f['measured_lower_bound'])}</p><p>{pairs}. The new images are few enough to "
            "compare each with all; the bound follows from the law of the sign sketches that shorten the search.</p>"
        )
    if f["basis"] == "law":
        return (
            f"<p class='claim'>≥ {_share(f['measured_lower_bound'])}</p><p>{pairs}. {probing}. Of {f['num_queries']:,} "
            f"images compared with the whole pool, too few had a near-duplicate ({f['num_pairs']:,} pairs) to measure "
            "the share that is found; the bound follows from the law of the sign sketches that shorten the search.</p>"
        )
    return (
        f"<p class='claim'>{_share(f['measured_recall'])}</p><p>{pairs}. {probing}. To check that, "
        f"{f['num_queries']:,} randomly drawn images were also compared with the whole pool: of the {f['num_pairs']:,} "
        f"true pairs found so, the run had found {_share(f['measured_recall'])}. With 95% confidence it finds at least "
        f"<b>{_share(f['measured_lower_bound'])}</b> of all pairs (asked for: {_share(target)}).</p>"
    )


def _share(value: float) -> str:
    return f"{100 * value:.2f}".rstrip("0").rstrip(".") + "%"


def times(figures: Mapping[str, Any]) -> str:
    """Bars of the seconds that each step took when it ran."""
    seconds = figures["seconds"]
    whole, longest = sum(seconds.values()), max(seconds.values(), default=0)
    rows = [(name, s, duration(s), "flow") for name, s in seconds.items()]
    return f"<p>{duration(whole)} in all, when each step ran last.</p>{bars(rows, longest)}"


def settings(
    figures: Mapping[str, Any], changed: Mapping[str, Any], asked: Mapping[str, Any] | None, run_url: str
) -> str:
    """The command, what differs from the defaults, and everything else, folded."""
    shown = f"<pre>{_lines(_command(asked, changed, run_url))}</pre>" if asked else ""
    lines = "".join(
        f"<tr><td><code>{clean(name)}</code></td><td><code>{clean(json.dumps(value))}</code></td></tr>"
        for name, value in changed.items()
    )
    table = (
        f"<p>Settings that differ from the defaults:</p><table>{lines}</table>"
        if lines
        else "<p>All settings are the defaults.</p>"
    )
    inputs = figures["inputs"]
    read = [f"pool: {plural(len(inputs['pool']), 'part')}, {_names(inputs['pool'])}"]
    read += [f"seed set {name}: {_names(seed['urls'])}" for name, seed in inputs["seeds"].items()]
    for name, urls in inputs["evaluations"].items():
        read.append(f"evaluation set {name}: {plural(len(urls), 'part')}, {_names(urls)}")
    listed = "".join(f"<li>{clean(line)}</li>" for line in read)
    everything = _lines(json.dumps(figures["config"], indent=1))
    return (
        f"{shown}<ul>{listed}</ul>{table}<details><summary>All settings</summary><pre>{everything}</pre></details>"
        "<p>One image's story in words: <code>python -m curation.explain "
        f"{clean(shlex.quote(public_url(run_url)))} KEY</code></p>"
    )


def _command(asked: Mapping[str, Any], changed: Mapping[str, Any], run_url: str) -> str:
    """The command that gives this run again, whatever configuration file the first one named."""
    flags = [("--seed", seed) for seed in asked["seeds"]]
    if asked["seeds"] != ["demo"]:
        flags += [("--pool", url) for url in asked["pool"]]
        flags += [("--evaluation", url) for url in asked["evaluations"].values()]
    if asked.get("extend"):
        flags.append(("--extend", asked["extend"]))
    flags += [("--exclude", url) for url in asked.get("exclude", [])]
    flags.append(("--out", run_url))
    words_ = [f"{flag} {shlex.quote(public_url(value))}" for flag, value in flags]
    words_ += [shlex.quote(f"{k}={v if isinstance(v, str) else json.dumps(v)}") for k, v in changed.items()]
    return " \\\n    ".join(["python -m curation.run", *words_])


def _lines(text: str) -> str:
    return "\n".join(clean(line) for line in text.split("\n"))


def _names(urls: Iterable[str]) -> str:
    shown = [public_url(url) for url in urls]
    if len(shown) > 2:
        return f"{shown[0]} … {posixpath.basename(shown[-1])}"
    return ", ".join(shown)


def public_url(url: str) -> str:
    """A URL without what may be secret in it: user, password, and the query that a presigned link carries."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _tile(pictures: Pictures, ref: Ref, caption: str = "", mark: str = "") -> str:
    picture = pictures[ref]
    about = f"{picture.key} · gid {ref.gid}" + (f" · {_dimensions(picture)} {picture.format}" if picture.width else "")
    if picture.jpeg is not None:
        inside = f"<img src='{jpeg_url(picture.jpeg)}' alt='{clean(picture.key)}' loading='lazy'>"
    else:
        key = picture.key if len(picture.key) <= 24 else f"{picture.key[:12]}…{picture.key[-10:]}"
        inside = f"<span class='none'><b>{clean(words(picture.problem))}</b><small>{clean(key)}</small></span>"
    text = f"<figcaption>{clean(caption)}</figcaption>" if caption else ""
    return f"<figure class='tile {mark}' title='{clean(about)}'>{inside}{text}</figure>"


def kept_strip(chosen: list[Ref], pictures: Pictures) -> str:
    """Some of what was kept, at the top of the page."""
    return f"<div class='strip'>{''.join(_tile(pictures, ref) for ref in chosen if pictures[ref].jpeg)}</div>"
