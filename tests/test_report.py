"""Reports from run folders written by hand, against figures worked out by hand."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import trim_mean

from lightning_distill.commands.report import report
from lightning_distill.report import Report, build_report
from lightning_distill.report.groups import (
    aggregate,
    human_steps,
    interquartile_mean,
    t_interval,
)
from lightning_distill.report.reading import read_evaluation

HEADER = (
    "policy,stage,capacity,parameters,return_mean,return_std,return_max,ci_low,ci_high,episodes,"
    "agent_steps,percent_of_teacher,percent_of_teacher_normalised,difference,difference_low,"
    "difference_high,game,act,seeds,epochs,control,file_size,latency_ms,truncated_episodes,runs"
)
PARAMETERS = {"32-64-64/512": 1_687_719, "16-32-32/256": 429_575, "8-16-16/128": 111_607}
HIGH, MEDIUM, LOW = PARAMETERS
# Random return, then the mean returns of Green et al. 2019, Table 3: teacher; medium direct,
# distilled and tuned; low direct, distilled and tuned.
TABLE_3 = {
    "beam_rider": (363.9, 7500, 7018, 6284, 5447, 6958, 5489, 5548),
    "breakout": (1.7, 277, 166, 248, 309, 187, 201, 159),
    "enduro": (0.0, 722, 827, 656, 733, 948, 611, 1013),
    "freeway": (0.0, 34, 33, 34, 32, 34, 33, 33),
    "ms_pacman": (307.3, 3410, 4544, 3413, 5041, 2085, 3390, 3483),
    "pong": (-20.7, 21, 21, 20, 19, 21, 19, 21),
    "qbert": (163.9, 28367, 11646, 28554, 20572, 18502, 23019, 12152),
    "riverraid": (1338.5, 13916, 15601, 13080, 13716, 9408, 11256, 15593),
    "seaquest": (68.4, 2471, 1908, 2572, 3708, 2315, 2219, 3550),
    "space_invaders": (148.0, 1653, 1624, 1432, 1569, 1312, 1382, 1288),
}


def write_policy(
    folder: Path,
    mean: float,
    stage: str = "trained",
    capacity: str = LOW,
    *,
    game: str = "pong",
    random: float | None = -20.0,
    std: float = 1.0,
    seed: int | None = 0,
    act: str = "sample",
    fingerprint: str | None = None,
    sticky: float = 0.0,
    episodes: int = 4,
    returns: Sequence[float] | None = None,
    paired: bool = False,
    **provenance: Any,
) -> dict[str, Any]:
    """Write an evaluation and return what provenance says about the policy elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {
        "stage": stage,
        "run": str(folder),
        "agent_steps": 0 if stage == "distilled" else 1_800_000,
        "epochs": 10,
        "init_from": None,
        "seed": seed,
        "teacher": None,
        "version": "0.1.0",
        "commit": "abc123",
    } | provenance
    fingerprint = fingerprint or str(folder)
    policy = {
        "path": str(folder / "policy/last"),
        "fingerprint": fingerprint,
        "stage": stage,
        "algorithm": "PPO",
        "network": "NatureCNN",
        "capacity": capacity,
        "num_parameters": PARAMETERS[capacity],
        "file_size": 4096,
        "latency_ms": 0.25,
        "provenance": provenance,
    }
    record = {
        "format_version": 1,
        "game": game,
        "protocol": {
            "class_path": "lightning_distill.envs.Atari",
            "init_args": {"game": game, "sticky_probability": sticky},
        },
        "policy": policy,
        "act": act,
        "epsilon": 0.05 if act == "epsilon" else 0.0,
        "seed": 20_000,
        "precision": "32",
        "return_mean": mean,
        "return_std": std,
        "return_max": mean + 2,
        "ci_low": mean - 0.5,
        "ci_high": mean + 0.5,
        "episodes": episodes,
        "distinct_episodes": episodes,
        "truncated_episodes": 1,
        "returns": returns or [mean - 2, mean, mean, mean + 2],
        "paired": paired,
        "num_envs": 4,
        "random_score": random,
        "version": "0.1.0",
        "commit": "abc123",
    }
    (folder / "evaluation.json").write_text(json.dumps(record))
    return {key: policy[key] for key in ("path", "fingerprint", "capacity", "provenance")}


