"""Solving the teacher's ODE from noise to data, shard by shard. A kill costs the shard in hand and nothing else."""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from distill import draws, solvers, space
from distill.guard import InputError, RunError
from distill.pairs.manifest import Manifest, ShardFile, fault, foreign, noise_sha256, read
from distill.progress import Progress
from distill.protocols import VelocityField
from distill.spec import PairsStage
from distill.stop import StopRequest
from distill.store import write_atomic
from distill.teachers.loaded import LoadedTeacher

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def generate(
    teacher: LoadedTeacher,
    stage: PairsStage,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    stop: StopRequest,
) -> None:
    """Make what `folder` lacks of the stage's pairs. On the same device kind the files are the same bytes, whatever
    interrupted them: each block of consecutive indices is solved whole, and appears in a complete shard or not at all.
    """
    field, planned = teacher.guided(stage.guidance_scale), _plan(teacher, stage, seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"pairs cannot be written to {folder}: {error.strerror}; name another folder") from error
    manifest = _resume(folder, planned, progress)
    done = sum(file.stop - file.start for file in manifest.shards.values())
    left = stage.count - done
    need = left * math.prod(teacher.shape) * DTYPES[stage.dtype].itemsize
    space.require(folder, need, f"{left:,} pairs")
    progress.start(done)
    for name, indices in manifest.layout().items():
        if name in manifest.shards:
            continue
        blocks = []
        for start in range(indices.start, indices.stop, manifest.block):
            stop.raise_if_requested(f"{len(manifest.shards)} of {len(manifest.layout())} shards in {folder}")
            block = range(start, start + manifest.block)  # whole, even where the count ends
            data = _solve(field, manifest, block, device)[: indices.stop - start].to(DTYPES[manifest.dtype])
            _refuse_non_finite(data, start, name, manifest)
            blocks.append(data)
            done += len(data)
            progress.update(done, {})
        content = _encode(torch.cat(blocks), indices, manifest)
        write_atomic(folder / name, content)
        sha256 = hashlib.sha256(content).hexdigest()
        file = ShardFile(start=indices.start, stop=indices.stop, size=len(content), sha256=sha256)
        shards = {**manifest.shards, name: file}
        manifest = manifest.model_copy(update={"shards": dict(sorted(shards.items()))})
        manifest.save(folder)
    if not manifest.done:
        manifest.model_copy(update={"done": True}).save(folder)


def _plan(teacher: LoadedTeacher, stage: PairsStage, seed: int) -> Manifest:
    if stage.shard % stage.block:
        nearest = max(1, round(stage.shard / stage.block)) * stage.block
        raise InputError(f"shard={stage.shard} is not a multiple of block={stage.block}; nearest is {nearest}")
    calls = 1 if stage.guidance_scale == 1 else 2
    return Manifest(
        teacher=teacher.description,
        teacher_digest=teacher.digest,
        solver=stage.solver,
        steps=stage.steps,
        nfe=solvers.SOLVERS[stage.solver].nfe(stage.steps) * calls,
        guidance_scale=stage.guidance_scale,
        seed=seed,
        count=stage.count,
        block=stage.block,
        shard=stage.shard,
        dtype=stage.dtype,
        precision=stage.precision,
        shape=teacher.shape,
        num_classes=teacher.num_classes,
        noise_sha256=noise_sha256(seed, teacher.shape),
    )


def _resume(folder: Path, planned: Manifest, progress: Progress) -> Manifest:
    """The folder's manifest without shards that are gone or damaged, or the planned one, saved, if there is none."""
    found = read(folder)
    strangers = foreign(folder, planned) if found else sorted(path.name for path in folder.glob("*.safetensors"))
    if found and (differences := found.differences(planned)):
        raise InputError(
            f"{folder} holds other pairs than this stage asks for: {', '.join(differences)} (asked for in brackets); "
            "delete the folder, or give this run another name"
        )
    if strangers:
        raise InputError(f"{folder} holds shards that are not of this set: {', '.join(strangers)}; remove them")
    for left_over in folder.glob(".*.tmp-*"):  # of a process that was killed
        left_over.unlink()
    if found is None:
        planned.save(folder)
        return planned
    faults = {name: wrong for name, file in found.shards.items() if (wrong := fault(folder / name, file))}
    for name, wrong in faults.items():
        progress.warn(f"{folder / name} is {wrong}; it is made again")
    kept = {name: file for name, file in found.shards.items() if name not in faults}
    return found.model_copy(update={"shards": kept, "done": found.done and not faults})


def _solve(field: VelocityField, manifest: Manifest, indices: range, device: torch.device) -> Tensor:
    """The data ends of pairs `indices`, [len(indices), *shape] on the CPU."""
    noise = draws.sample_noise(manifest.seed, indices, manifest.shape).to(device)
    cond = {}
    if manifest.num_classes is not None:
        cond = {"class_labels": draws.sample_labels(indices, manifest.num_classes).to(device)}
    bf16 = manifest.precision == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return solvers.sample(field, noise, cond, solver=manifest.solver, steps=manifest.steps).cpu()


def _refuse_non_finite(data: Tensor, start: int, name: str, manifest: Manifest) -> None:
    finite = data.isfinite().flatten(1).all(1)
    if not finite.all():
        raise RunError(
            f"pair {start + int(finite.int().argmin())} of {name} is not finite as {manifest.dtype} after "
            f"{manifest.steps} steps of {manifest.solver}; the shard was not written, earlier shards are intact"
        )


def _encode(data: Tensor, indices: range, manifest: Manifest) -> bytes:
    """A shard as safetensors. One key of metadata: with more, their order in the file is not fixed."""
    tensors = {"data": data}
    if manifest.num_classes is not None:
        tensors["class_labels"] = draws.sample_labels(indices, manifest.num_classes)
    metadata = {"start": indices.start, "stop": indices.stop, "seed": manifest.seed, "teacher": manifest.teacher_digest}
    return save(tensors, {"distill": json.dumps(metadata)})
