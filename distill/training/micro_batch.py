"""`launch.micro_batch: auto`: finds the largest micro-batch for which every rank has enough memory.

A candidate is tested by real training steps, until each trained network has had two turns: a network gets the state of
its optimizer in its first turn, so the memory of its second one is that of training. Each rank tests it on networks of
its own and calls no collective, so that no rank waits for one that runs out of memory. Then all ranks exchange their
results. If one of them failed, all continue with a smaller candidate.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import nn

from distill.core import records
from distill.core.atomic import write_json
from distill.core.errors import InputError
from distill.flow.draws import Rows
from distill.protocols import Batch, Init, Recipe, Source
from distill.spec.model import TrainStage
from distill.training import engine
from distill.training.blocks import Blocks
from distill.training.plain import PLAIN
from distill.training.roles import Roles
from distill.training.world import ALONE, World

TURNS = 2  # of each trained network; the optimizer's moments are allocated in the first
MOST_STEPS = 100  # for recipes in which a network rarely has a turn


class ChosenMicroBatch(BaseModel):
    """The file in which a stage keeps the chosen micro-batch, so that a resumed run computes the same values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    micro_batch: PositiveInt
    share: PositiveInt
    """samples of a global batch per process, when it was chosen"""


CHOSEN: records.Schema[ChosenMicroBatch] = records.Schema(ChosenMicroBatch)
REMEDY = "delete this file, so that a new micro-batch is chosen"


@dataclass(frozen=True)
class OneBatch:
    """The batch of one step of `source`, at every step. Implements `protocols.Source`."""

    source: Source
    at: int

    def batch(self, step: int, rows: Rows) -> Batch:
        return self.source.batch(self.at, rows)


def candidates(share: int, rows_together: int) -> list[int]:
    """The micro-batch sizes to try, largest first.

    Each divides `share` (a rank's samples of a batch), is a multiple of `rows_together`, and is at most half of the
    one before.
    """
    found: list[int] = []
    for size in range(share, 0, -1):
        if share % size == 0 and size % rows_together == 0 and (not found or 2 * size <= found[-1]):
            found.append(size)
    return found


def choose(path: Path, share: int, rows_together: int, world: World, fits: Callable[[int], bool]) -> int:
    """The micro-batch size for all ranks. All ranks must call this.

    It is read from the file `path` if it was chosen for the same share. Otherwise it is the first candidate that fits,
    and is written there. InputError if none fits.

    fits: tells whether this rank can train with a candidate; it must call no collective.
    """
    kept = torch.tensor([world.alone("reading the micro-batch", lambda: _kept(path, share, rows_together)) or 0])
    with world.contact("sharing the micro-batch"):
        world.share([kept])
    if found := int(kept):
        return found
    left = candidates(share, rows_together)
    least = left[-1]

    def smaller() -> int:
        left.pop(0)
        return left[0] if left else 0

    @find_executable_batch_size(starting_batch_size=left[0], reduce_batch_size_fn=smaller)
    def tried(size: int) -> int:
        failed = not fits(size)
        if world.meet(f"after trying micro-batches of {size}", failed)[0]:
            if size == least:
                raise InputError(
                    "launch.micro_batch=auto: there is not enough memory for the smallest possible micro-batch size, "
                    f"{size}; use a smaller network, fewer ema_half_lives, launch.activation_checkpointing, or "
                    "launch.zero_stage with a number as launch.micro_batch"
                )
            raise torch.OutOfMemoryError(f"micro-batches of {size}: a rank is out of memory.")
        return size

    found = tried()
    world.alone(
        "keeping the micro-batch",
        lambda: write_json(path, ChosenMicroBatch(micro_batch=found, share=share).model_dump()),
    )
    return found


def largest(
    path: Path,
    recipe: Callable[[], Recipe],
    init: Init,
    source: Source,
    stage: TrainStage,
    *,
    rows_together: int,
    seed: int,
    device: torch.device,
    world: World,
    blocks: Blocks,
    spare: Sequence[nn.Module] = (),
    step: int = 0,
) -> int:
    """The largest micro-batch with which this stage can be trained; see `choose`. All ranks must call this.

    step: the step of `source` whose batch needs the most memory. spare: see `Roles`.
    """
    same = OneBatch(source, step)
    tried = partial(fits, recipe, init, same, stage, seed=seed, device=device, world=world, blocks=blocks, spare=spare)
    return choose(path, stage.batch_size // world.size, rows_together, world, tried)


def _kept(path: Path, share: int, rows_together: int) -> int | None:
    try:
        found = records.load(path, CHOSEN, REMEDY)
    except FileNotFoundError:
        return None
    if found.share == share and (found.micro_batch not in candidates(share, rows_together)):
        raise InputError(
            f"{path} cannot be used: micro_batch: {found.micro_batch} given; valid: "
            f"{', '.join(map(str, candidates(share, rows_together)))}; {REMEDY}"
        )
    return found.micro_batch if found.share == share else None


def fits(
    recipe: Callable[[], Recipe],
    init: Init,
    source: Source,
    stage: TrainStage,
    size: int,
    *,
    seed: int,
    device: torch.device,
    world: World,
    blocks: Blocks,
    spare: Sequence[nn.Module] = (),
) -> bool:
    """Whether this rank has enough memory for micro-batches of `size`. Makes a few training steps and discards them."""
    slices = world.rows(stage.batch_size, size)
    try:
        _try(recipe(), init, source, stage, slices, seed, device, blocks=blocks, spare=spare)
        enough = True
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        enough = False
    clear_device_cache(garbage_collection=True)  # nothing refers to the networks any more
    return enough


def _try(
    recipe: Recipe,
    init: Init,
    source: Source,
    stage: TrainStage,
    slices: list[Rows],
    seed: int,
    device: torch.device,
    *,
    blocks: Blocks,
    spare: Sequence[nn.Module],
) -> None:
    roles = Roles(
        recipe, init, stage, device, ALONE, slices,
        seed=seed, found=None, sharding=PLAIN, teacher=None, blocks=blocks, spare=spare,
    )  # fmt: skip
    images, had = 0, Counter[str]()
    for step in range(MOST_STEPS):
        turns = engine.step_once(
            recipe, roles, source, stage, seed=seed, step=step, images=images, slices=slices, device=device
        )
        moved = {each.network for each in turns}
        had.update(moved)
        images += stage.batch_size if "student" in moved else 0
        if images >= stage.images or all(had[name] >= TURNS for name in roles.trainables):
            break
    roles.close()