def of_episodes(folder: Path, returns: Sequence[float], **kwargs: Any) -> dict[str, Any]:
    return write_policy(folder, float(np.mean(returns)), returns=returns, **kwargs)


def test_students_are_compared_episode_by_episode(tmp_path: Path) -> None:
    """A teacher of 0, 10, 20 and 30 and a student always 1 below: the difference is certain."""
    teacher_returns, runs = [0.0, 10, 20, 30], tmp_path / "runs"
    teacher = of_episodes(runs / "teacher", teacher_returns, capacity=HIGH, paired=True)
    student = [value - 1 for value in teacher_returns]
    about: dict[str, Any] = {"stage": "distilled", "teacher": teacher, "dataset": dataset()}
    of_episodes(runs / "paired", student, paired=True, **about)
    of_episodes(runs / "unpaired", student, capacity=MEDIUM, **about)
    built, _, text = build(tmp_path)
    _, unpaired, paired = built.groups
    assert paired.difference == (-1, -1, -1)
    assert unpaired.difference is not None
    mean, low, high = unpaired.difference
    assert (mean, low < -10, high > 10) == (-1, True, True)
    assert "-1.0 (-1.0 to -1.0)" in text
    assert "So it was for 1 of 2 policies" in text


def test_the_untaught_are_not_compared_with_one_of_several_teachers(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    teachers = [
        of_episodes(runs / f"teacher{i}", [9.0 + i] * 4, capacity=HIGH, seed=i) for i in (0, 1)
    ]
    for i, teacher in enumerate(teachers):
        about: dict[str, Any] = {"stage": "distilled", "teacher": teacher, "dataset": dataset()}
        of_episodes(runs / f"student{i}", [8.0] * 4, seed=i, **about)
    of_episodes(runs / "direct", [7.0] * 4, stage="trained")
    built, *_ = build(tmp_path)
    teacher, direct, distilled = built.groups
    assert (direct.stage, direct.difference) == ("direct", None)
    assert direct.percent_normalised is not None  # of the mean of both
    assert distilled.difference is not None
    assert distilled.difference[0] == -1.5


def test_students_of_an_assistant_are_compared_with_the_first_teacher(tmp_path: Path) -> None:
    """Each with its own of two, and not with the assistant."""
    runs = tmp_path / "runs"
    for i in (0, 1):
        teacher = of_episodes(runs / f"teacher{i}", [9.0 + i] * 4, capacity=HIGH, seed=i)
        about: dict[str, Any] = {"stage": "distilled", "dataset": dataset(), "seed": i}
        medium = {"capacity": MEDIUM, "teacher": teacher}
        assistant = of_episodes(runs / f"assistant{i}", [8.5] * 4, **medium, **about)
        of_episodes(runs / f"student{i}", [8.0] * 4, teacher=assistant, **about)
    built, *_ = build(tmp_path)
    student = next(group for group in built.groups if group.capacity not in (HIGH, MEDIUM))
    assert student.difference is not None
    assert student.difference[0] == -1.5


def test_students_of_different_teachers_are_no_seeds_of_one_experiment(tmp_path: Path) -> None:
    """Their seeds differ as well, and one of the teachers is not evaluated."""
    runs = tmp_path / "runs"
    teacher = of_episodes(runs / "teacher", [9.0] * 4, capacity=HIGH)
    stranger = of_episodes(tmp_path / "elsewhere", [1.0] * 4, capacity=HIGH, stage="corrupted")
    for i, of in enumerate((teacher, stranger)):
        about: dict[str, Any] = {"stage": "distilled", "dataset": dataset(), "seed": i}
        of_episodes(runs / f"student{i}", [8.0 - 7 * i] * 4, teacher=of, **about)
    built, *_ = build(tmp_path)
    _, *students = built.groups
    found = {group.mean: (group.variant(), group.difference) for group in students}
    path = "policy/last"
    assert found[8] == (f"from {runs / 'teacher' / path}", (-1, -1, -1))
    assert found[1] == (f"from {tmp_path / 'elsewhere' / path}", None)
    # A teacher's other seed is the same experiment.
    other = of_episodes(runs / "teacher1", [9.0] * 4, capacity=HIGH, seed=1)
    of_episodes(runs / "student2", [8.0] * 4, teacher=other, **about | {"seed": 2})
    built, *_ = build(tmp_path)
    assert {group.mean: group.seeds for group in built.groups} == {9: 2, 8: 2, 1: 1}


def test_what_a_training_began_with_and_who_played_tell_experiments_apart(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    teacher = of_episodes(runs / "teacher", [9.0] * 4, capacity=HIGH)
    actor = of_episodes(tmp_path / "elsewhere", [1.0] * 4, stage="trained")
    about: dict[str, Any] = {"stage": "distilled", "teacher": teacher}
    of_episodes(runs / "a", [8.0] * 4, seed=0, dataset=dataset(), **about)
    of_episodes(runs / "b", [7.0] * 4, seed=1, dataset={**dataset(), "actor": actor}, **about)
    of_episodes(runs / "c", [6.0] * 4, seed=2, dataset=dataset(), init_from=actor, **about)
    built, *_ = build(tmp_path)
    _, *students = built.groups
    assert {group.mean: group.variant() for group in students} == {
        8: "",
        7: "played by 8-16-16/128",
        6: "begun with 8-16-16/128",
    }


def test_student_of_rollouts_is_no_direct_training_and_has_no_epochs(tmp_path: Path) -> None:
    """Older versions called what PPO with a distillation loss makes trained."""
    runs = tmp_path / "runs"
    teacher = of_episodes(runs / "teacher", [9.0] * 4, capacity=HIGH)
    of_episodes(runs / "kickstarted", [8.0] * 4, stage="trained", teacher=teacher)
    of_episodes(runs / "direct", [7.0] * 4, stage="trained", seed=1)
    built, rows, _ = build(tmp_path)
    assert [row["stage"] for row in rows] == ["teacher", "direct", "distilled"]
    assert [row["epochs"] for row in rows] == ["", "", ""]
    assert built.groups[-1].difference is not None


def test_difference_draws_identical_episodes_together(tmp_path: Path) -> None:
    """Three of four episodes are one: without their copies, an interval is from end to end."""
    runs = tmp_path / "runs"
    teacher = of_episodes(runs / "teacher", [9.0] * 4, capacity=HIGH)
    of_episodes(runs / "student", [5.0, 5.0, 5.0, 9.0], stage="distilled", teacher=teacher)
    file = runs / "student" / "evaluation.json"
    record = json.loads(file.read_text())
    for said in ({"same_as": [0, 0, 0, 3]}, {"distinct_episodes": 2, "lengths": [7, 7, 7, 2]}):
        file.write_text(json.dumps(record | said))
        student = build(tmp_path)[0].groups[-1]
        assert student.difference == (-3, -4, 0)
    file.write_text(json.dumps(record))  # all different
    difference = build(tmp_path)[0].groups[-1].difference
    assert difference is not None
    assert difference[2] < 0


def test_episodes_of_another_seed_are_no_pairs(tmp_path: Path) -> None:
    for name in ("one", "other"):
        of_episodes(tmp_path / name, [0.0, 1, 2, 3], paired=True)
    one = read_evaluation(tmp_path / "one" / "evaluation.json")
    file = tmp_path / "other" / "evaluation.json"
    assert one.is_paired_with(read_evaluation(file))
    file.write_text(file.read_text().replace("20000", "30000"))
    assert not one.is_paired_with(read_evaluation(file))


def test_interquartile_mean_is_scipys_trimmed_mean() -> None:
    scores = np.random.default_rng(0).normal(size=(50, 13))
    expected = trim_mean(scores, 0.25, axis=1)
    np.testing.assert_allclose(interquartile_mean(scores), expected)


def test_stratified_interval_covers_the_true_mean() -> None:
    """Of 200 studies of five runs in four games, about 95 % (bootstraps of few runs fall short)."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        _, interval = aggregate(random.normal(50, 10, (4, 5)).tolist(), resamples=500)
        assert interval is not None
        hits += interval[0] <= 50 <= interval[1]
    assert 170 <= hits <= 199


def test_runs_and_games_are_taken_together(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for game in ("pong", "qbert"):
        teacher = write_policy(runs / game / "teacher", 80, capacity=HIGH, game=game)
        for seed, mean in enumerate((-20, 30, 50, 80)):  # 0, 50, 70 and 100 %
            about: dict[str, Any] = {"teacher": teacher, "dataset": dataset(), "seed": seed}
            write_policy(runs / game / f"s{seed}", mean, "distilled", game=game, **about)
    _, _, text = build(tmp_path)
    assert "## Across runs and games" in text
    assert "| 2 | 8 | 60.0 |" in text
    assert aggregate([[0.0, 50, 70, 100]] * 2)[0] == 60
    assert aggregate([[1.0], [3.0]]) == (2, None)


def test_ways_of_acting_are_side_by_side(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for act, mean in (("sample", 15), ("argmax", 18)):
        write_policy(runs / act, mean, fingerprint="same", act=act)
    write_policy(runs / "other", 3, capacity=MEDIUM)
    _, _, text = build(tmp_path)
    table = text.split("## Ways of acting")[1].split("##")[0]
    assert "| 15.0 (14.5 to 15.5) | 18.0 (17.5 to 18.5) |" in table
    assert MEDIUM not in table


def dataset(epsilon: float = 0.1) -> dict[str, Any]:
    return {"steps": 540_000, "control": {"mode": "sample", "epsilon": epsilon}}


def build(tmp_path: Path, *runs: Path) -> tuple[Report, list[dict[str, str]], str]:
    built = build_report(runs or [tmp_path / "runs"], tmp_path / "out")
    with (tmp_path / "out/report.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return built, rows, (tmp_path / "out/report.md").read_text()


def test_one_game_against_hand_computed_figures(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    teacher = write_policy(runs / "teacher", 20, capacity=HIGH)
    write_policy(runs / "direct", -5)
    student = write_policy(runs / "student", 10, "distilled", teacher=teacher, dataset=dataset())
    write_policy(runs / "tuned", 15, "fine-tuned", init_from=student, agent_steps=600_000)
    built, rows, text = build(tmp_path)

    assert ",".join(rows[0]) == HEADER
    assert [row["stage"] for row in rows] == ["teacher", "direct", "distilled", "fine-tuned"]
    assert [row["percent_of_teacher"] for row in rows] == ["100.0", "-25.0", "50.0", "75.0"]
    normalised = [row["percent_of_teacher_normalised"] for row in rows]
    assert normalised == ["100.0", "37.5", "75.0", "87.5"]
    assert [row["agent_steps"] for row in rows] == ["1800000", "1800000", "0", "600000"]
    assert [row["epochs"] for row in rows] == ["", "", "10", "10"]
    assert {row["control"] for row in rows[2:]} == {"sample + 10% random"}
    assert (rows[2]["ci_low"], rows[2]["ci_high"], rows[2]["return_max"]) == ("9.5", "10.5", "12.0")
    assert rows[2]["policy"] == f"distilled {LOW}"
    assert rows[2]["runs"] == str(runs / "student")
    assert "| pong | 20.0 ± 1.0 (22) | -5.0 ± 1.0 (-3) | 10.0 ± 1.0 (12) (e10) |" in text
    assert "| % of teacher (geometric mean) | 100.0 | – | 50.0 | 75.0 |" in text
    assert "| % of teacher, random-normalised | 100.0 | 37.5 | 75.0 | 87.5 |" in text
    assert "| distilled | 8-16-16/128 | 111,607 (6.61) | 4 | 0.25 | 10.0 | 9.5 to 10.5 |" in text
    assert "`sticky_probability=0.0`" in text
    assert "0.1.0 (commit abc123)" in text
    assert built.notes == []


def test_seeds_are_one_row_with_an_interval_over_them(tmp_path: Path) -> None:
    for seed, mean in enumerate((10, 12, 14)):
        write_policy(tmp_path / f"runs/seed{seed}", mean, seed=seed)
    row = build(tmp_path)[1][0]
    half = 4.303 * 2 / 3**0.5
    assert float(row["return_mean"]) == 12
    # Variance within a seed 1, between seeds ((-2)^2 + 0 + 2^2) / 3.
    assert float(row["return_std"]) == pytest.approx((1 + 8 / 3) ** 0.5, abs=1e-6)
    assert float(row["return_max"]) == 16
    assert float(row["ci_low"]) == pytest.approx(12 - half, abs=1e-6)
    assert float(row["ci_high"]) == pytest.approx(12 + half, abs=1e-6)
    assert (row["seeds"], row["episodes"], row["truncated_episodes"]) == ("3", "12", "3")
    assert row["runs"].split(";") == [str(tmp_path / f"runs/seed{seed}") for seed in range(3)]


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (11, 2.228), (12, 2.201), (31, 2.042)])
def test_t_interval_matches_printed_tables(n: int, quantile: float) -> None:
    values = np.arange(n, dtype=float)
    low, high = t_interval(list(values))
    assert (high - low) / 2 == pytest.approx(quantile * values.std(ddof=1) / n**0.5, rel=1e-3)


def test_geometric_means_are_those_of_the_paper(tmp_path: Path) -> None:
    for game, (random, *means) in TABLE_3.items():
        folder = tmp_path / "runs" / game
        common: dict[str, Any] = {"game": game, "random": random}
        teacher = write_policy(folder / "teacher", means[0], capacity=HIGH, **common)
        for capacity, direct, taught, tuned in zip(
            (MEDIUM, LOW), means[1::3], means[2::3], means[3::3], strict=True
        ):
            name = capacity.split("/")[-1]
            write_policy(folder / f"direct{name}", direct, capacity=capacity, **common)
            student = write_policy(
                folder / f"ad{name}", taught, "distilled", capacity, teacher=teacher, **common
            )
            write_policy(
                folder / f"tuned{name}", tuned, "fine-tuned", capacity, init_from=student, **common
            )
    text = build(tmp_path)[2]
    # By stage, medium before low. The paper prints 100, 88, 84, 94, 85, 100 and 89.
    expected = "100.0 | 88.4 | 83.5 | 94.3 | 84.8 | 100.5 | 89.2"
    assert f"| % of teacher (geometric mean) | {expected} |" in text


def test_partial_columns_say_over_how_many_games(tmp_path: Path) -> None:
    for game in ("breakout", "pong"):
        teacher = write_policy(tmp_path / f"runs/{game}/t", 20, capacity=HIGH, game=game)
    write_policy(tmp_path / "runs/s", 10, "distilled", game="pong", teacher=teacher)
    write_policy(
        tmp_path / "runs/s2", 10, "distilled", MEDIUM, game="breakout", random=None,
        teacher={"fingerprint": str(tmp_path / "runs/breakout/t")},
    )  # fmt: skip
    text = build(tmp_path)[2]
    assert "| 50.0 (1 of 2 games) | 50.0 (1 of 2 games) |" in text
    assert "| breakout | 20.0 ± 1.0 (22) | 10.0 ± 1.0 (12) (e10) | – |" in text


@pytest.mark.parametrize(
    ("teacher", "random", "ratios", "normalised", "row"),
    [
        (-10, -20, ["", ""], ["100.0", "25.0"], "% of teacher (geometric mean)"),
        (20, None, ["100.0", "-87.5"], ["", ""], "% of teacher, random-normalised"),
    ],
)
def test_undefined_ratio_is_empty(
    tmp_path: Path,
    teacher: float,
    random: float | None,
    ratios: list[str],
    normalised: list[str],
    row: str,
) -> None:
    described = write_policy(tmp_path / "runs/teacher", teacher, capacity=HIGH, random=random)
    write_policy(tmp_path / "runs/student", -17.5, "distilled", random=random, teacher=described)
    _, rows, text = build(tmp_path)
    assert [row["percent_of_teacher"] for row in rows] == ratios
    assert [row["percent_of_teacher_normalised"] for row in rows] == normalised
    assert f"| {row} | – | – |" in text


def test_missing_teacher_is_named(tmp_path: Path) -> None:
    teacher = {"path": "runs/pong/teacher/policy/last", "fingerprint": "feed", "capacity": HIGH}
    write_policy(tmp_path / "runs/student", 10, "distilled", teacher=teacher)
    write_policy(tmp_path / "runs/direct", 10)
    built, rows, text = build(tmp_path)
    assert all(row["percent_of_teacher"] == "" for row in rows)
    assert len(built.notes) == 1
    assert "evaluate --policy runs/pong/teacher/policy/last --out" in built.notes[0]
    assert f"> {built.notes[0]}" in text


def test_teacher_is_found_through_a_fine_tuned_policy(tmp_path: Path) -> None:
    teacher = write_policy(tmp_path / "runs/teacher", 20, capacity=HIGH)
    student = {"provenance": {"stage": "distilled", "teacher": teacher, "epochs": 5}}
    once = {"provenance": {"stage": "fine-tuned", "init_from": student}}
    # The anchor of fine-tuning is a teacher by another meaning.
    anchor = {"path": "student", "fingerprint": "feed"}
    write_policy(tmp_path / "runs/tuned", 10, "fine-tuned", init_from=once, teacher=anchor)
    built, rows, _ = build(tmp_path)
    assert [row["stage"] for row in rows] == ["teacher", "fine-tuned"]
    assert (rows[1]["percent_of_teacher"], rows[1]["epochs"]) == ("50.0", "5")
    assert built.notes == []


def test_student_that_teaches_stays_a_student(tmp_path: Path) -> None:
    teacher = write_policy(tmp_path / "runs/teacher", 20, capacity=HIGH)
    middle = write_policy(tmp_path / "runs/middle", 16, "distilled", MEDIUM, teacher=teacher)
    write_policy(tmp_path / "runs/small", 10, "distilled", teacher=middle)
    rows = build(tmp_path)[1]
    assert [row["stage"] for row in rows] == ["teacher", "distilled", "distilled"]
    assert [row["percent_of_teacher"] for row in rows] == ["100.0", "80.0", "50.0"]


def test_policies_are_compared_with_the_teacher_acting_alike(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    teacher = write_policy(runs / "teacher", 10, capacity=HIGH)
    write_policy(
        runs / "greedy", 20, capacity=HIGH, act="epsilon", fingerprint=teacher["fingerprint"]
    )
    write_policy(runs / "student", 10, "distilled", teacher=teacher, act="epsilon")
    rows = build(tmp_path)[1]
    assert [row["act"] for row in rows] == ["epsilon 0.05", "sample", "epsilon 0.05"]
    assert rows[1]["policy"] == f"teacher {HIGH}, sample"
    assert rows[2]["percent_of_teacher"] == "50.0"


def test_training_that_differs_makes_rows_of_its_own(tmp_path: Path) -> None:
    teacher = write_policy(tmp_path / "runs/teacher", 20, capacity=HIGH)
    for epochs in (5, 40):
        for epsilon in (0.0, 0.1):
            write_policy(
                tmp_path / f"runs/{epochs}-{epsilon}", 10, "distilled", teacher=teacher,
                epochs=epochs, dataset=dataset(epsilon),
            )  # fmt: skip
    labels = [row["policy"] for row in build(tmp_path)[1][1:]]
    variants = ["e5, 0% random", "e5, 10% random", "e40, 0% random", "e40, 10% random"]
    assert labels == [f"distilled {LOW}, {variant}" for variant in variants]


def test_repeated_seed_is_no_further_seed(tmp_path: Path) -> None:
    write_policy(tmp_path / "runs/sharp", 10)
    write_policy(tmp_path / "runs/soft", 12)
    built, rows, _ = build(tmp_path)
    assert [row["policy"] for row in rows] == [f"direct {LOW}, sharp", f"direct {LOW}, soft"]
    assert "differ in something else" in built.notes[0]


def test_same_weights_count_once(tmp_path: Path) -> None:
    write_policy(tmp_path / "runs/last", 10, fingerprint="feed")
    write_policy(tmp_path / "runs/best", 12, fingerprint="feed", episodes=8)
    built, rows, _ = build(tmp_path)
    assert [(row["return_mean"], row["seeds"]) for row in rows] == [("12.0", "1")]
    assert "same weights" in built.notes[0]


def test_overlapping_folders_count_once(tmp_path: Path) -> None:
    write_policy(tmp_path / "runs/a", 10)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    folders = [tmp_path / "runs", tmp_path / "runs/a", tmp_path / "runs/a", tmp_path / "link"]
    built, rows, _ = build(tmp_path, *folders)
    assert len(rows) == 1
    assert built.notes == []


def test_many_policies_become_the_rows_of_the_scores(tmp_path: Path) -> None:
    for steps in range(1, 10):
        write_policy(tmp_path / f"runs/{steps}", steps, agent_steps=steps * 100_000)
    text = build(tmp_path)[2]
    assert "| policy | pong | % of teacher (geometric mean) |" in text
    assert f"| direct {LOW}, 300k steps | 3.0 ± 1.0 (5) | – | – |" in text


def test_pictures_are_those_the_runs_allow(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    out.mkdir()
    for name in ("epochs.png", "notes.txt"):
        (out / name).write_text("from before")
    teacher = write_policy(runs / "teacher", 20, capacity=HIGH)
    write_policy(runs / "low", 10, "distilled", teacher=teacher)
    built = build(tmp_path)[0]
    assert {file.name for file in built.files} == {"report.md", "report.csv", "returns.png"}
    assert {file.name for file in out.iterdir()} == {file.name for file in built.files} | {
        "notes.txt"
    }

    (runs / "teacher/metrics.csv").write_text("step,train/episode_return\n1,-20\n2,0\n3,20\n")
    write_policy(runs / "low40", 12, "distilled", teacher=teacher, epochs=40)
    write_policy(runs / "medium", 15, "distilled", MEDIUM, teacher=teacher)
    text = build(tmp_path)[2]
    for name in ("returns", "learning_curves", "epochs", "compression"):
        assert f"({name}.png)" in text
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_run_is_found_where_it_was_moved_to(tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere/teacher"
    write_policy(moved / "eval", 20, run="runs/pong/teacher")
    assert read_evaluation(moved / "eval/evaluation.json").run == moved / "eval"
    (moved / "metrics.csv").write_text("step\n")
    assert read_evaluation(moved / "eval/evaluation.json").run == moved


def test_two_protocols_of_one_game_are_an_error(tmp_path: Path) -> None:
    write_policy(tmp_path / "a", 10)
    write_policy(tmp_path / "b", 10, sticky=0.25)
    with pytest.raises(
        ValueError, match=r"sticky_probability=0.25 in .* but sticky_probability=0.0 in"
    ):
        build_report([tmp_path], tmp_path / "out")


def test_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = write_policy(tmp_path / "runs/teacher", 20, capacity=HIGH)
    write_policy(tmp_path / "runs/student", 10, "distilled", teacher=teacher)
    report([str(tmp_path / "runs")], str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert f"distilled {LOW}" in printed
    assert "9.5 to 10.5" in printed
    assert "report.md" in printed


def test_reports_need_no_torch() -> None:
    code = "import sys, lightning_distill.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_counts_read_easily() -> None:
    assert list(map(human_steps, (0, 999, 540_000, 1_800_192))) == ["0", "999", "540k", "1.8M"]


def test_settings_tell_experiments_apart_and_put_seeds_together(tmp_path: Path) -> None:
    teacher = write_policy(tmp_path / "runs/teacher", 20, capacity=HIGH)
    for name, one_cycle, rate in (("a", True, 3e-3), ("b", False, 3e-3), ("c", False, 1e-3)):
        settings = {"model.one_cycle": one_cycle, "model.optimizer.lr": rate, "data.batch": 256}
        for seed in (0, 1):
            write_policy(
                tmp_path / f"runs/{name}{seed}", 10, "distilled", teacher=teacher,
                seed=seed, settings=settings,
            )  # fmt: skip
    built, rows, _ = build(tmp_path)
    variants = [
        "one_cycle=true, lr=0.003",
        "one_cycle=false, lr=0.001",
        "one_cycle=false, lr=0.003",
    ]
    assert sorted(row["policy"].split(", ", 1)[1] for row in rows[1:]) == sorted(variants)
    assert [row["seeds"] for row in rows[1:]] == ["2", "2", "2"]
    assert built.notes == []


def test_runs_of_other_settings_are_other_curves(tmp_path: Path) -> None:
    """Snapshots of one run are one curve; runs of other settings or another length are not."""
    for name, total, warmup, snapshots in (
        ("long", 2_000, 0, (1_000, 2_000)),
        ("short", 500, 0, (500,)),
        ("warm", 2_000, 100, (2_000,)),
    ):
        settings = {"data.total_steps": total, "model.critic_warmup_steps": warmup}
        for steps in snapshots:
            folder = tmp_path / f"runs/{name}/{steps}"
            write_policy(folder, 10, agent_steps=steps, settings=settings)
    groups = build(tmp_path)[0].groups
    names = {g.first.path.parent.parent.name: set() for g in groups}
    for group in groups:
        names[group.first.path.parent.parent.name].add(group.name({"agent_steps"}))
    assert names == {
        "long": {"direct 8-16-16/128, total_steps=2000, critic_warmup_steps=0"},
        "short": {"direct 8-16-16/128, total_steps=500, critic_warmup_steps=0"},
        "warm": {"direct 8-16-16/128, total_steps=2000, critic_warmup_steps=100"},
    }
    assert len({group.name() for group in groups}) == 4


def test_another_seed_of_the_teacher_is_no_reference(tmp_path: Path) -> None:
    settings = {"model.ent_coef": 0.01}
    teacher = write_policy(tmp_path / "runs/teacher", 20, capacity=HIGH, settings=settings)
    write_policy(tmp_path / "runs/second", 10, capacity=HIGH, settings=settings, seed=1)
    write_policy(tmp_path / "runs/student", 10, "distilled", teacher=teacher)
    rows = build(tmp_path)[1]
    assert [(row["stage"], row["seeds"]) for row in rows] == [("teacher", "2"), ("distilled", "1")]
    assert [row["percent_of_teacher"] for row in rows] == ["75.0", "50.0"]
