"""Checks of arguments that several classes and commands take."""

from __future__ import annotations

from math import inf


def check_positive(**sizes: int) -> None:
    """Raise if a size is not positive.

    Args:
        sizes: By the name that the message gives them.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size} but must be at least 1")


def check_weights(**weights: float) -> None:
    """Raise if the weight of a term is negative or not finite.

    Args:
        weights: By the name that the message gives them.
    """
    for name, weight in weights.items():
        if not 0 <= weight < inf:
            raise ValueError(f"{name} is {weight} but must be at least 0 and finite")


def check_shares(**shares: float) -> None:
    """Raise if a share is not between 0 and 1.

    Args:
        shares: By the name that the message gives them.
    """
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share} but must lie between 0 and 1")
