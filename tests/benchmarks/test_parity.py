"""The numbers of the authors' program, replayed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.parity import main, replay

REPOSITORY = Path(__file__).parents[2]
GOLDEN = sorted((REPOSITORY / "tests" / "data").glob("*.npz"))


def test_float64_is_exact_from_the_command_line() -> None:
    assert len(GOLDEN) == 3
    command = [sys.executable, "-m", "benchmarks.parity", *map(str, GOLDEN)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("sampler/action") == result.stdout.count("update2/target_parameters") == 3


def test_float64_in_process() -> None:
    for path in GOLDEN:
        errors = replay(path)
        quantities = {name.split("/")[0] for name in errors}
        assert quantities == {"critic", "sampler", "update0", "update1", "update2"}
        assert max(errors.values()) <= 1e-10, path


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_float32_critics_and_losses(path: Path) -> None:
    assert main(["--dtype", "float32", "--tolerance", "1e-4", "--only", "critic", "--only", "loss", str(path)]) == 0


@pytest.mark.parametrize(
    "name", ["critic/q1", "sampler/action", "update0/next_action", "update2/after/q2/trunk.1.bias"]
)
def test_a_wrong_number_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    arrays = dict(np.load(GOLDEN[0], allow_pickle=False))
    arrays[name] = arrays[name].copy()
    arrays[name].flat[0] += 1e-9
    np.savez(tmp_path / "changed.npz", **arrays)
    assert main([str(tmp_path / "changed.npz")]) == 1
    assert "ABOVE 1e-10" in capsys.readouterr().out


def test_a_file_of_another_kind_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name, words in (("missing", "is not a file"), ("text", "not of the format"), ("other", "not of the format")):
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path / f"{name}.npz")])
        # Not 1, which says that numbers differ.
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
