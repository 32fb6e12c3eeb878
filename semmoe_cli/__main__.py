"""`python -m semmoe_cli`: what torchrun starts."""

from semmoe_cli.main import main

main()
