"""How a sampler calls the network of a velocity with its acceleration."""

from collections.abc import Mapping

from torch import Tensor, nn


def call(network: nn.Module, x_t: Tensor, t: Tensor, v: Tensor | None, cond: Mapping[str, Tensor]) -> Tensor:
    """The acceleration a(x_t, t, v, cond), or without v the velocity, like x_t [B, ...]; t [B] in [0, 1]. The network
    is called with 1000 t.
    """
    return network(x_t, 1000 * t, class_labels=cond.get("class_labels"), velocity=v).sample.to(x_t.dtype)
