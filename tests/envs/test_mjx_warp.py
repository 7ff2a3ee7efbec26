"""MuJoCo Warp under the mjx engine, on the CPU: what it computes is asked here, how fast it is only a GPU can tell.

Warp compiles its kernels for minutes, so the tests that step are left out unless MJX_WARP is set.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.mjx_parity import errors
from envs import make_env
from envs.engines import mjx_warp
from envs.engines.mjx import MJXEngine
from envs.tasks.ant import Ant
from envs.tasks.half_cheetah import HalfCheetah
from envs.tasks.inverted_pendulum import InvertedPendulum
from tests.envs.transitions import gymnasium_transitions

steps = pytest.mark.skipif(not os.environ.get("MJX_WARP"), reason="compiles for minutes; set MJX_WARP=1")


def test_without_warp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mjx_warp, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'nclql-torchrl\[warp\]'"):
        make_env("HalfCheetah-v5", 2, engine="mjx", engine_options={"impl": "warp"})


@pytest.mark.slow
@steps
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", [HalfCheetah(), Ant()])
def test_a_step_is_gymnasiums(task: HalfCheetah | Ant) -> None:
    pytest.importorskip("warp")
    expected = gymnasium_transitions(task.name, 16)
    engine = MJXEngine(task, 16, impl="warp")
    engine.set_state(torch.from_numpy(expected["qpos"]), torch.from_numpy(expected["qvel"]))
    step = engine.step(torch.from_numpy(expected["action"]))
    observation = errors(step.next_observation.numpy(), expected["observation"]).max(-1)
    # Measured: 2.7e-6 and 3.1e-6.
    assert np.median(observation) < 3e-5
    np.testing.assert_array_equal(step.terminated.numpy(), expected["terminated"])
    # It had room enough.
    engine.step(torch.zeros(16, len(engine.action_low)))


@pytest.mark.slow
def test_no_state_that_lost_contacts_is_handed_out() -> None:
    engine: Any = MJXEngine(InvertedPendulum(), 4)
    engine._room = mjx_warp.Room(4, 16)  # as if it were Warp's
    engine._states[0] |= {"overflow": engine._states[0]["overflow"] | np.array([0, 0, mjx_warp.NEFC, 0], np.int32)}
    for act in (
        engine.state_dict,
        lambda: engine.set_state(torch.zeros(4, 2), torch.zeros(4, 2)),
        lambda: engine.reset(torch.tensor([True, False, False, True])),
    ):
        with pytest.raises(RuntimeError, match=r"16 contacts of 4 environments of InvertedPendulum-v5"):
            act()


@pytest.mark.slow
@steps
@pytest.mark.timeout(900)
def test_a_start_with_too_little_room_is_an_error() -> None:
    pytest.importorskip("warp")
    engine = MJXEngine(Ant(), 4, impl="warp", max_contacts=1)
    with pytest.raises(RuntimeError, match=r"Ant-v5.*max_contacts beyond 1"):
        engine.set_state(torch.zeros(4, 15), torch.zeros(4, 14))  # in the ground


@pytest.mark.slow
@steps
@pytest.mark.timeout(900)
@pytest.mark.parametrize("room", [{"max_contacts": 1}, {"max_constraints": 2}])
def test_too_little_room_is_an_error(room: dict[str, Any]) -> None:
    pytest.importorskip("warp")
    engine = MJXEngine(HalfCheetah(), 4, impl="warp", **room)
    qpos, qvel = torch.zeros(4, 9), torch.zeros(4, 9)
    qpos[:, 1] = -0.3  # in the ground
    engine.set_state(qpos, qvel)
    with pytest.raises(RuntimeError, match=r"HalfCheetah-v5.*max_contacts beyond \d+ or max_constraints beyond \d+"):
        for _ in range(3):
            engine.step(torch.zeros(4, 6)).reward.sum().item()
