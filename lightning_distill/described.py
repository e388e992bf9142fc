"""Objects that a file describes by ``class_path`` and ``init_args``, and whom to trust with it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_distill.envs import EnvProtocol

T = TypeVar("T")


class NotTrustedError(ValueError):
    """Something would have to be imported or run that nobody has said to trust."""


def load_protocol(
    config: Mapping[str, Any], folder: Path, trust: bool = False, known: EnvProtocol | None = None
) -> EnvProtocol:
    """Build the environment protocol that an artefact carries.

    Args:
        config: ``class_path`` and ``init_args``.
        folder: The artefact, for messages.
        trust: Import a class, or an environment, from outside the package.
        known: A protocol that is trusted.

    Raises:
        ValueError: It is not a protocol, or would import what is not trusted.
    """
    protocol = build_from_config(config, EnvProtocol, folder, trust)
    if protocol.imports is not None and not trust and protocol != known:
        raise NotTrustedError(
            f"{folder} is played in {protocol.name}, for which {protocol.imports} would be"
            " imported; if you trust its author, pass --trust, or trust: true to the class that"
            " reads it in a config of fit"
        )
    return protocol


def is_inside(config: Mapping[str, Any]) -> bool:
    """Whether a class of this package is described."""
    return str(config.get("class_path")).split(".")[0] == __name__.split(".")[0]


def build_from_config(
    config: Mapping[str, Any], base: type[T], folder: Path, trust: bool = False
) -> T:
    """Instantiate ``class_path`` with ``init_args``; lists become tuples, as JSON has none.

    Args:
        config: The two.
        base: What the class must derive from.
        folder: The artefact that the config comes from, for messages.
        trust: Import a class from outside the package; modules already imported are trusted.

    Raises:
        ValueError: The class is outside the package, of another kind or takes other arguments.
    """
    if missing := {"class_path", "init_args"} - config.keys():
        raise ValueError(
            f"{folder} describes a {base.__name__} without {', '.join(sorted(missing))};"
            " copy the policy folder again"
        )
    module, _, name = str(config["class_path"]).rpartition(".")
    if not (is_inside(config) or trust or module in sys.modules):
        raise NotTrustedError(
            f"{folder} names the class {config['class_path']}, which is outside lightning_distill"
            " and would be imported; if you trust its author, pass --trust, or"
            " trust: true to the class that reads it in a config of fit"
        )
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{folder} names {config['class_path']}, which cannot be imported ({error}); run where"
            " its module lies, or upgrade lightning-distill"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(
            f"{folder} names {config['class_path']}, which is not a {base.__name__};"
            " copy the policy folder again"
        )
    try:
        given = config["init_args"].items()
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given})
    except Exception as error:  # whatever a constructor makes of arguments it did not expect
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder} has arguments that {name} does not take ({reason}); upgrade"
            " lightning-distill, or copy the folder again"
        ) from error


def class_path_of(cls: type) -> str:
    """Return the name by which a class is described."""
    return f"{cls.__module__}.{cls.__qualname__}"
