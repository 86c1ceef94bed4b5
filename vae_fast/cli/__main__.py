"""``python -m vae_fast.cli``, the same as ``vae-fast``."""

import sys

from vae_fast.cli import main

sys.exit(main())
