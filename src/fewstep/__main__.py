"""``python -m fewstep VERB …`` is ``fewstep VERB …``."""

import sys

from fewstep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
