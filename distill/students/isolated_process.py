"""What the process of `isolated` runs: a program where this project cannot be imported. It imports nothing of distill.

Run as `python -I isolated_process.py N PLACES FOLDER` (see `helper.run_isolated`). FOLDER has program.py,
inputs.safetensors and arguments.json; outputs.safetensors is written.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType

BLOCKED = ("distill", "recipes", "slurm")  # the packages of this project


class BlockedPackages:
    """A finder in front of all others that finds no package of this project, also if it is installed as editable."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} cannot be imported in this process, which tests that it is not needed")
        return None


def end_with(lifeline: int) -> None:
    """Kill this process when the other end of a pipe is closed, that is, when its parent process has ended."""

    def wait() -> None:
        os.read(lifeline, 1)  # returns only when the pipe is closed
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def say_last(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error with its traceback, and once more in one line at the end."""
    sys.__excepthook__(kind, error, trace)
    os.write(2, f"{kind.__name__}: {' '.join(str(error).split())}\n".encode(errors="backslashreplace"))


def main(folder: Path, lifeline: int, places: Sequence[str]) -> None:
    """Run the program in a folder. places: folders with packages."""
    end_with(lifeline)
    sys.excepthook = say_last
    sys.path += [place for place in places if place not in sys.path]
    sys.meta_path.insert(0, BlockedPackages)
    for name in [name for name in sys.modules if name.partition(".")[0] in BLOCKED]:
        del sys.modules[name]

    from safetensors.torch import load_file, save_file
    from torch import Tensor

    outputs: dict[str, Tensor] = {}
    known = {
        "__name__": "__main__",
        "inputs": load_file(folder / "inputs.safetensors"),
        "arguments": json.loads((folder / "arguments.json").read_text()),
        "outputs": outputs,
    }
    exec(compile((folder / "program.py").read_text(), "program.py", "exec"), known)
    found = {name: each.detach().to("cpu", copy=True).contiguous() for name, each in outputs.items()}
    save_file(found, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[3]), int(sys.argv[1]), sys.argv[2].split(os.pathsep))
