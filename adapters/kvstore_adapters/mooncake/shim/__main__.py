"""Prints the directory for PYTHONPATH."""

import sys

from . import PATH

sys.stdout.write(PATH + "\n")
