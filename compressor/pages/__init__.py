"""Pages of methods, made from the page beside each module, the options the code declares and the committed tables.

`python -m compressor.pages` writes `docs/methods`; with `--check` it says what is stale and writes nothing.
"""
