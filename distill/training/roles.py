"""The networks of a recipe, with their optimizers, averages and target copies.

This is everything that training changes, so it is what a checkpoint contains besides `meta.json`.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distill.core.errors import InputError, RunError
from distill.core.text import suggest
from distill.flow.draws import Rows
from distill.networks.sharing import copy_of, has_base, is_shared, load_own, own_state
from distill.protocols import Copy, Frozen, Init, Nets, Recipe, Stateful
from distill.spec.model import TrainStage
from distill.students import adapting
from distill.training.blocks import EAGER, Blocks, compile_networks, recompute
from distill.training.checkpoint_files import (
    RECIPE_GROUP,
    Checkpoint,
    ema_group,
    network_group,
    optimizer_group,
)
from distill.training.ema import Ema
from distill.training.parts import TensorGroup, share_of
from distill.training.sharding import Sharding, Trainable
from distill.training.world import World


class Roles:
    """The networks of a recipe on their device, with the state of the checkpoint `found` if there is one.

    InputError if the recipe trains no network "student" or copies one that it does not train; ValueError if a trained
    network shares weights with another; RunError if the checkpoint does not fit.

    seed: for the initial weights of adapters.
    teacher: the teacher's network, if the recipe calls it.
    spare: networks whose weights are only copied, and that are not called; they are moved to the CPU.
    blocks: how the blocks of networks run. The teacher is compiled like the trained networks.
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
        blocks: Blocks = EAGER,
        spare: Sequence[nn.Module] = (),
    ) -> None:
        self.recipe, self.name = recipe, stage.recipe
        roles = recipe.networks(init)
        own = adapting.trained(roles, stage.lora, seed, self.name)
        for network in spare:
            network.to("cpu")
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
            frozen[name] = copy_of(trained[copy.of])
        self.networks = {**trained, **frozen}
        apart = [network for name, network in frozen.items() if sharding.divides_frozen and name not in self.copies]
        in_parts = [*apart, *(trained.values() if sharding.divides_trained else [])]  # divide() moves these
        for module in self.networks.values():
            if module not in in_parts:
                module.to(device)
        _refuse_sharing(self.networks, list(trained))
        for name in frozen:
            self.networks[name].requires_grad_(False).eval()
        # Of trained weights that will be divided, each rank reads its part of the checkpoint, later.
        divided = trained if found is not None and sharding.divides_trained else {}
        later = {
            name: {key for key, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
            for name, module in divided.items()
        }
        if found is not None and world.first:
            for name in (*trained, *self.copies):
                self._load_weights(found, name, without=later.get(name, set()))
        # All ranks take the weights of rank 0: the recipe may have initialised them differently on each rank. Those of
        # a base were read from the same files by all.
        for name, module in self.networks.items():
            kept = later.get(name, set())
            own_weights = (p for key, p in module.named_parameters() if key not in kept and not is_shared(p))
            world.share([*own_weights, *_buffers(module)])
        if blocks.recompute:
            recompute(self.name, list(trained.values()), offload=blocks.offload)
        if teacher is not None and sharding.divides_frozen:
            apart.append(teacher)
        elif teacher is not None:
            teacher.to(device)
        for network in apart:
            sharding.divide(network, device, world)
        self.trainables: dict[str, Trainable] = {
            name: sharding.wrap(name, role, stage.optimizer, world, device, slices) for name, role in own.items()
        }
        if blocks.compiled:
            compile_networks([*self.networks.values(), *([] if teacher is None else [teacher])])
        self.student = self.trainables["student"]
        self.ema = Ema(self.student.masters(), stage.ema_half_lives, stage.ema_lengths)
        self.world = world
        if found is not None:
            self._load_divided(found, list(divided))

    def view(self, active: str) -> tuple[Nets, Trainable]:
        """The networks for the loss of a turn of `active`, which is trainable; the others are frozen.

        InputError if the recipe does not train `active`.
        """
        if active not in self.trainables:
            raise InputError(
                f"recipe '{self.name}' gave a turn to '{active}', which it does not train; "
                f"{suggest(active, self.trainables)}"
            )
        for name, trainable in self.trainables.items():
            trainable.activate(name == active)
        return {**self.networks, active: self.trainables[active].callable}, self.trainables[active]

    def moved(self, name: str, progress: float) -> None:
        """Call after an optimizer step of `name`: updates its target copies. Buffers are taken from rank 0."""
        self.world.share(_buffers(self.networks[name]))
        for copy, role in self.copies.items():
            if role.of == name:
                self._follow(self.networks[copy], self.trainables[name], role.decay_at(progress))

    @torch.no_grad()
    def _follow(self, copy: nn.Module, trainable: Trainable, decay: float) -> None:
        with trainable.whole():
            ours, theirs = ([p for p in each.parameters() if not is_shared(p)] for each in (copy, trainable.module))
            torch._foreach_lerp_(ours, theirs, 1 - decay)
        for ours, theirs in zip(_buffers(copy), _buffers(trainable.module), strict=True):
            ours.copy_(theirs)

    def rest(self) -> None:
        """Freeze the trained networks and set them to eval() mode; the other networks are always in this state."""
        for trainable in self.trainables.values():
            trainable.activate(False)

    def close(self) -> None:
        """Free all memory, for later stages in the same process."""
        for trainable in self.trainables.values():
            trainable.close()
        self.trainables.clear()
        self.networks.clear()
        self.ema.averages.clear()
        gc.collect()

    def groups(self) -> Iterator[TensorGroup]:
        """The groups of a checkpoint, one at a time, with this rank's parts. Every rank must iterate over all.

        Tensors may be gathered from all ranks for this; their memory is freed when the caller drops them.
        """
        share = partial(share_of, rank=self.world.rank, size=self.world.size)
        for name, trainable in self.trainables.items():
            yield network_group(name), trainable.parts(trainable.masters())
            yield optimizer_group(name), trainable.state()
        for name in self.copies:
            yield network_group(name), share(own_state(self.networks[name]))
        for average, own in self.ema.averages.items():
            yield ema_group("student", average), self.student.parts(own)
        if isinstance(self.recipe, Stateful):
            yield RECIPE_GROUP, share(self.recipe.state())

    @property
    def moments(self) -> int | None:
        """Bytes of the whole state of optimizers other than AdamW; None for AdamW. All networks have the same one."""
        found = [trainable.optimizers.moments for trainable in self.trainables.values()]
        return None if None in found else sum(each or 0 for each in found)

    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: float32 weights, the optimizers' state, averages and copies."""
        moments = self.moments
        if moments is None:
            moments = 8 * sum(sum(trainable.sizes) for trainable in self.trainables.values())
        whole = {name: sum(each.sizes) + sum(each.still) for name, each in self.trainables.items()}
        copies = sum(whole[role.of] for role in self.copies.values())
        return moments + 4 * (sum(whole.values()) + len(self.ema.averages) * whole["student"] + copies)

    def live(self) -> dict[str, list[Tensor]]:
        """This rank's tensors by kind: the kinds of `Trainable.live`, "ema" and "copies"."""
        found = [trainable.live() for trainable in self.trainables.values()]
        kinds = {kind: [tensor for each in found for tensor in each[kind]] for kind in found[0]}
        copies = [p for name in self.copies for p in self.networks[name].parameters() if not is_shared(p)]
        return {**kinds, "ema": [t for own in self.ema.averages.values() for t in own.values()], "copies": copies}

    def _load_weights(self, found: Checkpoint, name: str, without: set[str]) -> None:
        with found.group(network_group(name)) as group:
            try:
                load_own(self.networks[name], group, without=without)
            except RuntimeError as error:
                raise RunError(f"checkpoint {found.path} does not fit recipe '{self.name}': {error}") from error

    def _load_divided(self, found: Checkpoint, networks: list[str]) -> None:
        """Load this rank's parts of optimizers, averages and the trained weights of `networks`."""
        for name in networks:
            with found.group(network_group(name)) as group:
                self.trainables[name].load_masters(group)
        for name, trainable in self.trainables.items():
            with found.group(optimizer_group(name)) as group:
                trainable.load_state(group)
        for average in self.ema.averages:
            with found.group(ema_group("student", average)) as group:
                self.ema.load(average, self.student.read(group))
        if isinstance(self.recipe, Stateful):
            saved, state = found.tensors(RECIPE_GROUP), self.recipe.state()
            if saved.keys() != state.keys():
                raise RunError(
                    f"checkpoint {found.path} has the recipe state {sorted(saved)}, "
                    f"but recipe '{self.name}' has {sorted(state)}"
                )
            for name, tensor in state.items():
                tensor.copy_(saved[name])


def _refuse_sharing(networks: Mapping[str, nn.Module], trained: list[str]) -> None:
    for name in trained:
        own = {each for each in networks[name].parameters() if not is_shared(each)}
        for other, network in networks.items():
            if other != name and own & set(network.parameters()):
                raise ValueError(f"networks '{name}' and '{other}' share weights; give one of them a copy")


def _buffers(module: nn.Module) -> list[Tensor]:
    """The buffers that may change: none if they are shared, like the weights of a base."""
    return [] if has_base(module) else list(module.buffers())
