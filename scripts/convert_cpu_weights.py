#!/usr/bin/env python3
"""Convert the experts of a checkpoint for CPU execution: see --help, or kt_kernel/convert_command.py."""

import sys

from kt_kernel.convert_command import main

if __name__ == "__main__":
    sys.exit(main())
