"""`python -m variator_export`."""

from variator_export.cli.main import main

main()
