"""Loads and samples student folders where `distill` and `recipes` cannot be imported: FOLDER STUDENT...

The noise (and labels and fresh noises) of a student FOLDER/S is read from FOLDER/S.in.safetensors. Its samples at 1, 2
and 4 steps are written to FOLDER/S.out.safetensors.
"""

import importlib
import sys
from pathlib import Path


class Blocked:
    """A finder in front of all others that refuses our packages."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("distill", "recipes"):
            raise ModuleNotFoundError(f"{name} is blocked in this process")


sys.meta_path.insert(0, Blocked())
for package in ("distill", "recipes"):
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        assert "is blocked in this process" in str(error)
    else:
        raise AssertionError(f"{package} could be imported")

from diffusers import DiffusionPipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

folder = Path(sys.argv[1])
pipelines = {  # all before the first is used: diffusers runs their code in one module
    student: DiffusionPipeline.from_pretrained(folder / student, trust_remote_code=True) for student in sys.argv[2:]
}
for student, pipeline in pipelines.items():
    inputs = load_file(folder / f"{student}.in.safetensors")
    fresh = inputs.pop("fresh", ())  # of the most steps
    outputs = {
        str(steps): pipeline(steps, **inputs, fresh=fresh[: steps - 1], output_type="pt").images.contiguous()
        for steps in (1, 2, 4)
    }
    save_file(outputs, folder / f"{student}.out.safetensors")
assert not any(name.split(".")[0] in ("distill", "recipes") for name in sys.modules)
