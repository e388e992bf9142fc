"""Algorithms: one file tells one algorithm from top to bottom."""

from lightning_distill.algorithms.base import PolicyModule
from lightning_distill.algorithms.distillation import Distillation
from lightning_distill.algorithms.dqn import DQN
from lightning_distill.algorithms.finetuning import FineTuning
from lightning_distill.algorithms.multi_task import MultiTaskDistillation
from lightning_distill.algorithms.ppo import PPO
from lightning_distill.algorithms.real_time import RealTimeDQN, RealTimePPO
from lightning_distill.algorithms.rollout_distillation import RolloutDistillation

__all__ = [
    "DQN",
    "PPO",
    "Distillation",
    "FineTuning",
    "MultiTaskDistillation",
    "PolicyModule",
    "RealTimeDQN",
    "RealTimePPO",
    "RolloutDistillation",
]
