"""What the stock pipeline of a student has besides its network and scheduler, from the folder of its teacher.

Text encoders, tokenizers, autoencoder and the like are linked (hard links) or copied. Only regular files inside the
teacher's folder are taken; in the cache of the hub, where files are links, also the files that they link to.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from distill.core import space
from distill.core.errors import InputError
from distill.core.regular_files import BLOCK, open_regular
from distill.spec.model import CheckpointTeacher, TeacherSpec
from distill.teachers import by_id, files, layout, pipeline_index
from distill.teachers.by_id import ENCODER_FILES as SMALL
from distill.teachers.read import parse, short, unreadable
from distill.teachers.variants import PREFERRED, listing

WEIGHTS = re.compile(  # of diffusers and transformers: NAME.safetensors, NAME.fp16-00001-of-00002.safetensors, ...
    r"(?P<name>model|diffusion_pytorch_model)(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?\.safetensors"
)
SHARDS = re.compile(r"(?P<name>model|diffusion_pytorch_model)\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
CACHED = "models--"  # how the names of folders in the cache of the hub begin
WITHOUT_WEIGHTS = ("tokenizer", "feature_extractor", "image_processor", "processor", "scheduler")
WHOLE = "--whole writes a pipeline with text encoders, tokenizers and autoencoder, which come from the teacher"


@dataclass(frozen=True)
class OtherComponents:
    """The components of a pipeline besides network and scheduler.

    index: library and class of each, as in model_index.json. places: the file for each name in the new folder.
    """

    index: Mapping[str, list[str]] = field(default_factory=dict)
    places: Mapping[str, Path] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.places.values())


def local(teacher: TeacherSpec) -> CheckpointTeacher:
    """The teacher by a local folder; that of a hub id is in the hub's cache. InputError if it is not there."""
    if not isinstance(teacher, CheckpointTeacher):
        raise InputError(f"{WHOLE}, but this teacher ({teacher.kind}) has no files; leave --whole out")
    if Path(teacher.path).exists() or not teacher.is_of_hub:
        return teacher
    found = by_id.cached_folder(teacher.path, teacher.revision)
    if found is None:
        raise InputError(
            f"{teacher.where} is not in the cache of the hub on this machine; download it first: "
            f"hf download {short(teacher.path)}"
        )
    return teacher.model_copy(update={"path": str(found), "revision": None})


def find(teacher: CheckpointTeacher, pipeline: str, own: Sequence[str]) -> OtherComponents:
    """The components of the teacher's pipeline folder that a student lacks.

    pipeline: the class of the student's pipeline. own: the components that the student has.
    InputError if one is missing that the class needs, or if a file cannot be used.
    """
    parts, pipeline_class = files.find(teacher, download=False), pipeline_index.class_of(pipeline)
    assert pipeline_class is not None, "packaged.export refuses other pipelines"
    needed = {name: each for name, each in pipeline_index.components_of(pipeline_class).items() if name not in own}
    if parts.pipeline is None:
        what = "a single file" if parts.single is not None else "a single network"
        names = ", ".join(sorted(name for name, is_needed in needed.items() if is_needed))
        raise InputError(
            f"{WHOLE}, but {teacher.where} is {what}, without {names}; give the folder or hub id of a {pipeline} with "
            "--teacher"
        )
    if parts.pipeline_class != pipeline:
        raise InputError(
            f"{teacher.where} is a {short(parts.pipeline_class) or 'pipeline of no class'}, but the student is for a "
            f"{pipeline}; give the folder or hub id of its teacher with --teacher"
        )
    index = parse(parts.pipeline / layout.INDEX)
    found, places, missing = dict[str, list[str]](), dict[str, Path](), []
    for name, is_needed in needed.items():
        folder, home = parts.pipeline / name, parts.pipeline
        if name in layout.VAES and teacher.vae is not None:
            folder = home = Path(teacher.vae)
            found[name] = ["diffusers", str(parse(folder / layout.CONFIG).get("_class_name"))]
        elif name in parts.components:
            found[name] = list(map(str, index[name]))
        elif not is_needed:
            continue
        if name not in found or not folder.is_dir():
            missing.append(name)
            continue
        pipeline_index.refuse_code(folder, *found[name])
        for new, given in _files(folder, name, teacher.variant):
            places[f"{name}/{new}"] = _inside(home, folder / given)
    if missing:
        hub_id = _hub_id(parts.pipeline)
        todo = f"give a complete {pipeline} with --teacher" if hub_id is None else f"download it: hf download {hub_id}"
        raise InputError(f"{WHOLE}, but {parts.pipeline} has no {', '.join(sorted(missing))}; {todo}")
    return OtherComponents(found, places)


