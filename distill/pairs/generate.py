"""Solving the teacher's ODE from noise to data, shard by shard. A kill costs the shard in hand and nothing else."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from distill import draws, solvers, space
from distill.guard import InputError, RunError
from distill.pairs.manifest import Manifest, ShardFile, fault, foreign, noise_sha256, read, records
from distill.progress import Progress
from distill.protocols import VelocityField
from distill.spec import PairsStage
from distill.stop import StopRequest
from distill.store import shard_record, write_atomic
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
    part: tuple[int, int] | None = None,
) -> None:
    """Make what `folder` lacks of the stage's pairs. On the same device kind the files are the same bytes, whatever
    interrupted them: each block of consecutive indices is solved whole, and appears in a complete shard or not at all.

    part: (i, n) makes the shards i, i + n, ... alone, beside others that make the rest; the set is complete once it is
    then made whole.
    """
    field, planned = teacher.guided(stage.guidance_scale), _plan(teacher, stage, seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"pairs cannot be written to {folder}: {error.strerror}; name another folder") from error
    ours = planned.layout() if part is None else planned.part(*part)
    manifest = _resume(folder, planned, ours, progress)
    done = sum(len(indices) for name, indices in ours.items() if name in manifest.shards)
    left = sum(len(indices) for indices in ours.values()) - done
    need = left * math.prod(teacher.shape) * DTYPES[stage.dtype].itemsize
    space.require(folder, need, f"{left:,} pairs")
    progress.start(done)
    for name, indices in ours.items():
        if name in manifest.shards:
            continue
        blocks = []
        for start in range(indices.start, indices.stop, manifest.block):
            made = sum(name in manifest.shards for name in ours)
            stop.raise_if_requested(f"{made} of {len(ours)} shards in {folder}")
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
        if part is None:
            manifest.save(folder)
        else:
            write_atomic(shard_record(folder / name), file.model_dump_json())
    if part is None:
        if not manifest.done:
            manifest.model_copy(update={"done": True}).save(folder)
        for name in ours:
            shard_record(folder / name).unlink(missing_ok=True)


def size(stage: PairsStage, part: tuple[int, int] | None) -> int:
    """Pairs of a stage, or of the shards of one part (i, n)."""
    first, step = part or (0, 1)
    starts = range(first * stage.shard, stage.count, step * stage.shard)
    return sum(min(stage.shard, stage.count - start) for start in starts)


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


def _resume(folder: Path, planned: Manifest, ours: Mapping[str, range], progress: Progress) -> Manifest:
    """The folder's manifest, or the planned one, saved, if there is none; with what parts have made, and of our shards
    without those that are gone or damaged.
    """
    shards = sorted(path.name for path in folder.glob("*.safetensors"))  # before the manifest, as others may make both
    found = read(folder)
    strangers = foreign(folder, planned) if found else shards
    if found and (differences := found.differences(planned)):
        raise InputError(
            f"{folder} holds other pairs than this stage asks for: {', '.join(differences)} (asked for in brackets); "
            "delete the folder, or give this run another name"
        )
    if strangers:
        raise InputError(f"{folder} holds shards that are not of this set: {', '.join(strangers)}; remove them")
    for left_over in folder.glob(".*.tmp-*"):  # of a process that was killed
        if ours == planned.layout() or any(left_over.name.startswith(f".{Path(name).stem}.") for name in ours):
            left_over.unlink()
    if found is None:
        planned.save(folder)
        found = planned
    listed = {**found.shards, **records(folder, found)}
    mine = {name: file for name, file in listed.items() if name in ours}
    faults = {name: wrong for name, file in mine.items() if (wrong := fault(folder / name, file))}
    for name, wrong in faults.items():
        progress.warn(f"{folder / name} is {wrong}; it is made again")
    kept = {name: file for name, file in sorted(listed.items()) if name not in faults}
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
