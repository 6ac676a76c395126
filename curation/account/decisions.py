"""One row for every pool image: kept or not, and why. The account that every other view of a run is made from."""

import numpy as np
import pyarrow as pa

from curation.engine.store import ImageSet
from curation.stages import filter as filter_stage
from curation.stages.balance import read_balanced
from curation.stages.cluster import Clustering
from curation.stages.dedup import Duplicates
from curation.stages.groups import STEPS
from curation.stages.survivors import Survivors
from curation.state import Run

STATUSES = ("kept", "rejected", "duplicate", "leak", "not_retrieved")

SCHEMA = pa.schema(
    [
        ("gid", pa.int64()),  # dense row number of the pool image
        ("key", pa.string()),
        ("source", pa.string()),  # URL of the tar, Parquet file or folder it came from
        ("status", pa.string()),  # one of STATUSES
        # kept: retrieved, balanced or both; rejected: why (also *_since_indexing: chosen, but not written, because its
        # bytes were no longer those that had been judged); duplicate: exact, perceptual, embedding, or chain (through
        # others of its component); leak: exact, perceptual, embedding, or component (another member matched)
        ("reason", pa.string()),
        ("duplicate_of", pa.string()),  # key of the image kept in its stead; null unless a duplicate
        ("duplicate_of_gid", pa.int64()),
        ("component", pa.int64()),  # smallest gid of its near-duplicate group; null when alone or rejected
        ("component_size", pa.int32()),  # images in that group; 1 when alone
        ("evaluation", pa.string()),  # evaluation set that a leak matched
        ("eval_match", pa.string()),  # key of the image there
        ("seed", pa.string()),  # seed set whose draw was the strongest
        ("seed_match", pa.string()),  # key of the seed image; null when drawn by cluster or balance
        # cosine to: the representative (duplicate), the evaluation image (leak), the seed image (kept); null elsewhere
        ("similarity", pa.float32()),
        ("cluster", pa.int64()),  # finest concept cluster; null unless it survived to clustering
        # of a rejected row that stands for a shard's damage: bytes that could not be read, and how many images that is
        # at the shard's mean bytes a sample (null where it has no whole sample); null elsewhere
        ("unread_bytes", pa.int64()),
        ("unread_images", pa.int64()),
        ("shard", pa.string()),  # file below shards/; null unless kept and written
    ]
)


def without_lost(decisions: pa.Table, gids: np.ndarray, reasons: np.ndarray) -> pa.Table:
    """The decisions with these images, chosen but not written, rejected for these reasons."""
    status = decisions["status"].to_numpy(zero_copy_only=False).copy()
    reason = decisions["reason"].to_numpy(zero_copy_only=False).copy()
    assert (status[gids] == "kept").all()
    status[gids], reason[gids] = "rejected", reasons
    for name, values in (("status", status), ("reason", reason)):
        column = decisions.schema.get_field_index(name)
        decisions = decisions.set_column(column, SCHEMA.field(name), pa.array(values, pa.string()))
    return decisions


def decide(run: Run) -> pa.Table:
    """The decisions of a run whose retrieval is done: SCHEMA without `shard`, one row a gid, in gid order."""
    pool = run.pool
    num = pool.num_images
    duplicates = Duplicates(run.folder / "dedup")
    representative, component = duplicates.representative(), duplicates.component()
    sizes = np.bincount(component[component >= 0], minlength=num)
    survivors = Survivors(run.folder / "survivors")
    leaks = survivors.all_leaks()
    final = np.concatenate(
        [survivors.representative(n) for n in range(survivors.num_ranges)]
    )  # direct decontamination may have re-elected
    clustering = Clustering(run.folder / "cluster")
    cluster = np.concatenate([clustering.assignment(n) for n in range(clustering.num_ranges())]).astype(np.int64)
    cluster[final != np.arange(num)] = -1  # leaks were clustered, and are in no draw

    rejected = component < 0
    leak_gids = leaks["gid"].to_numpy()
    kept, seed_name, seed_key, seed_similarity, is_drawn, is_balanced = _choices(run)
    status = np.full(num, "not_retrieved", object)
    status[kept] = "kept"
    is_duplicate = ~rejected & (final != np.arange(num))
    status[is_duplicate] = "duplicate"
    status[leak_gids] = "leak"
    status[rejected] = "rejected"
    is_duplicate[leak_gids] = False

    reason = np.full(num, None, object)
    reason[kept] = np.where(is_drawn, np.where(is_balanced, "retrieved and balanced", "retrieved"), "balanced")[kept]
    steps = np.array(STEPS, object)[duplicates.step()]
    reason[is_duplicate] = steps[is_duplicate]
    reason[is_duplicate & (final != representative)] = "chain"  # its group lost the representative that it matched
    reason[leak_gids] = leaks["step"].to_numpy(zero_copy_only=False)
    rejections = filter_stage.read_reasons(run.folder / "filter").to_numpy()
    reason[rejected] = rejections[rejected]

    similarity = np.full(num, np.nan, np.float32)
    similarity[kept] = seed_similarity[kept]
    similarity[is_duplicate] = duplicates.similarity()[is_duplicate]
    similarity[is_duplicate & (final != representative)] = np.nan
    similarity[leak_gids] = leaks["similarity"].to_numpy()

    keys = pool.arrow("key")
    evaluation, eval_key = np.full(num, None, object), np.full(num, None, object)
    evaluation[leak_gids] = leaks["evaluation"].to_numpy(zero_copy_only=False)
    eval_key[leak_gids] = _matched_keys(run, leaks)
    replaced = np.where(is_duplicate, final, 0)
    duplicate_of = pa.array(np.where(is_duplicate, keys.to_numpy()[replaced], None), pa.string())
    alone = rejected | (sizes[np.maximum(component, 0)] <= 1)
    columns = {
        "gid": np.arange(num),
        "key": keys,
        "source": pool.arrow("source"),
        "status": pa.array(status, pa.string()),
        "reason": pa.array(reason, pa.string()),
        "duplicate_of": duplicate_of,
        "duplicate_of_gid": pa.array(replaced, mask=~is_duplicate),
        "component": pa.array(component, mask=alone),
        "component_size": pa.array(np.where(alone, 1, sizes[np.maximum(component, 0)]).astype(np.int32)),
        "evaluation": pa.array(evaluation, pa.string()),
        "eval_match": pa.array(eval_key, pa.string()),
        "seed": pa.array(seed_name, pa.string()),
        "seed_match": pa.array(seed_key, pa.string()),
        "similarity": pa.array(similarity, mask=np.isnan(similarity)),
        "cluster": pa.array(cluster, mask=cluster < 0),
        "unread_bytes": pool.arrow("unread_bytes"),
        "unread_images": pool.arrow("unread_images"),
    }
    names = [name for name in SCHEMA.names if name != "shard"]
    return pa.table({name: columns[name] for name in names}, schema=pa.schema([SCHEMA.field(name) for name in names]))


