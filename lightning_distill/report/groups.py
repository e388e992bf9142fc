"""The rows of a report: policies that differ only in their seed, and whom they compare with."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from lightning_distill.intervals import middle, resampled_means, t_interval
from lightning_distill.report.reading import Evaluation

STAGES = ("teacher", "direct", "distilled", "fine-tuned")
TOTAL_STEPS = re.compile(r"total_steps=\d+")

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


@dataclass(eq=False)
class Group:
    """Policies that differ only in their training seed: a row of the report."""

    stage: str
    evaluations: Sequence[Evaluation]  # one per policy
    traits: dict[str, Any]  # tell policies of a stage and capacity apart; None: does not apply
    # What its students are compared to: the mean return of those of its policies that taught.
    reference: float
    teacher: Group | None = field(default=None, repr=False)
    shown: Collection[str] = ()  # names of the traits that its name needs in this report
    # Fingerprints of the first teachers, by those of the policies.
    roots: Mapping[str, str | None] = field(default_factory=dict, repr=False)

    @property
    def first(self) -> Evaluation:
        """One of the policies, for what they have in common."""
        return self.evaluations[0]

    @property
    def game(self) -> str:
        """Short name of the game."""
        return self.first.game

    @property
    def capacity(self) -> str:
        """Short name of the network's size."""
        return str(self.first.policy["capacity"])

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return int(self.first.policy["num_parameters"])

    @property
    def seeds(self) -> int:
        """Number of policies."""
        return len(self.evaluations)

    @property
    def agent_steps(self) -> int:
        """Agent steps of the training; 0 where nobody played, as in distillation."""
        return int(self.first.provenance.get("agent_steps") or 0)

    @cached_property
    def mean(self) -> float:
        """Mean return: over episodes, then over seeds."""
        return statistics.fmean(e.mean for e in self.evaluations)

    @cached_property
    def std(self) -> float:
        """Standard deviation of an episode's return, the episodes of all seeds taken together."""
        variance = statistics.fmean(e.std**2 + (e.mean - self.mean) ** 2 for e in self.evaluations)
        return float(variance**0.5)

    @property
    def highest(self) -> float:
        """Return of the best episode."""
        return max(e.highest for e in self.evaluations)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean: over episodes for one seed, over seeds for several."""
        if self.seeds == 1:
            return self.first.interval
        return t_interval([e.mean for e in self.evaluations])

    @property
    def percent(self) -> float | None:
        """Return as a percentage of the teacher's; None where that is not positive or unknown."""
        if self.teacher is None or self.teacher.reference <= 0:
            return None
        return 100 * self.mean / self.teacher.reference

    @property
    def percent_normalised(self) -> float | None:
        """The same with the return of random play subtracted from both."""
        random = self.first.random_score
        if self.teacher is None or random is None or self.teacher.reference <= random:
            return None
        return 100 * (self.mean - random) / (self.teacher.reference - random)

    @cached_property
    def difference(self) -> tuple[float, float, float] | None:
        """Mean return less its teacher's, and the 95% interval of that; None without one.

        Episodes are compared in pairs where both played the same ones, and the interval is over
        episodes for one seed, over seeds for several.
        """
        pairs = self.compared_with_teacher
        if not pairs:
            return None
        means = [e.mean - teacher.mean for e, teacher in pairs]
        low, high = t_interval(means) if len(means) > 1 else difference_interval(*pairs[0])
        return statistics.fmean(means), low, high

    @property
    def compared_with_teacher(self) -> list[tuple[Evaluation, Evaluation]]:
        """Every policy with its own teacher, or the game's only one; none of a teacher."""
        if self.teacher is None or self.teacher is self:
            return []
        teachers = {e.fingerprint: e for e in self.teacher.evaluations}
        # Whoever had a teacher is compared with that or with none.
        only = self.teacher.first if self.teacher.seeds == 1 else None
        found = [
            (e, teachers.get(self.roots.get(e.fingerprint) or "", None if e.teacher else only))
            for e in self.evaluations
        ]
        pairs = [(e, teacher) for e, teacher in found if teacher is not None]
        return pairs if len(pairs) == len(found) else []

    @property
    def normalised_scores(self) -> list[float] | None:
        """Every policy's :attr:`percent_normalised`."""
        random = self.first.random_score
        if self.percent_normalised is None or random is None or self.teacher is None:
            return None
        scale = self.teacher.reference - random
        return [100 * (e.mean - random) / scale for e in self.evaluations]

    def name(self, hide: Collection[str] = ()) -> str:
        """Return stage, capacity and variant, without the traits to hide; unique in its game."""
        kind = self.stage if "capacity" in hide else f"{self.stage} {self.capacity}"
        return ", ".join(filter(None, (kind, self.variant(hide))))

    def variant(self, hide: Collection[str] = ()) -> str:
        """Return the traits that tell it from others of its stage and capacity."""
        traits = {k: v for k, v in self.traits.items() if k in self.shown and k not in hide}
        if traits.get("agent_steps") and TOTAL_STEPS.fullmatch(traits.get("settings") or ""):
            del traits["settings"]  # says the same
        return ", ".join(trait_text(k, v) for k, v in traits.items() if v is not None)


