"""The tables of a report: CSV, Markdown and terminal."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_distill.report.groups import Group, human_steps
from lightning_distill.report.protocol import protocol_text

UNDEFINED = "–"
# Above this many kinds of policy they are the rows of the table of scores, and games its columns.
MAX_COLUMNS = 8

CAPTIONS = {
    "returns.png": (
        "Mean return with its 95% interval; where there are several seeds, each is a tick. Dashed:"
        " the teacher."
    ),
    "learning_curves.png": (
        "Return while learning; where there are several seeds, their mean and range. Dashed: the"
        " teacher, evaluated."
    ),
    "epochs.png": (
        "Return with its 95% interval against the passes over the dataset. Dashed: the teacher."
    ),
    "compression.png": (
        "Return with its 95% interval against size; of each capacity, the policy trained longest."
        " Dashed: the teacher."
    ),
}


def write_csv(file: Path, groups: Sequence[Group]) -> None:
    """Write a row per group; what is undefined or unknown is empty.

    The epochs and the dataset's control of a fine-tuned policy are those of its student.

    Args:
        file: Where to write.
        groups: The rows.
    """
    rows = [_csv_row(group) for group in groups]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(group: Group) -> dict[str, Any]:
    row = {
        "policy": group.label,
        "stage": group.stage,
        "capacity": group.capacity,
        "parameters": group.parameters,
        "return_mean": group.mean,
        "return_std": group.std,
        "return_max": group.highest,
        "ci_low": group.interval[0],
        "ci_high": group.interval[1],
        "episodes": group.episodes,
        "agent_steps": group.agent_steps,
        "percent_of_teacher": group.percent,
        "percent_of_teacher_normalised": group.percent_normalised,
        "game": group.game,
        "act": group.first.act,
        "seeds": group.seeds,
        "epochs": group.traits["epochs"],
        "control": group.control,
        "file_size": group.first.policy.get("file_size"),
        "latency_ms": group.latency_ms,
        "truncated_episodes": group.truncated,
        "runs": ";".join(str(e.run) for e in group.evaluations),
    }
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def markdown(groups: Sequence[Group], notes: Sequence[str], pictures: Sequence[str]) -> str:
    """Return the report as Markdown.

    Args:
        groups: The rows.
        notes: Sentences to put first.
        pictures: File names of the pictures beside it.
    """
    parts = [
        f"# Report: {', '.join(games_of(groups))}",
        *(f"> {note}" for note in notes),
        "## Scores",
        _legend(groups),
        _scores(groups),
        "## Policies",
        _policies(groups),
        "## Pictures",
        *(f"![{name}]({name})\n\n*{CAPTIONS[name]}*" for name in pictures),
        "## Protocol",
        protocol_text(groups),
    ]
    return "\n\n".join(parts) + "\n"


def _legend(groups: Sequence[Group]) -> str:
    text = (
        "Return per game: mean ± standard deviation over games (best game); eN: distilled for N"
        " passes over the dataset"
    )
    if any("random_share" in group.shown for group in groups):
        text += "; N% random: share of random actions in that dataset"
    return text + "."


def games_of(groups: Sequence[Group]) -> list[str]:
    """Return the games, each once."""
    return list(dict.fromkeys(group.game for group in groups))


def kinds_of(groups: Sequence[Group]) -> dict[str, dict[str, Group]]:
    """Return the groups by label, then by game."""
    kinds: dict[str, dict[str, Group]] = {}
    for group in groups:
        kinds.setdefault(group.label, {})[group.game] = group
    return kinds


def decimals(groups: Sequence[Group], game: str) -> int:
    """Return how many decimals returns of a game deserve."""
    scale = max(abs(group.mean) + group.std for group in groups if group.game == game)
    return 0 if scale >= 100 else 1 if scale >= 10 else 2


def _scores(groups: Sequence[Group]) -> str:
    games, kinds = games_of(groups), kinds_of(groups)
    columns: dict[str, list[str]] = {}
    for label, by_game in kinds.items():
        columns[label] = [
            _score(by_game[game], decimals(groups, game)) if game in by_game else UNDEFINED
            for game in games
        ]
        columns[label].append(_geometric_mean(by_game, games, lambda g: g.percent))
        columns[label].append(_geometric_mean(by_game, games, lambda g: g.percent_normalised))
    names = [*games, "% of teacher (geometric mean)", "% of teacher, random-normalised"]
    if len(kinds) > MAX_COLUMNS:
        return _table(["policy", *names], [[label, *cells] for label, cells in columns.items()])
    rows = zip(*columns.values(), strict=True)
    return _table(["game", *columns], [[n, *row] for n, row in zip(names, rows, strict=True)])


def _score(group: Group, digits: int) -> str:
    text = f"{group.mean:.{digits}f} ± {group.std:.{digits}f} ({_short(group.highest, digits)})"
    epochs = group.traits["epochs"]
    if group.stage == "distilled" and epochs is not None and "epochs" not in group.shown:
        text += f" (e{epochs})"
    return text


def _short(value: float, digits: int) -> str:
    return f"{value:.0f}" if value.is_integer() else f"{value:.{digits}f}"


def _geometric_mean(
    by_game: dict[str, Group], games: Sequence[str], percent: Callable[[Group], float | None]
) -> str:
    """Return geometric mean / teacher's geometric mean, over the games that were played."""
    ratios = [percent(group) for group in by_game.values()]
    if any(ratio is None or ratio <= 0 for ratio in ratios):
        return UNDEFINED
    logs = [math.log(ratio) for ratio in ratios if ratio]
    text = f"{math.exp(math.fsum(logs) / len(logs)):.1f}"
    return text if len(logs) == len(games) else f"{text} ({len(logs)} of {len(games)} games)"


