"""``python -m vllm_compat``: the same as the command ``vllm-compat``."""

import sys

from vllm_compat.cli import main

sys.exit(main())
