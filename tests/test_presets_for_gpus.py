"""The presets for GPUs, each with a tiny random pipeline of its class: checks, plan, job scripts, three steps.

`SMALL` says what each preset is tested with, `shrunk` how its stages are made small; both are overrides of the preset,
as on the command line. Everything else is as it is shipped.
"""

import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cached_runs
import datasets
import diffusers
import edm
import pytest
import test_convert_edm as of_edm
import test_teacher_dit as dit
import test_teacher_flux as flux
import test_teacher_flux2 as flux2
import test_teacher_qwen_image as qwen
import test_teacher_unet_condition as sd
import test_teacher_wan as wan
import torch
from cached_runs import CAPTIONS
from commands import command
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan, Flux2KleinPipeline
from latent import VOCABULARY, ddim, seeded, tokenizer, write
from latent_runs import run
from PIL import Image
from test_tars import write as write_tar
from texts import clip, t5
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)

from distill.convert import conversion
from distill.core import yamltext
from distill.exchange import student_card
from distill.networks.edm_unet import DhariwalUNet2DModel, SongUNet2DModel
from distill.runs import results
from distill.spec import checks, presets, specfile
from distill.spec.model import CacheStage, EvaluateStage, PairsStage, RunSpec, TrainStage
from distill.spec.rolespec import LoraSpec
from distill.training import memory
from distill.training.choice import choose_sharding

BATCH, STEPS = 4, 3


# --- teachers ---


def stable_diffusion(folder: Path, *, xl: bool = False) -> Path:
    texts = (tokenizer(), tokenizer(), clip(8 if xl else 16), clip(8, projection=12, seed=1))
    return write(folder, sd.pipeline(ddim(**sd.SD), texts, xl=xl))


def flux_dev(folder: Path) -> Path:
    texts = {
        "text_encoder": clip(24),
        "tokenizer": tokenizer(),
        "text_encoder_2": t5(32),
        "tokenizer_2": tokenizer(512),
    }
    return write(folder, flux.pipeline(guidance_embeds=True, texts=texts))


def wan_21(folder: Path) -> Path:
    config = UMT5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = seeded(
        lambda: AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1] * 4, latents_std=[0.9] * 4,
        )
    )  # fmt: skip
    texts = {"text_encoder": seeded(lambda: UMT5EncoderModel(config)), "tokenizer": tokenizer(512)}
    return write(folder, wan.pipeline(vae=vae, **texts))


def flux_2_klein(folder: Path) -> Path:
    sizes = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 27, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4, "vocab_size": VOCABULARY,
    }  # fmt: skip
    encoder = seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**sizes)))
    texts = {"text_encoder": encoder, "tokenizer": tokenizer(512, "left", flux2.TEMPLATES[Flux2KleinPipeline])}
    return write(folder, flux2.pipeline(Flux2KleinPipeline, texts=texts))


def qwen_image(folder: Path) -> Path:
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 24}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    vae = seeded(
        lambda: AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[0.9] * 4
        )
    )
    encoder = seeded(lambda: Qwen2_5_VLForConditionalGeneration(config))
    return write(folder, qwen.pipeline(vae=vae, text_encoder=encoder, tokenizer=tokenizer(1024)))


def dit_of_three_classes(folder: Path) -> Path:
    return write(folder, dit.pipeline(num_embeds_ada_norm=3))


def converted(folder: Path, network: str) -> Path:
    """A checkpoint of EDM, converted as its preset says."""
    options, model = of_edm.NETWORKS[network]
    file = folder.with_suffix(".pkl")
    edm.write(file, edm.tree(options, song=model == "SongUNet"), options, folder.with_name("mark"), model=model)
    conversion.complete(file, None, of_edm.asked(folder, file) and folder)
    return folder


# --- data ---


def pixels(*shape: int, seed: int = 3) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in found]


def prompts(folder: Path) -> dict[str, object]:
    folder.with_suffix(".txt").write_text("\n".join(CAPTIONS) + "\n")
    return {"path": str(folder.with_suffix(".txt"))}


