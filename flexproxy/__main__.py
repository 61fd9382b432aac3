"""``python -m flexproxy`` is the command ``flexproxy``."""

import sys

from flexproxy.cli import main

sys.exit(main())
