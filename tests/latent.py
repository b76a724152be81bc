"""Tiny random pipelines of latent-space models: writing them, and sampling them by our solvers.

The test of each convention compares with the stock pipeline, from the same latents, embeddings and times.
"""

import json
import shutil
import string
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file, save_file
from students import card, put, relist
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from distill import teachers
from distill.core.errors import InputError
from distill.evaluation.sample import write_samples
from distill.exchange import pulling, student_card
from distill.exchange.transports import at
from distill.flow.fields import Rescheduled, start
from distill.flow.interpolants import linear, vp
from distill.flow.solvers import integrate
from distill.networks.second_time import SecondTime
from distill.networks.two_times import TwoTimes
from distill.spec.guidancespec import FieldSettings, GuidanceSpec
from distill.spec.model import CheckpointTeacher
from distill.students import native
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.teachers import encoding
from distill.teachers.analytic import GaussianField
from distill.teachers.architectures import convention_of
from distill.teachers.architectures.chroma import Chroma
from distill.teachers.network_field import linear_call
from distill.training.blocks import recompute

CPU = torch.device("cpu")
SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")  # tokens 0 to 3 of `tokenizer`
VOCABULARY = len(SPECIAL) + len(string.printable)
PROMPTS, NEGATIVE = ["a cat", "two dogs on a hill"], "rain"  # two lengths


def seeded(make, seed: int = 0):
    """What `make` builds, from this seed and in evaluation mode. Weights that start as zero are drawn, too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return network.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, pipeline) -> Path:
    """The folder of a pipeline as diffusers writes it."""
    pipeline.save_pretrained(folder)
    return folder


def write_conditions(path: Path, rows: dict[str, Tensor], null: dict[str, Tensor] | None = None) -> str:
    """A file with conditions, as `teacher.conditions` names it."""
    save_file({**rows, **{f"null.{name}": each for name, each in (null or {}).items()}}, path)
    return str(path)


def load(folder: Path, **fields) -> teachers.LoadedTeacher:
    return teachers.load_teacher(CheckpointTeacher(path=str(folder), **fields), CPU)


def conditions(teacher: teachers.LoadedTeacher, count: int):
    """The conditions of samples 0 to count - 1, which use the rows of the file in turn."""
    if teacher.conditioning.count is None:
        return {}
    return teacher.conditioning.collate(torch.arange(count) % teacher.conditioning.count)


@torch.no_grad()
def ours(
    teacher: teachers.LoadedTeacher,
    t_grid: Tensor,
    noise: Tensor,
    guidance_scale: float = 1.0,
    guidance: GuidanceSpec | None = None,
) -> Tensor:
    """Euler on the linear path over t_grid (the sigmas of a flow scheduler), from noise [B, C, ...]."""
    field = teacher.field_with(FieldSettings(guidance_scale, guidance))
    sigma = t_grid[:1].double() / (1 - t_grid[:1].double())
    c = field.interpolant.path(field.interpolant.time_of(sigma))
    scale = 1.0 if sigma.isinf() else (c.alpha + c.sigma).item()
    x = start(field, noise) / scale
    return integrate("euler", Rescheduled(field, linear()), x, t_grid.double(), conditions(teacher, len(noise)))


def same(got: Tensor, expected: Tensor, within: float = 1e-4) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= within, (got - expected).abs().max()
    assert 0.05 < expected.std() < 50  # samples, not zeros


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of data from N(0.3, 0.5^2) on the linear path at x [B, ...] and t [B]: what an oracle returns."""
    return GaussianField(torch.tensor([0.3]), torch.tensor([0.5]))(
        x.reshape(-1, 1), t.repeat_interleave(x[0].numel()), {}
    ).reshape(x.shape)


