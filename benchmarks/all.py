"""Every benchmark, one after another, each against its peer in its own run: `make bench` (about an hour)."""

import subprocess
import sys

COMMANDS = (
    ["-m", "benchmarks.tars"],
    ["-m", "benchmarks.kmeans"],
    ["-m", "benchmarks.hierarchy"],
    ["-m", "benchmarks.dedup"],
    ["-m", "benchmarks.scale", "join", "--rows", "10000000"],
    ["-m", "benchmarks.loading"],
    ["-m", "benchmarks.losses"],
    ["-m", "benchmarks.features"],
    ["-m", "benchmarks.serve"],
)


def main() -> None:
    for command in COMMANDS:
        print(f"\n=== python {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, *command], check=True)


if __name__ == "__main__":
    main()
