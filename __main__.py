"""`python -m roe_llava` is `roe-llava`."""

import sys

from .cli import main

sys.exit(main())
