"""`python -m mcir` and `accelerate launch -m mcir`."""

from mcir.cli import main

main()
