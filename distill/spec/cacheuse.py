"""What the cache stage of a spec stores, which stages read it, and the mistakes in it. Does not import torch."""

from collections.abc import Iterator

from distill.spec import cachespec
from distill.spec.model import (
    OF_DATA,
    CacheStage,
    CheckpointTeacher,
    PairsStage,
    RunSpec,
    TrainStage,
)
from distill.spec.resolved import Resolved


def reads_latents(found: Resolved, name: str) -> bool:
    """Whether a stage uses real data as samples, which a cache can hold.

    Evaluations read the images themselves.
    """
    stage = found.spec.stages[name]
    if isinstance(stage, TrainStage):
        return name in found.failed or "data" in found.needs(name)
    return isinstance(stage, PairsStage) and stage.paths in OF_DATA


def stores_latents(found: Resolved) -> bool:
    """Whether the cache stage stores images."""
    return _cache(found.spec) is not None and found.spec.data.has_images and _readers(found)


def may_store_prompts(spec: RunSpec) -> bool:
    """Whether the cache stage stores embeddings of prompts, if the teacher takes them."""
    stage, teacher = _cache(spec), spec.teacher
    if stage is None or stage.prompts is False or not isinstance(teacher, CheckpointTeacher):
        return False
    return teacher.conditions is None and spec.data.has_prompts


def _cache(spec: RunSpec) -> CacheStage | None:
    return next((stage for stage in spec.stages.values() if isinstance(stage, CacheStage)), None)


def _readers(found: Resolved) -> bool:
    return any(reads_latents(found, name) for name in found.spec.stages)


def mistakes(found: Resolved, name: str, stage: CacheStage) -> Iterator[str]:
    """The mistakes in a cache stage that can be found without the data and the teacher."""
    spec, where = found.spec, f"stages.{name}"
    yield from cachespec.mistakes(stage, f"{where}.")
    if spec.cache != name:
        yield f"{where}: '{spec.cache}' is a cache stage already; a spec can have one, so remove one of them"
        return
    if (first := next(iter(spec.stages))) != name:
        yield f"{where}: must come before '{first}', because other stages read what it stores; move it to the front"
    if not spec.data.has_samples and not spec.data.has_prompts:
        yield (
            f"{where}: a cache needs data with images or prompts, but the spec has none; e.g. data: {{kind: images, "
            "path: IMAGES, size: 512, captions: true}"
        )
        return
    if spec.data.has_samples and spec.data.place is None:
        yield f"{where}: data of kind {spec.data.kind} is kept in memory, so a cache has no effect; remove this stage"
        return
    yield from _prompts(spec, stage, where)
    yield from _latents(found, stage, where)
    if (
        not may_store_prompts(spec)
        and not stores_latents(found)
        and stage.latents is None
        and stage.prompts is not True
    ):
        yield (
            f"{where}: has no effect, because the data has no prompts and no stage trains on images; remove it, or set "
            "captions: true in data"
        )


def _prompts(spec: RunSpec, stage: CacheStage, where: str) -> Iterator[str]:
    teacher = spec.teacher
    if stage.prompts is None and not may_store_prompts(spec):
        for name in cachespec.of_prompts(stage):
            yield f"{where}.{name}: has no effect, because no embeddings of prompts are stored; remove it"
    if stage.prompts is not True:
        return
    if not isinstance(teacher, CheckpointTeacher):
        yield f"{where}.prompts: true given, but the spec has no teacher whose text encoders embed prompts; remove it"
    elif teacher.conditions is not None:
        yield (
            f"{where}.prompts: true given, but teacher.conditions={teacher.conditions} has the embeddings already; "
            "remove one of both"
        )
    elif not spec.data.has_prompts:
        yield (
            f"{where}.prompts: true given, but the data has no prompts; e.g. data: {{kind: images, path: IMAGES, "
            "size: 512, captions: true}"
        )


def _latents(found: Resolved, stage: CacheStage, where: str) -> Iterator[str]:
    data = found.spec.data
    if stage.latents is not None and not data.has_images:
        why = "is encoded already" if data.is_encoded else "has no images"
        yield f"{where}.latents: {stage.latents} given, but data of kind {data.kind} {why}; remove it"
    elif stage.latents is not None and not _readers(found):
        yield (
            f"{where}.latents: {stage.latents} given, but no stage trains on images, and evaluations read the images "
            "themselves; remove it"
        )
    if data.crops_randomly and stores_latents(found):
        yield (
            f"{where}: data.crop=random does not work with a cache, which stores one crop of each image; use crop: "
            "center, or remove this stage"
        )
