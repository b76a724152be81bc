"""Networks that take the guidance scale as an input."""

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange
from distill.flow.conditioning import guidance_of, taking
from distill.protocols import Conditioning


def conditions(given: Conditioning, wanted: GuidanceRange | None) -> Conditioning:
    """The conditions of networks that take the guidance scales of this range too; None: the conditions as given.

    given: of the network that a stage starts from. InputError if it is unconditional.
    """
    if wanted is None or guidance_of(given) == wanted:
        return given
    if given.count is None:
        text = "guidance_scale: [{:g}, {:g}]".format(*wanted)
        raise InputError(
            f"{text} has no effect on networks without classes or prompts; remove it, or give labelled data"
        )
    return taking(given, wanted)
