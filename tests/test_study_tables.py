"""What the studies keep of their runs, and the tables that they make of it."""

import csv
import json

import pytest
import torch

from lightning_distill.policies import load_policy
from studies import corrupt, keep, methods, pictures


def write(folder, mean, parameters=1000, commit="0123456789ab", random=-20.0):
    folder.mkdir(parents=True)
    found = {"return_mean": mean, "ci_low": mean - 1, "ci_high": mean + 1, "random_score": random}
    found["policy"] = {"num_parameters": parameters, "provenance": {"commit": commit}}
    (folder / "evaluation.json").write_text(json.dumps(found))


def write_metrics(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_student(results, name, sampled, greedy=20.0, early=None, reached=100_000):
    for act, mean in {"sampled": sampled, "greedy": greedy, **(early or {})}.items():
        if mean is not None:
            write(results / name / "evaluation" / act, mean)
    rows = [{"step": 50_000 * i, "time/elapsed_seconds": 60.0 * i} for i in range(1, 9)]
    # An evaluation takes an hour, which is no training.
    for row in rows[4:]:
        row["time/elapsed_seconds"] += 3600
    for row in rows:
        row["eval/return_mean"] = 19.0 if row["step"] >= reached else -5.0
    write_metrics(results / name, rows)


@pytest.fixture
def results(tmp_path):
    """A teacher of 20, where random play has -20, and students of it."""
    folder = tmp_path / "docs" / "results" / "methods"
    write(folder / "teacher" / "sampled", 20.0)
    write(folder / "teacher" / "greedy", 21.0)
    return folder


def row_of(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_three_seeds(results):
    early = {"step_50000": -10.0, "step_100000": 0.0}
    for seed, sampled in enumerate((10.0, 12.0, 14.0)):
        reached = 100_000 if seed else 500_000
        write_student(results, f"n_distill_tiny_{seed}", sampled, early=early, reached=reached)
    methods.pong(results)
    row = row_of((results / "table.md").read_text(), "N-distill, γ 0.5")
    assert row[1:6] == ["1.7 %", "25", "50", "", "80"]
    assert row[6] == "never, 100,000, 100,000"
    assert row[7] == "10.0, 12.0, 14.0; 12.0 (7.0 to 17.0)"  # t = 4.30 with two degrees of freedom
    assert row[8] == "20.0, 20.0, 20.0; 20.0 (20.0 to 20.0)"
    assert row[10:] == ["8.0", "`0123456`"]


def test_commits_of_a_resumed_run_are_all_named(results):
    write_student(results, "n_distill_tiny_0", 12.0)
    write(results / "n_distill_tiny_0" / "evaluation" / "step_50000", -10.0, commit="feedbeef01")
    write_student(results, "ppd_tiny_0", 12.0)
    methods.pong(results)
    text = (results / "table.md").read_text()
    assert sorted(row_of(text, "N-distill, γ 0.5")[11].split()) == ["`0123456`", "`feedbee`"]
    assert row_of(text, "PPD")[11] == "`0123456`"


def test_a_seed_that_lacks_is_shown_and_no_mean_hides_it(results):
    for seed, greedy in enumerate((20.0, None, 18.0)):
        early = {"step_50000": -10.0} if seed else {}
        write_student(results, f"n_distill_tiny_{seed}", 12.0, greedy=greedy, early=early)
    (results / "agreement.csv").write_text("policy,agreement\nn_distill_tiny_0/policy/last,0.9\n")
    methods.pong(results)
    row = row_of((results / "table.md").read_text(), "N-distill, γ 0.5")
    assert row[2] == ""
    assert row[8] == "20.0, –, 18.0"
    assert row[9] == ""


def test_students_beside_a_teacher_are_measured_by_their_own(results):
    run = results / "real_time_0"
    for name, mean in {"policy": 10.0, "tiny": 7.0}.items():
        write(run / "evaluation" / f"{name}_sampled", mean)
    rows = [
        {"step": 8e5, "time/elapsed_seconds": 60.0, "eval/tiny/return_mean": 8.0},
        {"step": 16e5, "time/elapsed_seconds": 120.0, "eval/tiny/return_mean": 9.0},
    ]
    write_metrics(run, rows)
    methods.pong(results)
    row = row_of((results / "table.md").read_text(), "real-time")
    assert row[4] == "90"
    assert row[5] == "1,600,000"  # 95 % of 30 are 28.5 above random play


def test_table_without_a_teacher_is_refused(tmp_path):
    write_student(tmp_path, "kl_tiny_0", 12.0)
    with pytest.raises(SystemExit, match=r"sampled/evaluation.json but shares are of it"):
        methods.pong(tmp_path)


def test_agreement_of_no_runs_changes_nothing(tmp_path):
    (tmp_path / "agreement.csv").write_text("policy,agreement\na/policy/last,0.9\n")
    methods.agree(tmp_path / "runs", tmp_path / "no_dataset", tmp_path)
    assert "0.9" in (tmp_path / "agreement.csv").read_text()


def test_shares_of_the_first_policy(results):
    write(results / "dqn" / "evaluation_epsilon", 20.0, parameters=1_687_206)
    write(results / "dqn_kl" / "net1" / "evaluation_epsilon", 10.0, commit="abcdef0123")
    methods.q_values(results)
    text = (results / "q_values.md").read_text()
    assert row_of(text, "DQN teacher")[1:4] == ["1 687 206", "20.00 (19.00 to 21.00)", "100.0"]
    assert row_of(text, "KL, temperature 0.01, net1")[3:] == ["75.0", "", "", "`abcdef0`"]


@pytest.mark.parametrize(
    ("method", "step", "expected"),
    [("kl", 4, 2000), ("n_distill", 128_000, 2000), ("dagger", 58_368, 784), ("dagger", 512, 0)],
)
def test_updates_by_what_a_method_counts(method, step, expected):
    assert pictures.updates(method, step) == expected


def test_pictures_of_what_there_is(results):
    write_student(results, "kl_tiny_0", 12.0, early={"step_4": 0.0})
    write_student(results, "n_distill_tiny_0", 12.0)
    pictures.pong(results)
    drawn = {file.name for file in results.parents[1].glob("*.png")}
    assert drawn == {"pong_compression.png", "pong_methods.png"}
    pictures.cartpole(results)


def test_run_is_kept_whole_and_in_place_of_the_earlier(tmp_path):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    write(runs / "kl_tiny_0" / "evaluation" / "sampled", 12.0)
    write(runs / "kl_tiny_0" / "evaluation" / "greedy", 20.0)
    write_metrics(runs / "kl_tiny_0", [{"step": i, "loss": i / 3} for i in range(1000)])
    write_metrics(runs / "kl_tiny_1", [])
    keep.main(str(runs), str(kept))
    assert not (kept / "kl_tiny_1").exists()
    with (kept / "kl_tiny_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) <= keep.ROWS + 1
    assert rows[-1] == {"step": "999", "loss": "333"}

    (runs / "kl_tiny_0").rename(tmp_path / "gone")
    write_metrics(runs / "kl_tiny_0", [{"step": 1, "loss": 5}])
    keep.main(str(runs), str(kept))
    assert (kept / "kl_tiny_0" / "evaluation" / "greedy" / "evaluation.json").exists()
    write(runs / "kl_tiny_0" / "evaluation" / "sampled", 13.0)
    keep.main(str(runs), str(kept))
    assert not (kept / "kl_tiny_0" / "evaluation" / "greedy").exists()
    assert "5" in (kept / "kl_tiny_0" / "metrics.csv").read_text()


def test_curve_stays_where_only_an_evaluation_is_at_hand(tmp_path):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    write_metrics(kept / "teacher", [{"step": 1, "loss": 5}])
    write(runs / "teacher", 20.0)
    keep.main(str(runs), str(kept))
    assert {file.name for file in (kept / "teacher").iterdir()} == {
        "metrics.csv",
        "evaluation.json",
    }


def test_evaluations_are_kept_however_many_rows_there_are(tmp_path):
    rows = [{"step": i, "eval/return_mean": "" if i % 7 else 1.25} for i in range(1000)]
    write_metrics(tmp_path, rows)
    keep.thin(tmp_path / "metrics.csv", tmp_path / "thin.csv")
    with (tmp_path / "thin.csv").open() as file:
        found = [row["step"] for row in csv.DictReader(file) if row["eval/return_mean"]]
    assert found == [str(i) for i in range(0, 1000, 7)]


def test_corrupted_weights_are_those_that_act(tmp_path, pong_policy):
    corrupt.main(str(pong_policy), "0.05", str(tmp_path / "corrupted"))
    before, after = load_policy(pong_policy), load_policy(tmp_path / "corrupted")
    assert after.provenance["sigma"] == 0.05
    assert after.provenance["seed"] == 0
    for (name, old), new in zip(
        before.network.named_parameters(), after.network.parameters(), strict=True
    ):
        if name.startswith("value_head"):
            assert torch.equal(old, new)
        else:
            moved = (new - old).detach()
            assert 0 < float(moved.abs().max()) < 6 * 0.05
            if moved.numel() > 1000:
                assert float(moved.std()) == pytest.approx(0.05, rel=0.05)
