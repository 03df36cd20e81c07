"""`python -m autopar`: the same as the command `autopar`."""

import sys

from autopar.cli import main

if __name__ == "__main__":
    sys.exit(main())
