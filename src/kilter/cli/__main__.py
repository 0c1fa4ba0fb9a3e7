"""`python -m kilter.cli`: the same as `kilter`."""

import sys

from kilter.cli.main import main

sys.exit(main())