def tars(folder: Path, captions: str = "txt", side: int = 16) -> dict[str, object]:
    """A tar with six captioned images."""
    members = []
    for i, (picture, caption) in enumerate(zip(pixels(6, side, side), CAPTIONS, strict=True)):
        file = io.BytesIO()
        picture.save(file, "JPEG")
        text = caption if captions == "txt" else json.dumps({captions.removeprefix("json."): caption})
        members += [(f"{i}.jpg", file.getvalue()), (f"{i}.{captions.partition('.')[0]}", text.encode())]
    write_tar(folder / "00000.tar", members)
    return {"path": str(folder), "size": side}


def videos(folder: Path) -> dict[str, object]:
    """Six videos of five frames, with captions beside them."""
    for i, caption in enumerate(CAPTIONS):
        (folder / str(i)).mkdir(parents=True)
        (folder / f"{i}.txt").write_text(caption)
        for number, picture in enumerate(pixels(5, 16, 32, seed=i)):
            picture.save(folder / str(i) / f"{number}.png")
    return {"path": str(folder), "size": [5, 16, 32]}


def rows(folder: Path, side: int, image: str = "image", label: str | None = None) -> dict[str, object]:
    """Nine images in a parquet file, of three classes if there is a column of labels."""
    columns = {image: pixels(9, side, side)} | ({} if label is None else {label: [i % 3 for i in range(9)]})
    features = {image: datasets.Image()} | ({} if label is None else {label: datasets.ClassLabel(num_classes=3)})
    folder.mkdir()
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    made.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    return {"path": str(folder), "size": side}


# --- the presets ---


@dataclass(frozen=True)
class Small:
    """What a preset is tested with. data: the fields of `data` that are overridden. size: of samples, in pixels."""

    teacher: Callable[[Path], Path]
    data: Callable[[Path], dict[str, object]] | None
    size: tuple[int, ...] = ()


SMALL = {
    "sd15-instaflow": Small(stable_diffusion, prompts, (16, 16)),
    "sd15-perflow": Small(stable_diffusion, tars, (16, 16)),
    "sd15-scm": Small(stable_diffusion, tars, (16, 16)),
    "sdxl-dmd2": Small(lambda folder: stable_diffusion(folder, xl=True), tars, (16, 16)),
    "sd35-consistency-lora": Small(cached_runs.pipeline, tars, (16, 16)),
    "flux2-klein-dmd2-lora": Small(flux_2_klein, tars, (16, 16)),
    "qwen-image-dmd2-lora": Small(qwen_image, lambda folder: tars(folder, side=32), (32, 32)),
    "flux-shortcut": Small(flux_dev, lambda folder: tars(folder, "json.prompt"), (16, 16)),
    "flux-meanflow": Small(flux_dev, lambda folder: tars(folder, "json.prompt"), (16, 16)),
    "wan21-dmd2": Small(wan_21, videos, (5, 16, 32)),
    "wan21-anyflow": Small(wan_21, videos, (5, 16, 32)),
    "imagenet256-dit-meanflow": Small(dit_of_three_classes, lambda folder: rows(folder, 16, label="label"), (16, 16)),
    "imagenet64-edm-rfpp": Small(lambda folder: converted(folder, "ADM"), None),
    "cifar10-ect": Small(lambda folder: converted(folder, "DDPM++"), lambda folder: rows(folder, 8, "img")),
}


def changes(folder: Path, name: str) -> list[str]:
    """The overrides with which a preset uses a tiny teacher and data in `folder`, and nothing of the network."""
    small = SMALL[name]
    found = {"teacher.path": str(small.teacher(folder / "teacher"))}
    found |= {"teacher.size": list(small.size)} if small.size else {}
    given = {} if small.data is None else small.data(folder / "data")
    found |= {f"data.{field}": value for field, value in given.items()}
    return [f"{path}={yamltext.dump_line(value).strip()}" for path, value in found.items()]


