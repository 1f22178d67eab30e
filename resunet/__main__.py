"""`python -m resunet VERB …`, the same as the `resunet` command."""

import sys

from resunet.cli import main

sys.exit(main())
