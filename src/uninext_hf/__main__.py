"""`python -m uninext_hf` is the `uninext` command."""

import sys

from .cli import main

sys.exit(main())
