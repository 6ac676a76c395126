"""README.md of a folder of shards: what is in it, for people, and for `datasets` which files are the data."""

from curation.writing.samples import IMAGE_SUFFIX, OTHERS_SUFFIX, Layout


def shard_card(layout: Layout, pattern: str) -> str:
    """A dataset card: `datasets.load_dataset(FOLDER)` reads the files of the pattern, and leaves index and records."""
    is_tar = pattern.endswith(".tar")
    image, text, label, others = (
        (f"`KEY.{IMAGE_SUFFIX}`", "`KEY.txt`", "`KEY.cls`", f"`KEY.{OTHERS_SUFFIX}`")
        if is_tar
        else ("`image`", "`text`", "`label`", "`others`")
    )
    rows = [
        (image, "the original bytes of the image, in whatever format it came: see `format`"),
        (text, "its caption; empty where it had none"),
    ]
    if layout.has_label:
        rows.append((label, "its class as an integer; -1 where it had none"))
    if layout.has_others:
        rows.append((others, "a tar of its other files; no bytes at all where it had none"))
    about = "`KEY.json`" if is_tar else "the other columns"
    rows.append((about, "where it came from and why it is here; the same fields in every sample, never null"))
    table = "\n".join(f"| {name} | {what} |" for name, what in rows)
    files = "tars" if is_tar else "files"
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: {pattern}
---

Curated by Seedbed. Every sample has the same members:

| | |
|---|---|
{table}

`index/shard-*.parquet` gives offset, size and sha256 of every {"member" if is_tar else "image"} in its shard;
`not_written.parquet` names images that were chosen, but had changed or gone when their bytes were to be copied.
`dropped.parquet`, where it is, names images of an earlier release that this one does not keep. Their bytes stay in
its {files}, and have no row in `index/`: leave them out where a leak or an image that is gone matters.
"""
