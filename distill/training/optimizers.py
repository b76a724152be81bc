"""The optimizers that a spec names (`adamw`, `adamw_8bit` and `muon`), and their parameter groups.

Each optimizer keeps its state in tensors and numbers by parameter, so that a checkpoint contains all of it.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.protocols import Trained
from distill.spec.model import OptimizerSpec

LEAST_8BIT = 4096  # elements; bitsandbytes keeps the moments of smaller parameters in float32
BLOCK_8BIT = 256  # elements that share a scale
FLOAT = 4  # bytes of a float32
MOMENTUM = 0.95  # of muon, unless the spec says otherwise
FACTOR = "lr_factor"  # key in a parameter group: the factor of the stage's learning rate

Groups = Sequence[dict[str, Any]]  # parameter groups, as torch.optim takes them


def parameter_groups(network: str, role: Trained, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer, one for each learning rate, with the factor of the stage's learning rate.

    ValueError if a pattern of `role.groups` matches no trained parameter, or two patterns match the same one.
    """
    chosen: dict[nn.Parameter, str] = {}  # a tied parameter has several names but one factor
    for pattern in role.groups:
        matched = {p for key, p in parameters.items() if fnmatchcase(key, pattern)}
        if not matched:
            raise ValueError(f"network '{network}': groups names '{pattern}', but no trained parameter has this name")
        for key, p in parameters.items():
            if p in matched and chosen.setdefault(p, pattern) != pattern:
                raise ValueError(
                    f"network '{network}': groups names '{key}' by two patterns, '{chosen[p]}' and '{pattern}'; give "
                    "each parameter at most one"
                )
    found: dict[float, list[nn.Parameter]] = {}
    for p in dict.fromkeys(parameters.values()):
        found.setdefault(role.lr * role.groups.get(chosen.get(p, ""), 1.0), []).append(p)
    return [{"params": group, FACTOR: factor} for factor, group in found.items()]


class Optimizers:
    """The optimizers of a network, which together train all parameters of `groups`.

    each: one, or with muon up to two. note: what to tell the user about them, if anything. moments: see `state_bytes`.
    InputError if a package is missing.
    """

    def __init__(self, spec: OptimizerSpec, network: str, module: nn.Module, groups: Groups) -> None:
        self.each = _build(spec, module, groups)
        self.note = _describe(spec, network, module)
        self.moments = state_bytes(spec, module)

    def set_lr(self, lr: float) -> None:
        """Set the stage's learning rate, which each group multiplies by its factor."""
        for group in (group for optimizer in self.each for group in optimizer.param_groups):
            group["lr"] = lr * group[FACTOR]

    def step(self) -> None:
        """Update the weights, and clear the gradients."""
        for optimizer in self.each:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter, by name; numbers as tensors without dimensions. Empty before the first step."""
        found = (optimizer.state.get(parameter, {}) for optimizer in self.each)
        return {name: torch.as_tensor(value) for each in found for name, value in each.items()}

    def load(self, states: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        """Load what `state` returned for each parameter."""
        for optimizer in self.each:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            content = {i: _with_numbers(states[p]) for i, p in enumerate(parameters) if p in states}
            optimizer.load_state_dict({"state": content, "param_groups": optimizer.state_dict()["param_groups"]})


def _require(spec: OptimizerSpec) -> None:
    """InputError if the optimizer needs a package that is not installed."""
    if spec.name == "adamw_8bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise InputError(
                "optimizer.name: adamw_8bit needs the package bitsandbytes, which is not installed; "
                "pip install 'distill[adamw-8bit]', or use adamw"
            ) from error


def _build(spec: OptimizerSpec, module: nn.Module, groups: Groups) -> list[torch.optim.Optimizer]:
    match spec.name:
        case "adamw":
            return [_adamw(spec, groups)]
        case "adamw_8bit":
            return [_adamw_8bit(spec, groups)]
        case "muon":
            chosen = _matrices(module)
            matrices = _divided(groups, chosen, wanted=True)
            others = _divided(groups, chosen, wanted=False)
            return [*([_muon(spec, matrices)] if matrices else []), *([_adamw(spec, others)] if others else [])]


def _adamw(spec: OptimizerSpec, groups: Groups) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2017, arXiv 1711.05101, Alg. 2."""
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups,
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=fused,
        foreach=None if fused else True,
    )


def _adamw_8bit(spec: OptimizerSpec, groups: Groups) -> torch.optim.Optimizer:
    """AdamW with both moments in 8 bits, in blocks of 256 elements (Dettmers et al. 2021, arXiv 2110.02861)."""
    _require(spec)
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(
        groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, min_8bit_size=LEAST_8BIT
    )
    return made


def _muon(spec: OptimizerSpec, groups: Groups) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) with steps scaled so that they are as large as AdamW's with the same learning rate and
    weight decay (Liu et al. 2025, arXiv 2502.16982, eq. 4)."""
    return torch.optim.Muon(
        groups,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        momentum=MOMENTUM if spec.momentum is None else spec.momentum,
        adjust_lr_fn="match_rms_adamw",
    )


def _matrices(module: nn.Module) -> set[Tensor]:
    """The weights that `muon` trains: matrices, except tables of embeddings, of which a step changes only few rows."""
    tables = {each.weight for each in module.modules() if isinstance(each, nn.Embedding)}
    return {p for p in module.parameters() if p.requires_grad and p.ndim == 2 and p not in tables}


def _divided(groups: Groups, chosen: set[Tensor], *, wanted: bool) -> list[dict[str, Any]]:
    """The groups with those of their parameters that are `chosen`, or with the others; without empty groups."""
    parts = [{**group, "params": [p for p in group["params"] if (p in chosen) == wanted]} for group in groups]
    return [part for part in parts if part["params"]]


def _describe(spec: OptimizerSpec, network: str, module: nn.Module) -> str | None:
    if spec.name != "muon":
        return None
    trained, matrices = [p for p in module.parameters() if p.requires_grad], _matrices(module)
    share = sum(p.numel() for p in matrices) / sum(p.numel() for p in trained)
    return (
        f"{network}: muon trains {len(matrices)} of {len(trained)} parameters, {share:.0%} of the elements; "
        "adamw trains those that are not matrices, such as the weights of convolutions, and tables of embeddings"
    )


def state_bytes(spec: OptimizerSpec, module: nn.Module) -> int | None:
    """Bytes of the optimizers' whole state. None for adamw, whose state `Sharding.held` predicts, as it is divided.

    InputError if a package is missing.
    """
    _require(spec)
    trained = [p for p in module.parameters() if p.requires_grad]
    match spec.name:
        case "adamw":
            return None
        case "adamw_8bit":
            return sum(_bytes_8bit(p.numel()) for p in trained)
        case "muon":
            matrices = _matrices(module)
            return sum(FLOAT * p.numel() * (1 if p in matrices else 2) for p in trained)


def _bytes_8bit(numel: int) -> int:
    return 2 * FLOAT * numel if numel < LEAST_8BIT else 2 * (numel + FLOAT * math.ceil(numel / BLOCK_8BIT))


def _with_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor | int]:
    """With whole numbers as numbers: bitsandbytes counts its steps in one."""
    is_number = {name: not t.ndim and not t.is_floating_point() for name, t in tensors.items()}
    return {name: int(t) if is_number[name] else t for name, t in tensors.items()}
