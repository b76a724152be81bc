"""Draws the picture of the emoji students in recipes/README.md: what they and their teacher make of twelve prompts.

python -m tests.programs.emoji_picture RUN IMAGES OUT.png

RUN is a run of the preset emoji-students, IMAGES the folder of drawings that its teacher was trained on. Each student
is exported as a complete pipeline and prompted in stock diffusers, from the same noise for each prompt, in the order of
`PICTURED`, which was fixed before the training. Nothing is selected or edited.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from distill.emoji.images import PICTURED
from distill.runs import todo
from distill.runs.run_store import RunPaths

ROWS = {  # network -> numbers of steps
    "teacher": [8, 4],
    "reflow": [4, 1],
    "one_step": [1],
    "consistency": [4, 1],
    "shortcut": [4, 1],
    "meanflow": [4, 1],
    "dmd2": [1],
}
GUIDANCE = 3.0  # of the teacher; students have learned it
SEED = 0


def drawings(folder: Path) -> list[np.ndarray]:
    """The drawing of each prompt, [H, W, 3] in 0 ... 255."""
    rows = [(part, json.loads(line)) for part in ("train", "test")
            for line in (folder / part / "metadata.jsonl").read_text().splitlines()]  # fmt: skip
    files = {row["text"]: folder / part / row["file_name"] for part, row in rows}
    return [np.asarray(Image.open(files[prompt]).convert("RGB")) for prompt in PICTURED]


def sampled(folder: Path, steps: int, guidance: float) -> list[np.ndarray]:
    """The image of each prompt, by the pipeline in a folder."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.transformer.config.sample_size
    channels = pipeline.vae.config.latent_channels
    noise = torch.randn(len(PICTURED), channels, side, side, generator=torch.Generator().manual_seed(SEED))
    given = {"num_inference_steps": steps, "guidance_scale": guidance, "use_resolution_binning": False}
    images = pipeline(list(PICTURED), latents=noise, output_type="np", **given).images
    return [np.clip(255 * image, 0, 255).round().astype(np.uint8) for image in images]


def draw(rows: dict[str, list[np.ndarray]], out: Path) -> None:
    """One line of images for each row, with its title on the left and the prompts above."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(rows), len(PICTURED), figsize=(0.86 * len(PICTURED) + 1.3, 0.86 * len(rows) + 0.7)
    )
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    for axis, prompt in zip(axes[0], PICTURED, strict=True):
        axis.set_title(textwrap.fill(prompt, 13), fontsize=6)
    figure.subplots_adjust(left=0.11, right=0.998, top=0.94, bottom=0.005, hspace=0.04, wspace=0.04)
    figure.savefig(out, dpi=78)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "images", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    run = RunPaths(given.run.absolute())
    teacher = Path(todo.load_spec(run).teacher.path)
    rows = {"drawing": drawings(given.images)}
    with tempfile.TemporaryDirectory() as temporary:
        for name, numbers in ROWS.items():
            folder = teacher
            if name != "teacher":
                folder = Path(temporary) / name
                command = [
                    sys.executable,
                    "-m",
                    "distill",
                    "export",
                    f"{run.name}/{name}",
                    "--whole",
                    "--out",
                    str(folder),
                ]
                subprocess.run([*command, "--store", str(run.root.parent)], check=True)
            for steps in numbers:
                title = f"{name.replace('_', ' ')}, {steps} step{'s' if steps > 1 else ''}"
                rows[title] = sampled(folder, steps, GUIDANCE if name == "teacher" else 1.0)
    draw(rows, given.out)


if __name__ == "__main__":
    main()
