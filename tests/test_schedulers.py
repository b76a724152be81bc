"""Scheduler configs: every option of every class is classified, every class gives the field of diffusers' own loop, and
options that would change the path are respected or refused.
"""

import ast
import importlib.util
import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from checkpoints import STEPS, edit, load, noise, ours, refused, same, stock, unet, write
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from distill.core.errors import InputError
from distill.students.init import StudentInit
from distill.teachers import schedulers
from distill.teachers.schedulers import KINDS, LinearSchedule, Options, VpSchedule

UNTRAINED = {  # have betas, but describe no network's training, or change the path by rules of their own
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "RePaintScheduler",
    "UnCLIPScheduler",
}
HERE_SAMPLING = {  # options that are the path elsewhere, and in these classes say how a sampler steps
    "EDMDPMSolverMultistepScheduler": {"num_train_timesteps"},
    "EDMEulerScheduler": {"num_train_timesteps"},
    "EulerDiscreteScheduler": {"sigma_min", "sigma_max"},
    "ScoreSdeVeScheduler": {"num_train_timesteps"},
    "UniPCMultistepScheduler": {"sigma_min", "sigma_max"},
}
REFUSED = {"timestep_type", "snr_shift_scale", "predict_epsilon"}  # `Options` allows the neutral value only
PATH = schedulers.ZERO | schedulers.FLOW | schedulers.EDM | {"invert_sigmas"}
SAMPLING = set(Options.model_fields) - PATH - REFUSED
VP = [name for name, kind in KINDS.items() if kind.family == "vp" and name != "DPMSolverSDEScheduler"]


