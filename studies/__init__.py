"""How the README's results were made."""
