"""The loop: turns of a recipe over batches of a source, until enough images were shown. It knows no objective.

(seed, step) is the whole position besides the tensors in the checkpoint, so a run that is killed and started again
ends in the same bits.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.checkpoint import Checkpoint, Checkpoints, Group, ema_group, network_group, optimizer_group
from distill.draws import Rows, StepDraw, key
from distill.ema import Ema
from distill.guard import InputError, RunError, suggest
from distill.progress import Progress
from distill.protocols import Batch, Draw, Init, Loss, Nets, Pairs, Recipe, Role, Source, Trained
from distill.spec import TrainStage
from distill.stop import StopRequest
from distill.store import RunPaths, StagePaths, append_event
from distill.trainable import Trainable, learning_rate


@dataclass(frozen=True)
class StepContext:
    """What a loss may know of the run. Fits `protocols.Context`."""

    step: int
    images: int
    draw: Draw
    carry: dict[str, Tensor]


@dataclass(frozen=True)
class TrainResult:
    """What training leaves: the networks, and state dicts of the averaged ones by network and half-life."""

    networks: dict[str, nn.Module]
    ema: dict[str, dict[float, dict[str, Tensor]]]
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
) -> TrainResult:
    """Train a recipe's networks for `stage.images` images (rounded up to whole batches), from the newest checkpoint
    in `paths.checkpoints` if there is one. A signal noted by `stop` saves after the step and raises `Stopped`.
    inputs: digests of what is trained on, by name; a resume with others is refused.
    """
    batch_size = stage.batch_size
    assert batch_size % micro_batch == 0, f"batch_size {batch_size} is not a multiple of micro_batch {micro_batch}"
    slices = [Rows(start, start + micro_batch, batch_size) for start in range(0, batch_size, micro_batch)]
    state = _State(recipe.networks(init), stage, device)
    settings = {"seed": seed, "stage": stage.model_dump(mode="json"), "inputs": dict(inputs or {})}
    environment = _environment(device, micro_batch)
    checkpoints = Checkpoints(paths.checkpoints, stage.checkpoint, settings, environment, progress.warn)
    found = checkpoints.resume()
    step, images = (0, 0) if found is None else (found.meta.step, found.meta.images)
    if found is not None:
        state.load(found)
        if run is not None:
            append_event(run, "resumed", stage=paths.root.name, step=step, images=images, **environment)
    progress.start(images)

    while images < stage.images:
        torch.manual_seed(key(seed, "dropout", step))  # the global generator serves dropout alone, and resumes with it
        batches = [_to(source.batch(step, rows), device) for rows in slices]
        carries: list[dict[str, Tensor]] = [{} for _ in slices]
        moved: dict[str, dict[str, float]] = {}
        for index, turn in enumerate(recipe.turns(step, images)):
            nets, trainable = state.view(turn.network)
            losses = []
            for rows, batch, carry in zip(slices, batches, carries, strict=True):
                context = StepContext(step, images, StepDraw(seed, step, index, rows), carry)
                with torch.autocast(device.type, torch.bfloat16, enabled=stage.precision == "bf16"):
                    loss = turn.loss(nets, batch, context)
                trainable.backward(loss.total / len(slices))
                carry.update({name: tensor.detach() for name, tensor in carry.items()})
                losses.append(loss)
            norm = trainable.gradient_norm()
            logs = _means(losses, norm)
            if not (math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"])):
                raise RunError(
                    f"step {step}, turn {index}, network '{turn.network}': loss {logs['loss']}, gradient norm "
                    f"{logs['grad_norm']}; its weights did not move; last good checkpoint: "
                    f"{checkpoints.last or 'none yet'}"
                )
            trainable.step(learning_rate(stage.optimizer, images + batch_size / 2, stage.images), norm)
            moved[turn.network] = logs
        if not moved:
            raise InputError(f"recipe '{stage.recipe}' gave no turn at step {step}; turns() must yield at least one")
        step += 1
        if "student" in moved:
            state.ema.update(images, batch_size)
            images += batch_size
        progress.update(images, _named(moved))
        if stop.signal is not None or checkpoints.due(images) or images >= stage.images:
            began = time.monotonic()
            saved = checkpoints.save(step, images, state.groups())
            if run is not None:
                seconds = round(time.monotonic() - began, 3)
                append_event(run, "saved", stage=paths.root.name, step=step, images=images, seconds=seconds)
            stop.raise_if_requested(str(saved))
    state.rest()
    return TrainResult(state.networks, {"student": state.averages()}, images, step)


class _State:
    """The networks on their device, their optimizers, the averages of the student: all that moves."""

    def __init__(self, roles: Mapping[str, Role], stage: TrainStage, device: torch.device) -> None:
        trained = [name for name, role in roles.items() if isinstance(role, Trained)]
        if "student" not in trained:
            raise InputError(f"recipe '{stage.recipe}' trains no network named 'student'; it trains {trained}")
        self.networks = {name: role.module.to(device) for name, role in roles.items()}
        _refuse_sharing(self.networks, trained)
        self.trainables = {name: Trainable(name, self.networks[name], stage.optimizer) for name in trained}
        self.recipe = stage.recipe
        for name, network in self.networks.items():
            if name not in self.trainables:
                network.requires_grad_(False).eval()
        self.ema = Ema(self.trainables["student"].masters(), stage.ema_half_lives)

    def view(self, active: str) -> tuple[Nets, Trainable]:
        """The networks as the loss of `active`'s turn sees them: it trains, the others are raw and frozen."""
        if active not in self.trainables:
            raise InputError(
                f"recipe '{self.recipe}' gave a turn to '{active}', which it does not train; "
                f"{suggest(active, self.trainables)}"
            )
        for name, trainable in self.trainables.items():
            trainable.activate(name == active)
        return self.networks, self.trainables[active]

    def rest(self) -> None:
        """Every network in eval() and frozen."""
        for trainable in self.trainables.values():
            trainable.activate(False)

    def averages(self) -> dict[float, dict[str, Tensor]]:
        """Whole state dicts of the student: averaged weights, and buffers as they are."""
        raw = self.networks["student"].state_dict()
        return {half_life: {**raw, **average} for half_life, average in self.ema.averages.items()}

    def groups(self) -> Iterator[Group]:
        """What a checkpoint holds, one group at a time."""
        for name, trainable in self.trainables.items():
            yield network_group(name), self.networks[name].state_dict()
            yield optimizer_group(name), trainable.state()
        for half_life, average in self.averages().items():
            yield ema_group("student", half_life), average

    def load(self, found: Checkpoint) -> None:
        for name, trainable in self.trainables.items():
            try:
                self.networks[name].load_state_dict(found.tensors(network_group(name)))
            except RuntimeError as error:
                raise RunError(
                    f"checkpoint {found.path} does not fit recipe '{self.recipe}': {' '.join(str(error).split())}"
                ) from error
            trainable.load_state(found.tensors(optimizer_group(name)))
        for half_life in self.ema.averages:
            self.ema.load(half_life, found.tensors(ema_group("student", half_life)))


