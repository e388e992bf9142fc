"""The tables of a report: CSV, Markdown and terminal."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_distill.report.groups import Group, aggregate, group_by, human_steps, trait_text

TITLE = "# Report:"
UNDEFINED = "–"
# Above this many kinds of policy they are the rows of the table of scores, and games its columns.
MAX_COLUMNS = 8
TEXT_COLUMNS = {"policy", "game", "stage", "capacity", "variant"}
# Below this many the interquartile mean leaves nothing out.
MIN_RUNS = 4
ACROSS_LEGEND = (
    "% of teacher, random-normalised, of every run in every game: the mean of what lies between"
    " the quartiles, with a bootstrap interval that draws each game's runs anew."
)
ACTS_LEGEND = "Return, with its 95% interval, of the same weights by how they act."
SCORES_LEGEND = (
    "Return per episode: mean ± standard deviation over episodes (best episode). eN: distilled for"
    " N passes over the dataset; N% random: share of random actions in that dataset."
)


def write_csv(file: Path, groups: Sequence[Group]) -> None:
    """Write a row per group; what is undefined or unknown is empty."""
    rows = [_csv_row(group) for group in groups]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(group: Group) -> dict[str, Any]:
    # A fine-tuned policy's epochs and control are those of its student.
    control, random = group.traits["control_mode"], group.traits["random_share"]
    difference = group.difference or (None, None, None)
    row = {
        "policy": group.name(),
        "stage": group.stage,
        "capacity": group.capacity,
        "parameters": group.parameters,
        "return_mean": group.mean,
        "return_std": group.std,
        "return_max": group.highest,
        "ci_low": group.interval[0],
        "ci_high": group.interval[1],
        "episodes": sum(e.episodes for e in group.evaluations),
        "agent_steps": group.agent_steps,
        "percent_of_teacher": group.percent,
        "percent_of_teacher_normalised": group.percent_normalised,
        **dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True)),
        "game": group.game,
        "act": group.first.act,
        "seeds": group.seeds,
        "epochs": group.traits["epochs"],
        "control": f"{control} + {trait_text('random_share', random)}" if random else control,
        "file_size": group.first.policy.get("file_size"),
        "latency_ms": _latency(group),
        "truncated_episodes": sum(e.truncated for e in group.evaluations),
        "runs": ";".join(str(e.run) for e in group.evaluations),
    }
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def _latency(group: Group) -> float | None:
    """Return the median time of one forward pass of one observation, in milliseconds."""
    times = [t for e in group.evaluations if (t := e.policy.get("latency_ms")) is not None]
    return statistics.median(times) if times else None


def markdown(groups: Sequence[Group], notes: Sequence[str], pictures: Mapping[str, str]) -> str:
    """Return the report as Markdown; ``pictures`` are captions by file name."""
    parts = [
        f"{TITLE} {', '.join(group_by(groups, lambda g: g.game))}",
        *(f"> {note}" for note in notes),
        "## Scores",
        SCORES_LEGEND,
        _scores(groups),
        *_across(groups),
        *_sampled_and_greedy(groups),
        "## Policies",
        _policies(groups),
        "## Pictures",
        *(f"![{name}]({name})\n\n*{caption}*" for name, caption in pictures.items()),
        "## Protocol",
        _protocol(groups),
    ]
    return "\n\n".join(parts) + "\n"


def _scores(groups: Sequence[Group]) -> str:
    """Return the layout of the paper's Table 3; with many policies, turned on its side."""
    digits = _decimals(groups)
    kinds = group_by(groups, Group.name)
    table = [
        ["policy", *digits, "% of teacher (geometric mean)", "% of teacher, random-normalised"]
    ]
    for name, members in kinds.items():
        by_game = {group.game: _score(group, digits[group.game]) for group in members}
        scores = [by_game.get(game, UNDEFINED) for game in digits]
        ratios = ([g.percent for g in members], [g.percent_normalised for g in members])
        table.append([name, *scores, *(_geometric_mean(r, len(digits)) for r in ratios)])
    if len(kinds) <= MAX_COLUMNS:
        table[0][0] = "game"
        table = [list(row) for row in zip(*table, strict=True)]
    return _table(table)


