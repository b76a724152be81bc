"""The tiny pipeline of each class of latent-space teachers, and how it is called with embeddings and latents."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
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
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from latent import ddim, load, normal, write, write_conditions
from torch import Tensor

from distill.students.init import teacher_on_linear_path
from distill.teachers.loaded import LoadedTeacher

STATES, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline class with a tiny random network.

    rows: the condition of each sample, [B, ...]; empty: class labels. call: (pipeline, noise [B, ...], rows, options of
    the call) -> latents [B, ...]. to_loop: latents [B, ...] as they are in the loop of the pipeline.
    """

    make: Callable[[], diffusers.DiffusionPipeline]
    rows: Mapping[str, Tensor]
    noise: Tensor
    call: Callable[..., Tensor]
    fields: Mapping[str, object] = field(default_factory=dict)  # of the teacher's spec
    to_loop: Callable[[diffusers.DiffusionPipeline, Tensor], Tensor] = lambda pipeline, x: x
    options: Mapping[str, object] = field(default_factory=dict)  # of the class, for a student

    def write(self, folder: Path) -> dict[str, object]:
        """Writes the pipeline, and returns the spec of its teacher."""
        path = write(folder / "pipeline", self.make())
        given = {"conditions": write_conditions(folder / "rows.safetensors", dict(self.rows))} if self.rows else {}
        return {"path": str(path), **self.fields, **given}

    def teacher(self, folder: Path) -> LoadedTeacher:
        """On the linear path, as recipes get it."""
        spec = self.write(folder)
        return teacher_on_linear_path(load(Path(str(spec.pop("path"))), **spec))

    def from_loop(self, pipeline: diffusers.DiffusionPipeline, x: Tensor) -> Tensor:
        """Takes back `to_loop`, which reorders numbers."""
        places = self.to_loop(pipeline, torch.arange(self.noise.numel()).reshape(self.noise.shape))
        found = torch.empty(self.noise.numel())
        found[places.flatten()] = x.flatten()
        return found.reshape(self.noise.shape)

    def pipeline(self, student: Path) -> diffusers.DiffusionPipeline:
        """The stock pipeline with the networks and the scheduler of a student's folder, read by diffusers alone."""
        made = self.make()
        parts = {name: each for name, each in made.components.items() if name != "scheduler"}
        for name in ("transformer", "transformer_2", "unet"):
            if (student / name).is_dir():
                parts[name] = type(parts[name]).from_pretrained(student / name)
        config = json.loads((student / "scheduler" / "scheduler_config.json").read_text())
        scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(student / "scheduler")
        options = {name: each for name, each in made.config.items() if name not in parts and name[0] != "_"}
        found = type(made)(**{**options, **parts, "scheduler": scheduler, **self.options})
        found.set_progress_bar_config(disable=True)
        return found


def _packed_flux(pipeline, x: Tensor) -> Tensor:
    return pipeline._pack_latents(x, *x.shape)


