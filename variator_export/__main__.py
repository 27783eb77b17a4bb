"""`python -m variator_export`, which `accelerate launch -m` needs."""

from variator_export.cli.main import main

main()
