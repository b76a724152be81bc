"""A tiny Stable Diffusion 3 with its text encoders, and images with captions, for runs with a cache stage."""

from pathlib import Path

import test_teacher_sd3 as sd3
import torch
from latent import tokenizer, write
from PIL import Image
from texts import clip, t5

CAPTIONS = ["a cat", "two dogs on a hill", "a cat", "rain", "a very long caption of a small picture", "rain"]
UNIQUE = list(dict.fromkeys(CAPTIONS))
SOLVE = {"kind": "pairs", "count": 8, "block": 4, "shard": 4, "steps": 2, "solver": "euler"}
LEARN = {"kind": "train", "images": 8, "batch_size": 4, "optimizer": {"lr": 1e-4}}
CACHE = {"kind": "cache", "block": 2, "shard": 2, "prompts_shard": 2}


def pipeline(folder: Path) -> Path:
    texts = {
        "text_encoder": clip(16, 12),
        "text_encoder_2": clip(16, 12, seed=1),
        "text_encoder_3": t5(32),
        **{f"tokenizer{suffix}": tokenizer(512 if suffix == "_3" else 77) for suffix in ("", "_2", "_3")},
    }
    return write(folder, sd3.pipeline(texts=texts))


def images(folder: Path) -> dict[str, object]:
    """The `data` of a spec: six coloured images with their captions beside them."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    for i, caption in enumerate(CAPTIONS):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return {"kind": "images", "path": str(folder), "size": 16, "captions": True}


def content(teacher: Path, data: dict[str, object], stages: dict[str, object], **fields) -> dict[str, object]:
    given = {"path": str(teacher), "size": [16, 16]}
    return {"name": "run", "teacher": given, "data": data, "stages": {"cache": CACHE, **stages}, **fields}
