"""Validation of the cluster settings of a spec. Does not import torch, and does not call Slurm."""

import re
from collections.abc import Iterator

from distill.spec.layout import Layout
from distill.spec.model import LaunchSpec, PairsStage, RunSpec

TIME = re.compile(r"(?:(D)-)?(D)(?::(D))?(?::(D))?".replace("D", "[0-9]{1,9}"))


def limit_seconds(text: str) -> int | None:
    """Seconds of a time limit in Slurm's notation (MINUTES, M:SS, H:MM:SS, D-HH, D-HH:MM:SS); None if invalid."""
    match = TIME.fullmatch(text)
    if match is None:
        return None
    days, *numbers = match.groups()
    first, second, third = (None if number is None else int(number) for number in numbers)
    if days is not None:
        return 86400 * int(days) + 3600 * (first or 0) + 60 * (second or 0) + (third or 0)
    if second is None:
        return 60 * (first or 0)
    return 60 * (first or 0) + second if third is None else 3600 * (first or 0) + 60 * second + third


def mistakes(spec: RunSpec) -> Iterator[str]:
    """The mistakes in the cluster settings of a spec."""
    launch, slurm = spec.launch, spec.launch.slurm
    if slurm.time is not None:
        limit = limit_seconds(slurm.time)
        if limit is None:
            yield f"launch.slurm.time: '{slurm.time}' is not a time limit; valid: MINUTES, H:MM:SS, D-HH or D-HH:MM:SS"
        elif slurm.lead_seconds >= limit:
            yield (
                f"launch.slurm.lead_seconds: {slurm.lead_seconds} s must be less than the time limit of {limit} s "
                f"(time: {slurm.time}); increase time, or decrease lead_seconds"
            )
    yield from _processes(spec, launch)
    shards = {name: Layout.of(stage).files for name, stage in spec.stages.items() if isinstance(stage, PairsStage)}
    if slurm.pairs_jobs > 1 and not shards and spec.cache is None:
        yield f"launch.slurm.pairs_jobs: {slurm.pairs_jobs} given, but no stage makes pairs or a cache; remove it"
    if slurm.pairs_jobs > 1 and slurm.one_job:
        yield (
            f"launch.slurm.pairs_jobs: {slurm.pairs_jobs} given, but one_job runs all stages in one job; remove one of "
            "them"
        )
    # A smaller stage gets one job per shard. How many shards a cache has depends on the data.
    if shards and spec.cache is None and slurm.pairs_jobs > max(shards.values()):
        most = max(shards, key=lambda name: shards[name])
        yield (
            f"launch.slurm.pairs_jobs: {slurm.pairs_jobs} jobs given, but stage '{most}' has only {shards[most]} "
            f"shards; give fewer jobs, or a smaller stages.{most}.shard"
        )


def _processes(spec: RunSpec, launch: LaunchSpec) -> Iterator[str]:
    gpus = launch.slurm.gpus_per_node
    if gpus and gpus != launch.procs:
        yield (
            f"launch.slurm.gpus_per_node: {gpus} given, but launch.procs is {launch.procs}; each process uses one GPU, "
            "so make them equal"
        )
    if gpus and launch.device == "cpu":
        yield f"launch.slurm.gpus_per_node: {gpus} given, but launch.device=cpu does not use GPUs; remove one of them"
