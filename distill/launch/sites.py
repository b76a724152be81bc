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
from distill.plans import device_kinds
from distill.spec import schema, specfile

EXAMPLE = environment.ROOT / "slurm" / "site.example.yaml"


def _variable(name: str) -> str:
    if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise ValueError(
            f"'{name}' is not a valid variable name; valid: letters, digits and _, not beginning with a digit"
        )
    return name


def _gpus(text: str) -> str:
    device_kinds.kind_or_memory(text)
    return text


Gpus = Annotated[str, AfterValidator(_gpus)]
Variable = Annotated[str, AfterValidator(_variable)]


class CacheSite(FrozenModel):
    """Folders in which libraries keep files for later jobs. null: the library's default, often in the home folder."""

    HF_HOME: ScriptLine | None = None
    TORCH_EXTENSIONS_DIR: ScriptLine | None = None
    TRITON_CACHE_DIR: ScriptLine | None = None
    TMPDIR: ScriptLine | None = None


class ContainerSite(FrozenModel):
    """How `launch.slurm.container` is run."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """pyxis: srun --container-image; apptainer: srun apptainer exec"""
    mounts: list[ScriptLine] = []
    """folders to mount in the container under the same path, in addition to the store"""
    options: list[ScriptLine] = []
    """further options of the runtime, like --nv"""
    python: ScriptLine = "python3"
    """Python interpreter inside the container"""


class Site(FrozenModel):
    """The settings of a cluster."""

    modules: list[ScriptLine] = []
    """modules to load before anything else"""
    setup: list[ScriptLine] = []
    """bash commands to run after the modules are loaded, one per item"""
    environment: dict[Variable, ScriptLine] = {}
    """environment variables to set for every process, like NCCL_SOCKET_IFNAME"""
    caches: CacheSite = CacheSite()
    partition: ScriptLine | None = None
    """partition for jobs whose spec sets none; null: Slurm's default"""
    partitions: list[ScriptLine] = []
    """partitions that users may choose; empty: all partitions of Slurm"""
    account: ScriptLine | None = None
    """account for jobs whose spec sets none; null: Slurm's default"""
    qos: ScriptLine | None = None
    """QOS for jobs whose spec sets none; null: Slurm's default"""
    options: list[ScriptLine] = []
    """further options for sbatch, for every job"""
    python: ScriptLine | None = None
    """Python interpreter on the nodes; null: the one that runs `distill submit`"""
    gpus: Gpus | None = None
    """kind of the GPUs, like h100, or their memory, like 80GB, to predict what trainings need; null: no prediction"""
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
        raise InputError(f"{path}: contains {schema.show(content)}, not the settings of a site; see {EXAMPLE}")
    try:
        return SiteSource(Site.model_validate(content, strict=True), path)
    except ValidationError as error:
        raise InputError(specfile.join(str(path), schema.explain(error, Site, content))) from None
