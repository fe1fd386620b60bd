"""`python -m opd_async.cli` is `opd`."""

from opd_async.cli.main import main

main()
