"""`python -m stylepipe` is `stylepipe`."""

import sys

from stylepipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
