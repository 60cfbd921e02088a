"""The command line: words into calls. Rich and Typer live here and nowhere else."""