def _tokens(pipeline, x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _flux(pipeline, noise, rows, **options) -> Tensor:
    given = (
        {"pooled_prompt_embeds": rows[POOLED]} if POOLED in rows else {"prompt_attention_mask": rows["attention_mask"]}
    )
    found = pipeline(
        height=16, width=24, output_type="latent", latents=_packed_flux(pipeline, noise), prompt_embeds=rows[STATES],
        **given, **options,
    ).images  # fmt: skip
    return pipeline._unpack_latents(found, 16, 24, 2)


def _flux2(pipeline, noise, rows, **options) -> Tensor:
    found = pipeline(
        height=16, width=24, output_type="latent", latents=noise, prompt_embeds=rows[STATES], **options
    ).images  # fmt: skip
    return flux2.latents_of(pipeline, found)


def _qwen(pipeline, noise, rows, **options) -> Tensor:
    found = pipeline(
        height=32, width=64, output_type="latent", latents=_packed_flux(pipeline, noise), prompt_embeds=rows[STATES],
        prompt_embeds_mask=rows[f"{STATES}_mask"], **options,
    ).images  # fmt: skip
    return pipeline._unpack_latents(found, 32, 64, 8)[:, :, 0]


def _ltx(pipeline, noise, rows, **options) -> Tensor:
    frames, height, width = ltx.SIZE
    found = pipeline(
        num_frames=frames, height=height, width=width, output_type="latent", latents=pipeline._pack_latents(noise),
        frame_rate=25, prompt_embeds=rows[STATES], prompt_attention_mask=rows[MASK], **options,
    ).frames  # fmt: skip
    return pipeline._unpack_latents(found, *noise.shape[2:])


def _wan(pipeline, noise, rows, **options) -> Tensor:
    frames, height, width = wan.SIZE
    return pipeline(
        num_frames=frames, height=height, width=width, output_type="latent", latents=noise, prompt_embeds=rows[STATES],
        **options,
    ).frames  # fmt: skip


def _z_image(pipeline, noise, rows, **options) -> Tensor:
    prompts = [states[mask] for states, mask in zip(rows["cap_feats"], rows["cap_feats_mask"], strict=True)]
    return pipeline(
        height=32, width=64, output_type="latent", latents=noise, prompt_embeds=prompts, **options
    ).images  # fmt: skip


def _cogview4(pipeline, noise, rows, **options) -> Tensor:
    parts = [
        pipeline(
            height=32, width=48, output_type="latent", latents=noise[i : i + 1],
            prompt_embeds=rows[STATES][i : i + 1, :length], **options,
        ).images
        for i, length in enumerate(cogview4.LENGTHS)
    ]  # fmt: skip
    return torch.cat(parts)


def _images(size: tuple[int, int], names: Mapping[str, str], **fixed: object) -> Callable[..., Tensor]:
    """The call of a pipeline that takes latents as they are. names: argument -> name of the tensor in rows."""

    def call(pipeline, noise, rows, **options) -> Tensor:
        given = {name: rows[row] for name, row in names.items()}
        return pipeline(
            height=size[0], width=size[1], output_type="latent", latents=noise, **given, **fixed, **options
        ).images  # fmt: skip

    return call


def _dit(pipeline, noise, rows, **options) -> Tensor:
    """It draws the latents of `noise`, which are those of seed 5, and returns decoded ones: they are caught before."""
    latents = []
    hook = pipeline.vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))
    pipeline([0, 1, 2], generator=torch.Generator().manual_seed(5), output_type="pt", **options)
    hook.remove()
    return pipeline.vae.config.scaling_factor * latents[0]


PROMPT = {"prompt_embeds": STATES}
MASKED = {**PROMPT, "prompt_attention_mask": MASK}
SMALL, NOISE = {"size": [16, 24]}, normal(3, 4, 8, 12)
VIDEO = {"size": wan.SIZE}
HUNYUAN = {
    "prompt_embeds": STATES,
    "prompt_attention_mask": "text_embedding_mask",
    "prompt_embeds_2": f"{STATES}_t5",
    "prompt_attention_mask_2": "text_embedding_mask_t5",
}
UNBINNED = {"use_resolution_binning": False}


def _aura(pipeline, noise, rows, **options) -> Tensor:
    mask = torch.ones(rows[STATES].shape[:2])
    return _images((16, 24), PROMPT, prompt_attention_mask=mask)(pipeline, noise, rows, **options)


def _sd(options: Mapping[str, object], xl: bool) -> TinyPipeline:
    names = {**PROMPT, "pooled_prompt_embeds": "text_embeds"} if xl else PROMPT
    return TinyPipeline(
        lambda: sd.pipeline(ddim(**sd.SD, **options), xl=xl),
        sd.embeddings(2, xl=xl),
        NOISE,
        _images((16, 24), names),
        SMALL,
    )


def _pixart(version: str) -> TinyPipeline:
    return TinyPipeline(lambda: pixart.pipeline(version), pixart.embeddings(2), NOISE, PIXART, SMALL)


