"""Specs: strict validation, clear errors, and output that reads back as the same spec."""

import json

import pytest
from pydantic import BaseModel

from distill.core import yamltext
from distill.core.errors import InputError
from distill.spec import model, overrides, presets, schema, specfile
from distill.spec.model import CheckpointTeacher, RunSpec, is_hub_id

TRAIN = {"kind": "train", "recipe": "reflow/reflow", "images": 128}


def small(**stages):
    return {"name": "x", "stages": stages or {"a": TRAIN}}


def message(content):
    with pytest.raises(InputError) as caught:
        specfile.validate(content, "f")
    return str(caught.value)


# --- YAML ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1e6", 1_000_000),
        ("1_000", 1000),
        ("012", 12),
        ("2.0", 2.0),
        (".5", 0.5),
        ("-3", -3),
        ("1.5e3", 1500.0),
        ("yes", "yes"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        (".nan", ".nan"),
        (".inf", ".inf"),
        ("~", None),
        ("true", True),
        ("1.2.3", "1.2.3"),
    ],
)
def test_yaml_is_version_1_2(text, value):
    read = yamltext.parse(f"x: {text}", "f")["x"]
    assert read == value
    assert type(read) is type(value)
    assert yamltext.parse(yamltext.dump({"x": read}), "f") == {"x": value}


@pytest.mark.parametrize("text", ["1e-3", "yes", "true", "12", "null", "", "~", "1_0", "a: b", "# no", "<<", ".5", "é"])
def test_text_stays_text(text):
    assert yamltext.parse(yamltext.dump({"x": [text]}), "f") == {"x": [text]}
    assert yamltext.parse(yamltext.dump_line({"x": [text]}), "f") == {"x": [text]}


def test_a_key_stands_once():
    with pytest.raises(InputError, match=r"^f: line 3: key 'a' appears twice$"):
        yamltext.parse("a: 1\nb: 2\na: 3\n", "f")


def test_a_spec_cannot_hold_itself():
    with pytest.raises(InputError, match="^f: line 2: a value contains itself$"):
        yamltext.parse("name: x\nstages: &s\n  a: *s\n", "f")


# --- the model ---


def test_every_field_says_what_it_means():
    models = [m for m in vars(model).values() if isinstance(m, type) and issubclass(m, BaseModel)]
    assert len(models) > 15
    for each in models:
        for name, field in each.model_fields.items():
            one_model = schema.models(field.annotation) and len(schema.models(field.annotation)) == 1
            assert field.description or name == "kind" or one_model, f"{each.__name__}.{name} says nothing"
        assert each.__doc__, each


def test_types_are_strict():
    assert "seed: '3' given; must be a whole number" in message({**small(), "seed": "3"})
    assert "seed: true given; must be a whole number" in message({**small(), "seed": True})
    assert "stages.a.images: 1.5 given; must be a whole number" in message(small(a={**TRAIN, "images": 1.5}))
    assert specfile.validate(small(a={**TRAIN, "export": 8}), "f").stages["a"].export == 8.0


def test_mistakes_are_listed_one_per_line():
    content = {
        "name": "a b",
        "data": {"kind": "digit"},
        "lunch": 1,
        "stages": {"a": {"kind": "train", "imges": 3}, "b": 5},
    }
    assert message(content).splitlines() == [
        "f: 7 mistakes",
        "  name: 'a b' given; must be 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit",
        "  data: kind is 'digit'; did you mean 'digits'? "
        "valid: checkerboard, digits, hf, images, latents, mnist, none, prompts, tars, videos",
        "  stages.a.recipe: missing (name of a recipe, like reflow/reflow (see `distill recipes`), or your own file, "
        "like ./mine.py)",
        "  stages.a.images: missing (training length in images)",
        "  stages.a.imges: unknown key; did you mean 'images'? valid: batch_size, checkpoint, dropout, "
        "ema_half_lives, ema_lengths, ema_snapshots, export, guidance, images, init, kind, lora, network, optimizer, "
        "options, pairs, precision, recipe, student, teacher",
        "  stages.b: 5 given; must be a mapping",
        "  lunch: unknown key; did you mean 'launch'? valid: compile, data, launch, name, numerics, seed, stages, "
        "teacher",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"export": "ema"}, "stages.a.export: 'ema' given; must be 'raw' or a number"),
        ({"export": -1}, "stages.a.export: -1 given; must be 'raw' or greater than 0"),
        ({"precision": "fp64"}, "stages.a.precision: 'fp64' given; must be 'fp32' or 'bf16'"),
        (
            {"network": {"kind": "unet", "channels": [8, 0]}},
            "stages.a.network.channels.1: 0 given; must be greater than 0",
        ),
        ({"network": {"kind": "mpl"}}, "stages.a.network: kind is 'mpl'; did you mean 'mlp'? valid: mlp, unet"),
        ({"network": {"width": 3}}, "stages.a.network: kind is missing; valid: mlp, unet"),
        ({"optimizer": {"betas": [0.9]}}, "stages.a.optimizer.betas.1: missing"),
        ({"optimizer": {"betas": [0.9, 2]}}, "stages.a.optimizer.betas.1: 2 given; must be at most 1"),
        ({"options": [1]}, "stages.a.options: [1] given; must be a mapping"),
        ({"teacher": "a b"}, f"stages.a.teacher: 'a b' given; must be {schema.NAME_RULE}"),
    ],
)
def test_each_mistake_has_one_message(change, said):
    assert message(small(a={**TRAIN, **change})) == f"f: {said}"


