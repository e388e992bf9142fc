"""Checks of arguments that several classes and commands take."""

from __future__ import annotations


def check_positive(**sizes: int) -> None:
    """Raise if a size is not positive.

    Args:
        sizes: By the name that the message gives them.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size} but must be at least 1")


def check_shares(**shares: float) -> None:
    """Raise if a share is not between 0 and 1.

    Args:
        shares: By the name that the message gives them.
    """
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share} but must lie between 0 and 1")
