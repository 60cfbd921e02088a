"""The same jobs by other public tools and by this package, in one run on one machine.

`python -m compressor.evals.bench.peers run` makes the environments, runs the table `peers` through the bench runner,
and writes its summary as JSON and Markdown.
"""
