"""The trained networks of a recipe: in full, or as adapters of the frozen weights that they share with the teacher."""

from collections.abc import Mapping

from distill.core.errors import InputError
from distill.core.text import suggest
from distill.networks.adapters import as_trained, require_peft
from distill.protocols import Adapter, Role, Trained
from distill.spec.rolespec import LoraSpec
from distill.students import native


def trained(roles: Mapping[str, Role], loras: Mapping[str, LoraSpec], seed: int, recipe: str) -> dict[str, Trained]:
    """The trained networks of a recipe, by name.

    A network with an entry in `loras` gets adapters, which depend on (seed, name). The others are trained in full.
    Raises InputError if an entry belongs to no trained network, or does not fit its network.

    roles: as the recipe returns them. If there are `loras`, networks that `StudentInit` has made share weights.
    """
    own = {name: role for name, role in roles.items() if isinstance(role, Trained | Adapter)}
    for name in loras:
        if name not in own:
            raise InputError(f"lora.{name}: recipe '{recipe}' trains no network '{name}'; {suggest(name, own)}")
        if isinstance(own[name], Adapter):
            raise InputError(f"lora.{name}: recipe '{recipe}' chooses the adapters of '{name}' itself; remove it")
    return {name: one(name, role, loras, seed) for name, role in own.items()}


def one(name: str, role: Trained | Adapter, loras: Mapping[str, LoraSpec], seed: int) -> Trained:
    """One of the trained networks of a recipe; see `trained`."""
    found = as_trained(name, role, seed)
    if name in loras:
        require_peft()
        from distill.students import lora_start  # imports PEFT, which takes seconds

        lora_start.adapt(name, found.module, loras[name], seed)
    elif loras:
        native.unshared(found.module)
    return found
