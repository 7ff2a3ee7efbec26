"""Models load in silence, unless there is something that their user can mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mujoco as _mujoco
import pytest

from envs import make_env
from envs.models import silent_deprecations
from envs.tasks.swimmer import Swimmer

mujoco: Any = _mujoco


@pytest.mark.parametrize("engine", ["mujoco", "gymnasium"])
def test_making_half_cheetahs_prints_nothing(
    engine: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_env("HalfCheetah-v5", 2, engine=engine).reset()
    assert "settotalmass" not in capfd.readouterr().err
    assert not (tmp_path / "MUJOCO_LOG.TXT").exists()


def test_other_warnings_come_and_the_users_handler_stays(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    mujoco.set_mju_user_warning(heard.append)
    try:
        with silent_deprecations():
            mujoco.get_mju_user_warning()("the attribute is deprecated")
            mujoco.get_mju_user_warning()("the tendon is wound the wrong way")
        assert heard == ["the tendon is wound the wrong way"]
        mujoco.get_mju_user_warning()("after")
        assert heard[-1] == "after"
    finally:
        mujoco.set_mju_user_warning(None)
    with silent_deprecations():
        mujoco.get_mju_user_warning()("nobody listens")
    assert capfd.readouterr().err == "WARNING: nobody listens\n"


@pytest.mark.parametrize("engine", ["mujoco", "mjx", "gymnasium"])
@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ('ctrllimited="true" ctrlrange="-1 1"', "", "0, 1"),
        (
            'ctrlrange="-1 1" gear="150.0" joint="motor2_rot"',
            'ctrlrange="0 0" joint="motor2_rot" name="tail"',
            "'tail'",
        ),
    ],
)
def test_actuators_without_a_control_range_are_named(
    tmp_path: Path, engine: str, old: str, new: str, names: str
) -> None:
    path, text = tmp_path / "swimmer.xml", Swimmer().xml_path.read_text()
    assert old in text
    path.write_text(text.replace(old, new).replace('ctrllimited="true" ctrlrange="0 0"', ""))
    with pytest.raises(ValueError, match=rf'actuators {names} have no control range.*ctrlrange="LOW HIGH"'):
        make_env("Swimmer-v5", 1, engine=engine, xml_file=str(path))
