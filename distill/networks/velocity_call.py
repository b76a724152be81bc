"""How a sampler calls the network of a velocity field."""

from collections.abc import Mapping

from torch import Tensor, nn


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """v(x_t, t, cond) on the linear path, like x_t [B, ...]; t [B] in [0, 1]. The network is called with 1000 t, and
    with the class labels and guidance scales of `cond`.
    """
    given = {name: cond[name] for name in ("class_labels", "guidance_scale") if name in cond}
    return network(x_t, 1000 * t, **given).sample.to(x_t.dtype)
