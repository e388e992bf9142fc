"""Weights from files that nobody vouches for: sizes are checked first, nothing is executed."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

State = dict[str, Tensor]

# What a member may announce for each byte of its archive: weights hardly shrink.
_MAX_EXPANSION = 20
_MAX_COPIES = 8  # tensors of a state dict that may share one storage


def open_zip(source: Path | bytes, name: str) -> zipfile.ZipFile:
    """Open an archive whose members lie inside it and are no larger than it can hold.

    Args:
        source: The file, or its bytes.
        name: What to call it in messages.

    Raises:
        ValueError: It is damaged, or its members are not what they seem.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    try:
        archive = zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"{name} is damaged ({error}); copy it again") from error
    for member in archive.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"{name} has a member {member.filename!r} that points outside of it; an agent's"
                " archive never does, do not use this file"
            )
    announced = sum(member.file_size for member in archive.infolist())
    if announced > _MAX_EXPANSION * size:
        raise ValueError(
            f"{name} announces {announced:,} bytes in an archive of {size:,}; an agent's archive"
            " never does, do not use this file"
        )
    return archive


def read_member(archive: zipfile.ZipFile, member: str, name: str) -> bytes:
    """Return a member's bytes.

    Raises:
        ValueError: It is missing or damaged.
    """
    try:
        return archive.read(member)
    except KeyError:
        raise ValueError(f"{name} has no {member!r}; expected an agent's archive") from None
    except Exception as error:  # zlib and lzma have errors of their own
        raise ValueError(f"{name} is damaged at {member!r} ({error}); copy it again") from error


def read_torch(source: Path | bytes, name: str) -> Any:
    """Read what ``torch.save`` wrote, tensors and plain containers only.

    Args:
        source: The file, or its bytes.
        name: What to call it in messages.

    Raises:
        ValueError: It is damaged, or holds something that only running its code would restore.
    """
    with open_zip(source, name) as archive:
        for member in archive.namelist():
            if member.endswith(".pkl"):
                _check_globals(read_member(archive, member, name), name)
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes make of torch's reader
        reason = " ".join(str(error).split())[:200]
        if reason.startswith("Weights only load failed"):  # and advice that is not for strangers
            reason = "torch does not read it with weights_only"
        raise ValueError(f"{name} is damaged ({reason}); copy it again") from error


# All that tensors in plain containers, and the states of schedulers, are made of; others may run
# code, or allocate at will. What torch itself refuses of these it still does.
_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (\w+Storage|Size|device|b?float\d+|u?int\d+|bool)"
    r"|torch\.storage (Untyped|Typed)Storage"
)


def _check_globals(program: bytes, name: str) -> None:
    """Raise if a pickle names anything but what tensors are made of; nothing is executed."""
    try:
        for operation, argument, _ in pickletools.genops(program):
            if "GLOBAL" in operation.name and not _GLOBALS.fullmatch(str(argument)):
                what = f"the object {argument}" if argument else "more than tensors"
                raise ValueError(
                    f"{name} holds {what}, which could run code when read; save the state dict"
                    " alone, with torch.save(module.state_dict(), FILE)"
                )
            if operation.name in ("INST", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"{name} holds more than tensors; save the state dict alone")
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name} is damaged ({error}); copy it again") from error
    except Exception as error:  # of a program that is cut or not one
        raise ValueError(f"{name} is damaged ({error!r}); copy it again") from error


def read_state(source: Path | bytes, name: str) -> State:
    """Read a state dict from a file of torch or safetensors.

    Args:
        source: The file, or its bytes.
        name: What to call it in messages.

    Raises:
        ValueError: It is damaged or holds something else.
    """
    content = source if isinstance(source, bytes) else source.read_bytes()
    if content[:2] == b"PK":
        state = read_torch(content, name)
    else:
        try:
            state = load_safetensors(content)
        except (SafetensorError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{name} is neither a file of torch.save nor of safetensors ({error}); expected a"
                " state dict"
            ) from error
    if isinstance(state, Mapping) and "pytorch-lightning_version" in state:
        raise ValueError(
            f"{name} is a training checkpoint, which resumes its own run with --ckpt_path; a policy"
            " or teacher is the folder policy/last or policy/best of that run"
        )
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{name} does not hold a state dict, which maps names to tensors; save one with"
            " torch.save(module.state_dict(), FILE)"
        )
    state = {str(key): tensor.detach() for key, tensor in state.items()}
    check_sizes(state, len(content), name)
    return state


def check_sizes(state: Mapping[str, Tensor], size: int, name: str) -> None:
    """Raise if tensors are larger than the file that they come from, or not plain.

    Args:
        state: The tensors.
        size: Bytes of the file.
        name: What to call it in messages.
    """
    total = 0
    for key, tensor in state.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise ValueError(f"{name} holds {key!r}, which is not a plain tensor; save plain ones")
        if tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
            raise ValueError(f"{name} holds {key!r}, which has no plain numbers; save plain ones")
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(
                f"{name} announces a tensor {key!r} of shape {tuple(tensor.shape)} in {size:,}"
                " bytes; do not use this file"
            )
        total += tensor.numel() * tensor.element_size()
    if total > _MAX_COPIES * size:
        raise ValueError(f"{name} announces {total:,} bytes in {size:,}; do not use this file")
