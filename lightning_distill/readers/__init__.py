"""Reading anyone's policy: folders of this package, and agents that other libraries saved."""

from lightning_distill.readers.opening import open_policy

__all__ = ["open_policy"]
