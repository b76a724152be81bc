"""The facts about published models, against the classes of diffusers and the conventions by which these are called."""

from pathlib import Path

import diffusers
import pytest
import torch

from distill.core.errors import InputError
from distill.plans import facts
from distill.teachers.architectures import known
from distill.teachers.convention import Asked

MODELS = [
    "flux.1-dev",
    "flux.2-dev",
    "qwen-image",
    "sd3.5-medium",
    "sdxl",
    "wan2.1-1.3b",
    "wan2.1-14b",
    "z-image",
]
# The names under which networks take the embedding of a whole prompt.
POOLED = {"text_embeds", "pooled_projections"}


def on_meta(model: facts.ModelFacts) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(diffusers, model.network)(**model.config)


def test_every_model_is_known_by_its_name():
    assert facts.names() == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_the_network_has_as_many_numbers_as_published(name):
    model = facts.facts_of(name)
    stored = sum(each.numel() for each in on_meta(model).state_dict().values())
    assert stored == pytest.approx(model.elements, rel=0.01)


@pytest.mark.parametrize("name", [each for each in MODELS if each != "flux.2-dev"])
def test_exact_published_numbers_are_met_exactly(name):
    """Of FLUX.2 dev, only a rounded number is published."""
    model = facts.facts_of(name)
    assert sum(each.numel() for each in on_meta(model).state_dict().values()) == model.elements


@pytest.mark.parametrize("name", MODELS)
def test_the_convention_calls_the_network_with_these_shapes(name):
    model = facts.facts_of(name)
    network, convention = on_meta(model), known()[model.network]
    asked = convention.latent_shape(network.config, Path("config.json"), None)
    assert list(asked) == model.sample
    frames, side = convention.default_factors
    *first, height, width = model.sample[1:]
    assert [*((each - 1) * frames + 1 for each in first), height * side, width * side] == model.pixels
    fields = {key: field.shape for key, field in convention.fields(network.config).items()}
    assert (None, model.text_width) in fields.values()
    pooled = [shape for key, shape in fields.items() if key in POOLED]
    assert pooled == ([] if model.pooled_width is None else [(model.pooled_width,)])
    constants = convention.constants(network.config, Asked(tuple(model.pixels)))
    assert set(constants) <= {"guidance", "time_ids"}


@pytest.mark.parametrize("name", MODELS)
def test_every_fact_names_its_source(name):
    model = facts.facts_of(name)
    pipeline = model.call_source.partition(", ")[2].partition(":")[0]
    assert pipeline in known()[model.network].pipelines and f" {model.tokens} tokens" in model.call_source
    assert len(model.config_source) > 20 and len(model.elements_source) > 20


def test_an_unknown_model_is_refused():
    with pytest.raises(InputError, match="no facts about a model 'flux1-dev' are known; did you mean 'flux.1-dev'?"):
        facts.facts_of("flux1-dev")
