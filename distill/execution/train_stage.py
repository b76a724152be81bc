"""Runs a train stage: trains its networks, and exports its student."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from distill.core.atomic import write_json
from distill.core.errors import InputError, RunError
from distill.core.printing import say
from distill.core.text import one_line
from distill.data import DataSet, DataSource
from distill.data.encoded import codec_of, scaled_for
from distill.exchange import student_card
from distill.exchange.step_numbers import compact
from distill.exchange.student_card import LoraFacts, StudentCard
from distill.execution import batches, building, devices, preflight, sources
from distill.execution.work import Work
from distill.flow.fields import Counted
from distill.networks.adapters import merged
from distill.networks.quantised import is_quantised
from distill.networks.sharing import load_own
from distill.protocols import Adapter, Recipe, Source, Trained
from distill.runs import results
from distill.runs.progress import Progress
from distill.runs.run_store import RunPaths
from distill.spec import resolved
from distill.spec.guidancespec import FieldSettings
from distill.spec.model import CheckpointTeacher, RunSpec, TrainStage
from distill.students import adapting, loaded, sampling
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.teachers import LoadedTeacher
from distill.training import checkpoint, engine, loading, memory, micro_batch, snapshots
from distill.training.blocks import Blocks
from distill.training.choice import choose_sharding
from distill.training.roles import Roles

CPU = torch.device("cpu")
MEASURED = 2  # number of batches for which memory is counted


def _teacher_name(spec: RunSpec, stage: TrainStage) -> str:
    """The name of the teacher for the model card, without paths of this machine."""
    if stage.teacher is not None:
        return f"the student of stage {stage.teacher}"
    assert spec.teacher is not None
    if isinstance(spec.teacher, CheckpointTeacher):
        return Path(spec.teacher.path).name + spec.teacher.changes
    return f"{spec.teacher.kind} in closed form"


@dataclass(frozen=True)
class PreparedTraining:
    """Everything that a train stage needs: recipe, teacher, initial networks, data, and the card of its student."""

    recipe: Recipe
    teacher: LoadedTeacher | None
    init: StudentInit
    card: StudentCard
    times: list[float] | None  # of the states of its pairs, if they are the same for all
    data: DataSet | None  # real data of the batches
    inputs: dict[str, str]  # digests by name
    places: dict[str, str]  # where each input was read
    calls: Counted | None  # counts the recipe's calls of the teacher, if memory is measured
    called: nn.Module | None  # the teacher's network, if the recipe may call it

    @property
    def spare(self) -> list[nn.Module]:
        """The networks of which only the weights are copied, and that share none with the networks that are called."""
        if self.init.shares:
            return []
        kept = set() if self.called is None else {*self.called.parameters()}
        given = dict.fromkeys(each.network for each in (self.teacher, self.init.source) if each is not None)
        return [each for each in given if each is not None and kept.isdisjoint(each.parameters())]


def _training(work: Work, stage: TrainStage, device: torch.device) -> PreparedTraining:
    """Prepare a train stage. device: of the teacher and of networks that are copied from it."""
    asked = work.resolved.recipes[work.name]
    with work.inputs(device) as inputs:
        teacher, data = inputs.teacher, inputs.data
    if teacher is not None:
        teacher = teacher_on_linear_path(teacher)
    place = None if stage.init is None else work.run.student(stage.init)
    origin = teacher if place is None else loaded.load_student(place, device, work.teacher, teacher)
    calls = Counted(teacher.field) if teacher is not None and work.measure else None
    called = teacher if teacher is None or calls is None else replace(teacher, field=calls)
    called = called if "teacher" in asked.needs else None
    network = teacher.network if teacher is not None and building.calls_teacher(asked, teacher) else None
    recipe = asked.module.Recipe(asked.config, called)
    t_grids = preflight.t_grids(work.spec, work.name, recipe, inputs.times)
    init = building.start(stage, asked, teacher, origin, data, work.seed)
    card = StudentCard(
        name=work.name,
        recipe=stage.recipe,
        summary=one_line((asked.module.__doc__ or "").strip().split("\n")[0], student_card.LINE),
        spec_digest=work.spec.digest(),
        teacher_digest=None if teacher is None else teacher.digest,
        teacher="" if teacher is None else one_line(_teacher_name(work.spec, stage), student_card.LINE),
        data=work.spec.data.kind if "data" in asked.needs else "",
        license="" if teacher is None else teacher.license,
        kind=asked.config.student,
        sampler=recipe.sampler,
        t_grids=t_grids,
        trained_steps=compact(sampling.trained_steps(recipe, t_grids)),
        shape=init.shape,
        num_classes=init.num_classes if init.has_classes else None,
        null_class=init.null_class,
        unconditional=asked.unconditional,
        guidance_scale=_guidance(work.spec, stage, teacher) * asked.guidance_scale,
        guidance_range=init.guidance_range,
        guidance=_guidance_words(work.spec, stage, asked.guidance_scale),
        weights=stage.export,
        images=stage.images,
        lora={
            role: LoraFacts(rank=each.rank, alpha=each.scale * each.rank, targets=each.targets or [])
            for role, each in stage.lora.items()
        },
        base_digest=origin.base_digest if origin is not None and "student" in stage.lora else "",
    )
    data = None if data is None else scaled_for(data, init.codec)
    read = {"teacher": teacher, "init": origin, "data": data}
    digests = {name: each.digest for name, each in read.items() if each is not None}
    if teacher is not None and teacher.weak is not None:
        digests["weak"] = teacher.weak.digest
    if inputs.prompts is not None:
        digests["prompts"] = inputs.prompts.digest
    places = {"init": inputs.places.get("teacher", "") if place is None else str(place), **inputs.places}
    if data is not None and (digest := codec_of(data, init.codec).digest):
        digests["autoencoder"], places["autoencoder"] = digest, "of the teacher"
    return PreparedTraining(recipe, teacher, init, card, inputs.times, data, digests, places, calls, network)


def _guidance(spec: RunSpec, stage: TrainStage, teacher: LoadedTeacher | None) -> float:
    """Scales of teacher and pairs multiply: null + a (null + b (cond - null) - null) = null + a b (cond - null)."""
    if teacher is None:
        return 1.0
    settings = spec.guidance_of_pairs(stage)
    return teacher.guidance_scale * (1.0 if settings.form.is_auto else settings.guidance_scale)


def _guidance_words(spec: RunSpec, stage: TrainStage, scale: float) -> str:
    """How the teacher, or its pairs, were guided, if there is more to it than the scale."""
    return FieldSettings(scale, stage.guidance).more_words or spec.guidance_of_pairs(stage).more_words


def train(work: Work, stage: TrainStage) -> dict[str, object]:
    launch = work.spec.launch
    sharding = choose_sharding(launch)
    # Before it is divided, the teacher might not fit on the device; nor might the networks that are copied from it.
    divides = sharding.divides_frozen or sharding.divides_trained
    training = _training(work, stage, CPU if divides else work.device)
    probe = memory.Probe(sharding, work.world.size) if work.measure else None
    if work.world.first and training.times is not None:
        write_json(work.run.stage(work.name).times, training.times)  # for exports after the pairs are deleted
    sources.refuse_different(training.inputs, training.places, work.world)
    source, digests = batches.of_stage(
        work.run,
        stage,
        seed=work.seed,
        data=training.data,
        conditioning=training.init.conditioning,
        teacher_digest=training.card.teacher_digest,
        world=work.world,
    )
    codec = None if training.data is None else codec_of(training.data, training.init.codec)

    def encoded(read: Source) -> Source:
        return read if codec is None else batches.EncodedBatches.of(read, codec, work.device)

    size = _micro_batch(work, stage, training, encoded(source))
    share = work.world.rows(stage.batch_size, stage.batch_size // work.world.size)[0]
    pinned, workers = work.device.type == "cuda", devices.workers(launch, work.device)
    with (
        loading.opened(source, workers, share, data=training.data, pinned=pinned) as read,
        work.progress(stage.images, "images") as progress,
        probe.activations if probe else nullcontext(),
    ):
        timed = loading.TimedSource(read)
        result = engine.train(
            training.recipe,
            training.init,
            encoded(timed),
            stage,
            seed=work.seed,
            device=work.device,
            micro_batch=size,
            paths=work.run.stage(work.name),
            progress=progress,
            stop=work.stop,
            run=work.run if work.world.first else None,
            inputs={**training.inputs, **digests},
            world=work.world,
            sharding=sharding,
            teacher=training.called,
            spare=training.spare,
            timed=timed,
            blocks=_blocks(work),
            probe=None if probe is None else partial(_measure, probe, progress, stage),
        )
    if probe:
        rows = 0 if training.calls is None else training.calls.rows
        report = {**probe.report(work.world.rank), "teacher_rows": rows}
        write_json(work.run.stage(work.name).memory(work.world.rank), report)
    result.roles.close()
    # If the teacher is divided, it must be loaded again.
    whole = None if sharding.divides_frozen else training
    work.world.alone("export", partial(_publish, work, stage, whole))
    return {"images": result.images, "steps": result.step, "student": str(work.run.student(work.name))}


def _blocks(work: Work) -> Blocks:
    launch = work.spec.launch
    return Blocks(launch.activation_checkpointing, launch.activation_offload, work.spec.compile)


def _micro_batch(work: Work, stage: TrainStage, training: PreparedTraining, source: Source) -> int:
    """The micro-batch size: samples per forward pass of a process, the same on all ranks."""
    launch = work.spec.launch
    if launch.micro_batch != "auto":
        return launch.micro_batch or stage.batch_size // work.world.size
    asked = work.resolved.recipes[work.name]
    return micro_batch.largest(
        work.run.stage(work.name).micro_batch,
        lambda: asked.module.Recipe(asked.config, training.teacher if "teacher" in asked.needs else None),
        training.init,
        source,
        stage,
        rows_together=asked.rows_together,
        seed=work.seed,
        device=work.device,
        world=work.world,
        step=0 if training.data is None else DataSource(training.data, stage.batch_size, work.seed).largest_step,
        blocks=_blocks(work),
        spare=training.spare,
    )


def _measure(probe: memory.Probe, progress: Progress, stage: TrainStage, roles: Roles) -> None:
    """Count memory in the first batches only, so that later batches take as long as without measurement."""
    if progress.done < MEASURED * stage.batch_size:
        probe(roles)
    else:
        probe.activations.close()


def _publish(work: Work, stage: TrainStage, training: PreparedTraining | None) -> None:
    """Export the student, and add results to its card. training: None loads it again, since it is divided."""
    if training is not None:
        for each in (training.teacher, training.init.source):
            if each is not None and each.network is not None:
                each.network.to(CPU)
    _export(work, stage, training, stage.export, work.run.student(work.name), stage.images)
    for name in work.spec.stages:
        found = results.load_results(work.run.stage(name))
        if found is not None:  # evaluated earlier, before the student's folder was lost
            say_measured(work.run, found, work.name)


def export_checkpoint(
    paths: RunPaths,
    spec: RunSpec,
    name: str,
    weights: Literal["raw"] | float,
    folder: Path,
    step: int | None = None,
) -> None:
    """Export the student of a train stage from a checkpoint to `folder`. The run may be in progress.
    InputError if there is no such checkpoint.

    weights: "raw", one of the stage's `averages`, or any length below 1 if it keeps snapshots.
    step: of the checkpoint; None: the newest.
    """
    stage = spec.stages[name]
    assert isinstance(stage, TrainStage)
    if not _needs_snapshots(stage, weights) and not checkpoint.complete(paths.stage(name).checkpoints):
        raise InputError(f"stage '{name}' of run '{paths.name}' has no checkpoint yet; wait for the first one")
    work = Work(paths, resolved.of_run(spec, paths.root), name, CPU)
    _export(work, stage, None, weights, folder, step=step)


def _needs_snapshots(stage: TrainStage, weights: Literal["raw"] | float) -> bool:
    return weights != "raw" and weights < 1 and weights not in stage.ema_lengths


def _export(
    work: Work,
    stage: TrainStage,
    training: PreparedTraining | None,
    weights: Literal["raw"] | float,
    folder: Path,
    least: int = 0,
    step: int | None = None,
) -> None:
    """Build the student again (the trained one may be divided) and export it with the weights of a checkpoint.

    step: of the checkpoint; None: the newest. RunError if it has fewer than `least` images. training: None loads it.
    """
    training = training or _training(work, stage, CPU)
    card, asked = training.card, work.resolved.recipes[work.name]
    if training.teacher is not None and is_quantised(training.teacher.network):  # adapters fit the whole weights, too
        training = _training(work.with_whole_teacher, stage, CPU)
    recipe: Recipe = asked.module.Recipe(asked.config, training.teacher)
    role = recipe.networks(training.init)["student"]
    assert isinstance(role, Trained | Adapter)
    student = adapting.one("student", role, stage.lora, work.seed).module
    saved = work.run.stage(work.name)
    if isinstance(weights, float) and _needs_snapshots(stage, weights):
        names = {name for name, p in student.named_parameters(remove_duplicate=False) if p.requires_grad}
        tensors, images = snapshots.synthesize(saved.snapshots, weights, names)
    else:
        average = None if weights == "raw" else weights
        tensors, images = checkpoint.weights(saved.checkpoints, "student", average, step)
    if images < least:
        raise RunError(
            f"the last checkpoint of stage '{work.name}' cannot be read; resume with: "
            f"distill run {work.run.root} --resume"
        )
    load_own(student, tensors)
    del tensors  # the export needs memory
    card = card.model_copy(update={"weights": weights, "images": images})
    export(merged(role, student), folder, card, training.init.packaging, _proof(stage, training.init, student))


def _proof(stage: TrainStage, init: StudentInit, student: nn.Module) -> Callable[[Path], object] | None:
    """For a LoRA student: what loads its files again as others do."""
    if "student" not in stage.lora:
        return None
    from distill.students import lora_verify  # imports PEFT, which takes seconds

    say("loading the LoRA files again, in a process that cannot import distill")
    return partial(lora_verify.prove, student=student, init=init)


def say_measured(run: RunPaths, found: results.Results, student: str) -> None:
    """Add what an evaluation measured to the card of a student."""
    if measured := results.card_metrics(found, student):
        student_card.add_metrics(run.student(student), measured)
