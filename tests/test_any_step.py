"""Numbers of steps: every one that a student allows, which ones it was trained for, and what is said of others."""

import json
from pathlib import Path

import pytest
import torch
from commands import command
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler
from pydantic import ValidationError
from runs import CARD
from safetensors.torch import load_file
from test_export import OWN, describe, make
from test_stages import GAUSSIAN, PAIRS, REFLOW, go, spec

from distill.core.errors import InputError
from distill.exchange import step_numbers, student_card
from distill.execution import preflight
from distill.flow.times import uniform_grid
from distill.spec.kinds import SAMPLERS
from distill.spec.resolved import resolve
from distill.students import sampling
from distill.students.exporting import export
from distill.testing import exact
from recipes.reflow import reflow
from recipes.score import dmd2
from recipes.shortcut import cmt, flow_map, meanflow, progressive, shortcut

KINDS = {"euler": "mlp", "same_noise": "mlp-same-noise", "jump": "mlp-classes-jump", "renoise": "mlp-renoise"}
KINDS |= {"accelerated": "mlp-accelerated"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def drawn(capfd, *options):
    return command(capfd, "sample", "s", "--out", "a.safetensors", "--count", "3", *options)


@pytest.mark.parametrize("sampler", [name for name, each in SAMPLERS.items() if not each.is_fitted])
def test_every_number_of_steps_is_sampled_where_none_is_excluded(capfd, here, sampler):
    """From the same noise as by the sampler itself, without a word on stderr."""
    student, card = make(KINDS[sampler])
    assert card.sampler == sampler
    export(student, here / "s", card)
    assert "| steps | any number is possible |" in (here / "s" / "README.md").read_text()
    for steps in (1, 2, 3, 5, 7):
        done = drawn(capfd, "--steps", str(steps))
        assert (done.code, done.err) == (0, ""), done.err
        found = load_file("a.safetensors")
        cond = {} if "class_labels" not in found else {"class_labels": found["class_labels"]}
        noises, times = [found["latents"], *found.get("fresh", ())], uniform_grid(steps)
        expected = sampling.by_sampler(student.eval(), sampler, noises[0], times, cond, noises[1:])
        assert torch.equal(found["samples"], expected), steps


@pytest.mark.parametrize(("kind", "made"), [("mlp-jump-own", "1, 2 and 4"), ("mlp-bns", "1, 2 and 4")])
def test_a_number_of_steps_without_times_is_refused_with_the_reason(capfd, here, kind, made):
    student, card = make(kind)
    export(student, here / "s", card)
    done = drawn(capfd, "--steps", "3")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: --steps: this student supports only {made} steps, not 3, because it was made for the times of these "
        "steps alone\n"
    )
    assert not (here / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("trained", "words", "fewest", "measured"),
    [
        (2, "2 steps", 2, [2]),
        ([1, 2, 4, 8], "1, 2, 4 and 8 steps", 1, [1, 2, 4]),
        ([8, 16], "8 and 16 steps", 8, [8, 16]),
    ],
)
def test_another_number_than_it_was_trained_for_is_said_once(capfd, here, trained, words, fewest, measured):
    student, card = make("mlp-classes-jump")
    export(student, here / "s", card.model_copy(update={"trained_steps": trained}))
    found, readme = student_card.read(here / "s"), (here / "s" / "README.md").read_text()
    assert json.loads((here / "s" / "distill.json").read_text())["trained_steps"] == trained
    assert found.made_for == found.trained_for == ([trained] if trained == 2 else trained)
    assert (
        f"| steps | trained for {words}; other numbers are possible, but its training did not aim at them |" in readme
    )
    assert f"num_inference_steps={fewest}, " in readme
    default = drawn(capfd)
    assert (default.code, default.err) == (0, "") and f"3 samples at {fewest} step" in default.out
    other = drawn(capfd, "--steps", "3")
    assert other.code == 0 and "3 samples at 3 steps" in other.out
    assert other.err == (
        f"warning: this student was trained for {words}, and is sampled in 3 steps; that is possible, but its training "
        "did not aim at it\n"
    )
    assert step_numbers.to_measure(found) == measured


def test_it_is_measured_where_it_was_trained(capfd, here):
    student, card = make("mlp-renoise")
    export(student, here / "s", card.model_copy(update={"trained_steps": [2, 8]}))
    asked = ["eval", "s", "--teacher", str(GAUSSIAN), "--data", "none", "--samples", "16", "--teacher-steps", "2"]
    done = command(capfd, *asked, "--out", "e", "--json")
    assert done.code == 0 and "trained for" not in done.err, done.err
    assert [each["steps"] for each in json.loads(done.out)["rows"] if each["role"] == "student"] == [2]
    done = command(capfd, *asked, "--out", "f", "--steps", "1,2,3")
    assert done.code == 0 and done.err.count("trained for 2 and 8 steps, and is sampled in 1 and 3 steps") == 1


