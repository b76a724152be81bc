"""What an update of a train stage costs: it is rehearsed on tensors of the same shapes that have no values.

So neither weights nor memory nor a GPU are needed, and whatever the recipe calls is counted: the networks that it
trains, its teacher with guidance, target copies, and derivatives.
"""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill.core.errors import InputError
from distill.execution.building import BuiltNetworks
from distill.flow.conditioning import ConditionTable
from distill.flow.draws import Rows, StepDraw
from distill.networks.quantised import held_bytes
from distill.networks.sharing import MARK, is_shared
from distill.protocols import Batch, Cond, Pairs, Recipe, Turn
from distill.spec.model import TrainStage
from distill.teachers import LoadedTeacher
from distill.teachers.quiet import quiet
from distill.training import blocks, optimizers
from distill.training.counting import TurnCounts, count_forward, count_turn
from distill.training.engine import StepContext

NORMS = (nn.LayerNorm, nn.GroupNorm)  # autocast computes them in float32 on GPUs, and in bf16 on CPUs
SAMPLES = 8  # in the smaller of two micro-batches that are counted; parts of it, like a quarter, are whole


@dataclass(frozen=True)
class Growth:
    """Bytes that grow with the number of samples."""

    fixed: int
    each: int
    """for each sample"""

    def of(self, samples: int) -> int:
        """The bytes for a number of samples."""
        return self.fixed + samples * self.each


@dataclass(frozen=True)
class UpdateCosts:
    """What one update of the student computes and keeps, together with the updates of other networks before it."""

    operations: float
    """floating-point operations for each sample of a batch"""
    activations: Growth
    """what autograd keeps, in the turn in which it is most; in bf16 also casts of the weights"""


@dataclass(frozen=True)
class TrainingCosts:
    """What a train stage costs, on whatever machine."""

    trained: Mapping[str, Sequence[int]]
    """elements of each trained parameter, by network"""
    still: Mapping[str, Sequence[int]]
    """elements of each other parameter of these networks that they do not share"""
    copies: Sequence[str]
    """for each target copy, the network that it copies"""
    averages: int
    """of the student's weights"""
    moments: int | None
    """bytes of the state of optimizers other than AdamW"""
    frozen: int
    """bytes of all other weights: of the teacher that is called, of a base that is shared, of frozen networks"""
    shared: bool
    """the trained networks share these weights, which are not divided then"""
    updates: Mapping[str, int]
    """updates of each trained network for one of the student"""
    teacher_calls: int
    """calls of the teacher's network in these updates, by each micro-batch"""
    steps: Mapping[bool, UpdateCosts]
    """under True, with recomputed activations; without that entry if no network can recompute them"""


def rehearse(
    found: BuiltNetworks,
    stage: TrainStage,
    needs: frozenset[str],
    states: int | None = None,
    recomputed: Sequence[bool] = (False, True),
) -> TrainingCosts:
    """Count an update of a train stage, as at the start of training.

    needs: of its recipe. states: the number of states of its pairs, if it needs them. recomputed: whether activations
    are recomputed, in each count. InputError if only True is given, and no network can recompute them.
    """
    own = {name: [p for p in each.parameters() if not is_shared(p)] for name, each in found.trained.items()}
    frozen = {p: None for each in (*found.frozen.values(), *_called(found.teacher)) for p in each.parameters()}
    moments = [optimizers.state_bytes(stage.optimizer, each) for each in found.trained.values()]
    turns = _turns(found.recipe)
    calls, steps = 0, dict[bool, UpdateCosts]()
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about fused kernels of the CPU
        for recompute in recomputed:
            try:
                steps[recompute], calls = _Rehearsal(found, stage, needs, states, recompute).count()
            except InputError:
                if not steps:
                    raise
    return TrainingCosts(
        trained={name: [p.numel() for p in each if p.requires_grad] for name, each in own.items()},
        still={name: [p.numel() for p in each if not p.requires_grad] for name, each in own.items()},
        copies=[*found.copies.values()],
        averages=len(stage.averages),
        moments=None if None in moments else sum(each or 0 for each in moments),
        frozen=held_bytes(frozen) + found.base,
        shared=any(is_shared(p) for each in found.trained.values() for p in each.parameters()),
        updates={name: sum(times for turn, times in turns if turn.network == name) for name in found.trained},
        teacher_calls=calls,
        steps=steps,
    )


def forward_operations(teacher: LoadedTeacher) -> int:
    """Floating-point operations of one call of a teacher's velocity for one sample, without guidance."""
    assert teacher.network is not None
    mode, cond = FakeTensorMode(allow_non_fake_inputs=True), teacher.conditioning.collate(_first())
    (field,) = _pretended([teacher.field], [teacher.network], teacher.given, mode)
    with mode, _AllPresent():
        x_t, given = torch.zeros(1, *teacher.shape), _like(cond, 1)
        return count_forward(lambda: field(x_t, torch.ones(1), given))


def in_float32_norms(networks: Sequence[nn.Module]) -> None:
    """Let the norms of networks compute in float32 on a CPU under autocast, as they do on GPUs."""
    for part in (part for network in networks for part in network.modules()):
        if isinstance(part, NORMS):
            part.register_forward_pre_hook(lambda _, inputs: tuple(each.float() for each in inputs))


