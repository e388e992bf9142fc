"""The dataset folder: what a teacher saw and thought, a replay buffer on memory-mapped files.

``storage/`` holds one preallocated file per key, time-major (T, N, ...) for N environments.
``progress.json``, replaced atomically after every block of rows, says how far the recording is and
carries a checksum per block. ``manifest.json``, written last, makes the dataset complete.

Stacked observations are stored as single frames: plane k of K (oldest first) of the observation
at (t, n) is the frame at (t - (K - 1 - k), n), or zeros where the episode was younger than that.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer, TensorStorage

from lightning_distill import __version__
from lightning_distill.data.files import (
    FORMAT_VERSION,
    MANIFEST,
    PROGRESS,
    STORAGE,
    FolderLock,
    check_block,
    checksum,
    how_to_complete,
    map_files,
    read_manifest,
    read_progress,
    reserve,
    write_json,
)
from lightning_distill.described import load_protocol
from lightning_distill.policies import Output


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
        step: Agent steps since the episode's start at those rows, (B,).
        frame_stack: Frames per observation, K.
        num_envs: N.

    Returns:
        (B, K, H, W), zeros where the episode was younger than the frame.
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
                f" `lightning-distill collect --out {shlex.quote(str(root))}`"
            )
        if (root / MANIFEST).exists():
            raise ValueError(f"the dataset {root} is complete; there is nothing to continue")
        self._lock = FolderLock(root)
        self.progress = read_progress(root)
        self._data = map_files(root, self.progress, "r+")
        if blocks := self.progress["blocks"]:
            check_block(root, self._data, blocks[-1])

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
            reserve(root / STORAGE)
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
            returns: Returns of the episodes that ended in it.
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
        self.manifest = read_manifest(self.root)
        self.protocol = load_protocol(self.manifest["protocol"], self.root, trust)
        self.output: Output = self.manifest["teacher"]["output"]
        self.num_actions = int(self.manifest["num_actions"])
        self.num_envs = int(self.manifest["num_envs"])
        self.observation_shape = tuple(self.manifest["observation_shape"])
        self.data = map_files(self.root, self.manifest, "c")
        self._flat = {
            key: tensor.flatten(0, 1)
            for key, tensor in self.data.items(include_nested=True, leaves_only=True)
        }

    def __len__(self) -> int:
        """Recorded agent steps."""
        return int(self.manifest["steps"])

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the file of checksums, if it is there, its first 16 hex digits."""
        if not (self.root / PROGRESS).is_file():
            return None
        return hashlib.sha256((self.root / PROGRESS).read_bytes()).hexdigest()[:16]

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
        """Return the returns of the episodes that ended while recording."""
        returns: list[float] = read_progress(self.root)["returns"]
        return returns

    def verify(self, report: Callable[[float, str], None] = lambda steps, note: None) -> None:
        """Read everything and compare checksums.

        Args:
            report: Told the steps compared.

        Raises:
            ValueError: A block differs from what was recorded.
        """
        progress = read_progress(self.root)
        if progress["rows_done"] != len(self.data):
            raise ValueError(
                f"{self.root / PROGRESS} has checksums of {progress['rows_done']} of"
                f" {len(self.data)} rows; copy it again or record the dataset again"
            )
        for block in progress["blocks"]:
            check_block(self.root, self.data, block)
            report(block["rows"][1] * self.num_envs, "")


class _DatasetStorage(TensorStorage):
    """Lets a replay buffer's samplers read the dataset."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset.data.reshape(-1))
        self._dataset = dataset

    def get(self, index: Any) -> TensorDict:
        """Return the rows with rebuilt observations."""
        return self._dataset.gather(torch.as_tensor(index).reshape(-1))


def exists_message(root: Path) -> str:
    """Return what to say where a dataset would be created and something is there already."""
    if (root / PROGRESS).is_file() and not (root / MANIFEST).exists():
        return f"{root} is half recorded; {how_to_complete(root, read_progress(root))}"
    return f"{root} exists; choose another --out or remove it"
