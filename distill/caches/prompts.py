"""Encodes prompts, shard by shard. A process that is killed loses only the shard it is working on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from distill.core.atomic import write_atomic, write_json
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.data.prompts import Prompts
from distill.runs.progress import Progress
from distill.shards import make, make_folder
from distill.shards import manifest as files
from distill.shards.values import DTYPES
from distill.spec import cachespec
from distill.spec.cachespec import CacheStage
from distill.teachers.conditions import CAPTIONS, FIRST_PROMPTS, captions
from distill.teachers.encoding import TextEncoders, joined_rows
from distill.teachers.sharded_rows import KIND, NULL_FILE, TYPES, PromptManifest, PromptShard, null_faults

NAMES = {dtype: name for name, dtype in TYPES.items()}


def key(prompts_digest: str, encoder_digest: str, stage: CacheStage) -> str:
    """SHA-256 over everything that the rows depend on: the folder is STORE/caches/prompts-KEY.

    prompts_digest: `Prompts.digest`. encoder_digest: `teachers.encoder_files.digest(spec)`, made without loading them.
    """
    settings = {
        "format": PromptManifest.model_fields["format"].default,
        "prompts": prompts_digest,
        "encoder": encoder_digest,
        "negative": stage.negative,
        "encoder_dtype": stage.encoder_dtype,
        "dtype": stage.dtype,
        "block": stage.block,
        "shard": stage.prompts_shard,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def generate(
    prompts: Sequence[str],
    encoders: TextEncoders,
    stage: CacheStage,
    folder: Path,
    *,
    progress: Progress,
    stop: StopRequest,
    part: tuple[int, int] | None = None,
) -> None:
    """Make the shards of the embeddings of these prompts that `folder` does not have yet. See `shards.make`.

    The folder can be given as `teacher.conditions`. The progress counts prompts.

    part: (i, n) makes only the shards i, i + n, ...; the process that ends last completes the set. InputError if the
    folder holds another set or cannot be written, or if the rows do not fit the network; RunError if they are not
    finite.
    """
    for mistake in cachespec.mistakes(stage, ""):
        raise InputError(mistake)
    null = _stored(encoders.null(stage.negative), stage, "the unconditional prompt")
    content = save(null)
    planned = PromptManifest(
        encoder_digest=encoders.digest,
        prompts_digest=prompts.digest if isinstance(prompts, Prompts) else Prompts.of(prompts).digest,
        negative=stage.negative,
        encoder_dtype=stage.encoder_dtype,
        dtypes={name: NAMES[each.dtype] for name, each in null.items()},
        count=len(prompts),
        block=stage.block,
        shard=stage.prompts_shard,
        null_rows=_shapes(null),
        null_sha256=hashlib.sha256(content).hexdigest(),
    )
    make_folder(KIND, folder)
    planned = _with_null_row(planned, folder, content)

    def solve(block: range) -> dict[str, Tensor]:
        rows = encoders.rows(prompts[block.start : block.stop])
        encoders.check(rows, null)
        return _stored(rows, stage, f"one of the prompts {block.start} to {block.stop - 1}")

    def begin(is_new: bool) -> None:
        if not (folder / FIRST_PROMPTS).exists():
            write_json(folder / FIRST_PROMPTS, captions(prompts[:CAPTIONS]))

    make(
        KIND,
        planned,
        folder,
        block=stage.block,
        item_bytes=sum(each.nbytes for each in null.values()),
        solve=solve,
        encode=_encode,
        progress=progress,
        stop=stop,
        part=part,
        begin=begin,
    )


def _with_null_row(planned: PromptManifest, folder: Path, content: bytes) -> PromptManifest:
    """The planned manifest for the unconditional row that the folder has, which is written if it is missing or damaged.

    Its last bits depend on the device and the number of threads, so of several processes the first one writes it.
    """
    begun = files.read(KIND, folder)
    if begun is None:
        write_atomic(folder / NULL_FILE, content, replace=False)
    elif begun.differences(planned):
        return planned  # the folder has another set, which is refused
    elif null_faults(folder, begun):
        write_atomic(folder / NULL_FILE, content)
        begun.model_copy(update={"null_sha256": planned.null_sha256}).save(folder)
    return planned.model_copy(update={"null_sha256": files.file_sha256(folder / NULL_FILE)})


def _encode(blocks: Sequence[Mapping[str, Tensor]], indices: range) -> tuple[bytes, PromptShard]:
    """The bytes of a shard, whose rows are as long as its longest one, and its entry in the manifest."""
    rows = joined_rows(blocks)
    content = save(rows)
    sha256 = hashlib.sha256(content).hexdigest()
    return content, PromptShard(
        start=indices.start, stop=indices.stop, size=len(content), sha256=sha256, rows=_shapes(rows)
    )


def _shapes(rows: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape[1:]) for name, each in rows.items()}


def _stored(rows: Mapping[str, Tensor], stage: CacheStage, which: str) -> dict[str, Tensor]:
    """The rows in the data type of the cache. RunError if they are not finite in it."""
    found = {}
    for name, each in rows.items():
        found[name] = each.to(DTYPES[stage.dtype]) if each.is_floating_point() else each
        if each.is_floating_point() and not found[name].isfinite().all():
            raise RunError(
                f"{name} of {which} contains NaN or infinity, computed in {stage.encoder_dtype} and stored as "
                f"{stage.dtype}; its shard was not written, earlier ones are intact. Use encoder_dtype: float32 and "
                "dtype: float32 or bfloat16"
            )
    return found
