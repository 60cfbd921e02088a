"""Image classifiers: filter pruning with dependency tracking, fine-tuning, and checkpoints that are really smaller."""