def _refuse_sharing(networks: Mapping[str, nn.Module], trained: list[str]) -> None:
    for name in trained:
        own = set(networks[name].parameters())
        for other, network in networks.items():
            if other != name and own & set(network.parameters()):
                raise ValueError(f"networks '{name}' and '{other}' share weights; give one of them a copy")


def _environment(device: torch.device, micro_batch: int) -> dict[str, str | int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    where = {"device": device.type, "device_name": name, "threads": torch.get_num_threads()}
    return {"torch": str(torch.__version__), **where, "micro_batch": micro_batch}


def _to(batch: Batch, device: torch.device) -> Batch:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    pairs = None if batch.pairs is None else Pairs(noise=move(batch.pairs.noise), data=move(batch.pairs.data))
    cond = {name: move(tensor) for name, tensor in batch.cond.items()}
    return Batch(data=None if batch.data is None else move(batch.data), pairs=pairs, cond=cond)


def _means(losses: list[Loss], norm: Tensor) -> dict[str, float]:
    """Means over the micro-batches, in one transfer from the device."""
    sums: dict[str, Tensor] = {}
    for loss in losses:
        for name, value in {"loss": loss.total, **loss.logs}.items():
            share = value.detach().float().to(norm.device) / len(losses)
            sums[name] = sums[name] + share if name in sums else share
    sums["grad_norm"] = norm.detach().float()
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def _named(moved: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Numbers of the step by name: the student's plain, the others' as NETWORK.NAME."""
    out = {}
    for network, logs in moved.items():
        prefix = "" if network == "student" else f"{network}."
        out.update({f"{prefix}{name}": value for name, value in logs.items()})
    return out
