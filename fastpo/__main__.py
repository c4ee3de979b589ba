"""``python -m fastpo`` is ``fastpo``."""

from fastpo.cli import main

main()
