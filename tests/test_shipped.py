"""The code in student folders: complete, clean, and identical to the code of the samplers."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler

from distill.networks.velocity_mlp import VelocityMLP
from distill.spec.kinds import SAMPLERS, STUDENTS
from distill.students import sampling, shipped

PAIRS = [(kind, sampler) for kind, record in STUDENTS.items() for sampler in record.samplers]
ROOT = Path(__file__).parent.parent
OWN = '''"""Euler in whole steps only.

Of nobody.
"""

import math
from collections import abc

SAMPLER = "whole"


def num_fresh(steps: int) -> int:
    """None."""
    return 0


def sample(network: abc.Callable, noise, t_grid, cond):
    """x - v(x, 1), rounded down."""
    return noise - math.floor(1.5) * network(noise, t_grid[:1].float().expand(len(noise)), cond)
'''


def test_every_sampler_is_a_file_and_every_file_a_sampler():
    files = {path.stem for path in shipped.SAMPLERS_DIR.glob("*.py")} - {"__init__"}
    assert files == set(sampling.MODULES) == set(SAMPLERS) == {sampler for _, sampler in PAIRS}
    assert all(name == module.SAMPLER for name, module in sampling.MODULES.items())


@pytest.mark.parametrize(("kind", "sampler"), PAIRS)
def test_the_pipeline_has_the_samplers_own_text(kind, sampler):
    text, module = shipped.pipeline(kind, sampler), sampling.MODULES[sampler]
    after_imports = Path(inspect.getfile(module)).read_text().partition("from torch import Tensor\n")[2]
    assert after_imports.startswith(f'\nSAMPLER = "{sampler}"\n') and after_imports.endswith("    return x\n")
    assert after_imports in text
    assert inspect.getsource(module.sample) in text
    assert all(line in text for line in inspect.getdoc(module).splitlines())


TEXTS = {f"{kind} {sampler}": shipped.pipeline(kind, sampler) for kind, sampler in PAIRS} | {
    "linear path scheduler": shipped.scheduler(),
    "flow map pipeline": shipped.flow_map_pipeline(),
    "second time": shipped.second_time(),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_code_is_complete_and_as_clean_as_code_of_ours(name):
    """Imports once and at the top, nothing unused or defined twice: what ruff says of our own code."""
    text = TEXTS[name]
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name.name if isinstance(node, ast.Import) else node.module for node in imports for name in node.names}
    allowed = {"torch", "diffusers"} | sys.stdlib_module_names
    assert all(module.split(".")[0] in allowed for module in modules), modules
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", "pipeline.py", "-"],
            cwd=ROOT, input=text, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("kind", "sampler"), PAIRS)
def test_no_function_of_the_pipeline_needs_a_name_that_another_folder_replaces(kind, sampler):
    """diffusers runs the code of all local folders in one module: its names are those of the folder loaded last."""
    tree = ast.parse(shipped.pipeline(kind, sampler))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)}
    assert defined == {"SAMPLER", "Cond", "num_fresh", "sample", "call", "DistilledPipeline"}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    used = {(each.name, node.id) for each in functions for line in each.body for node in names_in(line)}
    assert len(functions) > 10 and not [pair for pair in used if pair[1] in defined]


def names_in(tree: ast.AST) -> list[ast.Name]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name)]


def test_a_new_sampler_is_one_file(tmp_path):
    (tmp_path / "whole.py").write_text(OWN)
    text = shipped.joined(
        shipped.STUDENTS_DIR / "pipeline.py", [tmp_path / "whole.py", shipped.NETWORKS_DIR / "velocity_call.py"]
    )
    assert "\nimport math\nfrom collections import abc\nfrom collections.abc import Mapping, Sequence\n" in text
    assert '\n\n# Euler in whole steps only.\n#\n# Of nobody.\nSAMPLER = "whole"\n' in text
    found: dict = {"__name__": "own_pipeline"}
    exec(text, found)
    network, noise = VelocityMLP(dim=2, width=8).eval(), torch.ones(3, 2)
    pipeline = found["DistilledPipeline"](network, FlowMapEulerDiscreteScheduler())
    with torch.no_grad():
        expected = noise - network(noise, 1000 * torch.ones(3)).sample
    assert torch.equal(pipeline(2, latents=noise).images, expected)
