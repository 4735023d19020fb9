"""`python -m ema_triton`: the command line of `ema_triton.posthoc`."""

import sys

from ema_triton.posthoc.__main__ import main

sys.exit(main())
