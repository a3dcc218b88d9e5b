"""`python -m hywu_core.cli`: the command line of a checkout that isn't installed."""

import sys

from .main import main

sys.exit(main())