def test_cards_say_only_what_is_possible():
    assert CARD.trained_for == [] and CARD.made_for == [1, 2, 4]
    assert '"trained_steps"' not in student_card.to_json(CARD), "as in cards of earlier versions"
    old = student_card.to_json(CARD.model_copy(update={"trained_steps": 2}))
    assert student_card.parse(old.encode(), "a").trained_for == [2]
    own = describe((2,), None, t_grids=OWN)
    assert own.made_for == [1, 2, 4]
    content = json.loads(own.model_dump_json())
    assert student_card.StudentCard.model_validate(content | {"trained_steps": [2, 4]}).made_for == [2, 4]
    for wrong, message in (
        ([2, 3], "trained_steps: 3 given; valid, by t_grids: 1, 2 and 4 steps"),
        ([4, 2], r"trained_steps: \[4, 2\] given; valid: at most 100 numbers, which increase"),
        (0, "trained_steps"),
    ):
        with pytest.raises(ValidationError, match=message):
            student_card.StudentCard.model_validate(content | {"trained_steps": wrong})


def test_recipes_say_what_they_train_for():
    def said(recipe):
        return sampling.trained_steps(recipe, sampling.own_grids(recipe, None))

    assert said(dmd2.Recipe(dmd2.Config(steps=3), None)) == [3]
    assert said(shortcut.Recipe(shortcut.Config(grid=8), None)) == [1, 2, 4, 8]
    assert said(meanflow.Recipe(meanflow.Config(), None)) == [], "any"
    made = progressive.Recipe(progressive.Config(steps=4), None)
    assert said(made) == [] and [*sampling.own_grids(made, None)] == [4], "and no other is possible"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0", "trained_steps: 0 given; valid: whole numbers above 0, or None"),
        ("[1.5]", r"trained_steps: \[1.5\] given; valid: whole numbers"),
        ("[2, 1]", r"trained_steps: \[2, 1\] given; valid: at most 100 numbers, which increase"),
    ],
)
def test_a_recipe_that_says_nonsense_is_refused_before_the_run(tmp_path, given, message):
    (tmp_path / "own.py").write_text(recipe_text(given))
    own = spec(pairs=PAIRS, own={**REFLOW, "recipe": "./own.py"})
    with pytest.raises(InputError, match=f"^stages.own: the recipe's {message}"):
        preflight.check(resolve(own, tmp_path))


def recipe_text(given):
    sampler = '    sampler = "euler"\n'
    return Path(reflow.__file__).read_text().replace(sampler, f"{sampler}    trained_steps = {given}\n")


def test_what_a_recipe_trains_for_is_in_the_card_of_its_student(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "own.py").write_text(recipe_text("(2, 4)"))
    given = spec(pairs=PAIRS, own={**REFLOW, "recipe": "./own.py"}, none=REFLOW)
    preflight.check(resolve(given, tmp_path / "r"))
    run = go(tmp_path, given)
    assert student_card.verify(run.student("own")).trained_for == [2, 4]
    assert student_card.verify(run.student("none")).trained_for == []


@pytest.mark.parametrize("recipe", [cmt, flow_map, meanflow])
def test_a_map_that_was_trained_for_the_data_alone_is_sampled_by_jumps_to_it(recipe):
    """It is exact at s = 0 and wrong elsewhere. Then its samples have the distribution of the data in any N steps."""

    def to_data(x_t, t, s, cond):
        return exact.FLOW_MAP(x_t, t, torch.zeros_like(s), cond)

    sampler = recipe.Recipe(recipe.Config(to_data=1), None).sampler
    assert (recipe.Recipe.sampler, sampler) == ("jump", "renoise")
    generator, count = torch.Generator().manual_seed(0), 40_000
    for steps in (1, 2, 5):
        noise, *fresh = torch.randn(
            1 + sampling.num_fresh(sampler, steps), count, 3, generator=generator, dtype=torch.float64
        )
        found = sampling.by_sampler(exact.Network(to_data), sampler, noise, uniform_grid(steps), {}, fresh)
        assert ((found.mean(0) - exact.MEAN).abs() < 4 * exact.STD / count**0.5).all()
        assert ((found.std(0) / exact.STD - 1).abs() < 4 / (2 * count) ** 0.5).all()
    wrong = sampling.by_sampler(exact.Network(to_data), "jump", noise, uniform_grid(5), {}, [])
    assert ((wrong.std(0) / exact.STD - 1).abs() > 0.05).any()


@pytest.mark.parametrize("kind", ["unet-jump", "mlp-classes-jump", "mlp-jump-own"])
def test_the_scheduler_of_diffusers_makes_the_steps_of_a_flow_map(capfd, here, kind):
    """Network and scheduler of the folder in a plain loop give the samples of `distill sample`, up to rounding."""
    student, card = make(kind)
    export(student, here / "s", card)
    pipeline = DiffusionPipeline.from_pretrained(here / "s", trust_remote_code=True)
    scheduler = pipeline.scheduler
    assert type(scheduler) is FlowMapEulerDiscreteScheduler
    for steps in (1, 2, 4):
        assert drawn(capfd, "--steps", str(steps)).code == 0
        found = load_file("a.safetensors")
        x, labels, own = found["latents"], found.get("class_labels"), card.t_grids.get(steps)
        scheduler.set_timesteps(steps, sigmas=own and own[:-1])
        for i, n in enumerate(scheduler.timesteps):
            end = 1000 * scheduler.sigmas[i + 1]
            with torch.no_grad():
                u = pipeline.unet(x, n, end, class_labels=labels).sample
            x = scheduler.step(u, n, x).prev_sample
        assert (x - found["samples"]).abs().max() <= 1e-5 * found["samples"].abs().max(), steps
