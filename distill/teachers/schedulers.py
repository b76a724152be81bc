"""Reads the network's noise schedule from a scheduler config of diffusers, for any of its scheduler classes.

A scheduler class belongs to one family: "vp" (betas), "linear" (flow matching), "edm", or "ve" (score networks of a
variance-exploding SDE). There are three groups of options:

- Options that define the path are used.
- Options that would change the path in an unsupported way raise InputError, unless they have their neutral value.
- All other options concern sampling only: where a sampler calls the network, and what it does with the result. They are
  ignored.

`tests/test_schedulers.py` checks against diffusers that every option of every class is in one of these groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from diffusers import DDPMScheduler, HeunDiscreteScheduler
from pydantic import ConfigDict, Field, PositiveFloat
from torch import Tensor

from distill.core.errors import InputError
from distill.exchange import own_code
from distill.flow.interpolants import Interpolant, Prediction, vp
from distill.teachers.read import MAX_TABLE, Config, Read, ShortText, checked, parse, short

Family = Literal["vp", "linear", "edm", "ve"]
Whole = Annotated[int, Field(ge=0, le=1 << 31)]
Beta = Annotated[float, Field(gt=0, lt=1)]
Sigma = Annotated[float, Field(ge=1e-6, le=1e5)]  # the range is far wider than that of any trained network


class Options(Read):
    """The options of all classes in `KINDS`. In a file, null means the default, because old files contain it."""

    model_config = ConfigDict(extra="forbid")

    # options of the path
    num_train_timesteps: Annotated[int, Field(ge=1, le=MAX_TABLE)] = 1000
    beta_start: Beta | None = None  # None: the default of the scheduler class
    beta_end: Beta | None = None
    beta_schedule: ShortText | None = None
    trained_betas: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(max_length=MAX_TABLE)] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] | None = None
    use_flow_sigmas: bool = False
    invert_sigmas: bool = False
    sigma_data: Sigma = 0.5
    sigma_min: Sigma | None = None  # None: the default of the scheduler class
    sigma_max: Sigma | None = None
    # unsupported options: any other value is an error
    timestep_type: Literal["discrete"] = "discrete"  # with "continuous", the network takes log(sigma) / 4
    snr_shift_scale: Literal[1] = 1  # for CogVideoX
    predict_epsilon: Literal[True] = True  # in old versions, instead of prediction_type
    # options of sampling only
    algorithm_type: ShortText = ""
    base_image_seq_len: Whole = 0
    base_shift: float = 0
    clip_sample: bool = False
    clip_sample_range: float = 0
    correct_steps: Whole = 0
    corrector_order: Whole = 0
    disable_corrector: list[Whole] = []
    dynamic_thresholding_ratio: float = 0
    euler_at_final: bool = False
    final_sigmas_type: ShortText = ""
    flow_shift: PositiveFloat = 1
    interpolation_type: ShortText = ""
    lambda_min_clipped: Annotated[float, Field(allow_inf_nan=True)] = 0
    lower_order_final: bool = False
    max_image_seq_len: Whole = 0
    max_shift: float = 0
    noise_sampler_seed: Whole = 0
    original_inference_steps: Whole = 0
    predict_x0: bool = True
    predictor_order: Whole = 0
    rho: float = 0
    sample_max_value: float = 0
    sampling_eps: float = 0
    scale_factors: list[float] = []
    set_alpha_to_one: bool = False
    shift: PositiveFloat = 1
    shift_terminal: float | bool = False
    sigma_schedule: ShortText = ""
    skip_prk_steps: bool = False
    snr: float = 0
    solver_order: Whole = 0
    solver_p: None = None
    solver_type: ShortText = ""
    steps_offset: Whole = 0
    stochastic_sampling: bool = False
    tau_func: None = None
    tensor_format: ShortText = ""  # in the first versions only, like timestep_values
    thresholding: bool = False
    time_shift_type: ShortText = ""
    timestep_scaling: float = 0
    timestep_spacing: ShortText = ""
    timestep_values: None = None
    upscale_mode: ShortText = ""
    use_beta_sigmas: bool = False
    use_dynamic_shifting: bool = False
    use_exponential_sigmas: bool = False
    use_karras_sigmas: bool = False
    use_lu_lambdas: bool = False
    variance_type: ShortText = ""


@dataclass(frozen=True)
class SchedulerKind:
    """A scheduler class.

    path: the options that are used. betas: the default start, end and schedule. schedules: the supported
    beta_schedules. sigmas: the default sigma_min and sigma_max.
    """

    family: Family
    path: frozenset[str]
    betas: tuple[float, float, str] = (0.0001, 0.02, "linear")
    schedules: tuple[str, ...] = ("linear", "scaled_linear", "squaredcos_cap_v2")
    sigmas: tuple[float, float] = (0.002, 80.0)


FLAGS = ("rescale_betas_zero_snr", "use_flow_sigmas", "invert_sigmas")  # an error if set for a class that ignores them
BETAS = frozenset(
    {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
)
ZERO, FLOW = BETAS | {"rescale_betas_zero_snr"}, BETAS | {"use_flow_sigmas"}
EDM = frozenset({"prediction_type", "sigma_data", "sigma_min", "sigma_max"})
VE = frozenset({"sigma_min", "sigma_max"})
STEPS = frozenset({"num_train_timesteps"})
FAINT = (0.00085, 0.012, "linear")
SCALED = (0.00085, 0.012, "scaled_linear")
KINDS: Mapping[str, SchedulerKind] = {
    "DDIMParallelScheduler": SchedulerKind("vp", ZERO),
    "DDIMScheduler": SchedulerKind("vp", ZERO),
    "DDPMParallelScheduler": SchedulerKind("vp", ZERO, schedules=(*SchedulerKind.schedules, "sigmoid", "laplace")),
    "DDPMScheduler": SchedulerKind("vp", ZERO, schedules=(*SchedulerKind.schedules, "sigmoid", "laplace")),
    "DEISMultistepScheduler": SchedulerKind("vp", FLOW),
    "DPMSolverMultistepScheduler": SchedulerKind("vp", ZERO | FLOW),
    "DPMSolverSDEScheduler": SchedulerKind("vp", BETAS, FAINT),
    "DPMSolverSinglestepScheduler": SchedulerKind("vp", FLOW),
    "EulerAncestralDiscreteScheduler": SchedulerKind("vp", ZERO),
    "EulerDiscreteScheduler": SchedulerKind("vp", ZERO),
    "HeunDiscreteScheduler": SchedulerKind("vp", BETAS, FAINT, (*SchedulerKind.schedules, "exp")),
    "KDPM2AncestralDiscreteScheduler": SchedulerKind("vp", BETAS, FAINT),
    "KDPM2DiscreteScheduler": SchedulerKind("vp", BETAS, FAINT),
    "LCMScheduler": SchedulerKind("vp", ZERO, SCALED),
    "LMSDiscreteScheduler": SchedulerKind("vp", BETAS),
    "PNDMScheduler": SchedulerKind("vp", BETAS),
    "SASolverScheduler": SchedulerKind("vp", FLOW),
    "TCDScheduler": SchedulerKind("vp", ZERO, SCALED),
    "UniPCMultistepScheduler": SchedulerKind("vp", ZERO | FLOW),
    "FlowMapEulerDiscreteScheduler": SchedulerKind("linear", STEPS),
    "FlowMatchEulerDiscreteScheduler": SchedulerKind("linear", STEPS | {"invert_sigmas"}),
    "FlowMatchHeunDiscreteScheduler": SchedulerKind("linear", STEPS),
    "FlowMatchLCMScheduler": SchedulerKind("linear", STEPS),
    "EDMDPMSolverMultistepScheduler": SchedulerKind("edm", EDM),
    "EDMEulerScheduler": SchedulerKind("edm", EDM),
    "ScoreSdeVeScheduler": SchedulerKind("ve", VE, sigmas=(0.01, 1348.0)),
}
REASONS: Mapping[str, str] = {  # why networks of other classes are no teachers here
    "CMStochasticIterativeScheduler": "its networks are consistency models, which jump to data: no velocity fields",
    "SCMScheduler": "its networks are students of the TrigFlow path: no teachers",
    "CogVideoXDDIMScheduler": "it shifts the table of betas (snr_shift_scale)",
    "CogVideoXDPMScheduler": "it shifts the table of betas (snr_shift_scale)",
    "DDPMWuerstchenScheduler": "its networks take the time as a ratio, on a table of their own",
    "IPNDMScheduler": "its networks predict by a rule of their own",
    "UnCLIPScheduler": "its networks belong to two stages, a prior and a decoder",
    "CosineDPMSolverMultistepScheduler": "its networks take 2/pi atan(sigma) as the time",
}
PREDICTIONS: Mapping[Family, tuple[Prediction, ...]] = {
    "vp": ("epsilon", "sample", "v_prediction"),
    "linear": ("velocity",),
    "edm": ("epsilon", "v_prediction"),
    "ve": (),
}


@dataclass(frozen=True)
class VpSchedule:
    """A schedule given by a table of betas. The network is called with n = t (steps - 1)."""

    path: Interpolant
    steps: int
    prediction: Prediction
    zero_snr: bool  # zero terminal SNR: x_t is pure noise at the last time
    family: Family = "vp"


@dataclass(frozen=True)
class LinearSchedule:
    """The linear path. The network is called with time_scale t.

    inverted: it is called with time_scale (1 - t), and its output is the negative velocity.
    """

    time_scale: float
    inverted: bool = False
    prediction: Prediction = "velocity"
    family: Family = "linear"


@dataclass(frozen=True)
class EdmSchedule:
    """The schedule of EDM (Karras et al. 2022, arXiv 2206.00364), with sigma from sigma_min to sigma_max."""

    sigma_data: float
    sigma_min: float
    sigma_max: float
    prediction: Prediction
    family: Family = "edm"


@dataclass(frozen=True)
class VeSchedule:
    """The schedule of a variance-exploding SDE (Song et al. 2021, arXiv 2011.13456), for images in [0, 1].

    The network is called with sigma from sigma_min to sigma_max, and predicts the score.
    """

    sigma_min: float
    sigma_max: float
    prediction: Literal["score"] = "score"
    family: Family = "ve"


Schedule = VpSchedule | LinearSchedule | EdmSchedule | VeSchedule


def read(path: Path, *, strict: bool = True) -> Schedule:
    """Reads the schedule of a scheduler_config.json. Raises InputError if its class or options are not supported.

    strict: also raise InputError for options that are not in `Options`, instead of ignoring them.
    """
    config = described(path)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        reason = f", because {REASONS[name]}" if isinstance(name, str) and name in REASONS else ""
        raise InputError(
            f"{path}: scheduler class {short(str(name))} is not supported{reason}; valid: {classes()}. Set "
            "teacher.scheduler to the folder of a scheduler that describes how the network was trained"
        )
    kind, options = KINDS[name], _options(config, path, strict)
    for flag in FLAGS:
        ignored = flag not in kind.path and not (flag == "use_flow_sigmas" and kind.family == "linear")
        if ignored and flag in config and config[flag]:
            raise InputError(
                f"{path}: {flag}=true changes the path, but {name} ignores it; remove it, or set _class_name to the "
                "class that the network was trained with"
            )
    if kind.family == "edm":
        return _edm(options, kind, path)
    if kind.family == "ve":
        return VeSchedule(*_sigmas(options, kind, path))
    if kind.family == "linear" or options.use_flow_sigmas:
        if options.prediction_type not in ("flow_prediction", None if kind.family == "linear" else "flow_prediction"):
            raise InputError(
                f"{path}: prediction_type={options.prediction_type or 'epsilon'} does not fit "
                f"{name if kind.family == 'linear' else 'use_flow_sigmas=true'}: on the linear path, networks "
                "predict the velocity; valid: flow_prediction"
            )
        return LinearSchedule(float(options.num_train_timesteps), options.invert_sigmas)
    return _vp(name, kind, options, path)


def described(path: Path) -> Config:
    """The content of a scheduler config; that of the teacher's scheduler if it is one of our own, of a student.

    Our own scheduler samples on the linear path, and it is the teacher's that describes the network.
    """
    config = parse(path)
    if config.get("_class_name") != own_code.SCHEDULER[1]:
        return config
    teacher = config.get("teacher")
    if not isinstance(teacher, dict):
        raise InputError(
            f"{path}: teacher={short(repr(teacher))}; valid: the scheduler config of the student's teacher; export or "
            "copy the student again"
        )
    return teacher


def betas(config: Mapping[str, object], table: Tensor) -> dict[str, object]:
    """The options that say which table of betas a VP scheduler has, for schedulers of any class with this table.

    config: content of a scheduler config. table: log(sigma/alpha) of its table, [N]. Schedules that not all classes
    know, such as sigmoid, are written as numbers.
    """
    kind = KINDS[str(config["_class_name"])]
    options = _options({**config}, Path("scheduler_config.json"), strict=False)
    start, end, schedule = kind.betas
    schedule = options.beta_schedule or schedule
    found: dict[str, object] = {
        "num_train_timesteps": options.num_train_timesteps,
        "beta_start": options.beta_start or start,
        "beta_end": options.beta_end or end,
        "beta_schedule": schedule,
        "rescale_betas_zero_snr": options.rescale_betas_zero_snr,
    }
    if options.trained_betas is not None:
        return {**found, "trained_betas": options.trained_betas, "beta_schedule": "linear"}
    if schedule not in SchedulerKind.schedules:
        left = torch.sigmoid(-2 * table)  # alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=table.dtype), left[:-1]])
        return {**found, "trained_betas": (1 - left / before).tolist(), "beta_schedule": "linear"}
    return found


def classes() -> str:
    """A list of the supported scheduler classes by family, for messages."""
    families: dict[str, list[str]] = {}
    for name, kind in KINDS.items():
        families.setdefault(kind.family, []).append(name)
    return "; ".join(f"{', '.join(names)} ({family})" for family, names in families.items())


def _options(config: Config, path: Path, strict: bool) -> Options:
    given = {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
    unknown = [key for key in given if key not in Options.model_fields]
    if unknown and strict:
        raise InputError(
            f"{path}: {short(unknown[0])}={short(repr(given[unknown[0]]))} is not a known scheduler option, so it may "
            "change the path; if it does not, remove it, or set teacher.scheduler to the folder of a config without it"
        )
    return checked(Options, {key: value for key, value in given.items() if key not in unknown}, path)


def _edm(options: Options, kind: SchedulerKind, path: Path) -> EdmSchedule:
    prediction = options.prediction_type or "epsilon"
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"{path}: prediction_type={prediction}; valid on the edm path: epsilon, v_prediction")
    return EdmSchedule(options.sigma_data, *_sigmas(options, kind, path), prediction)


def _sigmas(options: Options, kind: SchedulerKind, path: Path) -> tuple[float, float]:
    """sigma_min and sigma_max. InputError if the first is not less than the second."""
    low, high = options.sigma_min or kind.sigmas[0], options.sigma_max or kind.sigmas[1]
    if low >= high:
        raise InputError(f"{path}: sigma_min={low:g}; valid: less than sigma_max={high:g}")
    return low, high


def _vp(name: str, kind: SchedulerKind, options: Options, path: Path) -> VpSchedule:
    prediction, steps = options.prediction_type or "epsilon", options.num_train_timesteps
    if prediction == "flow_prediction":
        raise InputError(f"{path}: prediction_type=flow_prediction; valid only with use_flow_sigmas=true")
    if steps < 2:
        raise InputError(f"{path}: num_train_timesteps={steps}; valid: 2 or more")
    start, end, schedule = kind.betas
    start, end, schedule = options.beta_start or start, options.beta_end or end, options.beta_schedule or schedule
    if schedule not in kind.schedules:
        raise InputError(f"{path}: beta_schedule={short(schedule)}; valid for {name}: {', '.join(kind.schedules)}")
    if options.trained_betas is not None and len(options.trained_betas) != steps:
        raise InputError(
            f"{path}: trained_betas has {len(options.trained_betas)} numbers; valid: num_train_timesteps={steps}"
        )
    if schedule == "exp":
        table = HeunDiscreteScheduler(steps, start, end, schedule, options.trained_betas).alphas_cumprod
    else:
        table = DDPMScheduler(
            steps, start, end, schedule, options.trained_betas, rescale_betas_zero_snr=options.rescale_betas_zero_snr
        ).alphas_cumprod
    try:
        return VpSchedule(vp(table), steps, prediction, float(table[-1]) == 0)
    except ValueError as error:
        told = f"betas from {start:g} to {end:g} in {steps} steps"
        if options.trained_betas is not None:
            told = f"the {steps} trained_betas, from {options.trained_betas[0]:g} to {options.trained_betas[-1]:g}"
        elif schedule not in ("linear", "scaled_linear", "sigmoid"):
            told = f"the betas of beta_schedule={schedule} in {steps} steps"
        trouble = "does not decrease at every step, so some steps add no noise"
        if table[-2] < 1e-12:
            trouble = "reaches 0 before the last step, so none of the data is left"
        named = "beta_start, beta_end and num_train_timesteps" if options.trained_betas is None else "trained_betas"
        raise InputError(f"{path}: {told}: alphas_cumprod {trouble}; check {named}") from error
