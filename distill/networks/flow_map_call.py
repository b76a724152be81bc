"""How a sampler calls the network of a flow map."""

from collections.abc import Mapping

from torch import Tensor, nn


def call(network: nn.Module, x_t: Tensor, t: Tensor, s: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """u(x_t, t, s, cond), the average velocity from t to s on the linear path, like x_t [B, ...]; t and s [B] in
    [0, 1]. The network is called with 1000 t and 1000 s, and with the class labels and guidance scales of `cond`.
    """
    given = {name: cond[name] for name in ("class_labels", "guidance_scale") if name in cond}
    return network(x_t, 1000 * t, 1000 * s, **given).sample.to(x_t.dtype)
