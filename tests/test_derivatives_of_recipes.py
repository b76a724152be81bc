"""Which recipes take forward-mode derivatives, with which options: they say so, and are refused where none can be."""

from typing import Literal, get_args, get_origin

import pytest
import torch
from pydantic import ValidationError
from test_conformance import ALL
from test_workflow import UNET, images, mistakes

from distill import testing
from distill.flow import autodiff
from distill.spec import registry
from distill.testing.training import train

REFUSED = "uses forward-mode derivatives (jvp), which do not work with launch.zero_stage: 3: gathering the weights of "
RECIPES = registry.names()


def configs(name):
    """The options of the recipe's tests, and each with one more that has named values set to one of them."""
    subject, module = ALL[name], ALL[name].module
    yield dict(subject.options)
    for field, about in module.Config.model_fields.items():
        named = [each for each in (about.annotation, *get_args(about.annotation)) if get_origin(each) is Literal]
        for value in dict.fromkeys([value for each in named for value in get_args(each)]):
            options = {**subject.options, field: value}
            try:
                module.Config(**options)
            except ValidationError:  # it needs another option, too, or has no effect with the others
                continue
            if value is not None and options != subject.options:
                yield options


LATE = {"shortcut/alphaflow": {"window_end": 1e-6}}  # takes derivatives in the last phase of a training only
OPTIONS = {name: [*configs(name)] for name in RECIPES}
JVP = {name: ["jvp" in ALL[name].module.Config(**each).needs for each in OPTIONS[name]] for name in RECIPES}
CHANGING = [name for name in RECIPES if any(JVP[name])]


def test_the_options_change_what_is_needed():
    assert {"consistency/scm", "shortcut/meanflow", "shortcut/flow_map"} <= set(CHANGING)
    assert all(not all(JVP[name]) for name in CHANGING), "each also works without forward-mode derivatives"


def forward_modes(name, options, folder, monkeypatch):
    """How many forward-mode derivatives a short training takes."""
    autodiff._load_rules()
    taken, jvp = [], torch.func.jvp

    def counted(*args, **kwargs):
        taken.append(1)
        return jvp(*args, **kwargs)

    monkeypatch.setattr(torch.func, "jvp", counted)
    subject = testing.Subject(name, options, times=ALL[name].times, base=ALL[name].base)
    train(subject, folder)
    return len(taken)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_needs_forward_mode_exactly_if_it_takes_such_derivatives(name, tmp_path, monkeypatch):
    """With all options for those that have it with any; with the options of their tests for the others."""
    cases = [*zip(OPTIONS[name], JVP[name], strict=True)][: None if name in CHANGING else 1]
    for i, (options, needed) in enumerate(cases):
        with monkeypatch.context() as context:
            found = forward_modes(name, {**options, **LATE.get(name, {})}, tmp_path / str(i), context)
        assert (found > 0) == needed, options


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_refused_before_the_run_where_weights_are_divided(name):
    for options, needed in zip(OPTIONS[name], JVP[name], strict=True):
        for stage, refused in ((2, False), (3, needed)):
            content = images(r={"kind": "train", "recipe": name, "network": UNET, "images": 1280, "options": options})
            said = mistakes({**content, "launch": {"zero_stage": stage}})
            assert any(REFUSED in each for each in said) == refused, options
