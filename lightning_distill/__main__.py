"""Run the command line."""

from lightning_distill.cli import entry_point

if __name__ == "__main__":
    entry_point()
