"""Finds the files of a checkpoint: in a pipeline folder, a single model folder, or the download of a hub id.

A single file with weights is read with the configs of such a folder.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.core.errors import InputError
from distill.core.regular_files import open_regular
from distill.exchange import own_code
from distill.spec.model import CheckpointTeacher
from distill.teachers import by_id
from distill.teachers.layout import ADAPTERS, CONFIG, INDEX, NETWORKS, SCHEDULER, SECOND, STUDENT, VAES
from distill.teachers.read import StudentFacts, WeightIndex, checked, components, parse, short, unreadable
from distill.teachers.variants import (
    ADAPTER,
    LORA_OPTION,
    MERGE,
    PICKLES,
    STEM,
    WEIGHTS,
    listing,
    no_weights,
    one_of,
)


@dataclass(frozen=True)
class Parts:
    """The files of a checkpoint."""

    folder: Path  # that the spec gives
    root: Path  # folder of the pipeline, or of the model if there is no pipeline
    model: Path  # folder of config.json and the weights
    single: Path | None  # file with the weights, if they are not in `model`
    scheduler: Path | None  # the checkpoint's own scheduler_config.json
    chosen: Path | None  # the scheduler_config.json that is used: that of teacher.scheduler, else the checkpoint's own
    student: StudentFacts
    pipeline: Path | None  # folder with model_index.json
    pipeline_class: str  # "" if there is no pipeline
    components: Sequence[str]  # of the pipeline
    is_student: bool = False  # whether it was exported by this package

    @property
    def autoencoder(self) -> Path | None:
        """The folder of the autoencoder."""
        found = [name for name in VAES if name in self.components]
        return self.pipeline / found[0] if found and self.pipeline is not None else None


def find(spec: CheckpointTeacher, *, download: bool = True, encoders: bool = False) -> Parts:
    """Finds the files of the checkpoint of a spec. Raises InputError if its path or hub id is not a checkpoint.

    download: for a hub id, also download the weights that are not cached, and not only the configs. encoders: and the
    text encoders and tokenizers.
    """
    path = Path(spec.path)
    _refuse_without_effect(spec, path)
    if path.is_dir():
        return _parts(spec, _inside(spec, path), spec.where)
    if path.exists():
        return _of_file(spec, path)
    if not spec.is_of_hub:
        raise InputError(f"teacher.path={spec.path} does not exist; give a folder, or a hub id like org/name")
    return _parts(spec, _inside(spec, by_id.snapshot(spec, weights=download, encoders=encoders)), spec.where)


def _refuse_without_effect(spec: CheckpointTeacher, path: Path) -> None:
    """InputError if an option of the spec does not fit what its path is."""
    is_file = path.exists() and not path.is_dir()
    what = "a file" if is_file else "a folder" if path.is_dir() else "not a file"
    without_effect = {
        "revision": path.exists(),
        "subfolder": is_file,
        "variant": is_file,
        "config": not is_file,
    }
    for name, has_none in without_effect.items():
        value = getattr(spec, name)
        if value is not None and has_none:
            what = f"{what} here, not a hub id" if name == "revision" else what
            raise InputError(f"teacher.{name}={value} has no effect: {spec.path} is {what}; remove teacher.{name}")
    if spec.lora is None and spec.lora_scale != 1:
        raise InputError(f"teacher.lora_scale={spec.lora_scale} has no effect without teacher.lora; remove it")


def _inside(spec: CheckpointTeacher, folder: Path) -> Path:
    """The subfolder that the spec names, or `folder`."""
    if spec.subfolder is None:
        return folder
    if not (folder / spec.subfolder).is_dir():
        raise InputError(
            f"teacher.path={spec.path} has no folder teacher.subfolder={spec.subfolder}, but "
            f"{listing(name for name in _names(folder) if (folder / name).is_dir())}; give one of its folders"
        )
    return folder / spec.subfolder


def _of_file(spec: CheckpointTeacher, path: Path) -> Parts:
    """A single file with the weights of a network, with the configs of the folder teacher.config."""
    if path.suffix != ".safetensors":
        command = f". If you trust this file, make such a folder: distill convert {path} NEW_FOLDER"
        more = command if path.suffix in PICKLES else ""
        raise InputError(
            f"teacher.path={spec.path} is a file; give the folder that contains config.json and safetensors, or a "
            f".safetensors file with teacher.config{more}"
        )
    if spec.config is None:
        raise InputError(
            f"teacher.path={spec.path} is a single file, which does not say what its network is; set teacher.config "
            "to a folder of the same model in diffusers' format (its config.json and scheduler are enough), or give "
            "such a folder as teacher.path"
        )
    folder = Path(spec.config)
    if not folder.is_dir():
        raise InputError(
            f"teacher.config={spec.config} is not a folder here; give the folder of a diffusers pipeline or model"
        )
    return _parts(spec, folder, f"teacher.config={spec.config}", single=path)


def _parts(spec: CheckpointTeacher, folder: Path, where: str, single: Path | None = None) -> Parts:
    """Finds network and scheduler of a pipeline folder or a single model folder, and checks them.

    where: the folder in messages. single: file with the weights, if they are not in the folder.
    """
    pipeline = _pipeline(folder)
    parts = [] if pipeline is None else components(pipeline / INDEX)
    networks = [name for name in NETWORKS if name in parts]
    if pipeline == folder:
        if not networks:
            raise InputError(
                f"{where} is a pipeline with the components {short(', '.join(parts)) or 'none'}; "
                f"valid: pipelines with a network in {' or '.join(NETWORKS)}"
            )
        model, nearby = folder / networks[0], [folder / "scheduler"]
    elif _there(folder / CONFIG):
        model, nearby = folder, [folder / "scheduler", folder.parent / "scheduler"]
    else:
        raise InputError(f"{where} {_nothing(folder)}")
    root = pipeline if pipeline is not None and folder.name in NETWORKS else folder
    _refuse_half(where, folder, pipeline, parts, single)
    if spec.lora is None and single is None:
        _refuse_adapters(where, root, model)
    found = next((path for path in (near / SCHEDULER for near in nearby) if _there(path)), None)
    facts = root / STUDENT
    student = checked(StudentFacts, parse(facts), facts) if _there(facts) else StudentFacts()
    named = None if pipeline is None else parse(pipeline / INDEX).get("_class_name")
    if pipeline is not None and not _there(pipeline / STUDENT):
        _refuse_code(where, pipeline, named)
    return Parts(
        folder=folder,
        root=root,
        model=model,
        single=single,
        scheduler=found,
        chosen=_override(spec) or found,
        student=student,
        pipeline=pipeline,
        pipeline_class=own_code.stock_class(named),
        components=parts,
        is_student=_there(facts),
    )


def _refuse_code(where: str, pipeline: Path, named: object) -> None:
    """InputError if a pipeline has code of its own. Its class is then named by a list: the file and the class.

    Students that this package exports have such pipelines too. How their networks are called is known.
    """
    if named is not None and not isinstance(named, str):
        raise InputError(
            f"{where}: the pipeline {pipeline} has code of its own ({INDEX}: _class_name={short(repr(named))}), which "
            "is not run, so it is not known how it calls its network. If it does so as a pipeline of diffusers, copy "
            f"the folder without {INDEX}, and give the network's folder in the copy as teacher.path"
        )


def _refuse_half(
    where: str, folder: Path, pipeline: Path | None, components: Sequence[str], single: Path | None
) -> None:
    """InputError if only one of the two networks of a pipeline is given."""
    if SECOND not in components:
        return
    if single is not None:
        raise InputError(
            f"{where} is of a pipeline with two networks, and a single file has one; give the pipeline's folder as "
            "teacher.path"
        )
    if folder.name == SECOND and pipeline != folder:
        raise InputError(f"{where} is the second network of a pipeline; give the pipeline's folder, {pipeline}")


def _refuse_adapters(where: str, root: Path, model: Path) -> None:
    """InputError if there is an adapter beside the weights, because it is not clear whether it is to be used."""
    for place in dict.fromkeys((root, model)):
        for name in sorted(_names(place)) if place.is_dir() else []:
            if ADAPTER.fullmatch(name) and not (place / name).is_dir():
                raise InputError(
                    f"{where}: adapters like {place / short(name)} are not loaded by themselves; {LORA_OPTION}, "
                    f"{MERGE}, or move it away to use the teacher without it"
                )


def _pipeline(folder: Path) -> Path | None:
    """The pipeline folder: `folder`, or its parent (with or without links resolved); None if there is none.

    The parent is searched because only the pipeline shows whether a network works on latents.
    """
    places = (folder, folder.absolute().parent, folder.resolve().parent)
    return next((place for place in places if _there(place / INDEX)), None)


def _nothing(folder: Path) -> str:
    """The message that says why a folder is not a checkpoint, and what to give instead."""
    networks = [name for name in ("unet_ema", "unet") if (folder / name / CONFIG).is_file()]
    if networks:
        averaged = ", the averaged weights," if networks[0] == "unet_ema" else ""
        other = f" or {folder / networks[1]}" if len(networks) > 1 else ""
        return (
            f"has neither {INDEX} nor {CONFIG}; it looks like an intermediate checkpoint of a training run. Give "
            f"teacher.path={folder / networks[0]}{averaged}{other}, with the scheduler folder of its pipeline as "
            "teacher.scheduler"
        )
    if (folder / ADAPTERS).is_file():
        return (
            f"has adapters (LoRA) without the network that they belong to; give this as teacher.path, and "
            f"teacher.lora={folder}"
        )
    inside = listing(_names(folder))
    return f"has neither {INDEX} nor {CONFIG}, but {inside}; give a diffusers pipeline folder or model folder"


def _override(spec: CheckpointTeacher) -> Path | None:
    """The scheduler_config.json of teacher.scheduler; None if that option is not set."""
    if spec.scheduler is None:
        return None
    path = Path(spec.scheduler) / SCHEDULER
    if not _there(path):
        raise InputError(f"teacher.scheduler={spec.scheduler} has no {SCHEDULER}; give its folder")
    return path


def weights(folder: Path, variant: str | None = None, *, optional: bool = False) -> list[Path]:
    """The safetensors files of a model folder, of one variant: a single file, or the shards listed in an index.

    variant, optional: see `variants.one_of`. Raises InputError if there are no files, or if one cannot be opened.
    """
    names = _names(folder)
    chosen = one_of(names, str(folder), variant, optional=optional)
    if not chosen:
        raise no_weights(names, str(folder), folder)
    files = [folder / name for name in chosen if not name.endswith(".json") and "-of-" not in name]
    if not files:
        files = _shards(folder, chosen)
    for path in files:
        try:
            open_regular(path, follow=True).close()
        except OSError as error:
            raise unreadable(path, error) from error
    return files


def _shards(folder: Path, chosen: list[str]) -> list[Path]:
    """The shards listed in the index, which is one of the `chosen` names. Raises InputError if any is missing."""
    indices = [folder / name for name in chosen if name.endswith(".json")]
    if not indices:
        found = WEIGHTS.fullmatch(chosen[0])
        variant = f"{found['variant']}." if found is not None and found["variant"] else ""
        raise InputError(
            f"{folder} has {listing(chosen)} but no {STEM}.safetensors.index.{variant}json, which maps weights to "
            "files; copy or download it"
        )
    index = checked(WeightIndex, parse(indices[0]), indices[0])
    files = [folder / name for name in sorted(set(index.weight_map.values()))]
    missing = [short(path.name) for path in files if not _there(path)]
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"{indices[0]} names {some}, which do not exist; copy or download them")
    return files


def _there(path: Path) -> bool:
    """Whether the path exists, even as a broken link, so that an unreadable file is an error instead of ignored."""
    return os.path.lexists(path)


def _names(folder: Path) -> list[str]:
    """The names in a folder. Raises InputError if it cannot be read."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError as error:
        raise unreadable(folder, error) from error
