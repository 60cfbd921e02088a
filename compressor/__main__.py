"""`python -m compressor` is `compress`."""

from compressor.cli.app import main

main()
