"""What the short names in a run's columns mean, in words: for the report and for curation.explain."""

_REASONS = {
    "animated": "more than one frame",
    "blank": "hardly any contrast, so there is nothing to see",
    "damaged": "the image data is cut off or broken",
    "damaged_shard": "the shard ends or breaks here",
    "empty": "a file of 0 bytes",
    "extreme_aspect": "much longer on one side than on the other",
    "file_too_large": "more bytes than embed.max_file_bytes",
    "no_image": "the sample holds no image file",
    "no_image_column": "the Parquet file has no column of images; --image-column can name it",
    "not_an_image": "not in any known image format, whatever its name says",
    "too_long": "a side is longer than the limit",
    "too_many_pixels": "refused from its header, before its pixels could fill the memory",
    "too_many_scans": "a JPEG made to be slow to decode",
    "too_small": "a side is shorter than the limit",
    "unreadable": "the file could not be opened",
}
_STEPS = {
    "exact": "same bytes",
    "perceptual": "near perceptual hash",
    "embedding": "near embedding",
    "chain": "through others",
    "component": "through its group",
}


def words(name: str) -> str:
    """A column's value as words: `not_retrieved` -> `not retrieved`."""
    return name.replace("_", " ")


def step_words(step: str) -> str:
    """How a step of the cascade links two images; other values of the `reason` column as they are."""
    return _STEPS.get(step, words(step))


def reason_meaning(reason: str) -> str:
    """What a reason for rejection means; empty for those of the user's own filters, which speak for themselves."""
    if reason.startswith("blocked_"):
        return f"its {words(reason.removeprefix('blocked_'))} is on a blocklist"
    if reason.startswith("no_score_"):
        return f"its metadata has no number {reason.removeprefix('no_score_')!r}"
    if reason.startswith("score_"):
        return f"its {reason.removeprefix('score_')!r} lies outside the limits"
    return _REASONS.get(reason, "")


def plural(count: int, one: str, many: str = "") -> str:
    """`1 image`, `2 images`, `1,200 images`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def visible(name: object) -> str:
    """A name from the pool, as text that can neither steer a terminal nor hide or reorder what stands around it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(name))
