"""Where the parts of a checkpoint lie: a pipeline folder, a single model folder, or what was fetched of a hub id."""

from dataclasses import dataclass
from pathlib import Path

from distill.guard import InputError
from distill.spec import CheckpointTeacher
from distill.teachers import by_id
from distill.teachers.read import StudentFacts, WeightIndex, checked, components, parse, short
from distill.teachers.variants import ADAPTERS, STEM, one_of

INDEX, CONFIG, STUDENT, SCHEDULER = "model_index.json", "config.json", "distill.json", "scheduler_config.json"
MERGE = (
    "merge it into the weights first (fuse_lora() and unload_lora_weights(), or peft's merge_and_unload(), then "
    "save_pretrained into a new folder)"
)


@dataclass(frozen=True)
class Parts:
    """The files of a checkpoint."""

    root: Path  # of the pipeline, if it is one, else of the model
    model: Path  # folder of config.json and the weights
    scheduler: Path | None  # its own scheduler_config.json
    student: StudentFacts


def find(spec: CheckpointTeacher) -> Parts:
    """The parts of the checkpoint of a path or hub id; all that is not one is refused."""
    path = Path(spec.path)
    if path.is_dir():
        return _parts(spec, path)
    if path.exists():
        raise InputError(f"teacher.path={spec.path} is a file; give the folder that holds config.json and safetensors")
    if not by_id.is_id(spec.path):
        raise InputError(f"teacher.path={spec.path} does not exist; give a folder, or a hub id like org/name")
    _parts(spec, by_id.snapshot(spec, weights=False))  # what is refused is not downloaded
    return _parts(spec, by_id.snapshot(spec, weights=True))


def _parts(spec: CheckpointTeacher, folder: Path) -> Parts:
    """Where network and scheduler of a pipeline or of a single model folder lie."""
    pipeline = _pipeline(folder)
    if pipeline is not None and (parts := components(pipeline / INDEX)) != ["scheduler", "unet"]:
        inside = f"lies in {pipeline}, " if pipeline != folder else "is "
        raise InputError(
            f"teacher.path={spec.path} {inside}a pipeline of {short(', '.join(parts)) or 'nothing'}; valid: pixel "
            "pipelines of scheduler and unet"
        )
    if pipeline == folder:
        model, nearby = folder / "unet", [folder / "scheduler"]
    elif (folder / CONFIG).is_file():
        model, nearby = folder, [folder / "scheduler", folder.parent / "scheduler"]
    else:
        raise InputError(f"teacher.path={spec.path} {_nothing(folder)}")
    root = pipeline if pipeline is not None and folder.name == "unet" else folder
    for place in dict.fromkeys((root, model)):
        for name in ADAPTERS:
            if (place / name).is_file():
                raise InputError(
                    f"teacher.path={spec.path}: the adapter {place / name} would not be used; {MERGE}, or move it away "
                    "where the teacher is meant without it"
                )
    found = next((path for path in (near / SCHEDULER for near in nearby) if path.is_file()), None)
    facts = root / STUDENT
    student = checked(StudentFacts, parse(facts), facts) if facts.is_file() else StudentFacts()
    return Parts(root, model, found, student)


def _pipeline(folder: Path) -> Path | None:
    """The folder itself where it is a pipeline, or the one around it: a network alone does not tell its latents."""
    places = (folder, folder.absolute().parent, folder.resolve().parent)
    return next((place for place in places if (place / INDEX).is_file()), None)


def _nothing(folder: Path) -> str:
    """Why a folder is no checkpoint, and what to give."""
    inside = [name for name in ("unet_ema", "unet") if (folder / name / CONFIG).is_file()]
    if inside:
        averaged = ", the averaged weights," if inside[0] == "unet_ema" else ""
        other = f" or {folder / inside[1]}" if len(inside) > 1 else ""
        return (
            f"has neither {INDEX} nor {CONFIG}; it looks like a checkpoint in the middle of training. Give "
            f"teacher.path={folder / inside[0]}{averaged}{other}, with the scheduler folder of its pipeline as "
            "teacher.scheduler"
        )
    return f"has neither {INDEX} nor {CONFIG}, but {listing(folder)}; give a diffusers pipeline folder or model folder"


def override(spec: CheckpointTeacher) -> Path | None:
    """The scheduler_config.json of teacher.scheduler."""
    if spec.scheduler is None:
        return None
    path = Path(spec.scheduler) / SCHEDULER
    if not path.is_file():
        raise InputError(f"teacher.scheduler={spec.scheduler} has no {SCHEDULER}; give its folder")
    return path


def weights(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or the shards of an index; of one variant."""
    chosen = one_of([path.name for path in folder.iterdir() if path.is_file()], str(folder))
    indices = [folder / name for name in chosen if name.endswith(".json")]
    whole = [folder / name for name in chosen if not name.endswith(".json") and "-of-" not in name]
    if whole:
        return whole
    if indices:
        index = checked(WeightIndex, parse(indices[0]), indices[0])
        files = [folder / name for name in sorted(set(index.weight_map.values()))]
        missing = [short(path.name) for path in files if not path.is_file()]
        if missing:
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise InputError(f"{indices[0]} names {some}, which are not there; copy or download them")
        return files
    raise InputError(
        f"{folder} has no {STEM}.safetensors, but {listing(folder)}; only safetensors is loaded. Where you trust a "
        f"pickled file, convert it: python -c \"from diffusers import UNet2DModel as M; M.from_pretrained('{folder}', "
        "use_safetensors=False).save_pretrained('NEW')\""
    )


def listing(folder: Path) -> str:
    """What lies in a folder, for a message."""
    names = sorted(short(path.name, 60) for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