def shrunk(spec: RunSpec) -> list[str]:
    """The overrides that make each stage of a preset small, on one process."""
    found: dict[str, object] = {"launch.nodes": 1, "launch.procs": 1, "launch.zero_stage": None, "launch.threads": 1}
    found |= {"launch.divide_teacher": False, "launch.slurm": {}, "launch.micro_batch": None}
    for name, stage in spec.stages.items():
        match stage:
            case TrainStage():
                fields = {"images": STEPS * BATCH, "batch_size": BATCH, "optimizer.warmup_images": 0}
            case PairsStage():
                fields = {"count": 8, "block": 4, "shard": 4, "steps": 2}
            case CacheStage():
                fields = {"block": 2, "shard": 2, "prompts_shard": 2}
            case EvaluateStage():
                fields = {"samples": 16, "block": 8, "fine_steps": 2, "teacher_steps": [1]}
        found |= {f"stages.{name}.{field}": value for field, value in fields.items()}
    return [f"{path}={yamltext.dump_line(value).strip().removesuffix('...').strip()}" for path, value in found.items()]


def test_all_presets_that_name_a_teacher_are_tested_here():
    named = [each for each in presets.names() if specfile.load(presets.find(each)).spec.teacher is not None]
    assert set(SMALL) == set(named) - {"mixture-2d", "emoji", "emoji-students"}


@pytest.mark.parametrize("name", SMALL)
def test_the_command_at_the_top_is_what_the_spec_says(name):
    launch = specfile.load(presets.find(name)).spec.launch
    given = f"--nodes {launch.nodes} --gpus-per-node {launch.procs} --time {launch.slurm.time}"
    assert presets.head(name)[0] == f"distill submit {name} {given}"
    assert (launch.slurm.gpus_per_node, launch.zero_stage is None) == (launch.procs, False)
    text = " ".join(presets.head(name))
    for said in (
        f"ZeRO stage {launch.zero_stage}",
        f"{launch.nodes} nodes of {launch.procs} x" if launch.nodes > 1 else f"1 node of {launch.procs} x",
        f"For {launch.world_size} GPUs of",
        "Nobody has run this preset with distill on GPUs yet.",
        "Expected",
        "Not as in ",
        "Sources of the values: ",
    ):
        assert said in text
    assert presets.summary(name).endswith("on GPUs yet.")


