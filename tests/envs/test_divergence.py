"""Environments that return NaN end like those of our own engines do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import check_env_specs

from envs.divergence import EndDiverged


class Counting(EnvBase):
    """Three environments that observe their step; ``faults`` are (environment, step) with NaN, step 0 at the reset."""

    batch_locked = True  # pyright: ignore[reportAssignmentType]

    def __init__(self, key: str = "observation", faults: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(batch_size=torch.Size([3]))
        self.key, self.faults, self.steps = key, faults, torch.zeros(3, 1)
        self.action_spec = Bounded(-1.0, 1.0, torch.Size([3, 1]))
        self.observation_spec = Composite(observation=Unbounded(torch.Size([3, 1])), shape=(3,))
        self.reward_spec = Unbounded(torch.Size([3, 1]))

    def _values(self) -> dict[str, torch.Tensor]:
        values = {"observation": self.steps.clone(), "reward": torch.ones(3, 1)}
        for environment, step in self.faults:
            if self.steps[environment] == step:
                values[self.key][environment] = torch.nan
        return values

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        self.steps = torch.zeros(3, 1) if mask is None else torch.where(mask.view(3, 1), 0.0, self.steps)
        return TensorDict({"observation": self._values()["observation"]}, [3])

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.steps = self.steps + 1
        done = torch.zeros(3, 1, dtype=torch.bool)
        return TensorDict({**self._values(), "done": done, "terminated": done}, [3])

    def _set_seed(self, seed: int | None) -> None:
        pass


def rollout(env: EnvBase) -> TensorDictBase:
    return TransformedEnv(env, EndDiverged()).rollout(4, break_when_any_done=False)


@pytest.mark.parametrize("key", ["observation", "reward"])
def test_what_is_not_finite_ends_its_own_episode(key: str) -> None:
    tensordict = rollout(Counting(key, faults=((1, 2),)))
    # Reset after its second step, the environment comes to a second step again.
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1, 1::2] = True
    for name in ("diverged", "terminated", "done"):
        assert torch.equal(tensordict["next", name].squeeze(-1), expected)
    for environment, observations in ((0, [1.0, 2.0, 3.0, 4.0]), (1, [1.0, 0.0, 1.0, 0.0])):
        observation = tensordict["next", "observation"][environment].squeeze(-1)
        assert torch.equal(observation, torch.tensor(observations))
    assert torch.equal(tensordict["next", "reward"].squeeze(-1), (~expected).float())


def test_an_episode_that_begins_so_ends_with_its_first_step() -> None:
    tensordict = rollout(Counting(faults=((1, 0),)))
    assert tensordict["next", "diverged"][1].all()
    assert not tensordict["next", "diverged"][[0, 2]].any()
    assert tensordict["observation"].isfinite().all()


def test_a_lost_action_is_an_error() -> None:
    env = TransformedEnv(Counting(), EndDiverged())
    tensordict = env.reset()
    tensordict["action"] = torch.tensor([[0.0], [0.0], [torch.nan]])
    with pytest.raises(ValueError, match="The action of environment 2 is not finite"):
        env.step(tensordict)


def test_specs_hold() -> None:
    check_env_specs(TransformedEnv(Counting(), EndDiverged()))
