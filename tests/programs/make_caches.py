"""Like make_pairs.py, for caches: FOLDER/latents with moments, mirrored, and FOLDER/prompts."""

from pathlib import Path
from types import SimpleNamespace

import torch
from make_pairs import serve
from torch import Tensor

from distill.caches import latents, prompts
from distill.core.stop import StopRequest
from distill.data.arrays import ArrayData
from distill.data.prompts import Prompts
from distill.runs.progress import Progress
from distill.spec.cachespec import CacheStage
from distill.teachers.convention import CondField, Convention
from distill.teachers.encoding import TextEncoders

COUNT = 1500
STAGE = CacheStage(kind="cache", block=24, shard=48, prompts_shard=48)  # 32 shards each, the last short


class Codec:
    """A posterior that takes a while to compute. Implements `protocols.Codec`, as far as a cache needs it."""

    is_identity, has_spread, digest = False, True, "0" * 64

    def shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        return (4, *pixels[1:])

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.linspace(-1, 1, 8 * 3 * 81).reshape(8, 3, 9, 9)
        mean, spread = torch.nn.functional.conv2d(pixels, weight, padding=4).chunk(2, dim=1)
        return mean, spread.tanh()


class Texts(Convention):
    """Rows as long as the longest prompt of a block."""

    def fields(self, config):
        return {"states": CondField((None, 64))}

    def encode(self, pipeline, prompts):
        rows = torch.zeros(len(prompts), max(map(len, prompts)), 64)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt)] = torch.tensor([ord(letter) for letter in prompt])[:, None] / 100
        return {"states": rows.expand(8, *rows.shape).cumsum(0)[-1]}


def make(folder: Path) -> None:
    images = torch.linspace(-1, 1, COUNT * 3 * 16 * 16).reshape(COUNT, 3, 16, 16)
    data = ArrayData("images", images, torch.arange(COUNT) % 10, 10)
    texts = Prompts.of([str(i) * (1 + i % 7) for i in range(COUNT)])
    facts = SimpleNamespace(content={}, size=(16, 16), path=Path("x"))
    with StopRequest() as stop, Progress("cache", 2 * COUNT, "items", None) as progress:
        common = {"progress": progress, "stop": stop}
        latents.generate(
            data, Codec(), STAGE, folder / "latents", seed=5, device=torch.device("cpu"), mirrored=True, **common
        )
        encoders = TextEncoders(None, Texts(), facts, "0" * 64)
        prompts.generate(texts, encoders, STAGE, folder / "prompts", **common)


if __name__ == "__main__":
    serve(make)
