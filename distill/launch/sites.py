"""The site file site.yaml: the settings of a cluster that all its users share."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ValidationError

from distill.core import yamltext
from distill.core.errors import InputError
from distill.core.field_types import FrozenModel, ScriptLine
from distill.launch import environment
from distill.spec import schema, specfile

EXAMPLE = environment.ROOT / "slurm" / "site.example.yaml"


def _variable(name: str) -> str:
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise ValueError(f"'{name}' cannot name a variable; letters, digits and _ can, not beginning with a digit")
    return name


Variable = Annotated[str, AfterValidator(_variable)]


class CacheSite(FrozenModel):
    """Folders of libraries for files between jobs. null: the library's default, often the home directory."""

    HF_HOME: ScriptLine | None = None
    TORCH_EXTENSIONS_DIR: ScriptLine | None = None
    TRITON_CACHE_DIR: ScriptLine | None = None
    TMPDIR: ScriptLine | None = None


class ContainerSite(FrozenModel):
    """How `launch.slurm.container` is run."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """pyxis: srun --container-image; apptainer: srun apptainer exec"""
    mounts: list[ScriptLine] = []
    """folders that are seen inside under the same path, beside the store"""
    options: list[ScriptLine] = []
    """further options of the runtime, like --nv"""
    python: ScriptLine = "python3"
    """the interpreter inside"""


class Site(FrozenModel):
    """The settings of a cluster."""

    modules: list[ScriptLine] = []
    """loaded before anything else"""
    setup: list[ScriptLine] = []
    """lines of bash after that, each an item of its own"""
    environment: dict[Variable, ScriptLine] = {}
    """variables of every process, like NCCL_SOCKET_IFNAME"""
    caches: CacheSite = CacheSite()
    partition: ScriptLine | None = None
    """where jobs go that name none; null: Slurm's default"""
    partitions: list[ScriptLine] = []
    """those that may be named; empty: all that Slurm has"""
    account: ScriptLine | None = None
    """null: Slurm's default"""
    qos: ScriptLine | None = None
    """null: Slurm's default"""
    options: list[ScriptLine] = []
    """more options for sbatch, for every job"""
    python: ScriptLine | None = None
    """the interpreter on the nodes; null: the one that submits"""
    container: ContainerSite = ContainerSite()


@dataclass(frozen=True)
class SiteSource:
    """A site and its file."""

    site: Site
    path: Path


def load(path: Path) -> SiteSource:
    """Read and validate a site file strictly. InputError with one line per mistake."""
    if not path.is_file():
        raise InputError(f"there is no site file {path}; copy and edit {EXAMPLE}")
    content = yamltext.parse(yamltext.read(path), str(path)) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {schema.show(content)}, not a site; {EXAMPLE} shows one")
    try:
        return SiteSource(Site.model_validate(content, strict=True), path)
    except ValidationError as error:
        raise InputError(specfile.join(str(path), schema.explain(error, Site, content))) from None