def test_stages_may_be_called_like_their_kinds_and_fields():
    content = small(train={**TRAIN, "imges": 1}, pairs={"kind": "pairs", "pairs": 1, "count": 1})
    said = message(content).splitlines()
    assert said[1].startswith("  stages.train.imges: unknown key; did you mean 'images'?")
    assert said[2].startswith("  stages.pairs.pairs: unknown key;")


def test_resolved_reads_back_to_the_same_spec():
    for name in presets.names():
        source = specfile.load(presets.find(name))
        again = specfile.validate(yamltext.parse(specfile.resolved(source.spec), "f"), "f")
        assert again == source.spec
        assert again.digest() == source.spec.digest()


def test_digest_leaves_out_the_name_and_launch_only():
    a = specfile.validate(small(), "f")
    assert a.digest() == a.model_copy(update={"name": "y"}).digest()
    assert a.digest() == specfile.validate({**small(), "launch": {"micro_batch": 1}}, "f").digest()
    assert a.digest() != specfile.validate({**small(), "seed": 1}, "f").digest()


def test_differences_name_fields_and_values():
    a = specfile.validate(small(), "f")
    b = specfile.validate({**small(a={**TRAIN, "images": 256}), "seed": 1}, "f")
    assert specfile.differences(a, b) == ["seed: 0 -> 1", "stages.a.images: 128 -> 256"]
    assert specfile.differences(a, a) == []


def test_paths_are_looked_up_beside_the_spec_then_here(tmp_path, monkeypatch):
    (tmp_path / "specs" / "teacher").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "images").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    content = small() | {
        "teacher": {"kind": "diffusers", "path": "teacher"},
        "data": {"kind": "images", "path": "images", "size": 8},
    }
    path = tmp_path / "specs" / "s.yaml"
    path.write_text(json.dumps(content))
    found = specfile.load(path).spec
    assert found.teacher.path == str(tmp_path / "specs" / "teacher")
    assert found.data.path == str(tmp_path / "here" / "images")
    hub = specfile.load(path, ["teacher.path=google/ddpm-cifar10-32"]).spec
    assert hub.teacher.path == "google/ddpm-cifar10-32"


# --- overrides ---


def changed(*texts, content=None):
    return overrides.apply(content or small(), [specfile.change_from(text) for text in texts])


def test_overrides_set_values_lists_defaults_and_options():
    done = changed(
        "stages.a.images=1e3",
        "stages.a.optimizer.betas.1=0.5",
        "stages.a.options.deep.er=[1, x]",
        "data={kind: digits}",
        "stages.a.network.kind=mlp",
        "stages.b={kind: pairs, count: 3}",
        "stages.a.teacher=",
    )
    stage = done["stages"]["a"]
    assert stage["images"] == 1000
    assert stage["optimizer"]["betas"] == [0.9, 0.5]
    assert stage["options"] == {"deep": {"er": [1, "x"]}}
    assert stage["network"] == {"kind": "mlp"}
    assert stage["teacher"] is None
    assert done["data"] == {"kind": "digits"}
    assert list(done["stages"]) == ["a", "b"]
    assert small() == {"name": "x", "stages": {"a": TRAIN}}, "the content given is not touched"


def test_later_overrides_win():
    assert changed("seed=1", "seed=2")["seed"] == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sed=1", "sed=1: the spec has no 'sed'; did you mean 'seed'? valid: compile, data, launch, name, numerics, "
         "seed, stages, teacher"),
        ("stages.b.images=1", "stages.b.images=1: stages has no 'b'; valid: a"),
        ("stages.a.optimizer.beta.0=1", "stages.a.optimizer.beta.0=1: stages.a.optimizer has no 'beta'; did you mean "
         "'betas'? valid: betas, clip, decay, eps, lr, momentum, name, warmup_images, weight_decay"),
        ("stages.a.optimizer.betas.2=1", "stages.a.optimizer.betas.2=1: stages.a.optimizer.betas has 2 items; "
            "'2' must be one of 0 to 1"),
        ("seed.x=1", "seed.x=1: seed is 0, which has no key 'x'"),
        ("seed", "'seed' is not a change of the spec; write path=value, like stages.teach.images=64000"),
        ("a..b=1", "'a..b=1' is not a change of the spec; write path=value, like stages.teach.images=64000"),
    ],
)  # fmt: skip
def test_overrides_name_what_is_wrong(text, said):
    with pytest.raises(InputError) as caught:
        changed(text)
    assert str(caught.value) == said


