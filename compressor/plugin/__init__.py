"""What transformers is told about this package. Imported in the middle of transformers' own import: keep it light."""
