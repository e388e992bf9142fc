"""Data modules, and the batch contract between them and the algorithms.

A batch is a TensorDict of batch size (B,) with these keys, as far as its maker has them:

========================= =========== ================ ======================= ==================
key                       shape       dtype            written by              read by
========================= =========== ================ ======================= ==================
observation               (B, *obs)   uint8 / float32  environment             networks, teachers
action                    (B,)        int64            acting policy           PPO, DQN
action_log_prob           (B,)        float32          acting policy           PPO
state_value               (B,)        float32          acting policy           GAE, PPO
advantage, value_target   (B,)        float32          ``prepare``             PPO
next.observation          (B, *obs)   as above         environment             DQN
next.reward               (B, n)      float32          environment             DQN
next.terminated           (B,)        bool             environment             DQN
task                      (B,)        int64            MultiTaskDataModule     multi-task
teacher.logits            (B, A)      float32          the teacher             distillation losses
teacher.state_value       (B,)        float32          teacher, if it has one  distillation losses
========================= =========== ================ ======================= ==================

Under ``next`` are the rewards of n steps, zero behind the end of an episode, and where they led.
Teacher logits are raw: Q-values stay Q-values, and the temperature belongs to the loss. Rollouts
(N, T) also hold ``next``: reward, terminated, truncated, done, life_lost, restarted,
episode_return, episode_step and observation; ``prepare`` reads them.
"""

from lightning_distill.data.base import PolicyDataModule
from lightning_distill.data.dataset import Dataset, DatasetWriter
from lightning_distill.data.memory import MemoryDataModule, ReplayMemory
from lightning_distill.data.multi_task import MultiTaskDataModule
from lightning_distill.data.replay import ReplayDataModule
from lightning_distill.data.rollouts import RolloutDataModule

__all__ = [
    "Dataset",
    "DatasetWriter",
    "MemoryDataModule",
    "MultiTaskDataModule",
    "PolicyDataModule",
    "ReplayDataModule",
    "ReplayMemory",
    "RolloutDataModule",
]
