"""recipes/README.md agrees with the recipes' docstrings, and `distill recipes NAME` shows the cost of an update."""

import json
import os

import pytest
from commands import command
from programs import catalogue

from distill.core.errors import InputError
from distill.launch import snapshot
from distill.spec import presets, registry, schema
from recipes.reflow import one_step


def test_the_generated_parts_of_the_readme_are_up_to_date():
    text = catalogue.README.read_text()
    assert text == catalogue.generated(text), "run: python -m tests.programs.catalogue"
    assert all(f"| `{name}` |" in text for name in registry.names())


def test_every_recipe_of_ours_has_a_measured_cost(capfd):
    costs = json.loads((registry.package_folder() / registry.COSTS).read_text())
    assert list(costs) == registry.names() and costs["pretrain/flow_matching"] == 1
    assert all(cost >= 0.5 for cost in costs.values())
    shown = command(capfd, "recipes", "score/dmd2").out
    assert f"cost of one student update: {costs['score/dmd2']:g} x that of flow matching, measured on" in shown


def test_a_recipe_of_ones_own_has_none(capfd, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text((registry.package_folder() / "reflow" / "reflow.py").read_text())
    monkeypatch.chdir(tmp_path)
    assert "cost of one student update: not measured" in command(capfd, "recipes", "./mine.py").out


def test_valid_values_are_said_in_words():
    fields = one_step.Config.model_json_schema()["properties"]
    said = {name: schema.valid(field) for name, field in fields.items()}
    assert said["steps"] == "a whole number, > 0, <= 100,000"
    assert said["distance"] == "l2, pseudo_huber, lpips, l2+lpips"
    assert said["lpips_weight"] == "a number, > 0 or null" and said["lpips_path"] == "a file or null"
    assert said["lpips_heads"] == "true or false or null"


def test_a_recipe_of_ones_own_is_what_stands_in_its_file_and_leaves_nothing_beside_it(tmp_path):
    """Python keeps bytecode in __pycache__ and takes it for that of any file of the same size from the same second."""
    path, text = tmp_path / "mine.py", (presets.folder().parent / "reflow" / "reflow.py").read_text()
    marks = []
    for mark in ("MARK = 1\n", "MARK = 2\n"):
        path.write_text(text + mark)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        marks.append(registry.load("./mine.py", tmp_path).MARK)
    assert marks == [1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_what_recipes_of_a_folder_share_is_no_recipe(tmp_path):
    assert "recipes/reflow/_segments.py" in snapshot.files()  # it goes where recipes go
    assert not [name for name in registry.names() if "/_" in name]
    for name in ("reflow/_segments", "reflow/__init__"):
        with pytest.raises(
            InputError, match=f"^{name} is not a recipe, but .*; valid: reflow/boss, .*reflow/slimflow$"
        ):
            registry.source(name, tmp_path)
    options = [option.name for option in registry.describe("reflow/proreflow", tmp_path).options]
    assert options[:2] == ["windows", "times_per_window"] and options[-1] == "direction_weight"
    text = (registry.package_folder() / "reflow" / "boss.py").read_text()
    for mine in (text, "import recipes.reflow._segments", "from recipes.reflow._segments import stored"):
        (tmp_path / "mine.py").write_text(mine)
        with pytest.raises(
            InputError,
            match=r"^recipe '\./mine.py' .*: recipes.reflow._segments\S* is private to the recipes of its folder",
        ):
            registry.load("./mine.py", tmp_path)
