"""NC-LQL (arXiv 2602.07873) for TorchRL: soft policies sampled from a critic by annealed Langevin dynamics."""

from nclql_torchrl.actor import LangevinActor
from nclql_torchrl.critic import NoiseConditionedQNetwork
from nclql_torchrl.kernels import (
    MetropolisAdjustedLangevin,
    PreconditionedLangevin,
    UnadjustedLangevin,
    UnderdampedLangevin,
    langevin_step,
)
from nclql_torchrl.langevin import LangevinSampler, langevin_chain
from nclql_torchrl.loss import NCLQLLoss
from nclql_torchrl.schedule import NoiseSchedule
from nclql_torchrl.temperature import AutomaticTemperature
from nclql_torchrl.update import NCLQLUpdate

__all__ = [
    "AutomaticTemperature",
    "LangevinActor",
    "LangevinSampler",
    "MetropolisAdjustedLangevin",
    "NCLQLLoss",
    "NCLQLUpdate",
    "NoiseConditionedQNetwork",
    "NoiseSchedule",
    "PreconditionedLangevin",
    "UnadjustedLangevin",
    "UnderdampedLangevin",
    "langevin_chain",
    "langevin_step",
]
