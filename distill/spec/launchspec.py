"""Validation of how a spec is executed: by which processes, and how they divide a training."""

from collections.abc import Iterator

from distill.spec.model import CheckpointTeacher, MlpSpec, RunSpec, TrainStage

# Why an optimizer cannot be divided as ZeRO does.
WHOLE = {
    "adamw_8bit": "its moments are quantised in blocks, which ZeRO would cut elsewhere on another number of processes",
    "muon": "a step needs whole weight matrices, which ZeRO divides",
}


def mistakes(spec: RunSpec) -> Iterator[str]:
    """The mistakes in the launch section of a spec, without those in launch.slurm (see `clusterspec`)."""
    launch = spec.launch
    trains = [stage for stage in spec.stages.values() if isinstance(stage, TrainStage)]
    if launch.zero_persistence_threshold is not None and launch.zero_stage != 3 and not launch.divide_teacher:
        yield (
            "launch.zero_persistence_threshold: has no effect, because no weights are sharded; remove it, or set "
            "zero_stage: 3"
        )
    for name, stage in spec.stages.items() if launch.zero_stage is not None else ():
        if isinstance(stage, TrainStage) and (why := WHOLE.get(stage.optimizer.name)):
            yield (
                f"stages.{name}.optimizer.name: {stage.optimizer.name} does not work with launch.zero_stage: {why}; "
                "use adamw, or zero_stage: null"
            )
    if launch.offload_optimizer and not launch.zero_stage:
        yield "launch.offload_optimizer: works only with zero_stage 1 to 3; remove it, or set zero_stage"
    if launch.divide_teacher and launch.world_size == 1:
        yield "launch.divide_teacher: has no effect with one process; remove it, or increase procs"
    if launch.divide_teacher and isinstance(spec.teacher, CheckpointTeacher) and spec.teacher.quantize:
        yield "launch.divide_teacher: does not work with teacher.quantize; remove one of them"
    if launch.activation_checkpointing and trains and all(isinstance(each.network, MlpSpec) for each in trains):
        yield "launch.activation_checkpointing: has no effect for an mlp; remove it"
    if launch.activation_offload and not launch.activation_checkpointing:
        yield "launch.activation_offload: has no effect without activation_checkpointing; set that, too, or remove it"
    if launch.micro_batch == "auto" and launch.zero_stage is not None:
        yield "launch.micro_batch: auto does not work with launch.zero_stage; give a number, or zero_stage: null"
    elif launch.micro_batch == "auto" and launch.divide_teacher:
        yield "launch.micro_batch: auto does not work with launch.divide_teacher; give a number"
    shared = [f"stages.{n}.lora" for n, each in spec.stages.items() if isinstance(each, TrainStage) and each.lora]
    if shared and launch.zero_stage == 3:
        yield (
            f"launch.zero_stage: 3 divides the weights of each network, but with {', '.join(shared)} they share those "
            "of the teacher; use 0, 1 or 2"
        )
    if shared and launch.divide_teacher:
        yield (
            f"launch.divide_teacher: with {', '.join(shared)}, the networks share the weights of the teacher, which "
            "are not divided then; remove it"
        )
    given = launch.model_dump(exclude_defaults=True)
    if "collective_minutes" in given and launch.world_size == 1:
        yield "launch.collective_minutes: has no effect with one process; remove it"
    for name in ("workers", "zero_stage", "activation_checkpointing", "divide_teacher", "micro_batch"):
        if name in given and not trains:
            yield f"launch.{name}: {given[name]} given, but it applies to training, and no stage trains; remove it"
