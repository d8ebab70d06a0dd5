"""`python -m pocketquant`: the command line."""

from pocketquant.cli import main

main()
