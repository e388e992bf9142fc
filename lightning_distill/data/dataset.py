"""The dataset folder: what a teacher saw and thought, a replay buffer on memory-mapped files.

``storage/`` holds one preallocated file per key, time-major (T, N, ...) for N environments.
``progress.json``, replaced atomically after every block of rows, says how far the recording is and
carries a checksum per block. ``manifest.json``, written last, makes the dataset complete.

Stacked observations are stored as single frames: plane k of K (oldest first) of the observation
at (t, n) is the frame at (t - (K - 1 - k), n), or zeros where the game was younger than that.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer, TensorStorage

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from lightning_distill import __version__
from lightning_distill.policies import Output, load_protocol

FORMAT_VERSION = 1
STORAGE, PROGRESS, MANIFEST = "storage", "progress.json", "manifest.json"


def take_rows(data: TensorDictBase, rows: Tensor) -> TensorDictBase:
    """Gather rows of every key with ``index_select``, ten times as fast as advanced indexing."""
    return data.apply(lambda t: t.index_select(0, rows), batch_size=rows.shape)


def as_rows(rollout: TensorDictBase, frame_stack: int) -> TensorDictBase:
    """Turn a rollout (N, T) into rows (T, N); of a stack only the newest frame is kept.

    Args:
        rollout: As the collector returns it, and ``teacher`` where it was labelled.
        frame_stack: Frames per observation.
    """
    observation = rollout["observation"]
    stacked = frame_stack > 1
    columns = {
        "frame" if stacked else "observation": observation[:, :, -1] if stacked else observation,
        "step": rollout["episode_step"].squeeze(-1),
        "action": rollout["action"],
        "reward": rollout["next", "reward"].squeeze(-1),
        "terminated": rollout["next", "terminated"].squeeze(-1),
        "truncated": rollout["next", "truncated"].squeeze(-1),
    }
    if rollout.get("teacher", None) is not None:
        columns["teacher"] = rollout["teacher"]
    return TensorDict(columns, rollout.shape).transpose(0, 1).contiguous()


def rebuild_stacks(
    frames: Tensor, rows: Tensor, step: Tensor, frame_stack: int, num_envs: int
) -> Tensor:
    """Gather stacked observations from single frames.

    Args:
        frames: (T * N, H, W), time-major; before the first row comes the last, as in a ring.
        rows: Flat row numbers t * N + n, (B,) int64.
        step: Agent steps since the game's start at those rows, (B,).
        frame_stack: Frames per observation, K.
        num_envs: N.

    Returns:
        (B, K, H, W), zeros where the game was younger than the frame.
    """
    age = torch.arange(frame_stack - 1, -1, -1)
    sources = (rows.unsqueeze(1) - age * num_envs).remainder_(len(frames))
    planes: Tensor = frames.index_select(0, sources.reshape(-1))
    unborn = step.unsqueeze(1) < age
    if unborn.any():
        # Not by the mask, which touches every byte.
        planes.index_fill_(0, unborn.view(-1).nonzero().squeeze(-1), 0)
    return planes.view(len(rows), frame_stack, *frames.shape[1:])


class DatasetWriter:
    """Writes a dataset folder block by block; a killed recording continues where it stopped.

    Args:
        root: The folder, holding a recording that :meth:`create` began.

    Raises:
        FileNotFoundError: There is no recording.
        ValueError: The recording is complete already.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / PROGRESS).is_file():
            raise FileNotFoundError(
                f"{root} holds no recording (no {PROGRESS}); start one with"
                f" `lightning-distill collect --out {root}`"
            )
        if (root / MANIFEST).exists():
            raise ValueError(f"the dataset {root} is complete; there is nothing to continue")
        self._lock = FolderLock(root)
        self.progress = _read_checked(root / PROGRESS, _check_progress)
        self._data = _map_files(root, self.progress, "r+")
        if blocks := self.progress["blocks"]:
            _check_block(root, self._data, blocks[-1])

    @classmethod
    def create(
        cls, root: Path, example: TensorDictBase, rows: int, recording: dict[str, Any]
    ) -> DatasetWriter:
        """Allocate the files and begin a recording.

        Args:
            root: Folder to create.
            example: One row (N,) with every key.
            rows: T, rows to record.
            recording: What a continuation and the manifest need to know: protocol, teacher,
                control, seed.

        Raises:
            FileExistsError: The folder exists.
            OSError: The disk has too little room.
        """
        if root.exists():
            raise FileExistsError(exists_message(root))
        needed = rows * example.bytes()
        root.mkdir(parents=True)
        if needed > (free := shutil.disk_usage(root).free):
            root.rmdir()
            raise OSError(
                f"the dataset needs {needed / 1e6:,.0f} MB but {root.parent} has"
                f" {free / 1e6:,.0f} MB free; record fewer steps or choose another folder"
            )
        try:
            example.unsqueeze(0).expand(rows, *example.shape).memmap_like(root / STORAGE)
            _reserve(root / STORAGE)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(root)
            raise OSError(
                f"the dataset's {needed / 1e6:,.0f} MB cannot be reserved in {root.parent}"
                f" ({error}); record fewer steps or choose another folder"
            ) from error
        progress = {
            "format_version": FORMAT_VERSION,
            "rows": rows,
            "rows_done": 0,
            "num_envs": example.shape[0],
            "keys": {
                "/".join(key) if isinstance(key, tuple) else key: {
                    "shape": [rows, *tensor.shape],
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                }
                for key, tensor in example.items(include_nested=True, leaves_only=True)
            },
            "blocks": [],
            "returns": [],
            "recording": recording,
        }
        write_json(root / PROGRESS, progress)
        return cls(root)

    @property
    def rows_left(self) -> int:
        """Rows still to record."""
        return int(self.progress["rows"] - self.progress["rows_done"])

    def append(self, block: TensorDictBase, returns: list[float]) -> None:
        """Write a block (rows, N) and note its checksum.

        Args:
            block: The rows.
            returns: Returns of the games that ended in it.
        """
        start = self.progress["rows_done"]
        stop = start + block.shape[0]
        self._data[start:stop] = block
        self.progress["rows_done"] = stop
        self.progress["returns"] += returns
        self.progress["blocks"].append({"rows": [start, stop], "crc32": checksum(block)})
        write_json(self.root / PROGRESS, self.progress)

    def finish(self) -> None:
        """Write the manifest, which makes the dataset complete."""
        returns = np.array(self.progress["returns"])
        manifest = {
            "format_version": FORMAT_VERSION,
            "version": __version__,
            **self.progress["recording"],
            "rows": self.progress["rows"],
            "num_envs": self.progress["num_envs"],
            "steps": self.progress["rows"] * self.progress["num_envs"],
            "keys": self.progress["keys"],
            "games": {
                "episodes": len(returns),
                "return_mean": float(returns.mean()) if len(returns) else None,
                "return_std": float(returns.std()) if len(returns) else None,
            },
        }
        write_json(self.root / MANIFEST, manifest)

    def close(self) -> None:
        """Let others write into the folder."""
        self._lock.release()


