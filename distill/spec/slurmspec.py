"""What jobs request from Slurm."""

from typing import Annotated

from pydantic import Field

from distill.core.field_types import MAX_PARTS, FrozenModel, Line, Processes, ScriptLine


class SlurmSpec(FrozenModel):
    """What `distill submit` requests from Slurm for each job; `distill run` ignores it."""

    partition: Line | None = None
    """Slurm partition; null: that of the site file, else Slurm's default"""
    account: Line | None = None
    """Slurm account; null: that of the site file, else Slurm's default"""
    qos: Line | None = None
    """Slurm QOS; null: that of the site file, else Slurm's default"""
    time: Line | None = None
    """time limit of a job: H:MM:SS, D-HH, D-HH:MM:SS, or minutes in quotes; null: the partition's default"""
    gpus_per_node: Annotated[int, Field(ge=0, le=4096)] = 0
    """GPUs per node, one for each process; 0: the processes use CPUs"""
    cpus_per_task: Processes | None = None
    """CPUs per process, for its threads and workers; null: Slurm's default"""
    memory: Line | None = None
    """memory per node, like 120G; null: Slurm's default"""
    options: list[ScriptLine] = []
    """further options for sbatch, like --constraint=h100"""
    lead_seconds: Annotated[int, Field(gt=0, le=604_800)] = 180
    """how many seconds before the time limit the processes are told to save and exit"""
    max_crashes: Annotated[int, Field(ge=0, le=1000)] = 3
    """how often a crashed job is queued again; after a second crash at the same step, it is not"""
    pairs_jobs: Annotated[int, Field(gt=0, le=MAX_PARTS)] = 1
    """number of array jobs that divide the shards of each pairs or cache stage, at most one job per shard of pairs"""
    one_job: bool = False
    """run all stages in one job, one after the other, instead of one job per stage"""
    container: Line | None = None
    """container image, as written for the site's container runtime; null: none"""