def kept_with_provenance(run: Run, decisions: pa.Table) -> tuple[np.ndarray, pa.Table]:
    """gids of the kept pool images, ascending, and what each one's .json says of why."""
    kept = decisions.filter(pa.array(decisions["status"].to_numpy(zero_copy_only=False) == "kept"))
    columns = ["reason", "seed", "seed_match", "similarity", "cluster", "component", "component_size"]
    return kept["gid"].to_numpy(), kept.select(columns).append_column(
        "draws", pa.array(_draws(run, kept["gid"].to_numpy()))
    )


def _choices(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """By gid: kept, and the strongest draw's seed set, seed key and similarity; drawn by a seed, drawn by balance."""
    num = run.pool.num_images
    drawn, balanced = np.zeros(num, bool), np.zeros(num, bool)
    seed_name, seed_key = np.full(num, None, object), np.full(num, None, object)
    similarity = np.full(num, np.nan, np.float32)
    for name in run.inputs.seeds:
        matches = (run.folder / f"retrieve/{name}").read_table("matches.parquet")
        gid, value = matches["gid"].to_numpy(), matches["similarity"].fill_null(-2).to_numpy()
        order = np.lexsort((matches["seed_gid"].to_numpy(), -value, gid))
        _, first = np.unique(gid[order], return_index=True)
        best = order[first]
        stronger = best[~drawn[gid[best]] | (value[best] > np.nan_to_num(similarity[gid[best]], nan=-2))]
        seed_name[gid[stronger]] = name
        similarity[gid[stronger]] = np.where(value[stronger] >= -1, value[stronger], np.nan)
        seed_gid = matches["seed_gid"].to_numpy()[stronger]
        seed_key[gid[stronger]] = _keys_of(run.images(f"embed/seed-{name}"), seed_gid)
        drawn[gid] = True
    if run.config.balance.is_wanted():
        balanced[read_balanced(run.folder / "balance")["gid"].to_numpy()] = True
    return drawn | balanced, seed_name, seed_key, similarity, drawn, balanced


def _draws(run: Run, gids: np.ndarray) -> list[dict[str, int]]:
    """For each kept image, how many draws of each seed set it answers, and whether balance drew it."""
    at = {gid: i for i, gid in enumerate(gids.tolist())}
    draws: list[dict[str, int]] = [{} for _ in gids]
    paths = {name: f"retrieve/{name}/matches.parquet" for name in run.inputs.seeds}
    sources = {name: run.folder.read_table(path, ["gid"]) for name, path in paths.items()}
    if run.config.balance.is_wanted():
        sources["balance"] = read_balanced(run.folder / "balance")
    for name, table in sources.items():
        unique, counts = np.unique(table["gid"].to_numpy(), return_counts=True)
        for gid, count in zip(unique.tolist(), counts.tolist(), strict=True):
            draws[at[gid]][name] = count
    return draws


def _matched_keys(run: Run, leaks: pa.Table) -> np.ndarray:
    result = np.full(leaks.num_rows, None, object)
    sets = np.array(leaks["evaluation"].to_pylist(), object)
    for name in run.inputs.evaluations:
        where = np.flatnonzero(sets == name)
        gids = leaks["evaluation_gid"].to_numpy()[where]
        result[where] = _keys_of(run.images(f"embed/evaluation-{name}"), gids)
    return result


def _keys_of(images: ImageSet, gids: np.ndarray) -> np.ndarray:
    """Keys by gid of a set; None for gid -1."""
    keys = np.append(images.arrow("key").to_numpy(), None)
    return keys[gids]
