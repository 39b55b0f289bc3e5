"""`python -m dptrain`."""

import sys

from dptrain.cli import main

sys.exit(main())
