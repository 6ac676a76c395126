"""python -m curation.truth RUN TRUTH.csv: see curation/account/truth.py."""

import sys

from curation.account.truth import main

if __name__ == "__main__":
    sys.exit(main())
