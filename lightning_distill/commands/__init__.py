"""Commands: typed functions whose flags and help come from signature and docstring."""
