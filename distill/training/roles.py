"""The networks of a recipe in their roles: optimizers, averages, target copies. All that training changes, and so all
that a checkpoint contains besides the position.
"""

import gc
from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from distill.core.errors import InputError, RunError
from distill.core.text import suggest
from distill.flow.draws import Rows
from distill.networks.adapters import as_trained
from distill.protocols import Adapter, Copy, Frozen, Init, Nets, Recipe, Stateful, Trained
from distill.spec.model import TrainStage
from distill.training.checkpoint import RECIPE_GROUP, Checkpoint, Group, ema_group, network_group, optimizer_group
from distill.training.ema import Ema
from distill.training.sharding import Sharding, Trainable
from distill.training.world import World


class Roles:
    """What a recipe trains and calls, on its device, as the checkpoint `found` left it.

    seed: of the first weights of adapters.
    teacher: a network that the recipe calls besides those of its roles.
    recompute: compute activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        recipe: Recipe,
        init: Init,
        stage: TrainStage,
        device: torch.device,
        world: World,
        slices: list[Rows],
        *,
        seed: int,
        found: Checkpoint | None,
        sharding: Sharding,
        teacher: nn.Module | None,
        recompute: bool,
    ) -> None:
        self.recipe, self.name = recipe, stage.recipe
        roles = recipe.networks(init)
        own = {
            name: as_trained(name, role, seed) for name, role in roles.items() if isinstance(role, Trained | Adapter)
        }
        trained = {name: role.module for name, role in own.items()}
        frozen = {name: role.module for name, role in roles.items() if isinstance(role, Frozen)}
        self.copies = {name: role for name, role in roles.items() if isinstance(role, Copy)}
        if "student" not in trained:
            raise InputError(f"recipe '{self.name}' trains no network named 'student'; it trains {list(trained)}")
        for name, copy in self.copies.items():
            if copy.of not in trained:
                raise InputError(
                    f"recipe '{self.name}': '{name}' is a copy of '{copy.of}', which it does not train; "
                    f"{suggest(copy.of, trained)}"
                )
            frozen[name] = deepcopy(trained[copy.of])
        self.networks = {**trained, **frozen}
        apart = [network for name, network in frozen.items() if sharding.divides_frozen and name not in self.copies]
        in_parts = [*apart, *(trained.values() if sharding.divides_trained else [])]  # moved to the device when divided
        for module in self.networks.values():
            if module not in in_parts:
                module.to(device)
        _refuse_sharing(self.networks, list(trained))
        for name in frozen:
            self.networks[name].requires_grad_(False).eval()
        if found is not None:
            self._load_weights(found, [*trained, *self.copies])  # before they are divided
        for module in (
            self.networks.values()
        ):  # all ranks take rank 0's weights: a recipe may have drawn its own differently on each
            world.share([*module.parameters(), *module.buffers()])
        if recompute:
            _recompute(self.name, list(trained.values()))
        if sharding.divides_frozen and teacher is not None:
            apart.append(teacher)
        for network in apart:
            sharding.divide(network, device, world)
        self.trainables: dict[str, Trainable] = {
            name: sharding.wrap(name, role, stage.optimizer, world, device, slices) for name, role in own.items()
        }
        self.student = self.trainables["student"]
        self.ema = Ema(self.student.masters(), stage.ema_half_lives)
        self.world = world
        if found is not None:
            self._load_optimizers(found)

    def view(self, active: str) -> tuple[Nets, Trainable]:
        """The networks as the loss of `active`'s turn sees them: it trains, the others are raw and frozen."""
        if active not in self.trainables:
            raise InputError(
                f"recipe '{self.name}' gave a turn to '{active}', which it does not train; "
                f"{suggest(active, self.trainables)}"
            )
        for name, trainable in self.trainables.items():
            trainable.activate(name == active)
        return {**self.networks, active: self.trainables[active].callable}, self.trainables[active]

    def moved(self, name: str) -> None:
        """`name` has made a step of its optimizer: its copies follow. Buffers are what they are on rank 0."""
        self.world.share(self.networks[name].buffers())
        for copy, role in self.copies.items():
            if role.of == name:
                self._follow(self.networks[copy], self.trainables[name], role.decay)

    @torch.no_grad()
    def _follow(self, copy: nn.Module, trainable: Trainable, decay: float) -> None:
        with trainable.whole():
            torch._foreach_lerp_(list(copy.parameters()), list(trainable.module.parameters()), 1 - decay)
        for ours, theirs in zip(copy.buffers(), trainable.module.buffers(), strict=True):
            ours.copy_(theirs)

    def rest(self) -> None:
        """Every network in eval() and frozen."""
        for trainable in self.trainables.values():
            trainable.activate(False)

    def close(self) -> None:
        """Let go of all memory, for the stages that follow in this process."""
        for trainable in self.trainables.values():
            trainable.close()
        self.trainables.clear()
        self.networks.clear()
        self.ema.averages.clear()
        gc.collect()

    def averages(self) -> dict[float, dict[str, Tensor]]:
        """Whole state dicts of the student: averaged weights, and buffers as they are; on rank 0 at least."""
        return {half_life: self._average(own) for half_life, own in self.ema.averages.items()}

    def _average(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**self.student.unmoved(), **self.student.gather(own)}

    def groups(self) -> Iterator[Group]:
        """What a checkpoint holds, one group at a time; every rank must take all of them, rank 0 gets them whole.

        A group that was gathered for this is kept in memory as long as the caller holds it.
        """
        for name, trainable in self.trainables.items():
            yield network_group(name), trainable.weights()
            yield optimizer_group(name), trainable.state()
        for name in self.copies:
            yield network_group(name), self.networks[name].state_dict()
        for half_life, own in self.ema.averages.items():
            yield ema_group("student", half_life), self._average(own)
        if isinstance(self.recipe, Stateful):
            yield RECIPE_GROUP, self.recipe.state()

    def checkpoint_bytes(self) -> int:
        """About what the tensors of `groups` take: float32 weights, two moments each, averages and copies."""
        moments = 2 * sum(sum(trainable.sizes) for trainable in self.trainables.values())
        whole = {name: sum(each.sizes) + sum(each.still) for name, each in self.trainables.items()}
        copies = sum(whole[role.of] for role in self.copies.values())
        return 4 * (moments + sum(whole.values()) + len(self.ema.averages) * whole["student"] + copies)

    def live(self) -> dict[str, list[Tensor]]:
        """The tensors of this rank by kind: those of `Trainable.live`, and "ema", "copies"."""
        found = [trainable.live() for trainable in self.trainables.values()]
        kinds = {kind: [tensor for each in found for tensor in each[kind]] for kind in found[0]}
        copies = [p for name in self.copies for p in self.networks[name].parameters()]
        return {**kinds, "ema": [t for own in self.ema.averages.values() for t in own.values()], "copies": copies}

    def _load_weights(self, found: Checkpoint, names: list[str]) -> None:
        for name in names:
            try:
                self.networks[name].load_state_dict(found.tensors(network_group(name)))
            except RuntimeError as error:
                raise RunError(
                    f"checkpoint {found.path} does not fit recipe '{self.name}': {' '.join(str(error).split())}"
                ) from error

    def _load_optimizers(self, found: Checkpoint) -> None:
        for name, trainable in self.trainables.items():
            trainable.load_state(found.tensors(optimizer_group(name)))
        for half_life in self.ema.averages:
            self.ema.load(half_life, self.student.scatter(found.tensors(ema_group("student", half_life))))
        if isinstance(self.recipe, Stateful):
            saved, state = found.tensors(RECIPE_GROUP), self.recipe.state()
            if saved.keys() != state.keys():
                raise RunError(
                    f"checkpoint {found.path} has the recipe state {sorted(saved)}, "
                    f"recipe '{self.name}' has {sorted(state)}"
                )
            for name, tensor in state.items():
                tensor.copy_(saved[name])


def _refuse_sharing(networks: Mapping[str, nn.Module], trained: list[str]) -> None:
    for name in trained:
        own = set(networks[name].parameters())
        for other, network in networks.items():
            if other != name and own & set(network.parameters()):
                raise ValueError(f"networks '{name}' and '{other}' share weights; give one of them a copy")


def _recompute(recipe: str, networks: list[nn.Module]) -> None:
    """Have the blocks of these networks computed again in the backward pass instead of kept in memory."""
    parts = [m for network in networks for m in network.modules() if isinstance(m, ModelMixin)]
    able = [part for part in parts if part._supports_gradient_checkpointing]
    if not able:
        raise InputError(
            f"launch.activation_checkpointing: no network that recipe '{recipe}' trains has blocks that can be "
            "recomputed, so this has no effect; remove it"
        )
    for part in able:
        part.enable_gradient_checkpointing()