def _decimals(groups: Sequence[Group]) -> dict[str, int]:
    """Return how many decimals the returns of each game deserve."""
    digits = {}
    for game, members in group_by(groups, lambda g: g.game).items():
        scale = max(abs(group.mean) + group.std for group in members)
        digits[game] = 0 if scale >= 100 else 1 if scale >= 10 else 2
    return digits


def _score(group: Group, digits: int) -> str:
    best = f"{group.highest:.{0 if group.highest.is_integer() else digits}f}"
    text = f"{group.mean:.{digits}f} ± {group.std:.{digits}f} ({best})"
    epochs = group.traits["epochs"]
    if group.stage == "distilled" and epochs is not None and "epochs" not in group.shown:
        text += f" (e{epochs})"
    return text


def _geometric_mean(ratios: Sequence[float | None], games: int) -> str:
    """Return geometric mean / teacher's geometric mean, over the games that were played."""
    positive = [ratio for ratio in ratios if ratio is not None and ratio > 0]
    if len(positive) < len(ratios):
        return UNDEFINED
    text = f"{statistics.geometric_mean(positive):.1f}"
    return text if len(ratios) == games else f"{text} ({len(ratios)} of {games} games)"


def _policies(groups: Sequence[Group]) -> str:
    decimals = _decimals(groups)
    rows = []
    for group in groups:
        digits, size = decimals[group.game], group.first.policy.get("file_size")
        parameters = f"{group.parameters:,}"
        if group.teacher:
            parameters += f" ({100 * group.parameters / group.teacher.parameters:.3g})"
        row = {
            "game": group.game if len(decimals) > 1 else "",
            "stage": group.stage,
            "capacity": group.capacity,
            "variant": group.variant(),
            "parameters (% of teacher's)": parameters,
            "file, KiB": _number(size and size / 1024, 0),
            "latency, ms": _number(_latency(group), 2),
            "return": _number(group.mean, digits),
            "95% interval": _interval(group, digits),
            "less the teacher's": _difference(group, digits),
            "episodes": str(sum(e.episodes for e in group.evaluations)),
            "episodes cut": str(sum(e.truncated for e in group.evaluations) or ""),
            "n": str(group.seeds),
            "agent steps": human_steps(group.agent_steps),
            "% of teacher, random-normalised": _number(group.percent_normalised, 1),
        }
        rows.append(row)
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    return _table([header, *([row[name] for name in header] for row in rows)])


def _interval(group: Group, digits: int) -> str:
    low, high = group.interval
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _difference(group: Group, digits: int) -> str:
    """Return mean and interval, and how they were found where it was not in pairs."""
    if group.difference is None:
        return UNDEFINED
    mean, low, high = group.difference
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _across(groups: Sequence[Group]) -> list[str]:
    """Return the table over runs and games, where there are several of either."""
    rows = []
    for name, members in group_by(groups, Group.name).items():
        scores = [of_game for group in members if (of_game := group.normalised_scores)]
        if len(scores) < len(members) or members[0].stage == "teacher":
            continue
        runs = sum(map(len, scores))
        mean, interval = aggregate(scores)
        between = UNDEFINED if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
        rows.append((runs, [name, str(len(scores)), str(runs), f"{mean:.1f}", between]))
    if all(runs < MIN_RUNS for runs, _ in rows):
        return []
    header = ["policy", "games", "runs", "interquartile mean", "95% interval"]
    return ["## Across runs and games", ACROSS_LEGEND, _table([header, *(row for _, row in rows)])]


def _sampled_and_greedy(groups: Sequence[Group]) -> list[str]:
    """Return the table of policies that were evaluated in more than one way of acting."""
    decimals, rows = _decimals(groups), []
    ways = list(group_by(groups, lambda group: group.first.act))

    def weights(group: Group) -> tuple[str, ...]:
        return (group.game, *sorted(e.fingerprint for e in group.evaluations))

    for alike in group_by(groups, weights).values():
        by_act = {group.first.act: group for group in alike}
        if len(by_act) > 1:
            digits, first = decimals[alike[0].game], alike[0]
            cells = [
                f"{g.mean:.{digits}f} ({_interval(g, digits)})" if (g := by_act.get(act)) else ""
                for act in ways
            ]
            rows.append([first.name(hide=("act",)), *cells])
    if not rows:
        return []
    return ["## Ways of acting", ACTS_LEGEND, _table([["policy", *ways], *rows])]


