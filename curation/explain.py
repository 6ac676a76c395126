"""python -m curation.explain RUN KEY: see curation/account/explain.py."""

import sys

from curation.account.explain import main

if __name__ == "__main__":
    sys.exit(main())
