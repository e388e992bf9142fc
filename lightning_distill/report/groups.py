"""A row of a report: policies that differ only in their seed, and their figures together."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lightning_distill.report.reading import Evaluation

# 97.5% quantiles of Student's t for 1 to 10 degrees of freedom.
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(eq=False)
class Group:
    """Policies that differ only in their training seed: a row of the report.

    Args:
        stage: ``teacher``, ``direct``, ``distilled``, ``fine-tuned``, or as the provenance says.
        evaluations: One per policy.
        traits: What tells policies of one stage and capacity apart; None where not applicable.
        shown: Names of the traits that do so in this report.
        teacher: The group that its returns are compared to.
        reference: Mean return of those of its policies that taught others, where it is a teacher.
    """

    stage: str
    evaluations: Sequence[Evaluation]
    traits: dict[str, Any]
    shown: Collection[str] = ()
    teacher: Group | None = field(default=None, repr=False)
    reference: float | None = None

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
        """Mean return: over games, then over seeds."""
        return statistics.fmean(e.mean for e in self.evaluations)

    @cached_property
    def std(self) -> float:
        """Standard deviation of a game's return, the games of all seeds taken together."""
        variance = statistics.fmean(e.std**2 + (e.mean - self.mean) ** 2 for e in self.evaluations)
        return float(variance**0.5)

    @property
    def highest(self) -> float:
        """Return of the best game."""
        return max(e.highest for e in self.evaluations)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean: over games for one seed, over seeds for several."""
        if self.seeds == 1:
            return self.first.interval
        return t_interval([e.mean for e in self.evaluations])

    @property
    def episodes(self) -> int:
        """Games played by all seeds."""
        return sum(e.episodes for e in self.evaluations)

    @property
    def truncated(self) -> int:
        """Games cut by their cap."""
        return sum(e.truncated for e in self.evaluations)

    @property
    def latency_ms(self) -> float | None:
        """Median time of one forward pass of one observation."""
        times = [t for e in self.evaluations if (t := e.policy.get("latency_ms")) is not None]
        return statistics.median(times) if times else None

    @property
    def control(self) -> str | None:
        """How the dataset that was learned from was played, such as ``sample + 10% random``."""
        mode, random = self.traits["control_mode"], self.traits["random_share"]
        return f"{mode} + {_trait_text('random_share', random)}" if random else mode

    @property
    def percent(self) -> float | None:
        """Return as a percentage of the teacher's; None where that is not positive or unknown."""
        reference = self._teacher_mean
        return None if reference is None or reference <= 0 else 100 * self.mean / reference

    @property
    def percent_normalised(self) -> float | None:
        """The same with the return of random play subtracted from both."""
        random, reference = self.first.random_score, self._teacher_mean
        if reference is None or random is None or reference <= random:
            return None
        return 100 * (self.mean - random) / (reference - random)

    @property
    def _teacher_mean(self) -> float | None:
        if self.teacher is None:
            return None
        return self.teacher.mean if self.teacher.reference is None else self.teacher.reference

    @property
    def label(self) -> str:
        """Its name, unique among the groups of its game."""
        return self.name()

    def name(self, hide: Collection[str] = ()) -> str:
        """Return stage, capacity and variant as text.

        Args:
            hide: What to leave out: traits or ``capacity``.
        """
        kind = self.stage if "capacity" in hide else f"{self.stage} {self.capacity}"
        variant = self.variant(hide)
        return f"{kind}, {variant}" if variant else kind

    def variant(self, hide: Collection[str] = ()) -> str:
        """Return the traits that tell it from others of its stage and capacity as text.

        Args:
            hide: Traits to leave out.
        """
        texts = (
            _trait_text(key, value)
            for key, value in self.traits.items()
            if key in self.shown and key not in hide and value is not None
        )
        return ", ".join(texts)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the mean of two or more values by Student's t."""
    mean, degrees = statistics.fmean(values), len(values) - 1
    half = _t_quantile(degrees) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


def _t_quantile(degrees: int) -> float:
    if degrees <= len(_T_QUANTILES):
        return _T_QUANTILES[degrees - 1]
    # Cornish-Fisher expansion about the normal quantile, good to 1e-3 from here on.
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def human_steps(steps: float) -> str:
    """Return a count as in ``540k`` or ``1.8M``."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(steps) >= size:
            return f"{steps / size:.3g}{suffix}"
    return f"{steps:g}"


def _trait_text(key: str, value: Any) -> str:
    match key:
        case "epochs":
            return f"e{value}"
        case "random_share":
            return f"{100 * value:g}% random"
        case "dataset_steps":
            return f"{human_steps(value)} recorded"
        case "agent_steps":
            return f"{human_steps(value)} steps"
        case "taught_by":
            return f"from {value}"
    return str(value)
