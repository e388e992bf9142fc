"""What reports read: folders without evaluations, damaged files, learning curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_distill.report import build_report
from lightning_distill.report.plots import _mean_and_range
from lightning_distill.report.reading import read_curve


def test_learning_curve_skips_what_is_not_there(tmp_path: Path) -> None:
    assert read_curve(tmp_path) is None
    file = tmp_path / "metrics.csv"
    file.write_text("step,eval/return_mean\n1,\n2,-3.5\n")
    curve = read_curve(tmp_path)
    assert curve is not None
    assert curve[0].tolist() == [2]
    # Resumed at step 2, and its last row is being written.
    file.write_text("step,train/episode_return,eval/return_mean\n1,,9\n2,5\n3,6\n2,7\n4,nan\n5,-")
    curve = read_curve(tmp_path)
    assert curve is not None
    assert curve[0].tolist() == [2, 3]
    assert curve[1].tolist() == [7, 6]


def test_seeds_are_averaged_over_the_steps_they_share() -> None:
    first = (np.array([0.0, 10, 20]), np.array([0.0, 10, 20]))
    second = (np.array([5.0, 15]), np.array([15.0, 35]))
    steps, low, mean, high = _mean_and_range([first, second])
    assert steps.tolist() == [5, 10, 15]
    assert low.tolist() == [5, 10, 15]
    assert mean.tolist() == [10, 17.5, 25]
    assert high.tolist() == [15, 25, 35]


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected a run folder"):
        build_report([tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_without_evaluations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lightning-distill evaluate --policy .* first"):
        build_report([tmp_path], tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("", "Expecting value"),
        ('{"format_version": 1, "ga', "Unterminated"),
        ("[1, 2]", "indices"),
        ('{"format_version": 1, "random_score": 0}', "no 'policy'"),
        ('{"format_version": 1, "policy": {}, "random_score": 0}', "no capacity, fingerprint"),
        ('{"format_version": 1, "policy": [], "random_score": 0}', "keys"),
    ],
)
def test_damaged_evaluation_is_named(tmp_path: Path, damage: str, reason: str) -> None:
    (tmp_path / "evaluation.json").write_text(damage)
    with pytest.raises(ValueError, match=rf"evaluation.json is damaged \(.*{reason}.*evaluate"):
        build_report([tmp_path], tmp_path / "out")


def test_newer_format_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match=r"evaluation format 2 but .* up to 1; upgrade"):
        build_report([tmp_path], tmp_path / "out")
