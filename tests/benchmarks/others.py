"""Errors of methods that are not solvers of distill: by number of network calls, beside those of the solvers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distill.protocols import Cond, VelocityField

from . import early_exit
from .bespoke import at_end, bound, fit_bespoke
from .fitted import Fitted, Paths, changes, everything, fit_dc, fit_linear
from .multistep import VARIABLES, Sampling, deis, ghvb
from .two_calls import fit_amed

CALLS = (4, 6, 8, 10, 16, 20)
Errors = dict[str, dict[int, float]]  # method -> number of network calls -> RMS error

MULTISTEP: dict[str, Sampling] = {
    **{f"DEIS {k}, {tau}": partial(deis, order=k, variable=tau) for tau in VARIABLES for k in (2, 3)},
    **{f"iPNDM {k}": partial(ghvb, order=k) for k in (2, 3, 4)},
    **{f"GHVB {q}": partial(ghvb, order=q) for q in (1.5, 2.5, 3.5)},
    "iPNDM 4 on v (ab4)": partial(ghvb, order=4, on_velocity=True),
    **{f"GHVB {q} on v": partial(ghvb, order=q, on_velocity=True) for q in (1.5, 2.5, 3.5)},
}

# (how to fit it to paths with a number of steps, the number of steps by calls, the largest number of calls)
Fit = tuple[Callable[[Paths, int], Fitted], Callable[[int], int], int]
FITS: dict[str, Fit] = {
    "IIA": (partial(fit_linear, basis=changes, to_path=False), int, 20),
    "IIA, to the path": (partial(fit_linear, basis=changes, to_path=True), int, 20),
    "x and all v, to the path": (partial(fit_linear, basis=everything, to_path=True), int, 20),
    "DC-Solver": (partial(fit_dc, changed=False), int, 16),
    "DC-Solver, changed": (partial(fit_dc, changed=True), int, 16),
    "AMED, constant": (partial(fit_amed, on_velocity=False), lambda calls: calls // 2 + 1, 16),
    "AMED, constant, on v": (partial(fit_amed, on_velocity=True), lambda calls: calls // 2, 16),
    "Bespoke RK1": (partial(fit_bespoke, midpoint=False, loss=bound), int, 10),
    "Bespoke RK2": (partial(fit_bespoke, midpoint=True, loss=bound), lambda calls: calls // 2, 10),
    "Bespoke RK2, end": (partial(fit_bespoke, midpoint=True, loss=at_end), lambda calls: calls // 2, 10),
}


def other_errors(field: VelocityField, noise: Tensor, cond: Cond, truth: Tensor, known: Paths) -> Errors:
    """known: paths from other noises, for the fits."""
    found: Errors = {}
    with torch.no_grad():
        for name, sampling in MULTISTEP.items():
            found[name] = {calls: rms(sampling(field, noise, cond, calls) - truth) for calls in CALLS}
        for name, (fit, steps, most) in FITS.items():
            fitted = {calls: fit(known, steps(calls)) for calls in CALLS if calls <= most}
            found[name] = {calls: rms(sample(field, noise, cond) - truth) for calls, sample in fitted.items()}
    return found


def shortened_errors(field: VelocityField, noise: Tensor, cond: Cond, truth: Tensor) -> Errors:
    """Of networks that do less in some calls; the field is a U-Net's."""
    share = early_exit.shares(field, noise, cond)
    return {
        name: {calls: rms(early_exit.sample(field, noise, cond, plan, calls, share) - truth) for calls in CALLS}
        for name, plan in early_exit.PLANS.items()
    }


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
