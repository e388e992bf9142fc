"""Which policies are the rows of a report: roles, seeds put together, teachers to compare with."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_distill.report.groups import Group
from lightning_distill.report.reading import Evaluation

STAGES = ("teacher", "direct", "distilled", "fine-tuned")


def group_evaluations(evaluations: Sequence[Evaluation]) -> tuple[list[Group], list[str]]:
    """Put evaluated policies into the rows of a report.

    Args:
        evaluations: Of any games.

    Returns:
        The groups, sorted by game, stage, parameters and traits; and sentences a reader needs.

    Raises:
        ValueError: One game was played under several protocols.
    """
    _check_protocols(evaluations)
    roots = _teachers(evaluations)
    taught = {(e.game, root) for e in evaluations if (root := roots[e.path]) is not None}
    teachers = taught | _other_seeds(evaluations, taught)
    buckets: dict[Any, list[Evaluation]] = defaultdict(list)
    notes = []
    for evaluation in evaluations:
        stage = _stage(evaluation, teachers)
        traits = _traits(evaluation, stage)
        key = (evaluation.game, stage, evaluation.policy["capacity"], *traits.values())
        buckets[key].append(evaluation)
    groups = []
    for bucket in buckets.values():
        policies, more = _one_per_policy(bucket)
        rows, unexplained = _split_by_seed(policies)
        notes += more + unexplained
        for row, name in rows:
            stage = _stage(row[0], teachers)
            groups.append(Group(stage, row, _traits(row[0], stage) | {"run": name}))
    _show_distinguishing_traits(groups)
    groups.sort(key=_order)
    for group in groups:
        group.teacher = _teacher_of(group, groups, roots)
        if references := [e.mean for e in group.evaluations if (e.game, e.fingerprint) in taught]:
            group.reference = statistics.fmean(references)
    return groups, notes + _missing_teachers(evaluations)


def _check_protocols(evaluations: Iterable[Evaluation]) -> None:
    first: dict[str, Evaluation] = {}
    for found in evaluations:
        expected = first.setdefault(found.game, found)
        for key in sorted(expected.protocol.keys() | found.protocol.keys()):
            left, right = expected.protocol.get(key), found.protocol.get(key)
            if left != right:
                raise ValueError(
                    f"{found.game} was played with {key}={right} in {found.path} but {key}={left}"
                    f" in {expected.path}, so their returns do not compare; report them separately"
                )


def _teachers(evaluations: Sequence[Evaluation]) -> dict[Path, str | None]:
    """Map each evaluation to the fingerprint of its teacher, None where that is not evaluated.

    A teacher that was itself taught by an evaluated policy hands the role on to that.
    """
    known = {(e.game, e.fingerprint): e for e in evaluations}
    roots: dict[Path, str | None] = {}
    for evaluation in evaluations:
        chain = [evaluation]
        while (
            following := known.get((evaluation.game, _teacher_fingerprint(chain[-1])))
        ) and following not in chain:
            chain.append(following)
        roots[evaluation.path] = chain[-1].fingerprint if len(chain) > 1 else None
    return roots


def _other_seeds(
    evaluations: Sequence[Evaluation], taught: Collection[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Return policies trained as a teacher was, with another seed, that taught nobody."""
    settings = {_experiment(e) for e in evaluations if (e.game, e.fingerprint) in taught}
    return {
        (e.game, e.fingerprint)
        for e in evaluations
        if _settings_key(e) and _experiment(e) in settings
    }


def _experiment(evaluation: Evaluation) -> tuple[Any, ...]:
    """Return what two seeds of one training have in common; snapshots differ in their steps."""
    provenance = evaluation.provenance
    return evaluation.game, provenance.get("agent_steps"), _settings_key(evaluation)


def _teacher_fingerprint(evaluation: Evaluation) -> str:
    return str((evaluation.teacher or {}).get("fingerprint"))


def _stage(evaluation: Evaluation, teachers: Collection[tuple[str, str]]) -> str:
    if (evaluation.game, evaluation.fingerprint) in teachers:
        return "teacher"
    stage = str(evaluation.policy["stage"])
    return "direct" if stage == "trained" else stage


def _traits(evaluation: Evaluation, stage: str) -> dict[str, Any]:
    """Return what tells policies of one stage and capacity apart, in the order it is shown."""
    origin = evaluation.origin
    distilled = origin.get("stage") == "distilled"
    dataset = origin.get("dataset") or {}
    control = dataset.get("control") or {}
    return {
        "epochs": origin.get("epochs") if distilled else None,
        "control_mode": control.get("mode"),
        "random_share": float(control.get("epsilon") or 0) if control else None,
        "dataset_steps": dataset.get("steps"),
        "agent_steps": None if stage == "distilled" else evaluation.provenance.get("agent_steps"),
        "act": evaluation.act,
        "algorithm": evaluation.policy.get("algorithm"),
        "network": evaluation.policy.get("network"),
        "taught_by": (evaluation.teacher or {}).get("capacity"),
        "settings": _settings_key(evaluation),
    }