class _Rehearsal:
    """An update of a train stage, with networks that have no values."""

    def __init__(
        self, found: BuiltNetworks, stage: TrainStage, needs: frozenset[str], states: int | None, recompute: bool
    ) -> None:
        self.stage, self.needs, self.states, self.shape = stage, needs, states, found.init.shape
        self.cond = found.init.conditioning.collate(_first())
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        teacher = _called(found.teacher)
        every = [*found.trained.values(), *found.frozen.values(), *teacher]
        given = [found.recipe, found.trained, found.frozen, teacher]
        self.recipe, self.trained, frozen, called = _pretended(given, every, found.init.conditioning, self.mode)
        self.wanted = {name: [p for p in each.parameters() if p.requires_grad] for name, each in self.trained.items()}
        for name, of in found.copies.items():
            (frozen[name],) = _pretended([self.trained[of]], [self.trained[of]], None, self.mode)
        if recompute:
            blocks.recompute(stage.recipe, [*self.trained.values()])
        for each in frozen.values():
            each.requires_grad_(False).eval()
        self.networks: dict[str, nn.Module] = {**self.trained, **frozen}
        self.calls = 0
        for each in called:
            each.register_forward_hook(self._called)
        if stage.precision == "bf16":
            in_float32_norms([*self.networks.values(), *called])

    def count(self) -> tuple[UpdateCosts, int]:
        """(costs, calls of the teacher's network)."""
        operations, largest = 0, Growth(0, 0)
        with self.mode, _AllPresent():
            few = self._count(SAMPLES)
            calls, many = self.calls, self._count(2 * SAMPLES)
        for (counts, times), (more, _) in zip(few, many, strict=True):
            each = (more.activations - counts.activations) // SAMPLES
            growth = Growth(counts.activations - SAMPLES * each, each)
            largest = max(largest, growth, key=lambda grown: grown.of(SAMPLES))
            operations += times * counts.operations
        return UpdateCosts(operations / SAMPLES, largest), calls

    def _count(self, samples: int) -> list[tuple[TurnCounts, int]]:
        """The counts of each turn that differs from the others, and how often it is taken."""
        batch, carry, found = self._batch(samples), dict[str, Tensor](), []
        for index, (turn, times) in enumerate(_turns(self.recipe)):
            self._activate(turn.network)
            context = StepContext(0, 0, _MeanDraw(0, 0, index, Rows(0, samples, samples)), carry)
            before = self.calls

            def loss(turn: Turn = turn, context: StepContext = context) -> Tensor:
                bf16 = self.stage.precision == "bf16"
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                    return turn.loss(self.networks, batch, context).total

            found.append((count_turn(loss), times))
            self.calls += (times - 1) * (self.calls - before)
            carry.update({name: each.detach() for name, each in carry.items()})
        return found

    def _called(self, *_: object) -> None:
        self.calls += 1

    def _activate(self, active: str) -> None:
        for name, network in self.trained.items():
            network.train(name == active)
            for each in self.wanted[name]:
                each.requires_grad_(name == active).grad = None

    def _batch(self, samples: int) -> Batch:
        data, cond = torch.zeros(samples, *self.shape), _like(self.cond, samples)
        pairs = None
        if "pairs" in self.needs:
            states = times = None
            if self.states is not None:
                states, times = torch.zeros(samples, self.states, *self.shape), torch.zeros(samples, self.states)
            pairs = Pairs(data.clone(), data.clone(), states, times)
        both = pairs is not None and "data" in self.needs
        return Batch(data if "data" in self.needs else None, pairs, cond, cond if both else {})


@dataclass(frozen=True)
class _MeanDraw(StepDraw):
    """Random numbers that have no values, except for integers, which are those in the middle."""

    def integer(self, name: str, below: int) -> int:
        return below // 2


def _turns(recipe: Recipe) -> list[tuple[Turn, int]]:
    """The turns until the student's first one, each that differs once, and how often it is taken."""
    found: list[tuple[Turn, int]] = []
    step = 0
    while not any(turn.network == "student" for turn, _ in found):
        for turn in recipe.turns(step, 0):
            same = next((n for n, (each, _) in enumerate(found) if each == turn), None)
            if same is None:
                found.append((turn, 1))
            else:
                found[same] = (turn, found[same][1] + 1)
        step += 1
    return found


def _pretended(
    things: list[Any], networks: Sequence[nn.Module], conditioning: object, mode: FakeTensorMode
) -> list[Any]:
    """Copies of things, in which the weights of these networks have no values and take no memory."""
    memo: dict[int, object] = {}
    if isinstance(conditioning, ConditionTable):
        memo[id(conditioning.rows)] = conditioning.rows
    with mode:
        for network in networks:
            for each in (*network.parameters(), *network.buffers()):
                if id(each) in memo:
                    continue
                new = torch.zeros(each.shape, dtype=each.dtype)
                if isinstance(each, nn.Parameter):
                    new = nn.Parameter(new, each.requires_grad)
                    if is_shared(each):
                        setattr(new, MARK, True)
                memo[id(each)] = new
    return deepcopy(things, memo)


def _called(teacher: LoadedTeacher | None) -> list[nn.Module]:
    """The networks of a teacher, and of its weak model if it is guided away from one."""
    given = [] if teacher is None else [teacher, teacher.weak]
    return [each.network for each in given if each is not None and each.network is not None]


def _first() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def _like(cond: Cond, samples: int) -> dict[str, Tensor]:
    """A condition of the same shape for a number of samples."""
    return {name: torch.ones(samples, *each.shape[1:], dtype=each.dtype) for name, each in cond.items()}


class _AllPresent(TorchDispatchMode):
    """Selects all positions where a mask without values selects some of them."""

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        if operation is torch.ops.aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
            return args[0].flatten(0, args[1][0].dim() - 1).clone()
        return operation(*args, **(kwargs or {}))
