"""Write report.html of a run folder, finished or not: python -m pretrain.watch.report RUN."""

import argparse
import sys
from collections.abc import Sequence

from configs.messages import named_folder, sentence
from pretrain.watch.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.watch.report", description=__doc__)
    parser.add_argument("run", type=named_folder, help="run folder of pretrain.train")
    try:
        print(write_report(parser.parse_args(arguments).run))
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
