"""The agent is moved back along its track only where neither physics nor the task can tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from envs.engines.mjx_track import may_be_recentred
from envs.tasks import GYMNASIUM_TASKS
from envs.tasks.ant import Ant
from tests.envs.ball import WALL, Ball, write_model

HILLS = '<asset><hfield name="hills" nrow="3" ncol="3" elevation="0 1 0 1 0 1 0 1 0" size="9 9 1 1"/></asset>'
X = '<joint name="x" type="slide" axis="1 0 0"/>'


@pytest.mark.parametrize("task", GYMNASIUM_TASKS, ids=lambda task: task.name)
def test_gymnasiums_tasks_are_where_they_have_a_track(task: Any) -> None:
    model = task().load_model()
    assert may_be_recentred(task(), model) is bool(task.track)
    if task.track:
        observing = task(exclude_current_positions_from_observation=False)
        assert not may_be_recentred(observing, model)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", True),
        ("<worldbody>", '<worldbody><geom type="plane" size="1 1 1" euler="90 0 0" pos="0 2 0"/>', True),
        ("<worldbody>", '<worldbody><body><geom type="plane" size="1 1 1" zaxis="0 -1 1"/></body>', True),
        (X, '<joint name="x" type="slide" axis="1 0 0" damping="1" frictionloss="1"/>', True),
        ("<worldbody>", f"<worldbody>{WALL}", False),
        ("<worldbody>", f"<worldbody><body>{WALL}</body>", False),
        ("<worldbody>", f"<worldbody><body><freejoint/>{WALL}</body>", False),
        ("<worldbody>", '<worldbody><geom type="plane" size="1 1 1" euler="0 1 0"/>', False),
        ("<worldbody>", f'{HILLS}<worldbody><geom type="hfield" hfield="hills"/>', False),
        ('axis="1 0 0"', 'axis="1 0 0.01"', False),
        (X, f'<joint type="hinge" axis="0 0 1"/>{X}', False),
        (X, '<joint name="x" type="hinge" axis="0 1 0"/>', False),
        (X, '<joint name="x" type="slide" axis="1 0 0" range="-9 9" limited="true"/>', False),
        (X, '<joint name="x" type="slide" axis="1 0 0" stiffness="1"/>', False),
        ("</actuator>", '<position joint="x" ctrlrange="-1 1"/></actuator>', False),
        ("</actuator>", '</actuator><equality><joint joint1="x" joint2="z"/></equality>', False),
        ("</actuator>", '</actuator><tendon><fixed><joint joint="x" coef="1"/></fixed></tendon>', False),
    ],
)
def test_what_is_not_the_same_everywhere_forbids_it(tmp_path: Path, old: str, new: str, expected: bool) -> None:
    task = Ball(xml_file=write_model(tmp_path, old, new))
    assert may_be_recentred(task, task.load_model()) is expected


def test_a_task_that_looks_where_it_said_it_would_not_forbids_it() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Homing(Ant):
        def reward(self, xp: Any, model: Any, physics: Any, action: Any, velocity: Any) -> Any:
            return -physics.xpos[..., 1, 0]

    assert not may_be_recentred(Homing(), Homing().load_model())
