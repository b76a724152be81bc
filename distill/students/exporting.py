"""Export of a student to a folder that plain diffusers can load. It is checked before it appears under its name.

The same weights and card give the same bytes, so that students can be compared by their files.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler
from diffusers.utils import HF_MODULES_CACHE
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.core.atomic import new_folder
from distill.core.errors import RunError
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.flow.conditioning import GUIDANCE_SCALE
from distill.flow.draws import sample_labels, sample_noise
from distill.networks.sharing import has_base, on_cpu, own_state
from distill.networks.velocity import TIME_SCALE
from distill.students import native, native_folder, shipped, stock
from distill.students.loaded import KINDS, Student
from distill.students.sampling import by_sampler, fresh_noises, grid, num_fresh, uses_table, weights
from distill.teachers.loaded import Packaging
from distill.teachers.quiet import quiet

WEIGHTS = "diffusion_pytorch_model.safetensors"
CHECK_STEPS, CHECK_BATCH, CHECK_SEED = (1, 2, 4), 2, 0
TOLERANCE = 1e-5  # absolute for samples within [-1, 1], relative to the largest value for larger ones


def export(
    student: Student,
    folder: Path,
    card: StudentCard,
    packaging: Packaging | None = None,
    prove: Callable[[Path], object] | None = None,
) -> None:
    """Write the student folder, reload it with plain diffusers, compare, and rename it to `folder`.

    An existing folder is replaced. RunError if a weight is not finite, if diffusers reads other weights or makes other
    samples, or if writing fails; `folder` is then unchanged.

    packaging: for students that keep the network class of a latent-space pipeline. prove: called with the complete
    folder under its temporary name; raises RunError if others cannot use it.
    """
    assert isinstance(student, KINDS[card.kind]), f"{type(student)} is no {card.kind}"
    folder = folder.absolute()
    reference = on_cpu(student).eval()
    for name, tensor in own_state(reference.network).items():
        if not tensor.isfinite().all():
            raise RunError(f"export failed: {name} contains NaN or infinity; nothing was exported")
    try:
        with new_folder(folder, replace=True) as new:
            if native.is_native(reference.network):
                assert packaging is not None
                how = stock.of(reference, card.sampler, card.t_grids, packaging, min(card.trained_for, default=None))
                card = card.model_copy(update={"table_times": not card.t_grids and uses_table(reference, card.sampler)})
            if has_base(reference.network):
                assert packaging is not None
                from distill.students import lora_folder  # imports PEFT, which takes seconds

                student_card.write(new, lora_folder.write(reference.network, new, packaging, card, how))
                lora_folder.compare(reference.network, new)
            elif native.is_native(reference.network):
                assert packaging is not None
                with quiet(), torch.random.fork_rng(devices=[]):
                    student_card.write(new, native_folder.write(reference.network, new, packaging, card, how))
                    native_folder.compare(reference.network, new)
            else:
                _write(reference.network, new, card)
                _compare(reference, new, card)
            if prove is not None:
                prove(new)
    except OSError as error:
        raise RunError(f"cannot write the student to {folder}: {error.strerror}; nothing was changed") from error


def _write(network: nn.Module, folder: Path, card: StudentCard) -> None:
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True)
    class_name = type(network).__name__
    library = shipped.NETWORKS.get(class_name, "diffusers")
    if library == "diffusers":
        assert type(network).__module__.startswith("diffusers."), f"{class_name} is neither of diffusers nor shipped"
    else:
        (folder / "unet" / f"{library}.py").write_text(shipped.network(library))
    (folder / "pipeline.py").write_text(shipped.pipeline(card.kind, card.sampler))

    config = json.loads(network.to_json_string())
    config.pop("_name_or_path", None)  # the origin of the weights is not part of the student
    _write_json(folder / "unet" / "config.json", config)
    weights = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in _state(network)}
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    version = {"_diffusers_version": diffusers.__version__}
    scheduler = FlowMapEulerDiscreteScheduler.__name__
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": scheduler, **version, "num_train_timesteps": int(TIME_SCALE), "shift": 1.0},
    )
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": ["pipeline", "DistilledPipeline"],
            **version,
            "num_classes": card.num_classes,
            "sampler": card.sampler,
            "scheduler": ["diffusers", scheduler],
            **({"t_grids": card.t_grids} if card.t_grids else {}),
            **({"fitted": card.fitted} if card.fitted else {}),
            "unet": [library, class_name],
        },
    )
    student_card.write(folder, card)


def _compare(student: Student, folder: Path, card: StudentCard) -> None:
    """RunError unless plain diffusers reads the same weights, bit for bit, and makes the same samples."""
    with quiet(), torch.random.fork_rng(devices=[]):  # loading initialises the networks at random first
        pipeline = _loaded(folder)
    written, read = dict(_state(student.network)), dict(_state(pipeline.unet))
    for name, tensor in written.items():
        if name not in read or tensor.dtype != read[name].dtype or not torch.equal(tensor, read[name]):
            raise RunError(
                f"export failed: diffusers loads other values of {name} than were written; nothing was exported"
            )
    indices = range(CHECK_BATCH)
    noise = sample_noise(CHECK_SEED, indices, card.shape)
    labels = None if card.num_classes is None else sample_labels(indices, card.num_classes)
    cond = {} if labels is None else {"class_labels": labels}
    scale = None if card.guidance_range is None else card.guidance_range[1]
    if scale is not None:
        cond[GUIDANCE_SCALE] = torch.full((CHECK_BATCH,), scale)
    for steps in card.t_grids or CHECK_STEPS:
        fresh = fresh_noises(CHECK_SEED, indices, card.shape, num_fresh(card.sampler, steps))
        more = [*fresh, *weights(card.fitted, steps)]
        ours = by_sampler(student, card.sampler, noise, grid(card.t_grids, steps), cond, more)
        theirs = pipeline(
            steps, class_labels=labels, latents=noise, fresh=fresh, output_type="pt", guidance_scale=scale
        ).images
        error, allowed = (ours - theirs).abs().max().item(), TOLERANCE * max(1.0, ours.abs().max().item())
        if not error <= allowed:  # also true for NaN
            raise RunError(
                f"export failed: at {steps} steps, the exported student generates other samples in diffusers than in "
                f"distill from the same noise, max difference {error:.3g} (allowed {allowed:.3g}); nothing was exported"
            )


def _loaded(folder: Path) -> DiffusionPipeline:
    """The student's pipeline, from the code in its folder.

    diffusers copies the pipeline.py of every local folder to the same file, and imports the class from there. Without
    the lock, a process that exports another student at this moment could replace the file in between.
    """
    modules = Path(HF_MODULES_CACHE)
    modules.mkdir(parents=True, exist_ok=True)
    with FileLock(modules / "distill.lock"):
        return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def _state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.state_dict().items()


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