def exact_epsilon(x: Tensor, n: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The noise prediction for the same data at x [B, ...] of a VP table, with its steps n [B]."""
    path = vp(alphas_cumprod)
    t = n.double() / (len(alphas_cumprod) - 1)
    field = GaussianField(torch.tensor([0.3]), torch.tensor([0.5]), path)
    v = field(x.double().reshape(-1, 1), t.repeat_interleave(x[0].numel()), {}).reshape(x.shape)
    return path.convert(x.double(), v, t, "velocity", "epsilon").to(x.dtype)


@torch.no_grad()
def finite_at_both_ends(teacher: teachers.LoadedTeacher, noise: Tensor) -> None:
    """Also of the small sample with which a network is tested when it makes large ones."""
    samples = [noise]
    if (convention := convention_of(teacher.network)) is not None:
        config = dict(getattr(teacher.network, "transformer", teacher.network).config)
        channels, *sides = noise.shape[1:]
        with suppress(InputError):  # tiny networks may have no positions for this size
            large = convention.latent_shape(config, Path(), tuple(4 * side for side in sides))
            small = convention.small(config, large)
            assert max(small[1:]) <= 18 and small[0] == channels
            samples.append(normal(len(noise), *small))
    for x in samples:
        for t in teacher.field.t_range:
            found = teacher.field(x, torch.full((len(x),), t), conditions(teacher, len(x)))
            assert found.shape == x.shape
            assert found.isfinite().all()


def fits_students(teacher: teachers.LoadedTeacher, noise: Tensor) -> None:
    """Checks what a convention says for flow maps, accelerations and critics against the network."""
    network, cond, rows = teacher.network, conditions(teacher, len(noise)), len(noise)
    convention = convention_of(network)
    config = json.loads(network.to_json_string())
    width, layers = convention.time_width(config), convention.time_layers(network)

    mapped = TwoTimes(native.copied(network, None), layers, SecondTime(width, []))
    embedded = {}
    for name in layers:
        module = mapped.network.get_submodule(name)
        module.register_forward_hook(lambda _, inputs, output, name=name: embedded.update({name: output}))
    t, s = torch.full((rows,), 0.7), torch.full((rows,), 0.2)
    found = mapped(linear_call(teacher.field), noise, t, s, cond)
    assert {name: each.shape for name, each in embedded.items()} == dict.fromkeys(layers, (rows, width))
    found.square().sum().backward()
    assert mapped.gap.out.bias.grad.any()  # the second time reaches the output
    missed = [name for name, each in mapped.named_parameters() if each.requires_grad and each.grad is None]
    assert not missed, "`unused` names what has no effect on the output"

    same_gradients_when_recomputed(teacher, noise, t, cond)

    # An acceleration is at first the velocity, for any second input.
    time, wide = torch.full((rows,), 500.0), native.accelerated(network)
    twice = torch.cat([noise, normal(*noise.shape, seed=9)], dim=1)
    if any(isinstance(each, nn.Dropout) for each in network.modules()):
        grown = native.accelerated(native.copied(network, 0.25))
        assert {each.p for each in grown.modules() if isinstance(each, nn.Dropout)} == {0.25}
    with torch.no_grad():
        same(convention.call(wide, twice, time, cond), convention.call(network, noise, time, cond), 1e-5)
        middle = [convention.critic_layer(network)]
        (features,) = teacher.features(noise, t, cond, middle)
        (alone,) = teacher.features(noise[:1], t[:1], {name: each[:1] for name, each in cond.items()}, middle)
        velocity, logit = native.critic(network, linear_call(teacher.field), 0)(noise, t, cond)
        same_alone(native.critic(network, linear_call(teacher.field), 0), noise, t, cond, velocity, logit)
    assert (alone - features[:1]).abs().max() <= 1e-5
    tokens = features.shape[1] if features.ndim == 3 else features[0, 0].numel()
    assert noise[0, 0].numel() % tokens == 0, "features belong to patches of the image only"
    assert features.ndim > 2 and len(features) == rows and features.isfinite().all()
    assert velocity.shape == noise.shape and logit.shape == (rows,)


def same_gradients_when_recomputed(teacher: teachers.LoadedTeacher, noise: Tensor, t: Tensor, cond) -> None:
    """Checks launch.activation_checkpointing."""
    if not teacher.network._supports_gradient_checkpointing:
        return
    outputs, gradients = [], []
    for again in (False, True):
        student = native.velocity(native.copied(teacher.network, None), linear_call(teacher.field)).eval()
        if again:
            recompute("a recipe", [student])
        outputs.append(student(noise, t, cond))
        outputs[-1].square().sum().backward()
        gradients.append([each.grad for each in student.parameters() if each.grad is not None])
    assert torch.equal(*outputs)
    assert len(gradients[0]) == len(gradients[1])
    for kept, recomputed in zip(*gradients, strict=True):
        assert (kept - recomputed).abs().max() <= 1e-5 * kept.abs().max()


def same_alone(critic, noise: Tensor, t: Tensor, cond, velocity: Tensor, logit: Tensor) -> None:
    """Checks that each row alone gives the same as in the batch, and that the padding of prompts has no effect."""
    convention = convention_of(critic.field.network)
    fields = convention.fields(json.loads(critic.field.network.to_json_string()))
    free = {name for name, each in fields.items() if each.shape and each.shape[0] is None}
    masked = any(name.endswith("mask") for name in free) and not isinstance(convention, Chroma)
    if masked:  # Chroma's network adds its mask to the scores, so its padding has an effect
        longer = {
            name: torch.cat([each, each.new_zeros(len(each), 3, *each.shape[2:])], dim=1) if name in free else each
            for name, each in cond.items()
        }
        v, own = critic(noise, t, longer)
        assert (v - velocity).abs().max() <= 1e-5
        assert (own - logit).abs().max() <= 1e-5
    for i in range(len(noise)):
        v, own = critic(noise[i : i + 1], t[i : i + 1], {name: each[i : i + 1] for name, each in cond.items()})
        assert (v - velocity[i]).abs().max() <= 1e-5
        assert (own - logit[i]).abs().max() <= 1e-5


def tokenizer(length: int = 77, side: str = "right", template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are letters, with <eos> at the end. template: of chats, in Jinja."""
    names = [*SPECIAL, *string.printable]
    found = Tokenizer(BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    found.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", names.index("<eos>"))])
    made = PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=length,
        padding_side=side,
    )
    made.chat_template = template
    return made


def prompted(folder: Path, stock, negative: str = NEGATIVE, **fields) -> teachers.LoadedTeacher:
    """The teacher of a stock pipeline, with conditions of PROMPTS and `negative` as `distill encode` makes them."""
    pipeline = write(folder / "pipeline", stock)
    spec = CheckpointTeacher(path=str(pipeline), size=fields.get("size"))
    encoders = encoding.load(spec, CPU, torch.float32)
    rows, null = encoders.encode(PROMPTS, negative, len(PROMPTS), lambda done: None)
    teacher = load(pipeline, conditions=write_conditions(folder / "encoded.safetensors", rows, null), **fields)
    drawn_and_shared(folder, teacher, fields)
    return teacher


def drawn_and_shared(folder: Path, teacher: teachers.LoadedTeacher, fields: dict) -> None:
    """Checks that a student of the teacher in `folder` is drawn by prompts as by their conditions, and can be pulled.

    Also with all components of its pipeline.
    """
    linear_path = teacher_on_linear_path(teacher)
    student = StudentInit(linear_path, None, teacher.shape, teacher.num_classes, 0, linear_path).velocity_field()
    export(student, folder / "student", card("student", shape=teacher.shape), teacher.packaging)
    spec = CheckpointTeacher(path=str(folder / "pipeline"), **fields)
    found = []
    for name, prompts in {"prompts": PROMPTS, "rows": []}.items():
        like = spec if prompts else spec.model_copy(update={"conditions": str(folder / "encoded.safetensors")})
        path = folder / f"{name}.safetensors"
        write_samples(
            folder / "student", path, steps=1, seed=0, count=2, labels=None, device=CPU, like=like, prompts=prompts
        )
        found.append(load_file(path)["samples"])
    assert (found[0] - found[1]).abs().max() <= 1e-4 * max(1.0, found[1].abs().max().item())
    put(folder / "student", folder / "store", "student")
    pulling.pull(at(folder / "store" / "registry" / "student" / "v1"), folder / "pulled")
    whole = shutil.copytree(folder / "pipeline", folder / "whole")
    for name in ("README.md", "distill.json", "scheduler", "transformer", "unet"):
        if (folder / "pulled" / name).is_dir():
            shutil.copytree(folder / "pulled" / name, whole / name, dirs_exist_ok=True)
        elif (folder / "pulled" / name).exists():
            shutil.copy(folder / "pulled" / name, whole / name)
    relist(whole, student_card.read(whole))
    assert pulling.verify(whole).is_native


def autoencoder(levels: int = 2, **options) -> AutoencoderKL:
    """A small autoencoder with 4 latent channels, which makes the sides 2^(levels - 1) times smaller."""
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
            norm_num_groups=2,
            **options,
        )
    )


def ddim(**options) -> DDIMScheduler:
    """A scheduler whose steps are those of Euler's method, from the last entry of the table to the data."""
    return DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, **options)


def vp_grid(scheduler: DDIMScheduler) -> Tensor:
    """Linear time of the scheduler's steps, then 0."""
    table = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    alpha, sigma = table.sqrt(), (1 - table).sqrt()
    return torch.cat([sigma / (alpha + sigma), torch.zeros(1)])


def as_module(function) -> torch.nn.Module:
    """A function in place of a network."""

    class Stub(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    found = Stub()
    vars(found).update(vars(function))  # such as its config
    return found