def difference_interval(first: Evaluation, second: Evaluation) -> tuple[float, float]:
    """Return the 95% bootstrap interval of one evaluation's mean return less another's.

    Episodes of the same beginning are drawn together, which leaves out what they have in common.
    """
    generator = np.random.default_rng(0)
    if first.is_paired_with(second):
        pairs = np.stack([first.kinds, second.kinds])
        _, kinds = np.unique(pairs, axis=1, return_inverse=True)
        return middle(resampled_means(first.returns - second.returns, kinds.ravel(), generator))
    of_first, of_second = (resampled_means(e.returns, e.kinds, generator) for e in (first, second))
    return middle(of_first - of_second)


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean of what lies between the quartiles: a quarter at each end is left out.

    Paper: Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical
    Precipice, https://arxiv.org/abs/2108.13264.
    """
    count = values.shape[axis]
    kept = np.sort(values, axis=axis).take(range(count // 4, count - count // 4), axis=axis)
    return np.asarray(kept.mean(axis=axis))


def aggregate(
    scores: Sequence[Sequence[float]], resamples: int = 10_000
) -> tuple[float, tuple[float, float] | None]:
    """Return the interquartile mean over runs and games, and its 95% interval.

    The interval is a stratified bootstrap, as in the same paper: each game's runs are drawn anew.

    Args:
        scores: Of each game, the scores of its runs.
        resamples: Number of bootstrap samples.

    Returns:
        Mean and interval; no interval where every game has but one run.
    """
    mean = float(interquartile_mean(np.concatenate([np.array(runs) for runs in scores])))
    if all(len(runs) == 1 for runs in scores):
        return mean, None
    generator = np.random.default_rng(0)
    drawn = [generator.choice(np.array(runs), (resamples, len(runs))) for runs in scores]
    return mean, middle(interquartile_mean(np.concatenate(drawn, axis=1)))


def human_steps(steps: float) -> str:
    """Return a count as in ``540k`` or ``1.8M``."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(steps) >= size:
            return f"{steps / size:.3g}{suffix}"
    return f"{steps:g}"


def trait_text(key: str, value: Any) -> str:
    """Return a trait as it is shown in names."""
    match key:
        case "epochs":
            return f"e{value}"
        case "random_share":
            return f"{100 * value:g}% random"
        case "dataset_steps":
            return f"{human_steps(value)} recorded"
        case "agent_steps":
            return f"{human_steps(value)} steps"
        case "teacher_share":
            return f"β {value:g}"
        case "played_by":
            return f"played by {value}"
        case "taught_by":
            return f"from {value}"
        case "begun_with":
            return f"begun with {value}"
    return str(value)


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by their key; keys and items keep their order."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def group_evaluations(evaluations: Sequence[Evaluation]) -> tuple[list[Group], list[str]]:
    """Return the rows of a report, sorted, and what a reader has to know beside them.

    Raises:
        ValueError: One game was played under several protocols.
    """
    groups: list[Group] = []
    notes: list[str] = []
    for _, of_game in sorted(group_by(evaluations, lambda e: e.game).items()):
        _check_protocol(of_game)
        groups += _group_game(of_game, notes)
    for of_stage in group_by(groups, lambda g: g.stage).values():
        _show_distinguishing_traits(of_stage)
    return groups, notes


def _check_protocol(evaluations: Sequence[Evaluation]) -> None:
    expected = evaluations[0]
    for found in evaluations:
        for key in sorted(expected.protocol.keys() | found.protocol.keys()):
            left, right = expected.protocol.get(key), found.protocol.get(key)
            if left != right:
                raise ValueError(
                    f"{found.game} was played with {key}={right} in {found.path} but {key}={left}"
                    f" in {expected.path}, so their returns do not compare; report them separately"
                )


