"""Where transitions come from: the collector of a run, and its part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase

from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.training.config import TrainConfig


def make_collector(config: TrainConfig, env: EnvBase, actor: LangevinActor, device: torch.device) -> Collector:
    """Endless collection, [num_envs, time] transitions at a time; the training loop decides when to stop."""
    return Collector(
        env,
        actor,
        frames_per_batch=config.collector.frames_per_batch or config.env.num_envs,
        total_frames=-1,
        init_random_frames=config.collector.init_random_frames,
        device=device,
        # Trajectory numbers cost a host synchronisation per step on a GPU, and nothing here reads them.
        track_traj_ids=False,
        # A warm-started actor carries its previous action, as a recurrent policy does its hidden state.
        auto_register_policy_transforms=actor.warm_start,
    )


class CollectorState:
    """State of a collector in this process: its environments, the observation they are at, and its counters.

    TorchRL's own ``Collector.state_dict`` leaves out the environments' state and the step that comes next, so a
    restored collector would begin new episodes; here it goes on in the middle of the old ones.
    """

    def __init__(self, collector: BaseCollector) -> None:
        self.collector = collector

    def state_dict(self) -> dict[str, Any]:
        """Nested mapping of tensors and numbers."""
        collector: Any = self.collector
        return {
            "environment": collector.env.base_env.state_dict(),
            "carrier": collector._carrier.to_dict(),
            "frames": collector._frames,
            "iter": collector._iter,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict` into a collector of the same environments."""
        collector: Any = self.collector
        collector.env.base_env.load_state_dict(state["environment"])
        collector._carrier.update(TensorDict(state["carrier"], collector.env.batch_size))
        collector.load_state_dict({"frames": state["frames"], "iter": state["iter"]}, strict=False)