def _settings_key(evaluation: Evaluation) -> str | None:
    """Return the training's settings as text that is equal for equal settings."""
    settings = evaluation.provenance.get("settings")
    return json.dumps(settings, sort_keys=True) if settings else None


def _one_per_policy(bucket: Sequence[Evaluation]) -> tuple[list[Evaluation], list[str]]:
    """Keep the longest evaluation of each policy: the same weights are not another seed."""
    kept: dict[str, Evaluation] = {}
    for evaluation in sorted(bucket, key=lambda e: -e.episodes):
        kept.setdefault(evaluation.fingerprint, evaluation)
    notes = [
        f"`{e.path}` and `{kept[e.fingerprint].path}` evaluate the same weights; the latter, with"
        f" {kept[e.fingerprint].episodes} games, is reported."
        for e in bucket
        if e is not kept[e.fingerprint]
    ]
    return list(kept.values()), notes


def _split_by_seed(
    policies: Sequence[Evaluation],
) -> tuple[list[tuple[list[Evaluation], str | None]], list[str]]:
    """Return policies as one row or, where a seed repeats, as a named row each.

    Two runs with one seed differ in something that provenance does not record, such as a loss.
    """
    policies = sorted(policies, key=lambda e: (str(e.provenance.get("seed")), str(e.path)))
    seeds = Counter(e.provenance.get("seed") for e in policies)
    if len(policies) == 1 or (None not in seeds and max(seeds.values()) == 1):
        return [(policies, None)], []
    names = _short_names([e.path.parent for e in policies])
    listed = ", ".join(f"`{e.path.parent}`" for e in policies)
    note = (
        f"{listed} have the same game, stage, capacity and training length but not a seed each, so"
        " they differ in something else and are rows of their own."
    )
    return [([e], name) for e, name in zip(policies, names, strict=True)], [note]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the fewest last parts that tell the paths apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _show_distinguishing_traits(groups: Sequence[Group]) -> None:
    """Let each stage show the traits in which groups of one game and capacity differ."""
    alike = defaultdict(list)
    for group in groups:
        alike[group.stage, group.game, group.capacity].append(group.traits)
    shown: dict[str, set[str]] = defaultdict(set)
    for (stage, _, _), traits in alike.items():
        shown[stage] |= {key for key in traits[0] if len({t[key] for t in traits}) > 1}
        _shorten_settings(traits)
    for group in groups:
        group.shown = shown[group.stage]


def _shorten_settings(alike: Sequence[dict[str, Any]]) -> None:
    """Replace all settings by the fewest that tell groups of otherwise equal traits apart."""
    classes = defaultdict(list)
    for traits in alike:
        classes[tuple(v for k, v in traits.items() if k != "settings")].append(traits)
    for members in classes.values():
        settings = [json.loads(traits["settings"] or "{}") for traits in members]
        keys = sorted(set().union(*settings))
        chosen: list[str] = []

        def told_apart(names: Sequence[str], settings: Sequence[Any] = settings) -> int:
            return len({tuple(str(s.get(name)) for name in names) for s in settings})

        while told_apart(chosen) < told_apart(keys):
            chosen.append(max(keys, key=lambda key: told_apart([*chosen, key])))
        for traits, own in zip(members, settings, strict=True):
            texts = [f"{key.rpartition('.')[2]}={_setting_text(own.get(key))}" for key in chosen]
            traits["settings"] = ", ".join(texts) or None


def _setting_text(value: Any) -> str:
    return value.rpartition(".")[2] if isinstance(value, str) else str(value).lower()


def _order(group: Group) -> tuple[Any, ...]:
    stage = STAGES.index(group.stage) if group.stage in STAGES else len(STAGES)
    # Numbers before texts before nothing, each in its own order.
    traits = [
        (value is None, isinstance(value, str), value or 0) for value in group.traits.values()
    ]
    return group.game, stage, group.stage, -group.parameters, group.capacity, traits


def _teacher_of(
    group: Group, groups: Sequence[Group], roots: Mapping[Path, str | None]
) -> Group | None:
    """Return the group to compare with: the own teacher or, for the untaught, the game's."""
    if group.stage == "teacher":
        return group
    named = {roots[e.path] for e in group.evaluations}
    untaught = all(e.teacher is None for e in group.evaluations)
    candidates = [
        other
        for other in groups
        if other.game == group.game
        and other.stage == "teacher"
        and (untaught or named & {e.fingerprint for e in other.evaluations})
    ]
    same_act = [other for other in candidates if other.first.act == group.first.act]
    return next(iter(same_act + candidates), None)


def _missing_teachers(evaluations: Sequence[Evaluation]) -> list[str]:
    known = {(e.game, e.fingerprint) for e in evaluations}
    missing = {
        (e.game, str(e.teacher.get("path") or "POLICY")): None
        for e in evaluations
        if e.teacher and (e.game, _teacher_fingerprint(e)) not in known
    }
    return [
        f"The teacher `{path}` of students of {game} is not among the evaluated policies, so their"
        f" percentages of it are empty: run `lightning-distill evaluate --policy {path} --out DIR`"
        " and add `DIR` to the report."
        for game, path in missing
    ]
