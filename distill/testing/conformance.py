"""The checks that every recipe must pass. Each takes a `Subject` and a temporary folder, and raises AssertionError.

MINE = testing.Subject("./mine.py", base=HERE, closed_form=(zero_at_the_solution,))

@pytest.mark.parametrize("check", testing.CHECKS)
def test_mine(check, tmp_path):
    check(MINE, tmp_path)

Several checks use the same reference training of a subject, so create each subject only once.
"""

import ast
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from distill.exchange.student_card import StudentCard
from distill.flow.draws import Rows, StepDraw, sample_labels, sample_noise
from distill.networks.adapters import merged
from distill.protocols import Adapter, Copy, Frozen, Trained
from distill.spec import registry
from distill.spec.kinds import STUDENTS
from distill.students.exporting import export
from distill.students.loaded import load_student
from distill.students.sampling import by_sampler, fresh_noises, grid, num_fresh, own_grids
from distill.testing.pair import Numbers
from distill.testing.subject import CLASSES, SHAPE, Noise, Subject, bits, start
from distill.testing.training import BATCH, MOVES, train
from distill.training.checkpoint import latest
from distill.training.engine import StepContext
from distill.training.roles import Roles

Check = Callable[[Subject, Path], None]
LossesByStep = list[dict[str, float]]
RANDOM = {"rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal_", "uniform_"}
RANDOM |= {"random_", "exponential_", "bernoulli", "bernoulli_", "multinomial", "Generator", "manual_seed"}


def builds(subject: Subject, folder: Path) -> None:
    """The recipe can be built from its defaults. Its description is complete, and its config survives a round trip."""
    config, described = subject.config(), registry.describe(subject.recipe, subject.base)
    assert config.needs <= set(described.needs) <= set(registry.NEEDS), f"needs {config.needs}"
    assert all(option.meaning for option in described.options), "an option has no description"
    assert isinstance(config, BaseModel)
    written = config.model_dump(mode="json", exclude_unset=True)
    assert registry.configure(subject.recipe, subject.module, written, "again") == config
    recipe, init, _ = start(subject)
    assert recipe.sampler in STUDENTS[config.student].samplers, f"sampler {recipe.sampler} for a {config.student}"
    roles = recipe.networks(init)
    assert isinstance(roles.get("student"), Trained | Adapter), f"roles {roles}"
    assert all(isinstance(role, Trained | Adapter | Frozen | Copy) for role in roles.values())


def is_right(subject: Subject, folder: Path) -> None:
    """The recipe declares closed-form checks, and passes them."""
    assert subject.closed_form, f"{subject.recipe} has no closed-form check: add one to its Subject(closed_form=...)"
    for check in subject.closed_form:
        check()


@dataclass(frozen=True)
class Undisturbed:
    """The reference training: in fp32, without interruption. Several checks use it."""

    student: nn.Module
    steps: LossesByStep
    saved: dict[str, dict[str, bytes]]
    """its last checkpoint: group -> name -> bytes"""
    faults: list[str]
    """what is wrong with its gradients"""


class GradientProbe:
    """Checks before each optimizer step that only the network that is updated has gradients."""

    def __init__(self) -> None:
        self.moved: dict[str, set[str]] = {}
        self.faults: list[str] = []

    def __call__(self, roles: Roles) -> None:
        """Record which weights have a nonzero gradient, and gradients where none may be."""
        active = [
            name for name, each in roles.trainables.items() if any(p.requires_grad for p in each.module.parameters())
        ]
        if len(active) != 1:
            self.faults.append(f"active: {active}")
        for name, network in roles.networks.items():
            for key, parameter in network.named_parameters():
                if name not in active and parameter.grad is not None:
                    self.faults.append(f"the turn of {', '.join(active)} left a gradient in {name}.{key}")
                elif parameter.grad is not None and parameter.grad.any():
                    self.moved.setdefault(name, set()).add(key)

    def found(self, roles: Roles) -> list[str]:
        """All faults, including weights that never had a nonzero gradient."""
        faults = list(self.faults)
        for name, each in roles.trainables.items():
            trained = each.masters().keys() & dict(each.module.named_parameters()).keys()  # tied weights only once
            still = trained - self.moved.get(name, set()) - each.waiting
            if still:
                faults.append(f"gradients are zero for {len(still)} weights of {name}: {', '.join(sorted(still)[:5])}")
        return faults


@functools.cache
def undisturbed(subject: Subject) -> Undisturbed:
    """The reference training of a subject, run once and cached."""
    probe = GradientProbe()

    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        result, steps = train(subject, Path(folder), probe=probe)
        saved = _saved(Path(folder))
    faults, (recipe, init, _) = probe.found(result.roles), start(subject)
    role = recipe.networks(init)["student"]
    assert isinstance(role, Trained | Adapter)
    return Undisturbed(merged(role, result.roles.networks["student"]).eval(), steps, saved, faults)


