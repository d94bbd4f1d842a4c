"""`python -m mutransfer` is the `mutransfer` command."""

from __future__ import annotations

import sys

from mutransfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
