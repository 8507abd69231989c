"""`python -m lopt` is the `lopt` command."""

import sys

from lopt.cli import main

sys.exit(main())
