"""``python -m unilora_ext``: the command ``unilora``."""

import sys

from unilora_ext.cli import main

sys.exit(main())