def _saved(folder: Path) -> dict[str, dict[str, bytes]]:
    found = latest(folder / "checkpoints", print)
    assert found is not None
    return {group: bits(found.tensors(group)) for group in found.groups.split(", ")}


def learns(subject: Subject, folder: Path) -> None:
    """Losses in bf16 are close to those in fp32. Each update gives gradients only to its own network.

    Every trained weight has a nonzero gradient at some step.
    """
    exactly = undisturbed(subject)
    assert not exactly.faults, exactly.faults[0]
    probe = GradientProbe()
    result, rough = train(subject, folder / "bf16", precision="bf16", probe=probe)
    faults = probe.found(result.roles)
    assert not faults, f"in bf16: {faults[0]}"
    for step, other in zip(exactly.steps, rough, strict=True):
        for name, value in step.items():
            if not name.endswith("grad_norm"):
                assert abs(other[name] - value) <= 0.1 * abs(value), f"{name}: {value} in fp32, {other[name]} in bf16"


def draws_only_what_it_is_given(subject: Subject, folder: Path) -> None:
    """Random numbers come only from the context: losses do not depend on the global generator and do not advance it."""
    tree = ast.parse(registry.source(subject.recipe, subject.base).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in RANDOM, f"line {node.lineno}: .{node.attr}; use ctx.draw"
    recipe, init, _ = start(subject)
    roles = recipe.networks(init)
    own = {name: role.module.eval() for name, role in roles.items() if not isinstance(role, Copy)}
    nets = own | {name: own[role.of] for name, role in roles.items() if isinstance(role, Copy)}
    rows, losses = Rows(0, BATCH, BATCH), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        moves, step = 0, 0
        while moves < MOVES:
            carry: dict[str, Tensor] = {}
            for index, turn in enumerate(recipe.turns(step, step * BATCH)):
                context = StepContext(step, step * BATCH, StepDraw(0, step, index, rows), carry)
                losses.append(turn.loss(nets, Noise(BATCH, subject.times).batch(step, rows), context).total.item())
                moves += turn.network == "student"
            step += 1
        assert torch.equal(before, torch.get_rng_state()), "the recipe uses the global random generator"
    assert losses[: len(losses) // 2] == losses[len(losses) // 2 :], "the loss depends on the global generator"


def resumes(subject: Subject, folder: Path) -> None:
    """A training that is stopped at half and resumed ends with the same checkpoint, bitwise, as the reference."""
    train(subject, folder / "halves", stop_at=MOVES * BATCH // 2)
    whole, halves = undisturbed(subject).saved, _saved(folder / "halves")
    assert whole.keys() == halves.keys()
    for group, tensors in whole.items():
        assert tensors == halves[group], f"{group} differs after a resume"


def travels(subject: Subject, folder: Path) -> None:
    """After export and loading, the student makes the same samples, at each of its numbers of steps."""
    student, recipe = undisturbed(subject).student, start(subject)[0]
    sampler, own = recipe.sampler, own_grids(recipe, subject.times)
    t_grids = {steps: own[steps] for steps in subject.steps} if own else {}
    card = StudentCard(
        name="student", recipe=subject.recipe, spec_digest="", teacher_digest=None, kind=subject.config().student,
        sampler=sampler, t_grids=t_grids, num_classes=CLASSES, null_class=CLASSES, shape=SHAPE, weights="raw",
        images=MOVES * BATCH,
    )  # fmt: skip
    export(student, folder / "student", card)
    loaded = load_student(folder / "student", torch.device("cpu"))
    noise, cond = sample_noise(0, range(4), SHAPE), {"class_labels": sample_labels(range(4), CLASSES)}
    for steps in subject.steps:
        fresh = fresh_noises(0, range(4), SHAPE, num_fresh(sampler, steps))
        t_grid = grid(t_grids, steps)
        ours, theirs = (by_sampler(each, sampler, noise, t_grid, cond, fresh) for each in (student, loaded.student))
        assert torch.equal(ours, theirs), f"different samples at {steps} steps"


def splits(subject: Subject, folder: Path) -> None:
    """The losses with the smallest micro-batches (one sample, or one block of coupled samples) equal the reference."""
    _, single = train(subject, folder, micro_batch=registry.rows_together(subject.config()))
    _same_losses(undisturbed(subject).steps, single, "in one batch", "sample by sample")


def agrees(subject: Subject, numbers: Numbers) -> None:
    """The losses with two processes equal the reference. numbers: the result of `pair.train_together`."""
    _same_losses(undisturbed(subject).steps, numbers[subject.recipe], "alone", "together")


def _same_losses(ours: LossesByStep, theirs: LossesByStep, here: str, there: str) -> None:
    assert len(ours) == len(theirs)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if not name.endswith("grad_norm"):
                same = abs(other[name] - value) <= 1e-5 * max(1, abs(value))
                assert same, f"step {number}, {name}: {value} {here}, {other[name]} {there}"


CHECKS: tuple[Check, ...] = (builds, is_right, learns, draws_only_what_it_is_given, splits, resumes, travels)
