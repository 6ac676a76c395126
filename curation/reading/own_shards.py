"""A folder that curation wrote, as the pool or the seed of another run: its shards, and nothing else of it."""

from collections.abc import Callable, Collection

from curation.engine.manifest import MANIFEST_NAME, Manifest


def own_shards(names: Collection[str], read: Callable[[str], bytes]) -> list[str] | None:
    """The shards among the files of a run's folder or of its `shards`; None for a folder of anyone else.

    Args:
        names: of every file below the folder, relative to it.
        read: the bytes of one of them.

    Raises:
        ValueError: shards that the folder's manifest lists are not there.
    """
    for below in ("", "shards/"):
        if below + MANIFEST_NAME not in names:
            continue
        try:
            manifest = Manifest.from_json(read(below + MANIFEST_NAME).decode())
        except (ValueError, TypeError, KeyError):
            continue  # someone else's manifest.json
        if manifest.stage == "shard":
            shards = [below + file.path for file in manifest.files]
            if missing := [name for name in shards if name not in names]:
                raise ValueError(
                    f"its {below}{MANIFEST_NAME} lists {len(missing)} shards that are not there ({missing[0]})"
                )
            return shards
    return None
