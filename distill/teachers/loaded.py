"""A teacher, loaded: a frozen velocity field and what must be known to use it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.codecs import PIXELS
from distill.flow.conditioning import ClassLabels, of_classes
from distill.flow.fields import Guided, Indexed
from distill.protocols import Codec, Cond, Conditioning, VelocityField


@dataclass(frozen=True)
class LoadedTeacher:
    """What every kind of teacher becomes. Fits `protocols.Teacher`."""

    field: VelocityField
    shape: tuple[int, ...]  # of one sample
    num_classes: int | None  # real classes; None: unconditional
    null_class: int | None  # class id of the unconditional call; None: guidance is refused
    digest: str  # sha256 over configuration and weights
    description: str  # one line for people
    network: nn.Module | None = None  # the ModelMixin behind a checkpoint; None: closed form
    exact_data: Callable[[int, Sequence[int]], Tensor] | None = None  # (seed, indices) -> exact samples
    guidance_scale: float = 1.0  # classifier-free guidance that the network was trained to contain; 1: none
    unconditional: bool = True  # whether the null class, if there is one, was trained
    license: str = ""  # its terms, which pass on to its students; empty: not known
    given: Conditioning | None = None  # None: class labels, or nothing
    codec: Codec = PIXELS
    layers: Sequence[str] = ()  # names of what `features` can give, in the order of the network

    @property
    def conditioning(self) -> Conditioning:
        return self.given or of_classes(self.num_classes, self.null_class)

    def null(self, cond: Cond) -> Cond:
        """The condition of the unconditional call, for as many rows as `cond` has."""
        if not self.conditioning.has_null:
            raise InputError(
                f"{self.description} has no unconditional call, so it cannot be guided; "
                "use guidance_scale: 1, or name the class id of its unconditional call in teacher.null_class"
            )
        return self.conditioning.null(cond)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[str]) -> list[Tensor]:
        """What these layers of the network give for x_t [B, ...] at t [B], [B, ...] each; gradients reach x_t."""
        unknown = [name for name in layers if name not in self.layers]
        if unknown or self.network is None:
            valid = ", ".join(self.layers) or "none, as it is known in closed form"
            raise InputError(f"{self.description} has no layer {unknown[0] if unknown else ''}; valid: {valid}")
        found: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found[name] = output if isinstance(output, Tensor) else output[0]

        hooks = [self.network.get_submodule(n).register_forward_hook(partial(keep, n)) for n in dict.fromkeys(layers)]
        try:
            self.field(x_t, t, cond)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[name] for name in layers]

    def indexed(self, guidance_scale: float) -> VelocityField:
        """`guided`, called with the index of each sample's condition: what solves the paths of pairs."""
        field = self.guided(guidance_scale)
        return field if self.given is None or isinstance(self.given, ClassLabels) else Indexed(field, self.given)

    def guided(self, guidance_scale: float) -> VelocityField:
        """The field under classifier-free guidance; 1 = the field itself."""
        if guidance_scale == 1:
            return self.field
        if not self.conditioning.has_null:
            self.null({})  # the same refusal, before any work
        if not self.unconditional:
            raise InputError(
                f"{self.description} was trained on its teacher alone and never on an unconditional velocity; "
                "use guidance_scale: 1, or guide a teacher trained on data"
            )
        return Guided(self.field, self.null, guidance_scale)
