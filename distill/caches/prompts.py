"""Encodes prompts, shard by shard. A process that is killed loses only the shard it is working on."""

from collections.abc import Sequence
from pathlib import Path

from distill.core.stop import StopRequest
from distill.runs.progress import Progress
from distill.spec.cachespec import CacheStage
from distill.teachers.encoding import TextEncoders


def key(prompts_digest: str, encoder_digest: str, stage: CacheStage) -> str:
    """SHA-256 over everything that the rows depend on: the folder is STORE/caches/prompts-KEY.

    prompts_digest: `Prompts.digest`. encoder_digest: `teachers.encoder_files.digest(spec)`, made without loading them.
    """
    raise NotImplementedError


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
    """Make the shards of the embeddings of these prompts that `folder` does not have yet. See `latents.generate`.

    The folder can be given as `teacher.conditions`. The progress counts prompts.
    """
    raise NotImplementedError
