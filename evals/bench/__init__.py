"""Tables of results: rows described in YAML, run one by one, kept as JSON, rendered as Markdown."""
