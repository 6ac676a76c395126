"""python -m tests.lost_node POOL OUT: embeds a pool, then writes pieces, on two Ray nodes; each time one is lost."""

import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from ray.cluster_utils import Cluster

from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig, run_pieces, start_ray
from curation.reading.filters import build_filters
from curation.reading.listing import find_parts
from curation.stages.embed import EmbedConfig, embed_set
from tests.mortal import square_slowly
from tests.ray_nodes import add_node

EXECUTION = ExecutionConfig()


def main(pool: str, out: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    cluster = Cluster()
    add_node(cluster)

    def lose_a_node_when(folder: str, count: int) -> None:
        """Once so many files are there, the second node goes: its raylet is killed, and what it runs with it."""
        second = add_node(cluster)
        cluster.wait_for_nodes()

        def watch() -> None:
            while len(list(Path(out, folder).glob("*"))) < count:
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)
            print(f"lost a node in {folder}", flush=True)

        threading.Thread(target=watch, daemon=True).start()

    os.environ["RAY_ADDRESS"] = cluster.address
    start_ray(EXECUTION)
    lose_a_node_when("run/done", 1)
    slow = build_filters([{"kind": "pixels", "path": "tests.mortal:slowly", "options": {"seconds": 0.05}}])
    config = EmbedConfig(encoder="descriptors", batch_size=4)
    files, *_ = embed_set(Folder(f"{out}/run"), find_parts([pool]), ["descriptors"], config, slow, EXECUTION, "embed")
    Path(out, "files.json").write_text(json.dumps([asdict(file) for file in files]))

    lose_a_node_when("pieces", 6)
    names = [f"{number}.txt" for number in range(20)]
    folder = Folder(f"{out}/pieces")
    run_pieces(square_slowly, range(20), names, folder, execution=EXECUTION, label="squares", unit="numbers")
    assert [int(folder.read_bytes(name)) for name in names] == [i * i for i in range(20)]
    os._exit(0)  # the rest of the cluster ends with this process


if __name__ == "__main__":
    main(*sys.argv[1:])
