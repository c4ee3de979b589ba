"""``python -m fastpo.demo [output folder]``."""

import sys

from fastpo.demo import main

main(*sys.argv[1:2])
