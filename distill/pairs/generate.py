"""Solves the teacher's ODE shard by shard. A process that is killed loses only the shard that it is working on."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from distill import shards
from distill.core.atomic import clear_up
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.flow import draws
from distill.pairs import accuracy, paths
from distill.pairs.manifest import KIND, Manifest, ShardFile, noise_sha256, read
from distill.pairs.numbers import TOLERATED, Rounding, Whiteness
from distill.pairs.paths import Real
from distill.protocols import VelocityField
from distill.runs.progress import Progress
from distill.shards.values import restored, stored
from distill.spec import pairspec
from distill.spec.kinds import FITTED
from distill.spec.model import PairsStage
from distill.students.fitted import FittedSolver
from distill.students.init import teacher_on_linear_path
from distill.teachers.loaded import LoadedTeacher


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
    real: Real | None = None,
    data_digest: str | None = None,
    fit: FittedSolver | None = None,
    is_checked: bool = False,
) -> None:
    """Make the shards of the stage's pairs that `folder` does not have yet.

    On devices of the same kind, the files are the same bytes, whether or not the work was interrupted: blocks of
    consecutive indices are always solved as a whole, and a shard appears complete or not at all.

    part: (i, n) makes only the shards i, i + n, ...; other processes make the rest.
    real: the real data that forward paths and segments start from. data_digest: digest of the whole data set.
    fit: the fitted solver of a stage with solver: bns. is_checked: the accuracy of the solver is known.

    InputError if the folder holds other pairs or cannot be written; RunError if a pair is not finite.
    """
    field, planned = velocity(teacher, stage), plan(teacher, stage, seed, data_digest, fit)

    def solve(block: range) -> dict[str, Tensor]:
        whole = range(block.start, block.start + planned.block)  # even if it goes beyond the count
        solved = paths.solve(field, planned, whole, real, device)
        solved = {key: values[: len(block)] for key, values in solved.items()}
        _refuse_non_finite(solved, block.start, planned)
        return solved

    def begin(is_new: bool) -> None:
        if is_new and fit is None and not is_checked:
            accuracy.advise(field, planned, real, device, folder, progress, stop)

    shards.make(
        KIND,
        planned,
        folder,
        block=planned.block,
        item_bytes=stage.bytes_per_pair(teacher.shape),
        solve=solve,
        encode=lambda blocks, indices: _encode(blocks, indices, planned),
        progress=progress,
        stop=stop,
        part=part,
        begin=begin,
    )


def finish(folder: Path, progress: Progress) -> None:
    """Look at a set of pairs, of which parts were made by several processes. Nothing is done before it is complete.

    Removes the records of its shards, and what killed processes have left. Warns if storing the pairs changed them too
    much, or if inverted noise is not like standard normal noise.
    """
    manifest = read(folder)
    if manifest is None or not manifest.done:
        return
    shards.remove_records(folder, manifest.layout)
    clear_up(folder)
    if (rounding := manifest.rounding.relative) > TOLERATED:
        fits = "is only for pixels in [-1, 1]" if manifest.dtype == "uint8" else "is not precise enough for this data"
        progress.warn(
            f"storing the data as {manifest.dtype} changed it by {rounding:.2%} (RMS); {manifest.dtype} {fits}; "
            "use dtype: float32"
        )
    whiteness = manifest.whiteness
    faults = whiteness.faults(manifest.count * math.prod(manifest.shape)) if whiteness else []
    if faults:
        progress.warn(
            f"the inverted noise is not standard normal: {', '.join(faults)}; but a student that is trained on it will "
            "be sampled from standard normal noise. Use more steps, or a teacher that fits its data better"
        )


def velocity(teacher: LoadedTeacher, stage: PairsStage) -> VelocityField:
    """The field whose paths are solved. A fitted solver is fitted to the velocity that students start from."""
    source = teacher_on_linear_path(teacher) if stage.solver == FITTED else teacher
    return source.indexed(stage.field_settings)


def plan(
    teacher: LoadedTeacher, stage: PairsStage, seed: int, data_digest: str | None, fit: FittedSolver | None = None
) -> Manifest:
    """The manifest of a set of pairs, without shards. InputError if the options of the stage do not fit together."""
    for mistake in pairspec.mistakes(stage, ""):
        raise InputError(mistake)
    field = teacher.field_with(stage.field_settings)
    times = None if stage.times is None else paths.actual_times(field, stage.steps, stage.times)
    if times is not None:
        times[0] = 1.0  # the first state is the noise itself, even if the teacher's time range ends below 1
    return Manifest(
        teacher=teacher.description,
        teacher_digest=teacher.digest,
        solver=stage.solver,
        steps=stage.steps,
        nfe=stage.network_calls_along(paths.solver_grid(field, stage)),
        guidance_scale=stage.guidance_scale,
        guidance=stage.field_settings.recorded,
        weak_digest=teacher.weak.digest if teacher.weak is not None else None,
        epsilon_scale=stage.epsilon_scale,
        seed=seed,
        count=stage.count,
        block=stage.block,
        shard=stage.shard,
        paths=stage.paths,
        times=times,
        data_digest=data_digest,
        dtype=stage.dtype,
        store_noise=stage.store_noise or stage.paths == "forward",
        precision=stage.precision,
        shape=teacher.shape,
        num_classes=teacher.num_classes,
        noise_sha256=noise_sha256(seed, stage.count, teacher.shape),
        fitted=fit,
    )


def _refuse_non_finite(solved: Mapping[str, Tensor], start: int, manifest: Manifest) -> None:
    for key in solved.keys() - {"class_labels"}:
        kept = solved[key] if key == "noise" else restored(stored(solved[key], manifest.dtype))
        finite = (solved[key].isfinite() & kept.isfinite()).flatten(1).all(1)
        if not finite.all():
            name = manifest.layout.name(manifest.layout.holding(start))
            raise RunError(
                f"pair {start + int(finite.int().argmin())} of {name} contains NaN or infinity as {manifest.dtype} "
                f"after {manifest.steps} steps of {manifest.solver}; the shard was not written, earlier shards are "
                "intact. Try more steps, precision: fp32, or dtype: float32"
            )


def _encode(blocks: list[dict[str, Tensor]], indices: range, manifest: Manifest) -> tuple[bytes, ShardFile]:
    """The bytes of a shard, in safetensors format, and its entry in the manifest."""
    found = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    rounded = [found[name] for name in ("data", "states") if name in found]
    rounding = Rounding.of(torch.cat([values.flatten() for values in rounded]), manifest.dtype)
    whiteness = Whiteness.of(found["noise"]) if "noise" in found else None
    tensors = {"data": stored(found["data"], manifest.dtype)}
    if "states" in found:
        tensors["states"] = stored(found["states"], manifest.dtype)
    if manifest.store_noise:
        drawn = None if "noise" in found else draws.sample_noise(manifest.seed, indices, manifest.shape)
        tensors["noise"] = found["noise"] if drawn is None else drawn
    if "class_labels" in found:
        tensors["class_labels"] = found["class_labels"]
    # Only one metadata key: the order of several keys in the file is not fixed.
    metadata = {"start": indices.start, "stop": indices.stop, "seed": manifest.seed, "teacher": manifest.teacher_digest}
    content = save(tensors, {"distill": json.dumps(metadata)})
    sha256 = hashlib.sha256(content).hexdigest()
    return content, ShardFile(
        start=indices.start, stop=indices.stop, size=len(content), sha256=sha256, rounding=rounding, whiteness=whiteness
    )
