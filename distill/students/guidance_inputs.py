"""Networks that take the guidance scale as an input: which of them can."""

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange
from distill.flow.conditioning import ConditionTable, WithGuidance, embeds_guidance, guidance_of, taking
from distill.protocols import Conditioning


def conditions(given: Conditioning, wanted: GuidanceRange | None, *, is_native: bool) -> Conditioning:
    """The conditions of networks that take the guidance scales of this range too; None: the conditions as given.

    given: of the network that a stage starts from. is_native: whether it is that of a latent-space pipeline.
    InputError if the networks cannot take a guidance scale.
    """
    if wanted is None or guidance_of(given) == wanted:
        return given
    text = "guidance_scale: [{:g}, {:g}]".format(*wanted)
    if isinstance(given, ConditionTable) and embeds_guidance(given):
        return taking(given, wanted)
    if is_native or isinstance(given, ConditionTable):
        raise InputError(
            f"{text} given, but only networks of pixels and vectors can get the guidance scale as an input, and those "
            "of latent-space pipelines only if they have it already, like FLUX.1 dev; give one number"
        )
    if given.count is None:
        raise InputError(f"{text} has no effect on networks without classes; remove it, or give labelled data")
    return WithGuidance(given, wanted)
