"""`python -m monosem` is the command `monosem`."""

import sys

from monosem.cli import main

sys.exit(main())
