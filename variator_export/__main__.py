"""Entry point of `python -m variator_export`, required by `accelerate launch -m`."""

from variator_export.cli.main import main

main()
