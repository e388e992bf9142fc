"""How the figures of a report were measured, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_distill.report.groups import Group
from lightning_distill.report.reading import Evaluation

_ACTING = {
    "sample": "actions are sampled from softmax(logits)",
    "argmax": "the most likely action is taken",
}


def protocol_text(groups: Sequence[Group]) -> str:
    """Return a list of facts: environment, games, intervals, seeds and versions.

    Args:
        groups: The report's rows.
    """
    evaluations = [e for group in groups for e in group.evaluations]
    facts = [
        *_environments(evaluations),
        f"Acting: {_acting(evaluations)}.",
        _games(evaluations),
        *_intervals(groups),
        *_normalisation(evaluations),
        f"Evaluation seed {_span(e.record.get('seed') for e in evaluations)}; training seed"
        f" {_span(e.provenance.get('seed') for e in evaluations)}; forward passes in"
        f" {_listed(e.record.get('precision') for e in evaluations)}.",
        _latency(evaluations),
        f"Evaluated by lightning-distill {_versions(e.record for e in evaluations)}; trained by"
        f" {_versions(e.provenance for e in evaluations)}.",
    ]
    return "\n".join(f"- {fact}" for fact in facts if fact)


def _environments(evaluations: Sequence[Evaluation]) -> list[str]:
    """Name the fields that games share once, and for each game the others."""
    first = {e.game: e.protocol for e in evaluations}
    protocols = list(first.values())
    shared = {
        key: value
        for key, value in protocols[0].items()
        if all(key in p and p[key] == value for p in protocols)
    }
    lines = [f"Environment: {_fields(shared)}."] if shared else []
    if len(first) > 1:
        for game, protocol in first.items():
            own = {k: v for k, v in protocol.items() if k not in shared}
            if own and own != {"game": game}:
                lines.append(f"Environment of {game}: {_fields(own)}.")
    return lines


def _fields(protocol: dict[str, Any]) -> str:
    texts = (str(v) if key == "class_path" else f"{key}={v}" for key, v in protocol.items())
    return ", ".join(f"`{text}`" for text in texts)


def _acting(evaluations: Sequence[Evaluation]) -> str:
    acts = dict.fromkeys(e.act for e in evaluations)
    texts = {
        act: _ACTING.get(act) or f"the most likely action, or a random one ({act})" for act in acts
    }
    if len(texts) == 1:
        return f"{next(iter(texts.values()))} in every evaluation"
    count = {act: sum(e.act == act for e in evaluations) for act in acts}
    return "; ".join(f"{text} in {count[act]} evaluations" for act, text in texts.items())


def _games(evaluations: Sequence[Evaluation]) -> str:
    text = f"Games per policy: {_span(e.episodes for e in evaluations)}, whole and raw-scored"
    if truncated := sum(e.truncated for e in evaluations):
        text += f"; {truncated} in all were cut by the cap on their length"
    if repeated := sum(e.episodes - e.distinct for e in evaluations):
        text += f"; {repeated} in all repeat another game exactly and count once in intervals"
    return text + "."


def _intervals(groups: Sequence[Group]) -> list[str]:
    facts = ["n is the number of training seeds."]
    if any(group.seeds == 1 for group in groups):
        facts.append(
            "Where n is 1, the interval is a bootstrap over the policy's games: it covers the luck"
            " of the games and says nothing about another training run."
        )
    if any(group.seeds > 1 for group in groups):
        facts.append(
            "Where n is more, the mean is over the seeds' means, the interval is Student's t over"
            " them, and the standard deviation is that of the games of all seeds."
        )
    return facts


def _normalisation(evaluations: Sequence[Evaluation]) -> list[str]:
    scores = {e.game: e.random_score for e in evaluations if e.random_score is not None}
    if not scores:
        return []
    listed = ", ".join(f"{score:g} in {game}" for game, score in scores.items())
    return [
        "Random-normalised: (return - random) / (teacher's return - random); random play returns"
        f" {listed}."
    ]


def _latency(evaluations: Sequence[Evaluation]) -> str:
    if all(e.policy.get("latency_ms") is None for e in evaluations):
        return ""
    return "Latency: median time of one observation's forward pass on one CPU thread."


def _span(values: Iterable[int | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return "unknown"
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values if value is not None})) or "unknown"


def _versions(records: Iterable[Any]) -> str:
    """Return the versions with their commits, each once."""
    pairs = {(r.get("version"), r.get("commit")) for r in records if r.get("version")}
    texts = sorted(f"{version} (commit {commit or 'unknown'})" for version, commit in pairs)
    return ", ".join(texts) or "an unknown version"
