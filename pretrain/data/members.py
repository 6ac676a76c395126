"""Which members of a tar are its images: WebDataset's rule, and what it would lose."""

from collections.abc import Sequence, Set


def image_members(paths: Sequence[str], suffixes: Set[str]) -> list[int]:
    """Numbers of the members that are images, in order.

    A key is what stands before the first dot of the last path component, and a suffix what follows, in lower case:
    `a.seg.png` is no `png`, but the mask beside `a.jpg`. Where a key has no image by that rule, the members whose last
    suffix is one are its images: `img.0.jpg`, `Screenshot at 10.00.33.png`.

    Args:
        paths: of the regular members, in the order of the tar.
        suffixes: of images, in lower case, without a dot.
    """
    split = [_split(path) for path in paths]
    plain = {key for key, suffix in split if suffix in suffixes}
    return [
        number
        for number, (key, suffix) in enumerate(split)
        if suffix in suffixes or (key not in plain and suffix.rpartition(".")[2] in suffixes)
    ]


def _split(path: str) -> tuple[str, str]:
    folder, slash, name = path.rpartition("/")
    key, _, suffix = name.partition(".")
    return f"{folder}{slash}{key}", suffix.lower()
