"""A tiny random pipeline of each network class of latent-space teachers, with embeddings of three prompts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import test_teacher_aura_flow as aura_flow
import test_teacher_chroma as chroma
import test_teacher_cogview4 as cogview4
import test_teacher_dit as dit
import test_teacher_flux as flux
import test_teacher_flux2 as flux2
import test_teacher_hunyuan_dit as hunyuan_dit
import test_teacher_ltx as ltx
import test_teacher_lumina2 as lumina2
import test_teacher_pixart as pixart
import test_teacher_qwen_image as qwen_image
import test_teacher_sana as sana
import test_teacher_sd3 as sd3
import test_teacher_unet_condition as sd
import test_teacher_wan as wan
import test_teacher_z_image as z_image
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from latent import ddim, write, write_conditions
from torch import Tensor

Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tiny:
    """A tiny random pipeline. rows: the conditions of some prompts; empty for class labels."""

    pipeline: Callable[[], object]
    rows: Rows
    size: tuple[int, ...] = (16, 24)

    def write(self, folder: Path, **more: object) -> dict[str, object]:
        """The `teacher` of a spec. more: further fields of it."""
        given = {"path": str(write(folder / "teacher", self.pipeline())), "size": list(self.size), **more}
        if self.rows:
            null = {name: each[:1].clone() for name, each in self.rows.items()}
            given["conditions"] = write_conditions(folder / "conditions.safetensors", dict(self.rows), null)
        return given


WAN = {"encoder_hidden_states": wan.ROWS}
TINY = {
    "sd": Tiny(lambda: sd.pipeline(ddim(**sd.SD)), sd.embeddings(2, xl=False)),
    "sdxl": Tiny(lambda: sd.pipeline(ddim(**sd.SD), xl=True), sd.embeddings(2, xl=True)),
    "sd3": Tiny(sd3.pipeline, sd3.embeddings(2)),
    "sd3.5": Tiny(lambda: sd3.pipeline(version="3.5"), sd3.embeddings(2)),
    "flux": Tiny(lambda: flux.pipeline(guidance_embeds=True), flux.embeddings(2)),
    "flux2": Tiny(lambda: flux2.pipeline(Flux2Pipeline), flux2.embeddings(2)),
    "flux2 klein": Tiny(lambda: flux2.pipeline(Flux2KleinPipeline), flux2.embeddings(2)),
    "chroma": Tiny(chroma.pipeline, chroma.embeddings(2)),
    "aura flow": Tiny(aura_flow.pipeline, aura_flow.embeddings(2)),
    "cogview4": Tiny(cogview4.pipeline, cogview4.embeddings(2), (32, 48)),
    "dit": Tiny(lambda: dit.pipeline(num_embeds_ada_norm=3), {}, (16, 16)),
    "hunyuan dit": Tiny(lambda: hunyuan_dit.pipeline(**hunyuan_dit.LENGTHS), hunyuan_dit.embeddings(2), (64, 96)),
    "ltx": Tiny(ltx.pipeline, ltx.embeddings(3, 2), (17, 64, 96)),
    "lumina2": Tiny(lumina2.pipeline, lumina2.embeddings(3, 2), (32, 64)),
    "pixart": Tiny(lambda: pixart.pipeline("alpha"), pixart.embeddings(2)),
    "qwen": Tiny(qwen_image.pipeline, qwen_image.embeddings(3, 2), (32, 64)),
    "sana": Tiny(sana.pipeline, sana.embeddings(3, 2), (128, 192)),
    "wan": Tiny(wan.pipeline, WAN, (5, 16, 32)),
    "wan 2.2": Tiny(lambda: wan.pipeline(transformer_2=wan.network(1), boundary_ratio=0.6), WAN, (5, 16, 32)),
    "z image": Tiny(z_image.pipeline, z_image.embeddings(3, 2), (32, 64)),
}
