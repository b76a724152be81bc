"""Chooses how networks are divided among the processes, by the options in `launch`."""

from distill.spec.model import LaunchSpec
from distill.training.plain import PLAIN
from distill.training.sharding import Sharding
from distill.training.zero import Zero


def choose_sharding(launch: LaunchSpec) -> Sharding:
    """DeepSpeed if an option needs it (`zero_stage`, `divide_teacher`), else plain PyTorch."""
    if launch.zero_stage is None and not launch.divide_teacher:
        return PLAIN
    return Zero(launch.zero_stage, launch.divide_teacher, launch.zero_persistence_threshold, launch.offload_optimizer)
