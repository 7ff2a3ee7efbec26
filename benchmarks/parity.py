"""Does this package compute the numbers of the authors' program?

Replays golden files: critics, sampled actions and successive updates, in float64 or float32, and prints the largest
absolute error of every quantity::

    python -m benchmarks.parity tests/data/*.npz
    python -m benchmarks.parity --dtype float32 --tolerance 1e-4 --only critic --only loss tests/data/default.npz

The exit status is 1 if an error exceeds the tolerance.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from nclql_torchrl import LangevinActor, NCLQLLoss, NCLQLUpdate, NoiseConditionedQNetwork, NoiseSchedule

CRITICS = ("q1", "q2")


class Golden:
    """A golden file: ``meta`` holds the hyper-parameters, ``tensor`` reads an entry as a tensor of the chosen type."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.arrays = np.load(path, allow_pickle=False)
        self.meta = json.loads(str(self.arrays["meta"]))
        self.dtype = dtype

    def tensor(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self.arrays[name])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def exact(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def network(self, prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}/"
        return {name[len(start) :]: self.tensor(name) for name in self.arrays.files if name.startswith(start)}


def build(golden: Golden) -> tuple[LangevinActor, NCLQLLoss, NCLQLUpdate]:
    """Actor, loss and update as the file's hyper-parameters say, at the file's initial parameters."""
    meta = golden.meta
    networks = []
    for critic in CRITICS:
        network = NoiseConditionedQNetwork(
            meta["obs_dim"], meta["act_dim"], tuple(meta["hidden_sizes"]), dtype=golden.dtype
        )
        network.load_state_dict(golden.network(f"init/{critic}"), strict=False)
        networks.append(ValueOperator(network, in_keys=["observation", "action", "level"]))
    actor = LangevinActor(
        networks,
        spec=Bounded(-1.0, 1.0, torch.Size([meta["act_dim"]]), dtype=golden.dtype),
        schedule=NoiseSchedule(meta["num_levels"], meta["sigma_max"], meta["sigma_min"], meta["step_lr"]),
        steps_per_level=meta["steps_per_level"],
        w=meta["w"],
        normalize_gradient=meta["normalize_gradient"],
        num_particles=meta["num_particles"],
    )
    loss = NCLQLLoss(actor, reward_scale=meta["reward_scale"], target_num_particles=meta["num_particles"])
    # As a tensor: TorchRL's estimators keep a number in float32, which a float64 replay would notice.
    loss.make_value_estimator(gamma=torch.tensor(meta["gamma"], dtype=golden.dtype))
    optimizer = torch.optim.Adam(loss.parameters(), lr=meta["lr"])
    update = NCLQLUpdate(loss, optimizer, SoftUpdate(loss, tau=meta["tau"]))
    # After SoftUpdate, whose constructor makes the target critics equal to the online ones.
    for index, critic in enumerate(CRITICS):
        for name, value in golden.network(f"init/target_{critic}").items():
            _parameter(loss.target_qvalue_network_params, name)[index].copy_(value)
    return actor, loss, update


def replay(path: Path, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Largest absolute error of every quantity in a golden file.

    Args:
        path: a file of the format of ``tests/data/default.npz``.
        dtype: type to compute in.

    Returns:
        Error by quantity: ``critic/...``, ``sampler/action``, ``updateK/...``.
    """
    golden = Golden(path, dtype)
    actor, loss, update = build(golden)
    errors: dict[str, float] = {}

    def compare(name: str, value: Tensor, expected: Tensor) -> None:
        errors[name] = (value.detach().to(expected.dtype) - expected).abs().max().item()

    observation, action, level = (golden.tensor(f"critic/{key}") for key in ("observation", "action", "level"))
    values = loss.ensemble_values(TensorDict({"observation": observation}, level.shape), action, level)
    for index, critic in enumerate(CRITICS):
        compare(f"critic/{critic}", values[index], golden.exact(f"critic/{critic}"))

    acting = _randomness(golden, "sampler/init", "sampler/noise")
    acting["observation"] = golden.tensor("sampler/observation")
    batch_size = [acting["observation"].shape[0]]
    compare("sampler/action", actor(TensorDict(acting, batch_size))["action"], golden.exact("sampler/action"))

    for number in range(golden.meta["updates"]):
        prefix = f"update{number}"
        batch = _batch(golden, prefix)
        # The intermediate quantities, from the same state that the update starts from.
        next_batch = batch["next"].clone()
        compare(f"{prefix}/next_action", actor(next_batch)["action"], golden.exact(f"{prefix}/next_action"))
        per_critic = _per_critic_losses(loss, batch)
        metrics = update(batch)
        compare(f"{prefix}/td_target", per_critic["td_target"], golden.exact(f"{prefix}/td_target"))
        for index, critic in enumerate(CRITICS):
            info = f"{prefix}/info"
            compare(f"{info}/{critic}", per_critic["values"][index].mean(), golden.exact(f"{info}/{critic}"))
            compare(f"{info}/td_{critic}_loss", per_critic["losses"][index], golden.exact(f"{info}/td_{critic}_loss"))
        expected = sum(golden.exact(f"{prefix}/info/td_{critic}_loss") for critic in CRITICS)
        compare(f"{prefix}/loss_qvalue", metrics["loss_qvalue"], torch.as_tensor(expected))
        expected = sum(golden.exact(f"{prefix}/info/qt{index + 1}_loss") for index in range(len(CRITICS)))
        compare(f"{prefix}/loss_noise", metrics["loss_noise"], torch.as_tensor(expected))
        for kind, params in (("", loss.qvalue_network_params), ("target_", loss.target_qvalue_network_params)):
            worst = 0.0
            for index, critic in enumerate(CRITICS):
                start = f"{prefix}/after/{kind}{critic}/"
                for name in (name for name in golden.arrays.files if name.startswith(start)):
                    value = _parameter(params, name[len(start) :])[index].detach().double()
                    worst = max(worst, (value - golden.exact(name)).abs().max().item())
            errors[f"{prefix}/{kind}parameters"] = worst
    return errors


def _parameter(params: TensorDict, name: str) -> Tensor:
    return params.get(("module", *name.split("."))).data


def _randomness(golden: Golden, start: str, noise: str) -> dict[str, Tensor]:
    """The file keeps particles, levels and steps first; a tensordict wants its batch first."""
    return {
        "initial_action": golden.tensor(start).movedim(1, 0),
        "langevin_noise": golden.tensor(noise).movedim(3, 0),
    }


def _batch(golden: Golden, prefix: str) -> TensorDict:
    terminated = golden.tensor(f"{prefix}/terminated").unsqueeze(-1)
    next_entries = {
        "observation": golden.tensor(f"{prefix}/next_observation"),
        "reward": golden.tensor(f"{prefix}/reward").unsqueeze(-1),
        "terminated": terminated,
        "done": terminated,
        **_randomness(golden, f"{prefix}/next_init", f"{prefix}/next_noise"),
    }
    entries = {
        "observation": golden.tensor(f"{prefix}/observation"),
        "action": golden.tensor(f"{prefix}/action"),
        "noise_level": golden.tensor(f"{prefix}/level"),
        "action_noise": golden.tensor(f"{prefix}/level_noise"),
        "next": next_entries,
    }
    return TensorDict(entries, batch_size=[terminated.shape[0]])


def _per_critic_losses(loss: NCLQLLoss, batch: TensorDict) -> dict[str, Tensor]:
    _, metadata = loss.qvalue_loss(batch)
    level = torch.full(batch.batch_size, loss.sampler.schedule.num_levels - 1)
    values = loss.ensemble_values(batch, batch["action"], level).detach()
    target = metadata["target_value"]
    return {"td_target": target, "values": values, "losses": (values - target).square().mean(-1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--tolerance", type=float, default=1e-10)
    parser.add_argument("--only", action="append", default=[], help="report quantities that contain this word")
    options = parser.parse_args(arguments)
    failed = False
    for path in options.files:
        if not path.is_file():
            parser.error(f"{path} is not a file; expected a golden .npz file such as tests/data/default.npz")
        print(path)
        try:
            errors = replay(path, getattr(torch, options.dtype))
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            parser.error(f"{path} is not of the format of tests/data/default.npz: {error}")
        for name, error in errors.items():
            if options.only and not any(word in name for word in options.only):
                continue
            # Written so that NaN fails too.
            bad = not error <= options.tolerance
            failed |= bad
            print(f"  {name:26s} {error:9.2e}{'  ABOVE ' + format(options.tolerance, 'g') if bad else ''}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
