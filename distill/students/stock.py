"""How the stock pipeline of diffusers samples a student: with which scheduler, in how many steps, how it is called.

A student that keeps the network class of its teacher's pipeline gets a scheduler config with which
`pipeline(prompt, num_inference_steps=N)` computes what `distill sample` computes. `of` says which one, for which N, or
why there is none. Facts about a family of pipelines are attributes of its `Convention`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.exchange.student_card import StockCall
from distill.flow.times import uniform_grid
from distill.networks.experts import Experts
from distill.networks.sharing import has_base
from distill.networks.two_times import TwoNetworks, TwoTimes
from distill.spec.kinds import SAMPLERS
from distill.students import native
from distill.students.native import NativeStudent
from distill.teachers import schedulers
from distill.teachers.convention import Convention
from distill.teachers.loaded import Packaging
from distill.teachers.network_field import LinearCall
from distill.teachers.read import Config

SAME = 1e-6  # times that differ by no more are equal
FEW = 4  # steps of a student that is made for no number of steps, if its scheduler supports one number only
WITHOUT_STEPS = (
    1,
    2,
)  # numbers of steps in which the sampler same_noise is Euler's; on a VP schedule only in the first
EULER, FLOW_MAP, LCM = "FlowMatchEulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler", "FlowMatchLCMScheduler"


@dataclass(frozen=True)
class Stock:
    """How the stock pipeline samples a student.

    scheduler: the content of scheduler_config.json. steps: the numbers of steps N for which the pipeline computes what
    `distill sample` computes; None: any. arguments: with which the pipeline must be called, besides N. reason: why it
    cannot sample the student, in words; then the other fields have no meaning.
    """

    scheduler: Mapping[str, object] = field(default_factory=dict)
    steps: tuple[int, ...] | None = None
    arguments: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def works(self) -> bool:
        return not self.reason

    @property
    def call(self) -> StockCall:
        """What the card of the student says about it."""
        if self.reason:
            return StockCall(reason=self.reason)
        return StockCall(steps=None if self.steps is None else list(self.steps), arguments=dict(self.arguments))

    def scheduler_or(self, packaging: Packaging) -> dict[str, Any]:
        """The content of scheduler_config.json: that of the teacher if the pipeline cannot sample the student."""
        return dict(self.scheduler if self.works else packaging.scheduler)


def of(
    student: NativeStudent,
    sampler: str,
    t_grids: Mapping[int, Sequence[float]],
    packaging: Packaging,
    steps: int | None = None,
) -> Stock:
    """How the stock pipeline samples a student that keeps the network class of a latent-space pipeline.

    t_grids: number of steps -> its times, as in its card. packaging: of its teacher, or of its own folder.
    steps: for which the scheduler must be right, if it can be right for one number of steps only; None: the smallest
    one of t_grids, or 4.
    """
    if reason := _reason(student, sampler):
        return Stock(reason=reason)
    call, convention = native.call_of(student), native.convention_for(native.base_of(student.network))
    if call.edm is not None:
        return Stock(reason="its network has an EDM schedule, whose schedulers use times of their own")
    if call.inverted:
        return Stock(reason="its network is called with time 1 - t and predicts -v, and few schedulers support that")
    found = _vp(call, sampler, t_grids, packaging) if call.table is not None else None
    found = found or _linear(call, convention, sampler, t_grids, packaging, steps)
    if found.steps == ():
        many = "s" if len(t_grids) > 1 else ""
        return Stock(reason=f"no scheduler uses its times (for {', '.join(map(str, sorted(t_grids)))} step{many})")
    whole = not has_base(student.network)
    return Stock(found.scheduler, found.steps, arguments(convention, config_of(student), packaging, whole=whole))


def arguments(convention: Convention, config: Config, packaging: Packaging, *, whole: bool) -> dict[str, float]:
    """The arguments with which the pipeline makes one call per step, with the guidance that the student has learnt.

    whole: see `Convention.unguided`.
    """
    found, embedded = dict(convention.unguided(config, whole=whole)), packaging.embedded_guidance
    if embedded is not None and embedded != convention.embedded_guidance and config.get("guidance_embeds"):
        found["guidance_scale"] = embedded
    return found


def _reason(student: NativeStudent, sampler: str) -> str:
    """Why no scheduler can do what the sampler does; empty if one can."""
    match student.network:
        case TwoTimes():
            return "its network takes a second time, which the pipeline does not give it"
        case TwoNetworks():
            return "it has a second network, of the acceleration, which the pipeline does not call"
    if SAMPLERS[sampler].is_fitted:
        return "its solver was fitted to its network, and no scheduler computes such steps"
    return ""


def _vp(call: LinearCall, sampler: str, t_grids: Mapping[int, Sequence[float]], packaging: Packaging) -> Stock:
    """With a table of betas: DDIM's steps are those of Euler's method on the linear path."""
    assert call.table is not None
    size, renoise = len(call.table), sampler == "renoise"
    shared: dict[str, object] = {
        **schedulers.betas(packaging.scheduler, call.table),
        "prediction_type": call.prediction,
        "steps_offset": 1,  # not used; pipelines warn of other values
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    if renoise:
        # c_skip of this scheduler is then 0 and c_out 1 in float32, for N up to T / 2
        scheduler = {"_class_name": "LCMScheduler", "original_inference_steps": size, "timestep_scaling": 1e4}
        whole: tuple[int, ...] | None = None
    else:
        # Step i ends T // N before it began, which is where the next one begins only if N divides T.
        scheduler = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
        whole = tuple(n for n in range(1, size + 1) if size % n == 0)
    # From the noise at t = 1, the jump to data is the same as from the first time of `t_grid`, but no other step is.
    fits = tuple(n for n, grid in t_grids.items() if n == 1 or (renoise and _same(grid[1:], call.t_grid(n)[1:])))
    if sampler == "same_noise":
        whole = (1,)
    return Stock({**scheduler, **shared}, tuple(n for n in fits if whole is None or n in whole) if t_grids else whole)


def _linear(
    call: LinearCall,
    convention: Convention,
    sampler: str,
    t_grids: Mapping[int, Sequence[float]],
    packaging: Packaging,
    steps: int | None,
) -> Stock:
    """On the linear path: the schedulers of flow matching."""
    renoise, table = sampler == "renoise", {"num_train_timesteps": int(call.time_scale)}
    if convention.passes == "timesteps":
        # The last of several calls would be at the first time of the table: nothing would be left to do.
        name = LCM if renoise else EULER
        one = tuple(n for n in t_grids or (1,) if n == 1)
        return Stock({**packaging.scheduler, "_class_name": name}, one)
    shift = _shift(t_grids)
    allowed = tuple(n for n, grid in sorted(t_grids.items()) if _same(grid, shifted(uniform_grid(n), shift)))
    fits: tuple[int, ...] | None = allowed if t_grids else None
    if sampler == "same_noise":
        fits = tuple(n for n in WITHOUT_STEPS if fits is None or n in fits)
    if not renoise:
        return Stock(
            {"_class_name": EULER if convention.passes == "sigmas" else FLOW_MAP, "shift": shift, **table}, fits
        )
    if convention.passes == "sigmas":
        return Stock({"_class_name": LCM, "shift": shift, **table}, fits)
    # Given N alone, this scheduler ends at the first time of its table, unless told where to end.
    only = steps or (min(allowed, default=0) if t_grids else FEW)
    if shift != 1 or not only or (t_grids and only not in allowed):
        return Stock(steps=())
    ending = {} if only == 1 else {"shift_terminal": 1 / only}
    return Stock({"_class_name": LCM, "shift": 1.0, **ending, **table}, (only,))


def flow_map(
    call: LinearCall, convention: Convention, t_grids: Mapping[int, Sequence[float]]
) -> dict[str, object] | None:
    """The config of FlowMapEulerDiscreteScheduler, whose steps are x_s = x_t + (s - t) u, for a pipeline that tells the
    network where each step ends; None if that scheduler has other times than the student, or calls the network with
    other ones.
    """
    on_linear_path = call.table is None and call.edm is None and not call.inverted
    shift = _shift(t_grids)
    has_times = all(_same(grid, shifted(uniform_grid(n), shift)) for n, grid in t_grids.items())
    if not (on_linear_path and has_times and convention.passes == "steps"):
        return None
    return {"_class_name": FLOW_MAP, "shift": shift, "num_train_timesteps": int(call.time_scale)}


def shifted(times: Tensor, shift: float) -> Tensor:
    """Times on the linear path as schedulers with this `shift` change them: sigma/alpha is multiplied by it."""
    return shift * times / (1 + (shift - 1) * times)


def _shift(t_grids: Mapping[int, Sequence[float]]) -> float:
    """The shift of the uniform grid with which most of these grids agree; 1 if it does not matter."""
    candidates = [1.0]
    for n, grid in sorted(t_grids.items()):
        if n > 1 and 0 < (t := grid[1]) < 1:
            candidates.append(round(t / (1 - t) / (n - 1), 9))

    def agreeing(shift: float) -> int:
        return sum(_same(grid, shifted(uniform_grid(n), shift)) for n, grid in t_grids.items())

    return max(candidates, key=agreeing)  # the first of equal ones


def _same(found: Sequence[float], expected: Tensor) -> bool:
    given = torch.tensor(found, dtype=torch.float64)
    return given.shape == expected.shape and bool((given - expected).abs().max() <= SAME)


def config_of(student: NativeStudent) -> Config:
    """The config of the student's network."""
    base = native.base_of(student.network)
    return dict((base.transformer if isinstance(base, Experts) else base).config)
