"""Pages made from the page beside each module, the options the code declares and the committed tables.

`python -m compressor.pages` writes `docs/methods`, the page and picture of bits against divergence, and the page of the
calibration study; with `--check` it says what is stale and writes nothing.
"""