def place(found: OtherComponents, folder: Path) -> None:
    """Link or copy the files to a new folder. RunError if the disk has not enough space; OSError as usual."""
    is_checked = False
    for name, path in found.places.items():
        new = folder / name
        new.parent.mkdir(parents=True, exist_ok=True)
        if _linked(path, new):
            continue
        if not is_checked:
            space.require(folder, found.bytes, "the components of the teacher")
            is_checked = True
        with open_regular(path) as source, new.open("xb") as target:
            shutil.copyfileobj(source, target, BLOCK)


def _linked(path: Path, new: Path) -> bool:
    """Whether `new` could be made a hard link to a file: not on another file system, and not for some owners."""
    try:
        os.link(path, new, follow_symlinks=False)
    except OSError:
        return False
    if stat.S_ISREG(new.lstat().st_mode):
        return True
    with suppress(FileNotFoundError):  # it was exchanged since it was looked at
        new.unlink()
    return False


def _files(folder: Path, component: str, variant: str | None) -> Iterator[tuple[str, str]]:
    """(name in the new folder, name) of the files that a component is loaded from."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    yield from ((name, name) for name in names if Path(name).suffix in SMALL and ".index." not in name)
    found: dict[str, list[re.Match[str]]] = {}
    for match in (WEIGHTS.fullmatch(name) or SHARDS.fullmatch(name) for name in names):
        if match is not None:
            found.setdefault(match["variant"] or "", []).append(match)
    if not found:
        if not component.startswith(WITHOUT_WEIGHTS):
            raise InputError(f"{folder} has no weights as safetensors, but {listing(names)}; download or convert them")
        return
    order = [each for each in (variant, *PREFERRED) if each in found] or sorted(found)
    if order[0] not in (variant, *PREFERRED) and len(order) > 1:
        raise InputError(f"{folder} has weights in the variants {', '.join(order)}; set teacher.variant to one of them")
    yield from _without_variant(found[order[0]])


def _without_variant(files: Sequence[re.Match[str]]) -> Iterator[tuple[str, str]]:
    """(name without variant, name) of files with weights. The names of shards are kept, since their index has them."""
    single = [match for match in files if match.re is WEIGHTS and match["shard"] is None]
    for match in single or files:
        if match.re is SHARDS:
            yield f"{match['name']}.safetensors.index.json", match[0]
        else:
            yield match[0] if match["shard"] else f"{match['name']}.safetensors", match[0]


def _inside(home: Path, path: Path) -> Path:
    """A file of a folder, with links resolved. InputError if it is not a regular file of the same model."""
    try:
        resolved, allowed = path.resolve(strict=True), [home.resolve(strict=True)]
        open_regular(resolved).close()
    except OSError as error:
        raise unreadable(path, error) from error
    if (cached := _cached(home)) is not None:
        allowed.append((cached / "blobs").resolve())
    if not any(resolved.is_relative_to(each) for each in allowed):
        raise InputError(f"{path} is a link to a file outside of {home}; put the file itself there")
    return resolved


def _cached(folder: Path) -> Path | None:
    """The folder of a model in the cache of the hub that `folder` is in; None if it is not in such a cache."""
    found = [each.parent for each in folder.absolute().parents if each.name == "snapshots"]
    return next((each for each in found if each.name.startswith(CACHED)), None)


def _hub_id(folder: Path) -> str | None:
    """The hub id of a folder in the cache of the hub; None if it is not in such a cache."""
    found = _cached(folder)
    return None if found is None else short(found.name.removeprefix(CACHED).replace("--", "/"))