def _group_game(evaluations: Sequence[Evaluation], notes: list[str]) -> list[Group]:
    """Return the sorted groups of one game and add to the notes."""
    known = {e.fingerprint: e for e in evaluations}
    taught = {root for e in evaluations if (root := _root_teacher(e, known))}
    # Trained as a teacher was, with another seed: a teacher too, though it taught nobody.
    alike = {_experiment(known[fingerprint]) for fingerprint in taught} - {None}

    def kind(evaluation: Evaluation) -> tuple[Any, ...]:
        teaches = evaluation.fingerprint in taught or _experiment(evaluation) in alike
        stage = "teacher" if teaches else str(evaluation.policy["stage"])
        if stage == "trained":
            # Older versions called what PPO with a distillation loss makes trained.
            stage = "distilled" if evaluation.teacher else "direct"
        return stage, evaluation.policy["capacity"], *_traits(evaluation).items()

    groups = []
    for (stage, _, *traits), policies in group_by(evaluations, kind).items():
        for run, row in _rows(policies, notes):
            references = [e.mean for e in row if e.fingerprint in taught] or [e.mean for e in row]
            groups.append(
                Group(stage, row, {**dict(traits), "run": run}, statistics.fmean(references))
            )
    groups.sort(key=_order)
    for group in groups:
        group.teacher = _teacher_of(group, groups, known)
        group.roots = {e.fingerprint: _root_teacher(e, known) for e in group.evaluations}
    notes += _missing_teachers(evaluations, known)
    return groups


def _root_teacher(evaluation: Evaluation, known: Mapping[str, Evaluation]) -> str | None:
    """Return the fingerprint of its teacher, None where that is not evaluated.

    A teacher that was itself taught by an evaluated policy hands the role on to that.
    """
    chain = [evaluation]
    while (teacher := known.get(chain[-1].teacher.get("fingerprint", ""))) and teacher not in chain:
        chain.append(teacher)
    return chain[-1].fingerprint if len(chain) > 1 else None


def _experiment(evaluation: Evaluation) -> tuple[Any, ...] | None:
    """Return what two seeds of one training have in common; snapshots differ in their steps."""
    settings = _settings(evaluation)
    return (evaluation.provenance.get("agent_steps"), settings) if settings else None


def _settings(evaluation: Evaluation) -> str | None:
    """Return the training's settings as text that is equal for equal settings."""
    settings = evaluation.provenance.get("settings")
    return json.dumps(settings, sort_keys=True) if settings else None


# What differs between seeds of one training.
_BY_SEED = {"run", "path", "config", "seed", "updates", "elapsed_seconds", "evaluation"}
_BY_SEED |= {"precision", "version", "commit", "date"}


def _lineage(described: Mapping[str, Any] | None) -> str | None:
    """Return what policies have in common that are seeds of one training, their parents' too.

    Args:
        described: A teacher, actor or beginning, as provenance has it.
    """
    return json.dumps(_without_seed(described), sort_keys=True) if described else None


