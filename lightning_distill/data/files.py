"""The files of a dataset folder: mapped, checked before anything in them is believed, locked."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from lightning_distill.policies import Output

FORMAT_VERSION = 1
STORAGE, PROGRESS, MANIFEST = "storage", "progress.json", "manifest.json"


class FolderLock:
    """Keeps other processes from writing into a folder until it is released or the process ends.

    Args:
        folder: The folder, which exists.

    Raises:
        FileExistsError: Another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        if fcntl is None:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FileExistsError(
                f"another process is writing into {folder}; wait until it ends or choose another"
                " folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
        else:
            self._descriptor = descriptor

    def release(self) -> None:
        """Let others write."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def checksum(block: TensorDictBase) -> int:
    """Return the CRC-32 of a block's bytes, key by key in alphabetical order."""
    value = 0
    for key in sorted(block.keys(include_nested=True, leaves_only=True), key=str):
        value = zlib.crc32(block[key].contiguous().view(torch.uint8).numpy().data, value)
    return value


def reserve(storage: Path) -> None:
    """Take the disk's room now: written through a memory map, a full disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        for file in storage.rglob("*.memmap"):
            with file.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def check_block(root: Path, data: TensorDict, block: dict[str, Any]) -> None:
    """Raise if rows differ from their checksum."""
    start, stop = block["rows"]
    if checksum(data[start:stop]) != block["crc32"]:
        raise ValueError(f"rows {start} to {stop} of {root} are damaged; record the dataset again")


def map_files(root: Path, description: dict[str, Any], mode: Literal["r+", "c"]) -> TensorDict:
    """Map the files of a dataset (T, N) as plain tensors.

    Not ``TensorDict.load_memmap``, which unpickles what lies in some kinds of its folders; what it
    needs is written all the same, for those who trust the folder.

    Args:
        root: The dataset's folder.
        description: Its manifest, or the progress of its recording.
        mode: ``r+`` to write; with ``c`` what is written stays in memory.
    """
    shape = (description["rows"], description["num_envs"])
    tensors = {}
    for key, spec in description["keys"].items():
        file = root / STORAGE / f"{key}.memmap"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; record the dataset again")
        dtype = np.dtype(spec["dtype"])
        expected = math.prod(spec["shape"]) * dtype.itemsize
        if (size := file.stat().st_size) < expected:
            raise ValueError(
                f"{file} has {size:,} bytes but {expected:,} were recorded;"
                " copy it again or record the dataset again"
            )
        array = np.memmap(file, dtype, mode, shape=tuple(spec["shape"]))
        tensors[tuple(key.split("/"))] = torch.from_numpy(array)
    return TensorDict(tensors, shape, device="cpu")


def how_to_complete(root: Path, progress: Mapping[str, Any]) -> str:
    """Say what to do about a recording that has not come to its end."""
    if "joined" in progress["recording"].get("settings", {}):
        return "it was being joined from others: remove it and join them again"
    return f"continue with `lightning-distill collect --resume {shlex.quote(str(root))}`"


def read_progress(root: Path) -> dict[str, Any]:
    """Return how far a recording is, checked.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, contradicts itself, or is of a newer format.
    """
    if not (root / PROGRESS).is_file():
        raise FileNotFoundError(
            f"{root / PROGRESS}, which has the checksums, is missing; copy the dataset again or"
            " record it again"
        )
    return _read_checked(root / PROGRESS, _check_progress)


def read_manifest(root: Path) -> dict[str, Any]:
    """Return what describes a complete dataset, checked.

    Raises:
        FileNotFoundError: It is no dataset.
        ValueError: It is incomplete, damaged, contradicts itself, or is of a newer format.
    """
    if not (root / MANIFEST).is_file():
        if (root / PROGRESS).is_file():
            progress = read_progress(root)
            raise ValueError(
                f"the dataset {root} is incomplete: recording, {progress['rows_done']} of"
                f" {progress['rows']} rows; {how_to_complete(root, progress)}"
            )
        raise FileNotFoundError(
            f"{root} is not a dataset (no {MANIFEST}); record one with"
            f" `lightning-distill collect --teacher PATH --out {shlex.quote(str(root))}`"
        )
    return _read_checked(root / MANIFEST, _check_manifest)


def _read_checked(file: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    content = _read_json(file)
    try:
        check(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}); copy it again or record the dataset again"
        ) from error
    return content


# A key becomes a file's name: nothing in it may lead elsewhere.
_KEY = re.compile(r"[a-z_]+(/[a-z_]+)?")
_DTYPES = {"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}


def _check_keys(description: dict[str, Any]) -> None:
    """Raise if a manifest or the progress of a recording does not describe files (T, N, ...)."""
    rows, num_envs, keys = (description[name] for name in ("rows", "num_envs", "keys"))
    for key, spec in keys.items():
        shape = spec["shape"]
        if not (_KEY.fullmatch(key) and spec["dtype"] in _DTYPES):
            raise ValueError(f"key {key!r} of dtype {spec['dtype']!r}")
        if not all(type(side) is int and side > 0 for side in [rows, num_envs, *shape]):
            raise ValueError(f"key {key!r} of shape {shape}")
        if shape[:2] != [rows, num_envs]:
            raise ValueError(f"key {key!r} of shape {shape} for {rows} rows of {num_envs}")


def _check_progress(progress: dict[str, Any]) -> None:
    """Raise if the progress of a recording contradicts itself."""
    _check_keys(progress)
    ends = [0]
    for block in progress["blocks"]:
        start, stop = block["rows"]
        if start != ends[-1] or type(stop) is not int or type(block["crc32"]) is not int:
            raise ValueError(f"a block of rows {start} to {stop}")
        ends.append(stop)
    if not ends[-1] == progress["rows_done"] <= progress["rows"] or ends != sorted(ends):
        raise ValueError(f"{progress['rows_done']} of {progress['rows']} rows in {ends[-1]}")
    if not all(isinstance(final, (int, float)) for final in progress["returns"]):
        raise ValueError("returns that are no numbers")
    if not isinstance(progress["recording"].get("settings", {}), dict):
        raise TypeError(f"settings are {progress['recording']['settings']!r}")


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise if a manifest contradicts itself."""
    _check_keys(manifest)
    keys, shape = manifest["keys"], list(manifest["observation_shape"])
    columns = {key: spec["shape"][2:] for key, spec in keys.items()}
    expected: dict[str, list[int]] = {key: [] for key in ("step", "action", "reward")}
    expected["teacher/logits"] = [manifest["num_actions"]]
    expected |= {"observation": shape} if "observation" in columns else {"frame": shape[1:]}
    for key, of_one in expected.items():
        if columns.get(key) != of_one:
            raise ValueError(f"key {key!r} of shape {columns.get(key)} for {of_one} per step")
    if manifest["steps"] != manifest["rows"] * manifest["num_envs"]:
        raise ValueError(f"{manifest['steps']} steps in {manifest['rows']} rows")
    if manifest["teacher"]["output"] not in get_args(Output):
        raise ValueError(f"labels are {manifest['teacher']['output']!r}")
    parts = {"protocol": manifest["protocol"]}
    parts |= {key: manifest.get(key, {}) for key in ("control", "games")}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise TypeError(f"{key} is {part!r}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        version = content["format_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version is {version!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); record the dataset again") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{file.parent} has dataset format {version} but this version reads up to"
            f" {FORMAT_VERSION}; upgrade lightning-distill"
        )
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, or replace it whole."""
    scratch = file.with_name(f".{file.name}.new")
    scratch.write_text(_json(content))
    scratch.replace(file)


def write_new_json(file: Path, content: dict[str, Any]) -> bool:
    """Write a JSON file unless there is one; say whether it was written.

    Args:
        file: The file; one that another process writes at the same time is never replaced.
        content: What to write.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        scratch.write_text(_json(content))
        try:
            os.link(scratch, file)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if file.exists():
                return False
            scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
    return True


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
