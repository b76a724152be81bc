"""A network with an optimizer of its own: backward, gradient norm, clipped step, and its state by parameter name.

The one place that will know of DeepSpeed; the engine sees only these methods.
"""

import math

import torch
from torch import Tensor, nn

from distill.guard import RunError
from distill.spec import OptimizerSpec


def learning_rate(spec: OptimizerSpec, images: float, total: int) -> float:
    """lr after `images` of `total` images: linear warm-up, then constant, or cosine or linear decay to 0 at `total`.

    The engine asks at the middle of a step, so neither the first nor the last step is spent at lr 0.
    """
    if images < spec.warmup_images:
        return spec.lr * images / spec.warmup_images
    rest = total - spec.warmup_images
    progress = min(1.0, (images - spec.warmup_images) / rest) if rest > 0 else 0.0
    match spec.decay:
        case "constant":
            return spec.lr
        case "linear":
            return spec.lr * (1 - progress)
        case "cosine":
            return spec.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Trainable:
    """`module` under AdamW, on its device in fp32. Parameters that come with requires_grad=False stay as they are."""

    def __init__(self, name: str, module: nn.Module, spec: OptimizerSpec) -> None:
        self.name, self.module, self.spec = name, module, spec
        # Tied weights keep both names: a state dict holds both, and an average must not lack one.
        named = dict(module.named_parameters(remove_duplicate=False))
        self._parameters = {key: p for key, p in named.items() if p.requires_grad}
        if not self._parameters:
            raise ValueError(f"network '{name}' is Trained, but none of its parameters has requires_grad=True")
        for key, p in self._parameters.items():
            if p.dtype != torch.float32:
                raise ValueError(f"network '{name}': {key} is {p.dtype}; trained weights are torch.float32")
        self._unique = list(dict.fromkeys(self._parameters.values()))
        device = self._unique[0].device
        fused = device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.AdamW(
            self._unique,
            lr=spec.lr,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=fused,
            foreach=None if fused else True,
        )
        self._active: bool | None = None

    def activate(self, active: bool) -> None:
        """Active: in train() with gradients; else in eval() and frozen, though gradients may flow through it."""
        if active == self._active:
            return
        self._active = active
        self.module.train(active)
        for parameter in self._unique:
            parameter.requires_grad_(active)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (already divided by the number of micro-batches)."""
        loss.backward()

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradients, before clipping."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._unique if p.grad is not None])

    def step(self, lr: float, norm: Tensor) -> None:
        """Clip, move the weights, clear the gradients."""
        if self.spec.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._unique, self.spec.clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights that move, by name."""
        return dict(self._parameters)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as "PARAMETER/MOMENT"; a parameter that never had a gradient has none."""
        moments = self._optimizer.state
        return {f"{key}/{name}": t for key, p in self._parameters.items() for name, t in moments.get(p, {}).items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        moments: dict[int, dict[str, Tensor]] = {}
        number = {p: i for i, p in enumerate(self._unique)}
        for full, tensor in tensors.items():
            key, _, name = full.rpartition("/")
            if key not in self._parameters:
                raise RunError(f"the optimizer state of network '{self.name}' has '{key}', the network does not")
            moments.setdefault(number[self._parameters[key]], {})[name] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
