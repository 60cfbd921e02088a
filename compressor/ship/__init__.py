"""From a recipe to a published checkpoint: steps in order, the model card, and the upload."""
