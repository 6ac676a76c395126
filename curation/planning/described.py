"""The plan of a pool that need not exist: --images N."""

from collections.abc import Mapping

from configs.loader import load_config
from curation.config import CurationConfig
from curation.engine.folder import Folder
from curation.planning.estimates import described_set
from curation.planning.machines import Cluster
from curation.planning.plan import describe
from curation.reading.listing import Listing, find_parts
from curation.reading.seeds import SeedConfig, SeedSet
from curation.state import Inputs, Run

_EVALUATION = "any"


def describe_pool(
    folder: Folder,
    config: CurationConfig,
    num_images: int,
    num_evaluation: int,
    seeds: Mapping[str, SeedSet],
    evaluations: Mapping[str, str],
    cluster: Cluster | None,
) -> str:
    """As `describe`, with so many web images as the pool, and more of them, if not 0, as an evaluation set.

    Args:
        seeds: those whose URL still has `{root}` in it are taken to have the published number of images; others are
            listed.
        evaluations: are listed.

    Raises:
        ValueError: there is no image, or nothing says how many images a seed set has.
    """
    if num_images < 1 or num_evaluation < 0:
        raise ValueError(f"--images {num_images} and --evaluation-images {num_evaluation} must be numbers of images.")
    described = {"embed/pool": described_set(num_images)}
    listings: dict[str, tuple[SeedSet, Listing]] = {}
    for name, seed in seeds.items():
        if any("{root}" in url for url in seed.urls):
            published = load_config(SeedConfig, "seeds", seed.name).published
            if "images" not in published:
                raise ValueError(f"seed {name!r}: nothing says how many images it has: pass --seed-root PATH.")
            described[f"embed/seed-{name}"] = described_set(int(published["images"]))
            listings[name] = seed, Listing(())
        else:
            listings[name] = seed, find_parts(seed.urls, config.embed.images_per_folder_part)
    tested = {name: find_parts([url], config.embed.images_per_folder_part) for name, url in evaluations.items()}
    if num_evaluation:
        described[f"embed/evaluation-{_EVALUATION}"] = described_set(num_evaluation)
        tested[_EVALUATION] = Listing(())
    return describe(Run(folder, config, Inputs(Listing(()), listings, tested)), cluster, described)
