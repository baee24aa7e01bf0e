"""Run the command line: ``python -m encfs_js``."""

from encfs_js.cli import main

main()
