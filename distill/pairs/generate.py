"""Solves the teacher's ODE shard by shard. A process that is killed loses only the shard that it is working on.

The cost of a shard does not depend on the number of shards: first the shard is written, then its record. The manifest
is written twice: before the first shard, and with all shards listed when the set is complete.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from distill.core import space
from distill.core.atomic import remove_unfinished, write_atomic
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.flow import draws
from distill.pairs import accuracy, paths
from distill.pairs.manifest import Manifest, ShardFile, fault, few, foreign, noise_sha256, read, records
from distill.pairs.numbers import TOLERATED, Rounding, Whiteness, restored, stored
from distill.pairs.paths import Real
from distill.protocols import VelocityField
from distill.runs.progress import Progress
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"pairs cannot be written to {folder}: {error.strerror}; name another folder") from error
    layout, ours = planned.layout, planned.layout.part(part)
    manifest = _resume(folder, planned, ours, progress)
    missing = [number for number in ours if layout.name(number) not in manifest.shards]
    left = sum(len(layout.indices(number)) for number in missing)
    done, kept = layout.pairs(ours) - left, len(ours) - len(missing)
    space.require(folder, left * stage.bytes_per_pair(teacher.shape), f"{left:,} pairs")
    if done == 0 and ours and ours.start == 0 and fit is None and not is_checked:
        accuracy.advise(field, manifest, real, device, folder, progress, stop)
    progress.start(done)
    listed = dict(manifest.shards)
    for made, number in enumerate(missing, start=kept):
        name, indices = layout.name(number), layout.indices(number)
        blocks: list[dict[str, Tensor]] = []
        for start in range(indices.start, indices.stop, manifest.block):
            stop.raise_if_requested(f"{made} of {len(ours)} shards in {folder}")
            block = range(start, start + manifest.block)  # a whole block, even if it goes beyond the count
            solved = paths.solve(field, manifest, block, real, device)
            solved = {key: values[: indices.stop - start] for key, values in solved.items()}
            _refuse_non_finite(solved, start, name, manifest)
            blocks.append(solved)
            done += len(solved["data"])
            progress.update(done, {})
        content, listed[name] = _encode(blocks, indices, manifest)
        write_atomic(folder / name, content)
        write_atomic(pairspec.shard_record(folder / name), listed[name].model_dump_json())
    if part is not None and len(listed) < layout.files:
        listed = listed | records(folder, layout)[0]  # the part that ends last completes the set
    if len(listed) == layout.files and not manifest.done:
        manifest = manifest.model_copy(update={"shards": dict(sorted(listed.items())), "done": True})
        manifest.save(folder)
        _judge(manifest, progress)
    if part is None:
        for path in folder.glob("shard-*.json"):
            if layout.number(path.with_suffix(".safetensors").name) is not None:
                path.unlink(missing_ok=True)


def _judge(manifest: Manifest, progress: Progress) -> None:
    """Warn if storing the pairs changed them too much, or if inverted noise is not like standard normal noise."""
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


def _resume(folder: Path, planned: Manifest, ours: range, progress: Progress) -> Manifest:
    """The folder's manifest, with all shards that are complete. If there is none, the planned one is saved.

    The shards with numbers in `ours` are read and compared with their checksums; missing and damaged ones are left out.
    InputError if the folder holds other pairs.
    """
    # Listed before the manifest is read, because another process may be creating both.
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    layout, found = planned.layout, read(folder)
    strangers = foreign(folder, planned) if found else shards
    if found and (differences := found.differences(planned)):
        raise InputError(
            f"{folder} contains pairs with other settings: {', '.join(differences)}; delete the folder, or use another "
            "folder or run name"
        )
    if strangers:
        raise InputError(f"{folder} contains shards that do not belong to this set: {few(strangers)}; remove them")
    whole = len(ours) == layout.files
    remove_unfinished(folder, lambda name: whole or layout.number(f"{name.partition('.')[0]}.safetensors") in ours)
    if found is None:
        planned.save(folder)
        found = planned
    recorded, unreadable = records(folder, layout)
    listed = {name: file for name, file in (found.shards | recorded).items() if name not in unreadable}
    faults = dict[str, str]()
    for name in (layout.name(number) for number in ours):
        if name in unreadable:
            faults[name] = unreadable[name]
        elif name in listed and (wrong := fault(folder / name, listed[name])):
            faults[name] = f"{folder / name} is {wrong}"
    for wrong in faults.values():
        progress.warn(f"{wrong}; regenerating it")
    kept = {name: file for name, file in sorted(listed.items()) if name not in faults}
    done = found.done and len(kept) == layout.files and kept == found.shards
    return found.model_copy(update={"shards": kept, "done": done})


def _refuse_non_finite(solved: Mapping[str, Tensor], start: int, name: str, manifest: Manifest) -> None:
    for key in solved.keys() - {"class_labels"}:
        kept = solved[key] if key == "noise" else restored(stored(solved[key], manifest.dtype))
        finite = (solved[key].isfinite() & kept.isfinite()).flatten(1).all(1)
        if not finite.all():
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
