"""``python -m fused_lora.cli``."""

import sys

from . import main

sys.exit(main())
