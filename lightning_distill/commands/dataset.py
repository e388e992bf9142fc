"""Look after recorded datasets: describe, check and join them."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from lightning_distill.commands.collect import BLOCK_ROWS
from lightning_distill.data.dataset import Dataset, DatasetWriter
from lightning_distill.data.files import read_progress
from lightning_distill.envs import check_same_protocol
from lightning_distill.progress import progress


def dataset(
    action: Literal["info", "verify", "join"],
    paths: list[str],
    out: str | None = None,
    trust: bool = False,
) -> None:
    """Describe, check or join recorded datasets.

    Args:
        action: ``info`` describes, ``verify`` reads everything and compares checksums, ``join``
            writes one dataset with the steps of all.
        paths: Dataset folders.
        out: Dataset folder to create, for ``join``.
        trust: Import environment classes from outside the package.
    """
    if (out is None) == (action == "join"):
        raise ValueError(f"out is {out}; give --out DIR to join, and only then")
    datasets = [Dataset(path, trust) for path in paths]
    if action == "info":
        for each in datasets:
            print(_description(each))
    elif action == "verify":
        for each in datasets:
            with progress(f"verify {each.root}", len(each), "steps") as report:
                each.verify(report)
            print(f"{each.root}: {len(each):,} steps as they were recorded")
    else:
        _join(datasets, Path(str(out)))


def _description(dataset: Dataset) -> str:
    manifest = dataset.manifest
    ended, teacher = manifest["games"], manifest["teacher"]
    size = sum(file.stat().st_size for file in dataset.root.rglob("*") if file.is_file()) / 1e6
    played = (
        f"{ended['episodes']} episodes,"
        f" return {ended['return_mean']:.1f} ± {ended['return_std']:.1f}"
        if ended["episodes"]
        else "no finished episode"
    )
    control = ", ".join(f"{key} {value}" for key, value in manifest["control"].items())
    return "\n".join(
        (
            f"{dataset.root}: {len(dataset):,} steps of {dataset.protocol.name}, {size:,.0f} MB",
            f"  played    {played}; {dataset.num_envs} environments; {control}",
            f"  teacher   {teacher['path']} ({teacher['capacity']}), {dataset.output}",
            f"  labels    {', '.join(dataset.label_keys)}; {dataset.num_actions} actions",
        )
    )


def _join(datasets: list[Dataset], out: Path) -> None:
    """Write the rows of all datasets one after the other."""
    first = datasets[0]
    for other in datasets[1:]:
        check_same_protocol(first.protocol, other.protocol, f"the dataset {other.root}")
        for what, of_first, of_other in (
            ("teacher", _teacher(first), _teacher(other)),
            ("num_envs", first.num_envs, other.num_envs),
            ("labels", first.label_keys, other.label_keys),
        ):
            if of_first != of_other:
                raise ValueError(
                    f"{other.root} has {what} {of_other} but {first.root} has {of_first}; join"
                    " datasets of one teacher, recorded with the same --num_envs"
                )
    for one, other in combinations(datasets, 2):
        if _share_steps(one, other):
            raise ValueError(
                f"{other.root} has steps that {one.root} has as well, of which some would be held"
                " out and the others trained on; join recordings made with another --seed each"
            )
    for each in datasets:
        # Checksums are written anew: damage would look sound ever after.
        with progress(f"verify {each.root}", len(each), "steps", brief=True) as report:
            each.verify(report)
    rows = [len(each.data) for each in datasets]
    settings = {"joined": [str(each.root) for each in datasets]}
    recording = {key: first.manifest[key] for key in _DESCRIBED} | {
        "actor": None,
        "control": _control(datasets),
        "settings": settings,
    }
    writer = DatasetWriter.create(out, first.data[0], sum(rows), recording)
    try:
        with progress(f"join {out}", sum(map(len, datasets)), "steps") as report:
            for each in datasets:
                returns = each.recorded_returns()
                for block in each.data.split(BLOCK_ROWS):
                    writer.append(block, returns)
                    returns = []
                    report((sum(rows) - writer.rows_left) * first.num_envs, "")
        writer.finish()
    except BaseException:
        shutil.rmtree(out)  # half of it is nothing, and its parts are all there
        raise
    finally:
        writer.close()


_DESCRIBED = ("protocol", "teacher", "num_actions", "observation_shape")


def _teacher(dataset: Dataset) -> Any:
    return dataset.manifest["teacher"]["fingerprint"]


def _share_steps(one: Dataset, other: Dataset) -> bool:
    """Whether a block is in both, or both begin with the same rows, as with one seed."""
    blocks = [
        {(stop - start, block["crc32"]) for block in blocks for start, stop in [block["rows"]]}
        for blocks in (read_progress(each.root)["blocks"] for each in (one, other))
    ]
    rows = min(len(one.data), len(other.data), 64)
    return bool(blocks[0] & blocks[1]) or bool((one.data[:rows] == other.data[:rows]).all())


def _control(datasets: list[Dataset]) -> dict[str, Any]:
    """Return what all recordings have in common, and of shares the mean over steps."""
    modes = {each.manifest["control"]["mode"] for each in datasets}
    joined: dict[str, Any] = {"mode": modes.pop() if len(modes) == 1 else "mixed"}
    steps = sum(map(len, datasets))
    for key in ("epsilon", "beta"):
        shares = [each.manifest["control"].get(key, 0.0) * len(each) for each in datasets]
        joined[key] = sum(shares) / steps
    return joined
