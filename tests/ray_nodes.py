"""Ray nodes of one CPU each on this machine, in a process of their own: a Ray that tests run has its own secret.

`python -m tests.ray_nodes ENVIRONMENTS` starts one node for each environment of a JSON list, prints the address, and
ends when its input does.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator

from tests.conftest import REPOSITORY


@contextlib.contextmanager
def ray_nodes(environments: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """What a driver needs in its environment to join the nodes, each of which has one of `environments`."""
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "tests.ray_nodes", json.dumps([one | secret for one in environments])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **secret}, **pipes) as nodes:
        try:
            address = nodes.stdout.readline().strip()
            assert address, "the nodes did not start"
            yield secret | {"RAY_ADDRESS": address}
        finally:
            nodes.stdin.close()


def main(environments: str) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for environment in json.loads(environments):
        add_node(cluster, env_vars=environment)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


def add_node(cluster, **settings):  # type: ignore[no-untyped-def]  # `cluster_utils` has no types
    """A node of one CPU. Ray gives it half a minute to start, less than a busy machine may need: it has three."""
    settings = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False} | settings
    for is_last in (False, False, True):
        try:
            return cluster.add_node(**settings)
        except Exception as error:
            if is_last or "timed out during startup" not in str(error):
                raise


if __name__ == "__main__":
    main(*sys.argv[1:])