class Dataset:
    """A complete dataset folder, read in place.

    Args:
        root: The folder.
        trust: Import its environment class from outside the package.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The recording is incomplete, damaged or of a newer format.
    """

    def __init__(self, root: str | Path, trust: bool = False) -> None:
        self.root = Path(root)
        self.manifest = _read_manifest(self.root)
        self.protocol = load_protocol(self.manifest["protocol"], self.root, trust)
        self.output: Output = self.manifest["teacher"]["output"]
        self.num_actions = int(self.manifest["num_actions"])
        self.num_envs = int(self.manifest["num_envs"])
        self.observation_shape = tuple(self.manifest["observation_shape"])
        self.data = _map_files(self.root, self.manifest, "c")
        self._flat = {
            key: tensor.flatten(0, 1)
            for key, tensor in self.data.items(include_nested=True, leaves_only=True)
        }

    def __len__(self) -> int:
        """Recorded agent steps."""
        return int(self.manifest["steps"])

    @property
    def label_keys(self) -> tuple[str, ...]:
        """What the teacher wrote."""
        return tuple(key[1] for key in self._flat if key[0] == "teacher")

    def gather(self, rows: Tensor) -> TensorDict:
        """Return a batch with rebuilt observations.

        Args:
            rows: Flat row numbers t * N + n, (B,) int64.

        Returns:
            ``observation``, ``action``, ``teacher.logits`` and so on, batch size (B,).
        """
        batch = {
            key: tensor.index_select(0, rows)
            for key, tensor in self._flat.items()
            if key not in ("frame", "observation")
        }
        batch["observation"] = self._observation(rows)
        return TensorDict(batch, rows.shape, device="cpu")

    def _observation(self, rows: Tensor) -> Tensor:
        if "observation" in self._flat:
            found: Tensor = self._flat["observation"].index_select(0, rows)
            return found
        frames, step = self._flat["frame"], self._flat["step"].index_select(0, rows)
        return rebuild_stacks(frames, rows, step, self.protocol.frame_stack, self.num_envs)

    def split(self, heldout_fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Split rows by episode: neighbouring frames are near-duplicates and must not be parted.

        Args:
            heldout_fraction: Share of the steps to hold out; whole episodes are added at random
                until it is reached.
            seed: Which episodes.

        Returns:
            Flat training rows and held-out rows, ascending.
        """
        episode = self.episodes()
        lengths = torch.bincount(episode)
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        before = lengths[order].cumsum(0) - lengths[order]
        heldout = torch.zeros(len(lengths), dtype=torch.bool)
        heldout[order[before < heldout_fraction * len(self)]] = True
        if heldout.all() and heldout_fraction < 1:
            raise ValueError(
                f"the dataset {self.root} has {len(lengths)} episodes, too few to hold out"
                f" {heldout_fraction}; record more steps or set heldout_fraction=0"
            )
        mask = heldout[episode]
        return (~mask).nonzero().squeeze(-1), mask.nonzero().squeeze(-1)

    def episodes(self) -> Tensor:
        """Return an episode number for every flat row, (T * N,) int64."""
        step: Tensor = self._flat["step"].view(-1, self.num_envs)
        start = step == 0
        start[0] = True
        number = start.T.reshape(-1).cumsum(0) - 1
        return number.view(self.num_envs, -1).T.reshape(-1)

    def replay_buffer(self, batch_size: int) -> TensorDictReplayBuffer:
        """Return the dataset as a TorchRL replay buffer whose samples have whole observations.

        Args:
            batch_size: Of ``sample()``.
        """
        return TensorDictReplayBuffer(storage=_DatasetStorage(self), batch_size=batch_size)

    def recorded_returns(self) -> list[float]:
        """Return the returns of the games that ended while recording."""
        returns: list[float] = _read_checked(self.root / PROGRESS, _check_progress)["returns"]
        return returns

    def verify(self, report: Callable[[float, str], None] = lambda steps, note: None) -> None:
        """Read everything and compare checksums.

        Args:
            report: Told the steps compared.

        Raises:
            ValueError: A block differs from what was recorded.
        """
        for block in _read_checked(self.root / PROGRESS, _check_progress)["blocks"]:
            _check_block(self.root, self.data, block)
            report(block["rows"][1] * self.num_envs, "")


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


class _DatasetStorage(TensorStorage):
    """Lets a replay buffer's samplers read the dataset."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset.data.reshape(-1))
        self._dataset = dataset

    def get(self, index: Any) -> TensorDict:
        """Return the rows with rebuilt observations."""
        return self._dataset.gather(torch.as_tensor(index).reshape(-1))


def checksum(block: TensorDictBase) -> int:
    """Return the CRC-32 of a block's bytes, key by key in alphabetical order."""
    value = 0
    for key in sorted(block.keys(include_nested=True, leaves_only=True), key=str):
        value = zlib.crc32(block[key].contiguous().view(torch.uint8).numpy().data, value)
    return value


def _reserve(storage: Path) -> None:
    """Take the disk's room now: written through a memory map, a full disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        for file in storage.rglob("*.memmap"):
            with file.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def _check_block(root: Path, data: TensorDict, block: dict[str, Any]) -> None:
    start, stop = block["rows"]
    if checksum(data[start:stop]) != block["crc32"]:
        raise ValueError(f"rows {start} to {stop} of {root} are damaged; record the dataset again")


def _map_files(root: Path, description: dict[str, Any], mode: Literal["r+", "c"]) -> TensorDict:
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


def _read_manifest(root: Path) -> dict[str, Any]:
    if not (root / MANIFEST).is_file():
        if (root / PROGRESS).is_file():
            progress = _read_checked(root / PROGRESS, _check_progress)
            raise ValueError(
                f"the dataset {root} is incomplete: recording, {progress['rows_done']} of"
                f" {progress['rows']} rows; continue with `lightning-distill collect --resume"
                f" {root}`"
            )
        raise FileNotFoundError(
            f"{root} is not a dataset (no {MANIFEST}); record one with"
            f" `lightning-distill collect --teacher PATH --out {root}`"
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


def exists_message(root: Path) -> str:
    """Return what to say where a dataset would be created and something is there already."""
    if (root / PROGRESS).is_file() and not (root / MANIFEST).exists():
        return f"{root} is half recorded; continue with `lightning-distill collect --resume {root}`"
    return f"{root} exists; choose another --out or remove it"


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, or replace it whole."""
    scratch = file.with_name(f".{file.name}.new")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    scratch.replace(file)
