"""Draws the picture in README.md: a teacher at several numbers of steps above its one-step student, from equal noise.

python -m tests.programs.steps_picture TEACHER STUDENT OUT.png

TEACHER and STUDENT are the student folders of two train stages of one run, for example RUN/students/teach and
RUN/students/one_step. The command that trained the run is recorded in recipes/README.md.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from distill.students.loaded import load_student
from distill.students.sampling import blocks, grid, of_student

COLUMNS, SEED = 10, 0
CPU = torch.device("cpu")


def row(folder: Path, steps: int) -> Tensor:
    """The first samples [COLUMNS, C, H, W] of a student folder. Noise and class depend on the column alone."""
    student = load_student(folder, CPU)
    method = of_student(student, grid(student.t_grids, steps))
    return next(blocks(method, student, seed=SEED, count=COLUMNS, block=COLUMNS, device=CPU)).samples


def draw(rows: dict[str, Tensor], out: Path) -> None:
    """One line of images for each row, with its title on the left."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(7.2, 0.64 * len(rows)), dpi=120)
    for axis, (title, images) in zip(axes, rows.items(), strict=True):
        strip = torch.cat(list(images.clamp(-1, 1)), dim=2)[0]  # [H, COLUMNS * W]
        axis.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.subplots_adjust(left=0.19, right=1, top=1, bottom=0, hspace=0.06)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a teacher at 1, 4 and 16 steps above its student at 1.")
    for name in ("teacher", "student", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    rows = {f"teacher, {steps} step{'s' if steps > 1 else ''}": row(given.teacher, steps) for steps in (1, 4, 16)}
    draw(rows | {"student, 1 step": row(given.student, 1)}, given.out)


if __name__ == "__main__":
    main()
