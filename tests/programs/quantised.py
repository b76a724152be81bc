"""Prints, as JSON, how a teacher with quantised weights differs from the same with its own: python quantised.py FOLDER.

FOLDER: has the spec of a teacher in teacher.json.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from distill.networks.quantised import held_bytes, is_quantised
from distill.spec.model import CheckpointTeacher
from distill.teachers import LoadedTeacher, load_teacher


def with_gradient(teacher: LoadedTeacher) -> tuple[Tensor, Tensor]:
    """A velocity, and the gradient of its squares."""
    assert teacher.network is not None
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cond = teacher.conditioning.collate(torch.tensor([0, 1]))
    found = teacher.field(x, torch.tensor([0.3, 0.7]), cond)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    return found.detach(), gradient


def main() -> None:
    given = json.loads((Path(sys.argv[1]) / "teacher.json").read_text())
    plain, small = (
        load_teacher(CheckpointTeacher(**given, quantize=how), torch.device("cpu")) for how in (None, "int8")
    )
    assert plain.network is not None and small.network is not None
    pairs = zip(with_gradient(plain), with_gradient(small), strict=True)
    found = {
        "bytes": [held_bytes(each.network.parameters()) for each in (plain, small) if each.network is not None],
        "quantised": [is_quantised(plain.network), is_quantised(small.network)],
        "differences": [((a - b).norm() / a.norm()).item() for a, b in pairs],
        "same_base": plain.base_digest == small.base_digest,
        "same_digest": plain.digest == small.digest,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