def _number(value: float | None, digits: int) -> str:
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, of which the first is the header, as a Markdown table."""
    rule = [":--" if name in TEXT_COLUMNS else "--:" for name in rows[0]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))


def _protocol(groups: Sequence[Group]) -> str:
    """Return a list of facts: environment, games, intervals, seeds and versions."""
    evaluations = [e for group in groups for e in group.evaluations]
    environments: dict[str, dict[str, None]] = {}
    for e in evaluations:
        fields = (f"`{key}={value}`" for key, value in e.protocol.items() if key != "game")
        environments.setdefault(", ".join(fields), {})[e.game] = None
    random = {e.game: e.random_score for e in evaluations if e.random_score is not None}
    repeated = sum(e.episodes - e.record.get("distinct_episodes", e.episodes) for e in evaluations)
    facts = [
        *(f"Environment of {', '.join(games)}: {text}." for text, games in environments.items()),
        f"Acting: {_listed(e.act for e in evaluations)}; sample draws from"
        " softmax(logits), argmax takes the most likely action, epsilon X a random one with"
        " probability X and else the most likely.",
        f"Episodes per policy: {_listed(e.episodes for e in evaluations)}, whole and raw-scored;"
        f" {sum(e.truncated for e in evaluations)} in all were cut by the cap on their length;"
        f" {repeated} repeat another exactly and are drawn with it in intervals.",
        "n is the number of training seeds. Where it is 1, the interval is a bootstrap over"
        " episodes and says nothing about another training run. Where it is more, mean and interval"
        " (Student's t) are over the seeds' means, the standard deviation over all their episodes.",
        "Random-normalised: (return - random) / (teacher's return - random); random play returns"
        f" {', '.join(f'{score:g} in {game}' for game, score in random.items()) or 'unknown'}.",
        "Less the teacher's: mean return minus that of the teacher, episode by episode where both"
        " were evaluated with the same seed, number of environments and of episodes; the first ones"
        f" then begin alike.{_paired(groups)}",
        "Latency: median time of one observation's forward pass on one CPU thread.",
        f"Evaluation seed {_listed(e.record.get('seed') for e in evaluations)}; training seed"
        f" {_listed(e.provenance.get('seed') for e in evaluations)}; forward passes in"
        f" {_listed(e.record.get('precision') for e in evaluations)}.",
        f"Evaluated by lightning-distill {_listed(_version(e.record) for e in evaluations)};"
        f" trained by {_listed(_version(e.provenance) for e in evaluations)}.",
    ]
    return "\n".join(f"- {fact}" for fact in facts)


def _paired(groups: Sequence[Group]) -> str:
    pairs = [pair for group in groups for pair in group.compared_with_teacher]
    paired = sum(e.is_paired_with(teacher) for e, teacher in pairs)
    return f" So it was for {paired} of {len(pairs)} policies." if pairs else ""


def _listed(values: Iterable[Any]) -> str:
    known = sorted({value for value in values if value is not None})
    return ", ".join(map(str, known)) or "unknown"


def _version(record: Mapping[str, Any]) -> str | None:
    version = record.get("version")
    return f"{version} (commit {record.get('commit') or 'unknown'})" if version else None


def terminal_table(groups: Sequence[Group]) -> Table:
    """Return the groups as a table for the terminal, games one below the other."""
    decimals = _decimals(groups)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("policy" if len(decimals) > 1 else groups[0].game)
    for name in ("parameters", "return", "95% interval", "n", "% of teacher"):
        table.add_column(name, justify="right", no_wrap=True)
    for game, members in group_by(groups, lambda g: g.game).items():
        digits = decimals[game]
        if len(decimals) > 1:
            table.add_section()
            table.add_row(escape(game), style="bold")
        for group in members:
            table.add_row(
                escape(group.name()),
                human_steps(group.parameters),
                f"{group.mean:.{digits}f} ± {group.std:.{digits}f}",
                _interval(group, digits),
                str(group.seeds),
                _number(group.percent_normalised, 1),
            )
    if any(group.percent_normalised is not None for group in groups):
        table.caption = "% of teacher: with the return of random play subtracted from both"
    return table