PIXART = _images((16, 24), MASKED, negative_prompt=None, **UNBINNED)
PIPELINES: Mapping[str, TinyPipeline] = {
    "sd": _sd({}, xl=False),
    "sd v": _sd({"prediction_type": "v_prediction"}, xl=False),
    "sd zero snr": _sd({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, xl=False),
    "sdxl": _sd({}, xl=True),
    "dit": TinyPipeline(dit.pipeline, {}, normal(3, 4, 8, 8, seed=5), _dit),
    **{f"pixart {version}": _pixart(version) for version in pixart.VERSIONS},
    "hunyuan dit": TinyPipeline(
        lambda: hunyuan_dit.pipeline(**hunyuan_dit.LENGTHS),
        hunyuan_dit.embeddings(2),
        NOISE,
        _images((64, 96), HUNYUAN, **UNBINNED),
        {"size": [64, 96]},
    ),
    "sd3": TinyPipeline(
        sd3.pipeline, sd3.embeddings(2), NOISE, _images((16, 24), {**PROMPT, "pooled_prompt_embeds": POOLED}), SMALL
    ),
    "flux schnell": TinyPipeline(
        lambda: flux.pipeline(guidance_embeds=False), flux.embeddings(2), NOISE, _flux, SMALL, _packed_flux
    ),
    "flux dev": TinyPipeline(
        lambda: flux.pipeline(guidance_embeds=True), flux.embeddings(2), NOISE, _flux, SMALL, _packed_flux
    ),
    "flux dev 2.5": TinyPipeline(
        lambda: flux.pipeline(guidance_embeds=True),
        flux.embeddings(2),
        NOISE,
        _flux,
        {**SMALL, "embedded_guidance": 2.5},
        _packed_flux,
    ),
    "flux2 dev": TinyPipeline(
        lambda: flux2.pipeline(Flux2Pipeline), flux2.embeddings(2), normal(3, 8, 4, 6), _flux2, SMALL, _tokens
    ),
    "flux2 klein": TinyPipeline(
        lambda: flux2.pipeline(Flux2KleinPipeline),
        flux2.embeddings(2),
        normal(3, 8, 4, 6),
        _flux2,
        SMALL,
        _tokens,
        {"is_distilled": True},
    ),
    "chroma": TinyPipeline(chroma.pipeline, chroma.embeddings(2), NOISE, _flux, SMALL, _packed_flux),
    "qwen image": TinyPipeline(
        qwen_image.pipeline, qwen_image.embeddings(3, 2), qwen_image.NOISE, _qwen, {"size": [32, 64]}, _packed_flux
    ),
    "z image": TinyPipeline(z_image.pipeline, z_image.embeddings(2, 2), z_image.NOISE, _z_image, {"size": [32, 64]}),
    "lumina2": TinyPipeline(
        lumina2.pipeline, lumina2.embeddings(2, 2), lumina2.NOISE, _images((32, 64), MASKED), {"size": [32, 64]}
    ),
    "aura flow": TinyPipeline(aura_flow.pipeline, aura_flow.embeddings(2), NOISE, _aura, SMALL),
    "cogview4": TinyPipeline(
        cogview4.pipeline, cogview4.embeddings(2), normal(3, 4, 16, 24), _cogview4, {"size": [32, 48]}
    ),
    "sana": TinyPipeline(
        sana.pipeline,
        sana.ROWS,
        sana.NOISE,
        _images((128, 192), MASKED, negative_prompt=None, **UNBINNED),
        {"size": [128, 192]},
    ),
    "ltx": TinyPipeline(ltx.pipeline, ltx.ROWS, ltx.NOISE, _ltx, {"size": ltx.SIZE}, lambda p, x: p._pack_latents(x)),
    "wan 2.1": TinyPipeline(wan.pipeline, {STATES: wan.ROWS}, wan.NOISE, _wan, VIDEO),
    "wan 2.2": TinyPipeline(
        lambda: wan.pipeline(transformer_2=wan.network(1), boundary_ratio=0.6),
        {STATES: wan.ROWS},
        wan.NOISE,
        _wan,
        VIDEO,
    ),
    "wan 2.2 ti2v": TinyPipeline(
        lambda: wan.pipeline(expand_timesteps=True), {STATES: wan.ROWS}, wan.NOISE, _wan, VIDEO
    ),
}
