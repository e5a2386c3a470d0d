"""`python -m convert` is `gptoss-jax convert`."""

import sys

from convert.cli import main

sys.exit(main())
