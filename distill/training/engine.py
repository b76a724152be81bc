"""The training loop: runs the turns of a recipe on the batches of a source, for a given number of images.

Besides the tensors in the checkpoint, the state is only (seed, step). So a run that is killed and resumed ends with
bit-identical weights.

accelerate's `Accelerator` is not used: it supports only one DeepSpeed engine, while a recipe may train several
networks. And without a GPU, unless it is given the backend, each rank would train alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.core.versions import DRAWS
from distill.flow.draws import Rows, StepDraw, key
from distill.launch import environment
from distill.protocols import Draw, Init, Recipe, Source
from distill.runs.progress import Progress
from distill.runs.run_store import RunPaths, StagePaths, append_event
from distill.spec.model import TrainStage, stage_content
from distill.training import turn_logs
from distill.training.blocks import EAGER, Blocks
from distill.training.checkpoint import Checkpoints
from distill.training.loading import TimedSource
from distill.training.plain import PLAIN
from distill.training.precision import attention, autocast
from distill.training.roles import Roles
from distill.training.saving import Saved, Saver
from distill.training.sharding import Sharding
from distill.training.snapshots import Snapshots
from distill.training.turn_logs import TurnLogs
from distill.training.world import ALONE, World


@dataclass(frozen=True)
class StepContext:
    """The context that a loss is given. Implements `protocols.Context`."""

    step: int
    images: int
    draw: Draw
    carry: dict[str, Tensor]
    progress: float = 0.0


@dataclass(frozen=True)
class TrainResult:
    """The trained networks, and how many images and steps they were trained for."""

    roles: Roles
    images: int
    step: int


def train(
    recipe: Recipe,
    init: Init,
    source: Source,
    stage: TrainStage,
    *,
    seed: int,
    device: torch.device,
    micro_batch: int,
    paths: StagePaths,
    progress: Progress,
    stop: StopRequest,
    run: RunPaths | None = None,
    inputs: Mapping[str, str] | None = None,
    world: World = ALONE,
    sharding: Sharding = PLAIN,
    teacher: nn.Module | None = None,
    blocks: Blocks = EAGER,
    probe: Callable[[Roles], None] | None = None,
    spare: Sequence[nn.Module] = (),
    timed: TimedSource | None = None,
) -> TrainResult:
    """Train a recipe's networks for `stage.images` images, rounded up to whole batches.

    Training resumes from the newest checkpoint in `paths.checkpoints`, if there is one. After a signal noted by `stop`,
    the step is completed and saved, and `Stopped` is raised. InputError if the checkpoint was made with other settings.

    inputs: digests of the inputs (teacher, data, pairs), by name; they may not change when a run is resumed.
    run: where events are written; given to rank 0 only.
    world: the ranks that train together, each on its rows of a batch.
    sharding: how the networks are divided among the ranks.
    teacher: the teacher's network, if the recipe may call it. spare: see `Roles`.
    blocks: how the blocks of networks run.
    probe: called before each optimizer step, to measure memory.
    timed: the part of `source` that is waited for; None: all of it.
    """
    if timed is None:
        source = timed = TimedSource(source)
    batch_size = stage.batch_size
    slices = world.rows(batch_size, micro_batch)
    settings = {"draws": DRAWS, "seed": seed, "stage": stage_content(stage), "inputs": dict(inputs or {})}
    where = _environment(device, micro_batch, world, sharding)
    kept = None
    if stage.ema_snapshots is not None:
        kept = Snapshots(paths.snapshots, stage.ema_lengths, stage.ema_snapshots, batch_size, stage.images)
    checkpoints = Checkpoints(paths.checkpoints, stage.checkpoint, settings, where, progress.warn, kept)
    found = checkpoints.resume(world)
    with world.contact("at the start"):
        roles = Roles(
            recipe,
            init,
            stage,
            device,
            world,
            slices,
            seed=seed,
            found=found,
            sharding=sharding,
            teacher=teacher,
            blocks=blocks,
            spare=spare,
        )
    if probe is None:  # with a probe, the run is a temporary one
        world.alone("checking free space", partial(checkpoints.require_room, roles.checkpoint_bytes()))
        if world.first:
            checkpoints.warn_of_memory(roles.checkpoint_bytes() * environment.local_ranks(world.size) // world.size)
    for note in (trainable.optimizers.note for trainable in roles.trainables.values()):
        if world.first and note is not None:
            progress.note(note)
    step, images = (0, 0) if found is None else (found.meta.step, found.meta.images)
    if found is not None and run is not None:
        append_event(run, "resumed", stage=paths.root.name, step=step, images=images, **where)
    progress.start(images)
    with Saver(checkpoints, partial(_note, run, paths.root.name), world) as saver:
        step, images = _loop(
            recipe, roles, source, stage, saver,
            seed=seed, step=step, images=images, slices=slices, device=device,
            progress=progress, stop=stop, probe=probe, timed=timed,
        )  # fmt: skip
    roles.rest()
    return TrainResult(roles, images, step)


def _note(run: RunPaths | None, stage: str, saved: Saved) -> None:
    if run is not None:
        append_event(run, "saved", stage=stage, **asdict(saved))


def _loop(
    recipe: Recipe,
    roles: Roles,
    source: Source,
    stage: TrainStage,
    saver: Saver,
    *,
    seed: int,
    step: int,
    images: int,
    slices: list[Rows],
    device: torch.device,
    progress: Progress,
    stop: StopRequest,
    probe: Callable[[Roles], None] | None,
    timed: TimedSource,
) -> tuple[int, int]:
    """Train from `step`, after `images` images, to `stage.images`. Returns both at the end, where they are saved."""
    world, batch_size = roles.world, stage.batch_size
    unread: list[TurnLogs] = []  # of the step before
    while images < stage.images:
        logs = []
        try:
            turns = step_once(
                recipe, roles, source, stage, seed=seed, step=step, images=images, slices=slices, device=device,
                probe=probe,
            )  # fmt: skip
        finally:
            if unread:
                logs.append(turn_logs.read(unread, saver.last_good))  # an error here comes before what followed from it
        unread = turns
        step += 1
        if any(each.network == "student" for each in turns):
            images += batch_size
        ends = images >= stage.images or saver.checkpoints.due(images)
        if ends:
            logs.append(turn_logs.read(unread, saver.last_good))
            unread = []
        progress.waited(timed.take())
        progress.update(images, *logs)
        if saver.has_failed:  # what ends training is said first
            turn_logs.read(unread, lambda: saver.checkpoints.last or "none yet")
        saver.look()
        stopped, due = world.meet(f"after step {step}", stop.signal is not None, ends)
        if stopped or due:
            if unread:  # a signal has come, or another rank asks for it
                progress.update(images, turn_logs.read(unread, saver.last_good))
                unread = []
            saver.save(step, images, roles.groups())
        if stopped:
            saver.finish()
            stop.share(stopped)
            stop.raise_if_requested(str(saver.checkpoints.last))
    saver.finish()
    return step, images


def step_once(
    recipe: Recipe,
    roles: Roles,
    source: Source,
    stage: TrainStage,
    *,
    seed: int,
    step: int,
    images: int,
    slices: list[Rows],
    device: torch.device,
    probe: Callable[[Roles], None] | None = None,
) -> list[TurnLogs]:
    """One training step with all turns of the recipe. Returns what they log. InputError if there is no turn."""
    world = roles.world
    # Only dropout uses the global generator. It is seeded at every step, so that a resumed run drops the same.
    torch.manual_seed(key(seed, "dropout", step, world.rank))
    move = partial(Tensor.to, device=device, non_blocking=True)
    with world.contact(f"step {step}, reading its batch"):
        batches = [source.batch(step, rows).map(move) for rows in slices]
    carries: list[dict[str, Tensor]] = [{} for _ in slices]
    turns: list[TurnLogs] = []
    for index, turn in enumerate(recipe.turns(step, images)):
        place = f"step {step}, turn {index}, network '{turn.network}'"
        nets, trainable = roles.view(turn.network)
        losses = []
        world.meet(place)
        for rows, batch, carry in zip(slices, batches, carries, strict=True):
            context = StepContext(step, images, StepDraw(seed, step, index, rows), carry, images / stage.images)
            bf16 = stage.precision == "bf16"
            with world.contact(place), attention(device, bf16=bf16):
                with autocast(device, bf16=bf16):
                    loss = turn.loss(nets, batch, context)
                trainable.backward(loss.total / len(slices))
            carry.update({name: tensor.detach() for name, tensor in carry.items()})
            losses.append(loss)
        with world.contact(place):
            trainable.check_reach()
            norm = trainable.gradient_norm()
            turns.append(TurnLogs.of(turn.network, place, losses, norm, world))
            if probe is not None:
                probe(roles)
            trainable.step(stage.optimizer.learning_rate(images + stage.batch_size / 2, stage.images), norm)
            roles.moved(turn.network, images / stage.images)
    if not turns:
        raise InputError(
            f"recipe '{stage.recipe}': turns() yielded nothing at step {step}; it must yield at least one turn"
        )
    if any(each.network == "student" for each in turns):
        roles.ema.update(images, stage.batch_size)
    return turns


def device_name(device: torch.device) -> str:
    """The model of a GPU, or the vector instructions of the CPU (e.g. AVX2)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return str(name)


def _environment(device: torch.device, micro_batch: int, world: World, sharding: Sharding) -> dict[str, str | int]:
    where = {"device": device.type, "device_name": device_name(device), "threads": torch.get_num_threads()}
    ranks = {"procs": world.size, **sharding.record}
    return {"torch": str(torch.__version__), **where, "micro_batch": micro_batch, **ranks}