def _policies(groups: Sequence[Group]) -> str:
    several = len(games_of(groups)) > 1
    varied = any(group.variant() for group in groups)
    header = [
        *(["game"] if several else []),
        "stage",
        "capacity",
        *(["variant"] if varied else []),
        "parameters (% of teacher's)",
        "file, KiB",
        "latency, ms",
        "return",
        "95% interval",
        "games",
        "n",
        "agent steps",
        "% of teacher, random-normalised",
    ]
    rows = []
    for group in groups:
        digits = decimals(groups, group.game)
        size = group.first.policy.get("file_size")
        rows.append(
            [
                *([group.game] if several else []),
                group.stage,
                group.capacity,
                *([group.variant()] if varied else []),
                _parameters(group),
                _number(size and size / 1024, 0),
                _number(group.latency_ms, 2),
                _number(group.mean, digits),
                _interval(group, digits),
                str(group.episodes),
                str(group.seeds),
                human_steps(group.agent_steps),
                _number(group.percent_normalised, 1),
            ]
        )
    return _table(header, rows, left=len(header) - 9)


def _parameters(group: Group) -> str:
    if group.teacher is None:
        return f"{group.parameters:,}"
    return f"{group.parameters:,} ({100 * group.parameters / group.teacher.parameters:.3g})"


def _interval(group: Group, digits: int) -> str:
    low, high = group.interval
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first ``left`` columns are text and the others numbers."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def terminal_table(groups: Sequence[Group]) -> Table:
    """Return the groups as a table for the terminal, games one below the other.

    Args:
        groups: The rows.
    """
    games = games_of(groups)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("policy" if len(games) > 1 else games[0])
    for name in ("parameters", "return", "95% interval", "n", "% of teacher"):
        table.add_column(name, justify="right", no_wrap=True)
    for game in games:
        if len(games) > 1:
            table.add_section()
            table.add_row(escape(game), style="bold")
        for group in groups:
            if group.game == game:
                table.add_row(*_terminal_row(group, decimals(groups, game)))
    if any(group.percent_normalised is not None for group in groups):
        table.caption = "% of teacher: with the return of random play subtracted from both"
    return table


def _terminal_row(group: Group, digits: int) -> list[str]:
    return [
        escape(group.label),
        human_steps(group.parameters),
        f"{group.mean:.{digits}f} ± {group.std:.{digits}f}",
        _interval(group, digits),
        str(group.seeds),
        _number(group.percent_normalised, 1),
    ]