def _without_seed(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "fingerprint" in value:
        provenance = _without_seed(value.get("provenance") or {})
        return [value.get("capacity"), provenance or value["fingerprint"]]
    return {key: _without_seed(item) for key, item in value.items() if key not in _BY_SEED}


def _traits(evaluation: Evaluation) -> dict[str, Any]:
    """Return what tells policies of one stage and capacity apart, in the order it is shown."""
    origin = evaluation.origin
    dataset = origin.get("dataset") or {}
    control = dataset.get("control") or {}
    # Where somebody plays an epoch is no pass over a dataset.
    recorded = origin.get("stage") == "distilled" and not origin.get("agent_steps")
    return {
        "epochs": origin.get("epochs") if recorded else None,
        "control_mode": control.get("mode"),
        "random_share": float(control.get("epsilon") or 0) if control else None,
        "teacher_share": control.get("beta") or None,
        "played_by": _lineage(dataset.get("actor")),
        "dataset_steps": dataset.get("steps"),
        "agent_steps": evaluation.provenance.get("agent_steps") or None,
        "act": evaluation.act,
        "algorithm": evaluation.policy.get("algorithm"),
        "network": evaluation.policy.get("network"),
        "taught_by": _lineage(evaluation.teacher),
        "begun_with": _lineage(_begun_with(evaluation)),
        "settings": _settings(evaluation),
    }


def _begun_with(evaluation: Evaluation) -> Mapping[str, Any] | None:
    """Return the policy whose weights its training began with."""
    begun_with = evaluation.provenance.get("init_from")
    return begun_with if isinstance(begun_with, dict) else None


def _rows(
    evaluations: Sequence[Evaluation], notes: list[str]
) -> list[tuple[str | None, list[Evaluation]]]:
    """Return policies of equal traits as one row or, where a seed repeats, a named row each.

    Two runs with one seed differ in something that provenance does not record.
    """
    policies: dict[str, Evaluation] = {}
    for e in sorted(evaluations, key=lambda e: -e.episodes):
        # The same weights are not another seed.
        kept = policies.setdefault(e.fingerprint, e)
        if kept is not e:
            notes.append(
                f"`{e.path}` and `{kept.path}` evaluate the same weights; the latter, with"
                f" {kept.episodes} episodes, is reported."
            )
    row = sorted(policies.values(), key=lambda e: (str(e.provenance.get("seed")), str(e.path)))
    seeds = {e.provenance.get("seed") for e in row} - {None}
    if len(row) in (1, len(seeds)):
        return [(None, row)]
    notes.append(
        f"{', '.join(f'`{e.path.parent}`' for e in row)} have the same game, stage, capacity and"
        " training length but not a seed each, so they differ in something else and are rows of"
        " their own."
    )
    above = os.path.commonpath([e.path.parent.parent.absolute() for e in row])
    return [(os.path.relpath(e.path.parent, above), [e]) for e in row]


def _order(group: Group) -> tuple[Any, ...]:
    stage = STAGES.index(group.stage) if group.stage in STAGES else len(STAGES)
    traits = [(value is None, value or 0) for value in group.traits.values()]
    return stage, group.stage, -group.parameters, group.capacity, traits


def _teacher_of(
    group: Group, groups: Sequence[Group], known: Mapping[str, Evaluation]
) -> Group | None:
    """Return the group to compare with: the own teacher or, for the untaught, the game's."""
    if group.stage == "teacher":
        return group
    candidates = [other for other in groups if other.stage == "teacher"]
    if any(e.teacher for e in group.evaluations):
        own = {_root_teacher(e, known) for e in group.evaluations}
        candidates = [c for c in candidates if own & {e.fingerprint for e in c.evaluations}]
    same_act = [other for other in candidates if other.first.act == group.first.act]
    return next(iter(same_act + candidates), None)


def _missing_teachers(
    evaluations: Sequence[Evaluation], known: Mapping[str, Evaluation]
) -> list[str]:
    unknown = [e for e in evaluations if e.teacher and e.teacher.get("fingerprint") not in known]
    paths = dict.fromkeys(str(e.teacher.get("path") or "POLICY") for e in unknown)
    return [
        f"The teacher `{path}` of students of {evaluations[0].game} is not among the evaluated"
        " policies, so their percentages of it are empty: run `lightning-distill evaluate --policy"
        f" {path} --out DIR` and add `DIR` to the report."
        for path in paths
    ]


def _show_distinguishing_traits(groups: Sequence[Group]) -> None:
    """Let groups of one stage show the traits in which those of one game and capacity differ."""
    shown: set[str] = set()
    for trait, relative in RELATIVES.items():
        _name_relatives(groups, trait, relative)
    for alike in group_by(groups, lambda g: (g.game, g.capacity)).values():
        traits = [group.traits for group in alike]
        shown |= {key for key in traits[0] if len({t[key] for t in traits}) > 1}
        for same in group_by(traits, _without_settings).values():
            _shorten_settings(same)
    for group in groups:
        group.shown = shown


# Traits that are other policies.
RELATIVES: dict[str, Callable[[Evaluation], Mapping[str, Any] | None]] = {
    "taught_by": lambda evaluation: evaluation.teacher or None,
    "begun_with": _begun_with,
    "played_by": lambda evaluation: (evaluation.origin.get("dataset") or {}).get("actor"),
}


def _name_relatives(
    groups: Sequence[Group],
    trait: str,
    relative: Callable[[Evaluation], Mapping[str, Any] | None],
) -> None:
    """Name a group's teacher, or who else it comes from, by size if that is enough, else by path.

    Args:
        groups: Of one stage.
        trait: Which relative it is.
        relative: Returns its description.
    """
    described = {group: relative(group.first) or {} for group in groups if group.traits[trait]}
    lineages = {(group.game, group.traits[trait]) for group in described}
    for key in ("capacity", "path", "fingerprint"):
        names = {group: str(who.get(key)) for group, who in described.items()}
        if len({(group.game, name) for group, name in names.items()}) == len(lineages):
            break
    for group in described:
        group.traits[trait] = names[group]


def _without_settings(traits: Mapping[str, Any]) -> str:
    # A curve has many numbers of agent steps, and its name has to do without.
    return str({**traits, "settings": None, "agent_steps": None})


def _shorten_settings(alike: Sequence[dict[str, Any]]) -> None:
    """Replace all settings by the fewest that tell groups of otherwise equal traits apart."""
    settings = [json.loads(traits["settings"] or "{}") for traits in alike]
    keys = sorted(set().union(*settings))
    chosen: list[str] = []

    def told_apart(names: Sequence[str]) -> int:
        return len({tuple(str(own.get(name)) for name in names) for own in settings})

    while told_apart(chosen) < told_apart(keys):
        chosen.append(max(keys, key=lambda key: told_apart([*chosen, key])))
    for traits, own in zip(alike, settings, strict=True):
        texts = [f"{key.rpartition('.')[2]}={_setting_text(own.get(key))}" for key in chosen]
        traits["settings"] = ", ".join(texts) or None


def _setting_text(value: Any) -> str:
    return value.rpartition(".")[2] if isinstance(value, str) else str(value).lower()
