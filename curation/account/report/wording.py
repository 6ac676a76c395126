"""What the short names in a run's columns mean, in words: for the report and for curation.account.explain."""

_REASONS = {
    "animated": "more than one frame",
    "blank": "hardly any contrast, so there is nothing to see",
    "changed_since_indexing": "chosen, but when its bytes were to be copied they were not those that had been judged",
    "columns_left_out": "its Parquet row has columns that a shard cannot hold: lists, structs, binary, times",
    "damaged": "the image data is cut off or broken",
    "damaged_shard": "the shard is cut off or broken here; what stands before and behind was read",
    "decoder_crashed": "its decoding ended the process, also in a process of its own",
    "decoder_failed": "its decoding failed in a way that this program did not expect",
    "decoder_timeout": "its decoding took more than a minute",
    "dark_16_bit": "16 bits a sample, of which only the lower ones are used, so it is nearly black",
    "empty": "a file of 0 bytes",
    "excluded": "a run named by --exclude keeps an image of the same bytes, or of equal perceptual hashes",
    "extreme_aspect": "much longer on one side than on the other",
    "file_too_large": "more bytes than embed.max_file_bytes",
    "gone_since_indexing": "chosen, but its file was gone when its bytes were to be copied",
    "no_end_marker": "the tar has no end marker: it was cut between two files, or written without one",
    "no_image": "the sample holds no image file",
    "jpeg_without_end": "every pixel is there, but not the mark of the end",
    "no_image_column": "the Parquet file has no column of images; --image-column can name it",
    "not_in_pool": "its shard or folder was in the pool when the run began, and is not any more",
    "not_unpacked": "a sparse file, or one that goes on in another volume of the tar",
    "not_an_image": "not in any known image format, whatever its name says",
    "reader_crashed": "reading its source ended the process each time, so nothing of it was read",
    "too_long": "a side is longer than the limit",
    "too_many_pixels": "refused from its header, before its pixels could fill the memory",
    "too_many_scans": "a JPEG made to be slow to decode",
    "too_small": "a side is shorter than the limit",
    "unreadable": "the file could not be opened",
    "unsupported_format": "a picture of a kind that is not read (HEIC and JPEG XL are, with seedbed[formats])",
    "unreadable_since_indexing": "chosen, but its file could not be opened any more when its bytes were to be copied",
    "unresolved_link": "a link to what does not stand before it in the same tar",
    "unsupported_compression": "packed in a way that is not read; gzip, bzip2 and xz are",
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


def unread(num_bytes: int, num_images: int | None) -> str:
    """What a row about damage stands for: `12,345 bytes cannot be read, about 3 images at the shard's mean size`."""
    if not num_bytes:
        return "no byte of it is unread"
    about = "it has no whole sample to say how many images that is"
    if num_images is not None:
        about = f"about {plural(num_images, 'image')} at the shard's mean size"
    return f"{plural(num_bytes, 'byte')} cannot be read, {about}"


def visible(name: object) -> str:
    """A name from the pool, as text that can neither steer a terminal nor hide or reorder what stands around it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(name))
