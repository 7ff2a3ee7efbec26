"""The profile of the sampler: what its steps cost, and what they buy.

``config`` names the grid, ``availability`` says what of it can run, ``subject`` is the critic that is asked,
``schedules`` keeps chains of different lengths comparable, ``timing`` and ``quality`` measure, ``report`` and
``figure`` show, and ``profile`` is the order in which that happens.
"""

from nclql_torchrl.profiling.config import ProfileConfig, Setting
from nclql_torchrl.profiling.profile import NothingToMeasure, profile

__all__ = ["NothingToMeasure", "ProfileConfig", "Setting", "profile"]
