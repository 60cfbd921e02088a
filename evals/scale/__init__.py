"""Memory, time and disk of a run at real widths: random checkpoints of known models' shapes, and what `compress` uses.

Times and bytes do not depend on what the weights say, so nothing needs to be downloaded. See `docs/scale.md`.
"""
