"""Runs Python text where this project cannot be imported, as other people will use the folders that it writes.

The text runs in a fresh process of the same interpreter with the same packages, in which `import distill` fails even if
distill is installed. Its working directory is temporary, and the hub and its cache cannot be reached.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.core.errors import RunError
from distill.core.text import one_line
from distill.launch import helper
from distill.students import isolated_process

SECONDS = 3600.0  # until a process that still runs is killed: large weights may come from a slow disk


def run(
    program: str,
    inputs: Mapping[str, Tensor],
    arguments: Mapping[str, object],
    *,
    seconds: float = SECONDS,
) -> dict[str, Tensor]:
    """Run a program, and return its tensors on the CPU.

    program: Python text. It finds the dictionaries `inputs` (tensors on the CPU) and `arguments`, and puts tensors into
    the dictionary `outputs`. If this process ends, also that of the program ends.
    arguments: whatever JSON can say; names of files must be absolute.
    seconds: after so many, the process is killed.

    RunError, with the last line of what the program said, if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="distill-") as name:
        folder = Path(name)
        (folder / "program.py").write_text(program)
        (folder / "arguments.json").write_text(json.dumps(dict(arguments)))
        given = {name: each.detach().to("cpu", copy=True).contiguous() for name, each in inputs.items()}
        save_file(given, folder / "inputs.safetensors")
        ended = helper.run_isolated(Path(isolated_process.__file__), folder, name, seconds=seconds)
        if ended.code:
            said = one_line((ended.errors.strip().splitlines() or ["it printed nothing"])[-1], 500)
            raise RunError(f"a process that cannot import distill ended with code {ended.code}: {said}")
        try:
            return load_file(folder / "outputs.safetensors")
        except (OSError, SafetensorError) as error:
            raise RunError(f"a process that cannot import distill has written no valid tensors: {error}") from error
