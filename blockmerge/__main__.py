"""`python -m blockmerge`."""

from blockmerge.cli.main import main

main()
