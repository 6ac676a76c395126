"""Write report.html of a run folder, finished or not: python -m pretrain.watch.report RUN."""

import argparse
import sys
from pathlib import Path

from pretrain.watch.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.watch.report", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of pretrain.train")
    try:
        print(write_report(parser.parse_args().run))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