def options_of(name: str) -> dict[str, object]:
    """The options of a diffusers class and their defaults."""
    found = getattr(diffusers, name)
    if "torchsde" not in getattr(found, "_backends", ()):
        return {k: p.default for k, p in inspect.signature(found.__init__).parameters.items() if k != "self"}
    package = Path(importlib.util.find_spec("diffusers").submodule_search_locations[0])
    tree = ast.parse((package / "schedulers" / "scheduling_dpmsolver_sde.py").read_text())  # cannot be imported here
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    (init,) = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    names = [arg.arg for arg in init.args.args[1:]]
    return dict(zip(names, map(ast.literal_eval, init.args.defaults), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_every_option_of_every_class_is_classified(name):
    """A new option in a new diffusers version fails here: say in `Options` and `KINDS` what it is to the path."""
    kind, options = KINDS[name], options_of(name)
    assert kind.path <= set(options)
    refused_here = REFUSED | set(schedulers.FLAGS)
    known = kind.path | SAMPLING | refused_here | HERE_SAMPLING.get(name, set())
    assert set(options) - known == set()
    if kind.family == "vp":
        assert kind.betas == (options["beta_start"], options["beta_end"], options["beta_schedule"])
        assert options["num_train_timesteps"] == 1000
    if kind.family in ("edm", "ve"):
        assert kind.sigmas == (options["sigma_min"], options["sigma_max"])
    by_class = ("beta_start", "beta_end", "beta_schedule", "sigma_min", "sigma_max")
    for option, value in options.items():  # a config that says what the class would do anyway is no other config
        if option not in by_class and option in kind.path and value is not None:
            expected = Options.model_fields[option].default
            assert value == ("epsilon" if option == "prediction_type" else expected), option


def test_every_class_with_betas_is_read():
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    dummies = {"CosineDPMSolverMultistepScheduler", "KarrasVeScheduler", "SchedulerMixin"}
    with_betas = {name for name in names if name not in dummies and "beta_schedule" in options_of(name)}
    assert with_betas - UNTRAINED == {name for name, kind in KINDS.items() if kind.family == "vp"}


def scheduler_config(folder: Path, name: str, **options: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.42.1", **options}))
    return path


def table(schedule: VpSchedule) -> torch.Tensor:
    n = torch.arange(schedule.steps, dtype=torch.float64)
    return schedule.path.path(n / (schedule.steps - 1)).alpha.square()


def betas_of(name: str) -> list[dict[str, object]]:
    """Options of betas for a class."""
    found: list[dict[str, object]] = [{"beta_start": 0.001, "beta_end": 0.03}]
    found += [{"beta_schedule": schedule} for schedule in KINDS[name].schedules]
    found.append({"trained_betas": torch.linspace(0.0002, 0.03, 100).tolist()})
    if "rescale_betas_zero_snr" in KINDS[name].path:
        found.append({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    return [{**options, "num_train_timesteps": 100} for options in found]


@pytest.mark.parametrize("name", VP)
def test_the_betas_are_those_of_the_class_itself(tmp_path, name):
    for options in betas_of(name):
        scheduler = getattr(diffusers, name)(**options)
        schedule = schedulers.read(scheduler_config(tmp_path, name, **options))
        expected = scheduler.alphas_cumprod.double()
        if options.get("rescale_betas_zero_snr"):  # 0 at the end, which some samplers replace by a small number
            assert schedule.zero_snr
            expected[-1] = 1e-12
        torch.testing.assert_close(table(schedule), expected, rtol=1e-6, atol=1e-12)
        scheduler.save_pretrained(tmp_path)  # all that diffusers writes
        again = schedulers.read(tmp_path / "scheduler_config.json")
        assert torch.equal(table(again), table(schedule))
        assert again.prediction == options.get("prediction_type", "epsilon")


def test_the_class_that_needs_another_library_has_the_betas_of_its_defaults(tmp_path):
    schedule = schedulers.read(scheduler_config(tmp_path, "DPMSolverSDEScheduler"))
    torch.testing.assert_close(
        table(schedule), DDPMScheduler(beta_start=0.00085, beta_end=0.012).alphas_cumprod.double(), rtol=1e-6, atol=0
    )


# --- the images of diffusers' own loops ---

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # see test_ddim


@pytest.mark.parametrize("name", ["PNDMScheduler", "UniPCMultistepScheduler", "LCMScheduler"])
def test_a_vp_class_is_the_field_of_ddim_with_its_betas(tmp_path, name):
    network, scheduler = unet(), getattr(diffusers, name)(**SD)
    teacher = load(write(tmp_path, network, scheduler))
    stepper = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    stepper.set_timesteps(STEPS)
    alphas = stepper.alphas_cumprod.double()[stepper.timesteps]
    sigmas = torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1)])
    same(ours(teacher, sigmas / (1 + sigmas)), stock(network, stepper, noise()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_discrete(tmp_path, prediction):
    network, scheduler = unet(), EulerDiscreteScheduler(**SD, prediction_type=prediction, use_karras_sigmas=True)
    teacher = load(write(tmp_path, network, scheduler))
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    expected = stock(network, scheduler, (1 + sigmas[0].square()).sqrt().float() * noise())
    same(ours(teacher, sigmas / (1 + sigmas)), expected)


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_sigmas(tmp_path, solver):
    """Of first order, on the linear path, both are Euler."""
    network = unet()
    scheduler = solver(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0, solver_order=1)
    if solver is UniPCMultistepScheduler:
        scheduler.register_to_config(disable_corrector=list(range(STEPS)))
        scheduler.disable_corrector = list(range(STEPS))
    teacher = load(write(tmp_path, network, scheduler))
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    scheduler.timesteps = (1000 * sigmas[:-1]).float()  # it would round them
    scheduler.set_begin_index(0)
    same(ours(teacher, sigmas), stock(network, scheduler, noise()))


def inverted(shift: float) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(invert_sigmas=True, shift=shift)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_inverted_sigmas(tmp_path, shift):
    network, scheduler = unet(), inverted(shift)
    teacher = load(write(tmp_path, network, scheduler))
    scheduler.set_timesteps(STEPS)
    expected, grid = stock(network, scheduler, noise()), 1 - scheduler.sigmas.double()
    assert (grid[0], grid[-1]) == (1, 0)
    same(ours(teacher, grid), expected)
    plain = load(write(tmp_path / "plain", network, FlowMatchEulerDiscreteScheduler()))
    assert (ours(plain, grid) - expected).square().mean().sqrt() > 0.1, "the flag makes no difference here"


def test_a_student_starts_as_its_inverted_teacher_and_is_read_as_that(tmp_path):
    teacher = load(write(tmp_path / "teacher", unet(), inverted(1.0)))
    init = StudentInit(teacher, None, teacher.shape, None, 0, teacher)
    student, x, t = init.velocity_field().eval(), noise(), torch.tensor([0.0, 0.3, 1.0])
    with torch.no_grad():
        expected = teacher.field(x, t, {})
        torch.testing.assert_close(student(x, t, {}), expected)
        torch.testing.assert_close(init.flow_map().eval()(x, t, torch.zeros(3), {}), expected)
        loaded = load(write(tmp_path / "student", student.network, FlowMapEulerDiscreteScheduler()))
        torch.testing.assert_close(loaded.field(x, t, {}), expected)


def test_what_was_once_misread_is_another_teacher(tmp_path):
    """Pairs that were solved before invert_sigmas was honoured must not be taken for this teacher's."""
    folder = write(tmp_path, unet(), inverted(1.0))
    digest = load(folder).digest
    edit(folder / "scheduler" / "scheduler_config.json", invert_sigmas=False)
    plain = load(folder).digest
    assert digest != plain


@pytest.mark.parametrize("scheduler", [FlowMatchHeunDiscreteScheduler(shift=2.0), FlowMatchLCMScheduler()])
def test_other_classes_of_flow_matching(tmp_path, scheduler):
    scheduler.save_pretrained(tmp_path)
    assert schedulers.read(tmp_path / "scheduler_config.json") == LinearSchedule(1000.0)


def test_edm_by_another_solver(tmp_path):
    options = {"prediction_type": "v_prediction", "sigma_data": 0.7, "sigma_max": 60.0}
    EDMDPMSolverMultistepScheduler(**options).save_pretrained(tmp_path / "a")
    EDMEulerScheduler(**options).save_pretrained(tmp_path / "b")
    a, b = (schedulers.read(tmp_path / name / "scheduler_config.json") for name in "ab")
    assert a == b
    assert (a.sigma_data, a.sigma_min, a.sigma_max, a.prediction) == (0.7, 0.002, 60.0, "v_prediction")


# --- refusals ---

DDPM, FLOW, EDM = "DDPMScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        # classes: no near names among what is something else altogether
        ("EulerDiscrete", {}, "scheduler class EulerDiscrete is not supported; valid: DDIMParallelScheduler, "),
        (
            "IPNDMScheduler",
            {},
            "scheduler class IPNDMScheduler is not supported, because its networks predict by a rule of their own",
        ),
        ("OtherScheduler", {}, "scheduler class OtherScheduler is not supported; valid: "),
        (["DDPMScheduler"], {}, "scheduler class ['DDPMScheduler'] is not supported"),
        ("\x1b[31mX\n" + "x" * 500, {}, "scheduler class \ufffd[31mX xxx"),
        # what changes the path
        ("FlowMatchLCMScheduler", {"invert_sigmas": True}, "invert_sigmas=true changes the path, but FlowMatchLCM"),
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=true changes the path, but PNDM"),
        ("LMSDiscreteScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas=true changes the path, but LMS"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type='continuous'; valid: 'discrete'"),
        (DDPM, {"snr_shift_scale": 3.0}, "snr_shift_scale=3.0; valid: 1"),
        (DDPM, {"predict_epsilon": False}, "predict_epsilon=False; valid: True"),
        (DDPM, {"prediction_type": "flow_prediction"}, "valid only with use_flow_sigmas=true"),
        (DDPM, {"new_path": 1}, "new_path=1 is not a known scheduler option, so it may change"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "prediction_type=epsilon does not fit use_flow_sigmas"),
        (FLOW, {"prediction_type": "epsilon"}, "prediction_type=epsilon does not fit FlowMatchEulerDiscreteScheduler"),
        (EDM, {"prediction_type": "sample"}, "prediction_type=sample; valid on the edm path: epsilon, v_prediction"),
        # values
        (DDPM, {"beta_schedule": "quadratic"}, "beta_schedule=quadratic; valid for DDPMScheduler: linear, scaled_"),
        ("PNDMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid; valid for PNDMScheduler: linear, "),
        (DDPM, {"beta_start": float("nan")}, "beta_start=nan; valid: a finite number"),
        (DDPM, {"beta_end": 1.5}, "beta_end=1.5; valid: less than 1"),
        (DDPM, {"beta_start": -0.1}, "beta_start=-0.1; valid: greater than 0"),
        (DDPM, {"beta_start": "small"}, "beta_start='small'; valid: a valid number"),
        (
            DDPM,
            {"beta_end": 0.9},
            "betas from 0.0001 to 0.9 in 1000 steps: alphas_cumprod reaches 0 before the last step, so none of the "
            "data is left; check beta_start, beta_end and num_train_timesteps",
        ),
        (DDPM, {"beta_end": 10**400}, "beta_end=1"),
        (DDPM, {"num_train_timesteps": 0}, "num_train_timesteps=0; valid: greater than or equal to 1"),
        (DDPM, {"num_train_timesteps": 1}, "num_train_timesteps=1; valid: 2 or more"),
        (DDPM, {"num_train_timesteps": -5}, "num_train_timesteps=-5; valid: "),
        (DDPM, {"num_train_timesteps": "many"}, "num_train_timesteps='many'; valid: a valid integer"),
        (DDPM, {"num_train_timesteps": 10**10}, "num_train_timesteps=10000000000; valid: less than or equal to"),
        (DDPM, {"trained_betas": [0.1, 0.2]}, "trained_betas has 2 numbers; valid: num_train_timesteps=1000"),
        (DDPM, {"trained_betas": [0.1, "x"]}, "trained_betas.1='x'; valid: a valid number"),
        (
            DDPM,
            {"trained_betas": [0.5] * 1000},
            "the 1000 trained_betas, from 0.5 to 0.5: alphas_cumprod reaches 0 before the last step, so none of the "
            "data is left; check trained_betas",
        ),
        (
            DDPM,
            {"beta_start": 1e-9, "beta_end": 1e-8},
            "alphas_cumprod does not decrease at every step, so some steps add no noise",
        ),
        (DDPM, {"clip_sample": "yes"}, "clip_sample='yes'; valid: a valid boolean"),
        (DDPM, {"prediction_type": "noise"}, "prediction_type='noise'; valid: 'epsilon', 'sample', 'v_prediction' or"),
        (FLOW, {"shift": "three"}, "shift='three'; valid: a valid number"),
        (FLOW, {"shift": 0}, "shift=0; valid: greater than 0"),
        (FLOW, {"num_train_timesteps": 0}, "num_train_timesteps=0; valid: "),
        (EDM, {"sigma_min": "small"}, "sigma_min='small'; valid: a valid number"),
        (EDM, {"sigma_data": 0}, "sigma_data=0; valid: greater than or equal to 0.000001"),
        (EDM, {"sigma_min": 1e-300}, "sigma_min=1e-300; valid: greater than or equal to 0.000001"),
        (EDM, {"sigma_min": 90.0}, "sigma_min=90; valid: less than sigma_max=80"),
        (EDM, {"sigma_max": float("inf")}, "sigma_max=inf; valid: "),
        ("ScoreSdeVeScheduler", {"sigma_min": 2000.0}, "sigma_min=2000; valid: less than sigma_max=1348"),
    ],
)
def test_a_scheduler_config_that_cannot_be_read_says_which_key(tmp_path, name, options, said):
    path = scheduler_config(tmp_path, name, **options)
    with pytest.raises(InputError) as error:
        schedulers.read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 1200
    assert "\n" not in str(error.value) and "did you mean" not in str(error.value)


def test_old_and_foreign_keys_that_say_nothing_of_the_path_are_let_through(tmp_path):
    """As checkpoints of the first versions have them, and pipelines whose scheduler was replaced."""
    old = {"tensor_format": "pt", "timestep_values": None, "predict_epsilon": True, "whatever": None}
    assert schedulers.read(scheduler_config(tmp_path, DDPM, **old)).prediction == "epsilon"
    DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").save_pretrained(tmp_path)
    edit(tmp_path / "scheduler_config.json", _class_name=FLOW)
    assert '"lambda_min_clipped": -Infinity' in (tmp_path / "scheduler_config.json").read_text()
    assert schedulers.read(tmp_path / "scheduler_config.json") == LinearSchedule(1000.0)


def test_an_override_of_another_kind_or_prediction_is_refused(tmp_path):
    folder = write(tmp_path / "teacher", unet(), DDIMScheduler(**SD))
    others = {
        "flow": FlowMatchEulerDiscreteScheduler(),
        "edm": EDMEulerScheduler(),
        "v": DDPMScheduler(prediction_type="v_prediction"),
        "betas": PNDMScheduler(beta_end=0.01),
    }
    given = {name: str(tmp_path / name) for name in others}
    for name, scheduler in others.items():
        scheduler.save_pretrained(given[name])
    said = f"teacher.scheduler={given['flow']} describes the linear path, but the checkpoint's own scheduler ("
    refused(folder, said, "the vp path; remove teacher.scheduler", scheduler=given["flow"])
    refused(folder / "unet", said, scheduler=given["flow"])
    refused(folder, "describes the edm path, but", scheduler=given["edm"])
    refused(folder, "predicts v_prediction, but", "one that predicts epsilon; remove teacher", scheduler=given["v"])
    assert load(folder, scheduler=given["v"], prediction="v_prediction").field.prediction == "v_prediction"
    assert load(folder, scheduler=given["betas"]).field.prediction == "epsilon"
    DDIMScheduler(num_train_timesteps=500).save_pretrained(tmp_path / "short")
    said = "describes num_train_timesteps=500, but the checkpoint's own scheduler ("
    refused(
        folder,
        said,
        ") num_train_timesteps=1000; remove teacher.scheduler, or correct it",
        scheduler=str(tmp_path / "short"),
    )
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="IPNDMScheduler")
    refused(folder, "one that predicts epsilon", scheduler=given["flow"])
    flow = write(tmp_path / "inverted", unet(), inverted(1.0))
    refused(
        flow,
        "disagree on the scale or direction of time, or on the sign of the output; remove teacher.scheduler",
        scheduler=given["flow"],
    )


def test_an_override_that_contradicts_what_the_own_scheduler_leaves_out_is_refused(tmp_path):
    """diffusers' defaults: a noise prediction, and data of deviation 0.5."""
    folder = write(tmp_path / "teacher", unet(), DDPMScheduler())
    own = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(own.read_text())
    del config["prediction_type"]
    own.write_text(json.dumps(config))
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    refused(
        folder, "predicts v_prediction, but", "one that predicts epsilon; remove teacher", scheduler=str(tmp_path / "v")
    )
    edm = write(tmp_path / "edm", unet(), EDMEulerScheduler())
    EDMEulerScheduler(sigma_data=1.0).save_pretrained(tmp_path / "other")
    said = "describes sigma_data=1.0, but the checkpoint's own scheduler ("
    refused(edm, said, ") sigma_data=0.5; remove teacher.scheduler, or correct it", scheduler=str(tmp_path / "other"))


def test_an_option_that_is_not_known_is_repaired_by_an_override_that_agrees_in_the_rest(tmp_path):
    folder = write(tmp_path / "teacher", unet(), DDPMScheduler())
    edit(folder / "scheduler" / "scheduler_config.json", new_path=1)
    refused(
        folder, "new_path=1 is not a known scheduler option, so it may change the path; if it does not, remove "
            "it, or set teacher.scheduler to the folder of a config without it",
    )  # fmt: skip
    DDPMScheduler().save_pretrained(tmp_path / "same")
    assert load(folder, scheduler=str(tmp_path / "same")).field.prediction == "epsilon"
    DDPMScheduler(prediction_type="sample").save_pretrained(tmp_path / "other")
    refused(folder, "predicts sample, but", "one that predicts epsilon", scheduler=str(tmp_path / "other"))
