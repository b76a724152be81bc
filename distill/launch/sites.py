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
        raise ValueError(
            f"'{name}' is not the name of a variable; valid: letters, digits and _, not beginning with a digit"
        )
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
    """folders visible inside under the same path, in addition to the store"""
    options: list[ScriptLine] = []
    """further options of the runtime, like --nv"""
    python: ScriptLine = "python3"
    """the Python interpreter inside the container"""


class Site(FrozenModel):
    """The settings of a cluster."""

    modules: list[ScriptLine] = []
    """modules to load before anything else"""
    setup: list[ScriptLine] = []
    """lines of bash to run after that, one per item"""
    environment: dict[Variable, ScriptLine] = {}
    """environment variables of every process, like NCCL_SOCKET_IFNAME"""
    caches: CacheSite = CacheSite()
    partition: ScriptLine | None = None
    """partition of jobs that set none; null: Slurm's default"""
    partitions: list[ScriptLine] = []
    """partitions that users may choose; empty: all partitions of Slurm"""
    account: ScriptLine | None = None
    """null: Slurm's default"""
    qos: ScriptLine | None = None
    """null: Slurm's default"""
    options: list[ScriptLine] = []
    """more options for sbatch, for every job"""
    python: ScriptLine | None = None
    """the Python interpreter on the nodes; null: that of `distill submit`"""
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
        raise InputError(f"{path}: contains {schema.show(content)}, not a site; {EXAMPLE} shows one")
    try:
        return SiteSource(Site.model_validate(content, strict=True), path)
    except ValidationError as error:
        raise InputError(specfile.join(str(path), schema.explain(error, Site, content))) from None
