"""Nothing that comes from a file or a command line is ever executed."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from nclql_torchrl.training import TrainConfig, train
from nclql_torchrl.training.config import ConfigError, load_config

ROOT = Path(__file__).parents[1]
SOURCES = [path for package in ("nclql_torchrl", "envs") for path in sorted((ROOT / package).rglob("*.py"))]
FORBIDDEN_CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.load", "yaml.load",
    "yaml.unsafe_load", "shelve.open", "joblib.load", "cloudpickle.load", "cloudpickle.loads", "hydra.utils.call",
    "hydra.utils.instantiate", "instantiate", "numpy.load", "np.load",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "pty"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_evaluates_or_asks_a_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"line {node.lineno}"
            assert not any(keyword.arg == "shell" for keyword in node.keywords), f"line {node.lineno}"
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & FORBIDDEN_MODULES, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert node.module not in FORBIDDEN_MODULES, f"line {node.lineno}"


@pytest.mark.parametrize(
    "content",
    [
        "seed: !!python/object/apply:os.system ['touch executed']",
        "run_dir: !!python/object/new:pathlib.Path ['executed']",
        "_target_: os.mkdir\npath: executed",
    ],
)
def test_a_malicious_config_yaml_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match="does not fit"):
        load_config(str(tmp_path / "config.yaml"))
    assert not (tmp_path / "executed").exists()


def test_values_are_not_given_to_a_shell(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    hostile = f"run;touch executed $(touch {tmp_path / 'executed'})"
    hostile = hostile.replace("/", "_")
    config = tiny_config("collector.total_frames=20", "logger.backend=csv")
    config.run_dir = str(tmp_path / hostile)
    train(config)
    assert (tmp_path / hostile / "summary.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [hostile]
