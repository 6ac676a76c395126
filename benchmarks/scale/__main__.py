"""What curation costs at sizes that no one has pictures for: synthetic indexes and vectors.

    python -m benchmarks.scale join [--rows N]      cells, join and components of synthetic vectors
    python -m benchmarks.scale index [--rows N]     a synthetic index, from filters to the plan of shards
    python -m benchmarks.scale extend [--rows N]    a run that extends another by a tenth, beside a whole one

Each ends with one line of JSON: seconds, processor seconds, driver_gb (peak resident memory of the driver), task_gb (of
the largest worker), bytes read and written, recall.
"""

import argparse
import importlib
import json
import pkgutil
import sys

import benchmarks.scale as commands


def main() -> None:
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__) if module.name != "__main__")
    names = [name for name in names if hasattr(importlib.import_module(f"benchmarks.scale.{name}"), "add_arguments")]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in names:
        module = importlib.import_module(f"benchmarks.scale.{name}")
        told = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(subparsers.add_parser(name, help=told, description=told))
    arguments = parser.parse_args(sys.argv[1:])
    figures = importlib.import_module(f"benchmarks.scale.{arguments.command}").run(arguments)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
