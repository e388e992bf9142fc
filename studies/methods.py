"""What the methods compared kept of their teacher, in tables; ``studies.pictures`` draws it.

    python -m studies.methods agree RUNS DATASET RESULTS    how often a policy does what it does
    python -m studies.methods pong RESULTS                  table.md
    python -m studies.methods cartpole RESULTS              table.md
    python -m studies.methods q_values RESULTS              q_values.md
    python -m studies.methods three_games RESULTS           table.md

``studies/methods.mk`` and ``studies/cartpole.mk`` train them.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_distill.intervals import t_interval
from studies.students import REAL_TIME, Student, find, read_evaluation

SIZES = {
    "policy": "100 %",
    "medium": "25 %",
    "low": "6.4 %",
    "net3": "3.6 %",
    "tiny": "1.7 %",
    "mlp": "2.8 %",
}
HEAD = 2  # lines of a table without rows
SHARE_LEGEND = (
    "Mean returns of {episodes} with their 95 % interval; shares have random play subtracted. All"
    " of seed 0. The commit is the one that trained the policy."
    " [studies/methods.mk](../../../studies/methods.mk) makes the table."
)
SHARE = 0.95  # of the teacher's return, from that of random play on


@dataclass(frozen=True)
class Section:
    """Methods whose progress is counted alike.

    Args:
        title: Heading.
        methods: Names in the table by names of runs.
        unit: What is counted.
        early: Headings by the labels of evaluations on the way.
        last: Heading of the last one.
        scale: Units in one of what ``step`` counts in ``metrics.csv``.
        teacher: Folder of a teacher that shares are not of, for a row of its own.
    """

    title: str
    methods: Mapping[str, str]
    unit: str
    early: Mapping[str, str]
    last: str
    scale: int = 1
    teacher: str = ""


EPOCH = 500  # updates in one of configs/pong/methods.yaml
OFFLINE = Section(
    "From a recording of the teacher (200 000 agent steps, two minutes)",
    {"kl": "KL", "reverse_kl": "reverse KL", "nll": "NLL", "mse": "MSE on logits"},
    "updates",
    {"step_4": "after 2 000", "step_20": "10 000"},
    "40 000 updates",
    scale=EPOCH,
)
ON_THE_WAY = {"step_50000": "after 50 000", "step_100000": "100 000", "step_200000": "200 000"}
ACTING = Section(
    "The student acts",
    {
        "on_policy_distill": "on-policy distill",
        "exp_entropy_regularised": "expected entropy regularised, γ 0.5, entropy bonus",
        "n_distill": "N-distill, γ 0.5",
        "ppd": "PPD",
        "kickstarting": "kickstarting",
        "dagger": "DAgger",
    },
    "agent steps",
    ON_THE_WAY,
    "400 000 agent steps",
)
CORRUPTED = Section(
    "From a teacher with corrupted weights, shares of the intact one's return",
    {
        "corrupted_teacher_distill": "teacher distill",
        "corrupted_on_policy_distill": "on-policy distill",
        "corrupted_ppd": "PPD",
    },
    "agent steps",
    ON_THE_WAY,
    "400 000 agent steps",
    teacher="corrupted",
)
BESIDE = Section(
    "Beside a teacher that learns, whose return the shares are of",
    {"real_time_teacher": "real-time, the teacher", "real_time": "real-time"},
    "agent steps",
    {"step_128000": "after 2 000 updates", "step_640000": "10 000"},
    "39 000 updates, 2 500 000 agent steps",
)
PONG = (OFFLINE, ACTING, CORRUPTED, BESIDE)
LANDSCAPE = {
    "teacher_distill": "teacher distill",
    "uniform_distill": "uniform distill",
    "mixed_distill": "mixed distill",
    "on_policy_distill": "on-policy distill",
    "on_policy_distill_r": "on-policy distill + R",
    "on_policy_distill_r_v_cond": "on-policy distill + R + V cond",
    "entropy_regularised": "entropy regularised",
    "n_distill": "N-distill",
    "n_distill_r": "N-distill + R",
    "exp_entropy_regularised": "expected entropy regularised",
    "exp_entropy_regularised_r": "expected entropy regularised + R",
    "kl_regularised": "KL regularised",
    "teacher_v_reward": "teacher V reward",
    "td_teacher_v": "TD + V teacher",
    "td_zero_v": "TD + V 0",
}
CARTPOLE = (
    Section(
        "From a recording of the teacher (20 000 agent steps)",
        {
            "kl": "KL",
            "reverse_kl": "reverse KL",
            "jensen_shannon": "Jensen-Shannon",
            "hinton": "softened KL, T = 2",
            "cross_entropy": "cross-entropy",
            "reverse_cross_entropy": "reverse cross-entropy",
            "nll": "NLL",
            "mse": "MSE on logits",
        },
        "updates",
        {"step_2": "after 100", "step_6": "300"},
        "1 000 updates",
        scale=50,
    ),
    Section(
        "Presets of Czarnecki et al. 2019",
        LANDSCAPE,
        "agent steps",
        {"step_5000": "after 5 000", "step_15000": "15 000"},
        "50 000 agent steps",
    ),
)
# Where a DQN is that is still learning, first what its student follows, by kind and seed.
FOLLOWERS = {
    "online": {
        "the DQN at its best": "dqn_{}/best",
        "the DQN in the end": "dqn_{}",
        "student": "online_{}",
    },
    "real-time": {
        "the DQN": "real_time_dqn_{}/evaluation/policy",
        "student": "real_time_dqn_{}/evaluation/student",
    },
}


def agree(runs: Path, dataset: Path, results: Path) -> None:
    """Compare every policy's best action with its teacher's on the recording's held-out episodes.

    Args:
        runs: Where the runs are; those that are not at hand keep their row.
        dataset: The recording.
        results: Where ``agreement.csv`` goes.
    """
    import torch

    from lightning_distill.data import Dataset
    from lightning_distill.policies import load_policy

    policies = [*runs.glob("*/policy/last"), *runs.glob("real_time_*/policy/*/last")]
    done = [p for p in policies if (runs / p.relative_to(runs).parts[0] / "done").exists()]
    if not done:
        return
    file = results / "agreement.csv"
    known: dict[str, str] = {}
    if file.exists():
        with file.open(newline="") as lines:
            known = {row["policy"]: row["agreement"] for row in csv.DictReader(lines)}
    recording = Dataset(dataset)
    _, heldout = recording.split(0.1)
    recorded_teacher = recording.manifest["teacher"]["fingerprint"]
    for folder in sorted(done):
        name, student = str(folder.relative_to(runs)), load_policy(folder)
        own_teacher = None
        if REAL_TIME.match(name):
            own_teacher = load_policy(folder.parents[1] / "policy" / "last").network
        elif (student.provenance.get("teacher") or {}).get("fingerprint") != recorded_teacher:
            continue
        same = 0
        with torch.inference_mode():
            for rows in heldout.split(1024):  # type: ignore[no-untyped-call]
                batch = recording.gather(rows)
                seen, labels = batch["observation"], batch["teacher", "logits"]
                teacher = labels if own_teacher is None else own_teacher(seen)[0]
                same += int((student.network(seen)[0].argmax(-1) == teacher.argmax(-1)).sum())
        known[name] = f"{same / len(heldout):.4f}"
        print(name, known[name], flush=True)
    results.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerows([("policy", "agreement"), *sorted(known.items())])


class Table:
    """What was kept of the teacher's return, by method and size.

    Args:
        results: What was kept of the runs.
    """

    def __init__(self, results: Path) -> None:
        self._results = results
        self._teacher = {}
        for act in ("sampled", "greedy"):
            if (found := read_evaluation(results / "teacher" / act)) is None:
                raise SystemExit(
                    f"there is no {results}/teacher/{act}/evaluation.json but shares are of it;"
                    " evaluate the teacher (the study's Makefile does) and keep it"
                )
            self._teacher[act] = found
        self._agreement: dict[str, float] = {}
        if (file := results / "agreement.csv").exists():
            with file.open(newline="") as lines:
                rows = csv.DictReader(lines)
                self._agreement = {row["policy"]: float(row["agreement"]) for row in rows}
        self._students: dict[tuple[str, str], list[Student]] = defaultdict(list)
        for student in find(results):
            self._students[student.method, student.size].append(student)

    def students(self, method: str, size: str) -> Sequence[Student]:
        """Return those of all seeds, none where there are none."""
        return self._students.get((method, size), ())

    def share(self, evaluation: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> float:
        """Return per cent of the teacher's return, random play subtracted from both.

        Args:
            evaluation: What was measured of a student.
            teacher: The same of its own teacher; None is the shipped one.
        """
        random = evaluation["random_score"]
        whole = (teacher or self._teacher["sampled"])["return_mean"] - random
        return float(100 * (evaluation["return_mean"] - random) / whole)

    def _goal(self, student: Student) -> float:
        teacher = student.own_teacher or self._teacher["sampled"]
        whole, random = (teacher[k] for k in ("return_mean", "random_score"))
        return float(random + SHARE * (whole - random))

    def legend(self) -> str:
        """Say what the columns are."""
        sampled, greedy = (self._teacher[act]["return_mean"] for act in ("sampled", "greedy"))
        return (
            "Size is in per cent of the teacher's parameters. Shares of the teacher's return are"
            " means over seeds, with random play subtracted from both (teacher:"
            f" {sampled:.2f} sampled, {greedy:.2f} greedy), early ones of 32 episodes, the last of"
            " 100. What it took to 95 % of it is the first evaluation while training that was"
            " there, of 16 episodes (beside a teacher 8), by seed. Returns are of 100 sampled and"
            " 32 greedy episodes: of one seed with their 95 % interval, of more by seed, and from"
            " three on with Student's interval of the mean, which is wider than the game's range"
            " where seeds are far apart. Agreement is how often a student's best action is its own"
            " teacher's, in the held-out episodes of the recording of the shipped one. Minutes are"
            " those of one core, of the seed that had it most to itself, without episodes of"
            " evaluation. Commits are those that trained the policies, several of a run that was"
            " resumed."
        )

    def section(self, section: Section) -> list[str]:
        """Return the lines of one part of the table, largest students first."""
        head = ["method", "size", *section.early.values(), section.last, f"{section.unit} to 95 %"]
        head[2] = f"% of teacher {head[2]}"
        head += ["return, sampled", "return, greedy", "agreement, %", "minutes", "commits"]
        rows = []
        if section.teacher and (found := read_evaluation(self._results / section.teacher)):
            blank = [""] * len(section.early)
            cells = ["the corrupted teacher", "100 %", *blank, f"{self.share(found, None):.0f}"]
            cells += ["", self._interval(found), "", "", "", ""]
            rows.append(f"| {' | '.join(cells)} |")
        rows += [
            self._row(section, method, size)
            for size in SIZES
            for method in section.methods
            if self.students(method, size)
        ]
        if not rows:
            return []
        heading = [f"## {section.title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        return [*heading, *rows, ""]

    def _row(self, section: Section, method: str, size: str) -> str:
        students = self.students(method, size)
        same = [self._agreement[s.policy] for s in students if s.policy in self._agreement]
        first = [s.first_at(self._goal(s)) for s in students]
        minutes = f"{min(s.minutes for s in students):.1f}"
        if method == "real_time":
            minutes = ""  # of the teacher and its students together, in the teacher's row
        elif method == "real_time_teacher":
            minutes = ", ".join(f"{s.minutes:.0f}" for s in students)
        cells = [
            section.methods[method],
            SIZES[size],
            *(self._mean_share(students, label) for label in (*section.early, "sampled")),
            ", ".join("never" if n is None else f"{n * section.scale:,}" for n in first),
            *(self._returns(students, act) for act in ("sampled", "greedy")),
            f"{100 * fmean(same):.1f}" if len(same) == len(students) else "",
            minutes,
            " ".join(dict.fromkeys(f"`{commit}`" for s in students for commit in s.commits)),
        ]
        return f"| {' | '.join(cells)} |"

    def _mean_share(self, students: Sequence[Student], label: str) -> str:
        shares = [
            self.share(found, student.own_teacher)
            for student in students
            if (found := student.evaluation(label))
        ]
        return f"{fmean(shares):.0f}" if len(shares) == len(students) else ""

    def _returns(self, students: Sequence[Student], act: str) -> str:
        found = [student.evaluation(act) for student in students]
        if len(found) == 1:
            return self._interval(found[0]) if found[0] else ""
        means = [each["return_mean"] for each in found if each]
        by_seed = ", ".join(f"{each['return_mean']:.1f}" if each else "–" for each in found)
        if len(means) < max(3, len(found)):
            return by_seed
        low, high = t_interval(means)
        return f"{by_seed}; {fmean(means):.1f} ({low:.1f} to {high:.1f})"

    def _interval(self, found: Mapping[str, Any]) -> str:
        return f"{found['return_mean']:.1f} ({found['ci_low']:.1f} to {found['ci_high']:.1f})"


def _write(
    title: str, makefile: str, table: Table, sections: tuple[Section, ...], file: Path
) -> None:
    parts = [line for part in sections for line in table.section(part)]
    made_by = f"[studies/{makefile}](../../../studies/{makefile}) makes it."
    lines = [f"# {title}", "", *parts, f"{table.legend()} {made_by}", ""]
    file.write_text("\n".join(lines))
    print("\n".join(lines))


def pong(results: Path) -> None:
    """Write ``table.md``: losses, methods where the student acts, corrupted and learning teachers.

    Args:
        results: What was kept of the runs.
    """
    title = "Pong: every method from one teacher"
    _write(title, "methods.mk", Table(results), PONG, results / "table.md")


def cartpole(results: Path) -> None:
    """Write ``table.md``: the presets, and students of a DQN that is still learning.

    Args:
        results: What was kept of the runs.
    """
    title = "CartPole: students of 131 parameters"
    _write(title, "cartpole.mk", Table(results), CARTPOLE, results / "table.md")
    followers: list[str] = []
    for kind, folders in FOLLOWERS.items():
        for seed in range(3):
            policies = {
                f"{kind}, seed {seed}: {name}": results / folder.format(seed)
                for name, folder in folders.items()
            }
            table = _share_lines(policies, {"": "5 % random actions"})
            if len(table) > HEAD:
                followers += table[HEAD if followers else 0 :]
    with (results / "table.md").open("a") as file:
        title = "Students of a DQN that is still learning"
        file.write("\n".join(["", f"## {title}", "", *followers, ""]))


def q_values(results: Path) -> None:
    """Write ``q_values.md``: students of a teacher of action values, by loss and size.

    Args:
        results: What was kept of the runs.
    """
    losses = {"kl": "KL, temperature 0.01", "nll": "NLL", "mse": "MSE on Q-values"}
    students = {
        f"{name}, {net}": results / f"dqn_{loss}" / net
        for net in ("net1", "net2", "net3")
        for loss, name in losses.items()
    }
    acts = {"evaluation_epsilon": "5 % random actions", "evaluation_greedy": "greedy"}
    table = _share_lines({"DQN teacher": results / "dqn", **students}, acts)
    if len(table) > HEAD:
        lines = ["# Pong: students of a teacher of Q-values", "", *table, ""]
        lines += [SHARE_LEGEND.format(episodes="100 and, greedy, 32 episodes"), ""]
        (results / "q_values.md").write_text("\n".join(lines))
        print("\n".join(lines))


def three_games(results: Path) -> None:
    """Write ``table.md``: one student of three games against one of each.

    Args:
        results: What was kept of the runs.
    """
    lines = []
    for game, title in (("pong", "Pong"), ("breakout", "Breakout"), ("ms_pacman", "MsPacman")):
        students = {
            f"{kind}, {loss.upper()}": results / folder.format(game=game, loss=loss)
            for kind, folder in (
                ("of three games", "together_{loss}/{game}"),
                ("of this game alone", "single_{game}_{loss}"),
            )
            for loss in ("kl", "nll")
        }
        policies = {"teacher": results / f"teacher_{game}", **students}
        table = _share_lines(policies, {"": "sampled"})
        if len(table) > HEAD:
            lines += [f"## {title}", "", *table, ""]
    if lines:
        lines = ["# One student of three games", "", *lines]
        lines += [SHARE_LEGEND.format(episodes="100 sampled episodes"), ""]
        (results / "table.md").write_text("\n".join(lines))
        print("\n".join(lines))


def _share_lines(policies: Mapping[str, Path], acts: Mapping[str, str]) -> list[str]:
    """Return a table of returns and shares of the first policy's, random play subtracted."""
    head = ["policy", "parameters"]
    for act in acts.values():
        head += [f"return, {act}", "% of teacher"]
    head.append("commit")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    first, whole = next(iter(policies.values())), dict[str, float]()
    for name, folder in policies.items():
        cells = []
        for act in acts:
            if (read := read_evaluation(folder / act)) is None:
                cells += ["", ""]
                continue
            found = read
            gain = found["return_mean"] - found["random_score"]
            if folder == first:
                whole[act] = gain
            cells.append(
                f"{found['return_mean']:.2f} ({found['ci_low']:.2f} to {found['ci_high']:.2f})"
            )
            cells.append(f"{100 * gain / whole[act]:.1f}" if whole.get(act) else "")
        if any(cells):
            parameters = f"{found['policy']['num_parameters']:,}".replace(",", " ")
            commit = str(found["policy"]["provenance"]["commit"])[:7]
            lines.append(f"| {name} | {parameters} | {' | '.join(cells)} | `{commit}` |")
    return lines


if __name__ == "__main__":
    commands = {f.__name__: f for f in (agree, pong, cartpole, q_values, three_games)}
    commands[sys.argv[1]](*map(Path, sys.argv[2:]))
