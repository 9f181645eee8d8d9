"""``python -m qformat``."""

from qformat.cli import main

main()
