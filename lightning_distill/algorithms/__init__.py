"""Algorithms: one file tells one algorithm from top to bottom."""

from lightning_distill.algorithms.base import PolicyModule
from lightning_distill.algorithms.distillation import Distillation
from lightning_distill.algorithms.finetuning import FineTuning
from lightning_distill.algorithms.ppo import PPO

__all__ = ["PPO", "Distillation", "FineTuning", "PolicyModule"]
