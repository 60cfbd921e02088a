"""Plain torch: what every kernel must equal, and the path of machines without an accelerator."""