def test_commands_at_the_top_have_the_options_of_the_command(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [line.split()[1:] for name in SMALL for line in presets.head(name) if line.startswith("  distill ")]
    assert ["convert", "edm-cifar10-32x32-uncond-vp.pkl", "edm-cifar10"] in found
    for arguments in found:
        done = command(capfd, *arguments)
        assert done.err == f"error: {arguments[1]} does not exist; copy or download it again\n"


@pytest.mark.parametrize("name", SMALL)
def test_the_spec_is_valid(name, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    source = specfile.load(presets.find(name), [f"teacher.path={tmp_path}/org/name"])
    assert set(checks.check(source.spec, source.base).recipes)


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_it_is_planned_and_its_jobs_are_written(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tiny, spec = changes(tmp_path, name), specfile.load(presets.find(name)).spec
    planned = command(capfd, "plan", name, *tiny, "--json")
    assert planned.code == 0, planned.err
    work = {each["name"]: each["work"] for each in json.loads(planned.out)["stages"]}
    assert list(work) == list(spec.stages)
    for stage, each in spec.stages.items():
        if isinstance(each, TrainStage):
            said = f"{each.images:,} images = {each.images // each.batch_size:,} student updates of {each.batch_size}"
            assert work[stage].startswith(said)
    _, _, *flags = shlex.split(presets.head(name)[0])
    done = command(capfd, *["submit", *flags], "--dry-run", *tiny)
    assert done.code == 0, done.err
    for asked in (f"--nodes={spec.launch.nodes}", f"--time={spec.launch.slurm.time}"):
        assert f"#SBATCH {asked}\n" in done.out
    assert list(tmp_path.glob("runs*")) == []


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_three_steps(name, tmp_path):
    path, tiny = presets.find(name), changes(tmp_path, name)
    spec = specfile.load(path, [*tiny, *shrunk(specfile.load(path).spec)], name="run").spec
    done = run(tmp_path, spec.model_dump(mode="json"))
    trained = [name for name, stage in spec.stages.items() if isinstance(stage, TrainStage)]
    assert [student_card.verify(done.student(each)).images for each in trained] == [STEPS * BATCH] * len(trained)
    (measured,) = (each for each, stage in spec.stages.items() if isinstance(stage, EvaluateStage))
    found = {row.network: row.rms for row in results.load_results(done.stage(measured)).rows if not row.fine}
    assert set(found) == {"teacher", *spec.stages[measured].students}
    assert all(rms < 100 for rms in found.values())
    for each in trained:
        assert (done.student(each) / "pytorch_lora_weights.safetensors").exists() == bool(spec.stages[each].lora)


# --- memory ---

# The networks as their authors publish them, on the meta device, and the roles of the recipe that are trained.
UNETS = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
XL_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
PUBLISHED = {
    "sd15": (859_520_964, lambda: diffusers.UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), **UNETS)),
    "sdxl": (
        2_567_463_684,
        lambda: diffusers.UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), down_block_types=XL_BLOCKS,
            up_block_types=tuple(each.replace("Down", "Up") for each in reversed(XL_BLOCKS)), cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10], use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        ),
    ),
    "sd35": (
        2_243_171_520,
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm", joint_attention_dim=4096,
        ),
    ),
    "flux": (11_901_408_320, lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True)),
    "flux2": (
        3_875_544_576,
        lambda: diffusers.Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
    ),
    "qwen": (20_430_401_088, diffusers.QwenImageTransformer2DModel),
    "wan21": (
        1_418_996_800,
        lambda: diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    ),
    "imagenet256": (
        749_826_464,
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, out_channels=8, num_layers=28, sample_size=32
        ),
    ),
    "imagenet64": (295_899_267, lambda: DhariwalUNet2DModel(64, num_classes=1000)),
    "cifar10": (55_732_739, lambda: SongUNet2DModel(32, channel_multipliers=[2, 2, 2])),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_the_memory_at_the_top_is_that_of_the_plan(name):
    """Without activations, and without what is added to the networks: the second time, and the head of the critic."""
    spec = specfile.load(presets.find(name)).spec
    count, make = PUBLISHED[name.partition("-")[0]]
    with torch.device("meta"):
        network = make()
    whole = [p.numel() for p in network.parameters()]
    assert sum(whole) == count
    stage = [each for each in spec.stages.values() if isinstance(each, TrainStage)][-1]
    roles = ("student", "critic") if stage.recipe == "score/dmd2" else ("student",)
    sizes = {role: whole if role not in stage.lora else adapters(network, stage.lora[role]) for role in roles}
    launch, sharding = spec.launch, choose_sharding(spec.launch)
    found = sum(memory.predict(sizes, [], len(stage.ema_half_lives), launch.world_size, sharding).values())
    if "point" not in stage.options or stage.options["point"] != "data":
        held = count * (2 if spec.teacher.dtype == "bfloat16" else 4)
        found += held // launch.world_size if sharding.divides_frozen else held
    assert f"takes about {round(found / 1e9)} GB of each GPU" in " ".join(presets.head(name))


def adapters(network: torch.nn.Module, lora: LoraSpec) -> list[int]:
    ends = None if lora.targets is None else tuple(f".{each}" for each in lora.targets)
    chosen = [
        each for name, each in network.named_modules()
        if isinstance(each, torch.nn.Linear) and (".attn" in name if ends is None else name.endswith(ends))
    ]  # fmt: skip
    return [lora.rank * size for each in chosen for size in (each.in_features, each.out_features)]