def test_an_override_must_be_yaml():
    with pytest.raises(InputError, match=r"^seed=\{: not YAML: "):
        changed("seed={")


# --- what `init` writes ---


def test_annotated_presets_read_back_to_the_same_digest():
    for name in presets.names():
        source = specfile.load(presets.find(name))
        text = presets.annotated(source.spec, source.base)
        again = specfile.validate(yamltext.parse(text, "f"), "f")
        assert again == source.spec
        assert again.digest() == source.spec.digest()


def test_annotated_says_every_field_with_its_meaning():
    source = specfile.load(presets.find("digits"))
    text = presets.annotated(source.spec, source.base)
    content = yamltext.parse(text, "f")
    assert content == source.spec.model_dump(mode="json"), "every field stands there, defaults included"
    flat = " ".join(text.replace("#", " ").split())
    for stage in source.spec.stages.values():
        for name, field in type(stage).model_fields.items():
            if field.description and name != "options":
                assert " ".join(field.description.split()) in flat, name
    assert "label_dropout: 0.1" in text, "a recipe's options that are not set stand there as comments"
    assert "one of uniform, logit_normal" in text
    assert max(map(len, text.splitlines())) <= 130


def test_presets_say_how_to_run_them():
    for name in presets.names():
        first, *rest = presets.head(name)
        on_cluster = specfile.load(presets.find(name)).spec.launch.slurm.gpus_per_node > 0  # see test_presets_for_gpus
        command = "compare" if name.endswith(("-family", "-flow-maps")) else "submit" if on_cluster else "run"
        assert first.startswith(f"distill {command} {name}"), name
        assert on_cluster or any("minute" in line for line in rest), f"{name}: say how long it takes"


def test_comments_of_a_preset_belong_to_the_field_beside_or_below_them(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "find", lambda name: tmp_path / f"{name}.yaml")
    (tmp_path / "mine.yaml").write_text(
        "# distill run mine\n# What it makes,\n# in two lines.\n#\n# More.\nname: mine  # ours\nstages:\n"
        "  # one\n  teach:\n    # two lines\n    # of it\n    images: 1  # and beside it\n    # the optimizer\n"
        "    optimizer: {lr: 1e-3}\n    batch_size: 2\nseed: 3  # last\n"
    )
    assert presets.summary("mine") == "What it makes, in two lines."
    assert presets.head("mine")[-2:] == ["", "More."]
    assert presets.notes("mine") == {
        "name": "ours",
        "stages.teach": "one",
        "stages.teach.images": "two lines of it and beside it",
        "stages.teach.optimizer": "the optimizer",
        "seed": "last",
    }


def test_unknown_preset():
    with pytest.raises(
        InputError,
        match=r"^there is no preset 'digit'; did you mean 'digits'\? valid: checkerboard, cifar10-ect, digi",
    ):
        presets.find("digit")


def test_run_spec_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunSpec.model_validate(small()).seed = 3


def test_a_teacher_by_its_path_is_a_checkpoint():
    """As README.md has it: the kind may be left out, and mistakes are those of a checkpoint."""
    found = specfile.validate(small(a={**TRAIN}) | {"teacher": {"path": "org/name"}}, "f")
    assert found.teacher == CheckpointTeacher(kind="diffusers", path="org/name")
    with pytest.raises(InputError, match=r"f: teacher\.revison: unknown key; did you mean 'revision'"):
        specfile.validate(small(a={**TRAIN}) | {"teacher": {"path": "org/name", "revison": "x"}}, "f")
    with pytest.raises(InputError, match="f: teacher: kind is missing; valid: diffusers, gaussian, mixture"):
        specfile.validate(small(a={**TRAIN}) | {"teacher": {"mean": [1.0]}}, "f")


def test_a_hub_id_is_an_organisation_and_a_name_that_are_no_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("google/ddpm-cat-256", "a/b", "my_org/x.y", "0a/1-b"):
        assert is_hub_id(path), path
    for path in ("ddpm", "a/b/c", "/a", "a/", "./a", "~/a", "../a", "a/b\n", "a b/c", "é/b"):
        assert not is_hub_id(path), path
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_hub_id("a/b")
