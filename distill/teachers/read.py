"""Reads and validates the JSON files of a checkpoint. An error message names the file and the key."""

import errno
import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from distill.core.errors import InputError
from distill.core.field_types import CheckedRange
from distill.core.regular_files import open_regular
from distill.core.text import printable
from distill.spec.samplingspec import is_path

Config = dict[str, Any]  # parsed JSON

MAX_BYTES = 32 << 20  # maximum size of a JSON file; the index of a model of 12 billion parameters is below 1 MiB
MAX_TABLE = 100_000  # maximum number of entries in a list of betas


class Read(BaseModel):
    """Base class of file schemas. Keys without a field are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Read)
Side = Annotated[int, Field(ge=1, le=8192)]
Size = Annotated[int, Field(ge=1, le=1 << 16)]
ShortText = Annotated[str, Field(max_length=100)]


def _table(values: list[float]) -> list[float]:
    falls = all(before > after for before, after in pairwise(values))
    if len(values) < 2 or not falls or values[0] >= 1 or values[-1] < 0:
        raise PydanticCustomError("table", "2 numbers or more, decreasing from below 1 to 0 or above")
    return values


def _times(values: list[float]) -> list[float]:
    if len(values) < 2 or not is_path(values):
        raise PydanticCustomError("times", "2 times or more, decreasing from 1 to 0")
    return values


class NetworkConfig(Read):
    """The options of all network classes that are loaded: UNet2DModel and our own classes."""

    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    in_channels: Size = 3
    out_channels: Size = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional", "fourier", "learned"] = "positional"
    time_embedding_dim: Size | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: Annotated[list[ShortText], Field(min_length=1, max_length=16)] = ["DownBlock2D"]
    mid_block_type: ShortText | None = None
    up_block_types: Annotated[list[ShortText], Field(min_length=1, max_length=16)] = ["UpBlock2D"]
    block_out_channels: Annotated[list[Size], Field(min_length=1, max_length=16)] = [1]
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 2
    mid_block_scale_factor: PositiveFloat = 1
    downsample_padding: Annotated[int, Field(ge=0, le=8)] = 1
    downsample_type: ShortText = "conv"
    upsample_type: ShortText = "conv"
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    act_fn: ShortText = "silu"
    attention_head_dim: Size | None = 8
    norm_num_groups: Size = 32
    attn_norm_num_groups: Size | None = None
    norm_eps: PositiveFloat = 1e-5
    resnet_time_scale_shift: ShortText = "default"
    add_attention: bool = True
    class_embed_type: ShortText | None = None
    num_class_embeds: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    num_train_timesteps: Annotated[int, Field(ge=1, le=MAX_TABLE)] | None = None
    # options of our own classes
    path: ShortText = ""
    prediction: ShortText = ""
    alphas_cumprod: Annotated[list[float], Field(max_length=MAX_TABLE), AfterValidator(_table)] | None = None
    sigma_data: PositiveFloat = 0.5
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    dim: Size | None = None
    width: Size = 1
    depth: Annotated[int, Field(ge=1, le=1024)] = 1
    frequencies: Annotated[int, Field(ge=0, le=16384)] = 16
    second_time_waves: Size = 16
    guidance_range: CheckedRange | None = None
    outputs: Size = 1
    policy: Literal["", "steps", "data", "gaussian"] = ""
    grid: Annotated[list[float], Field(max_length=1025), AfterValidator(_times)] | None = None

    @model_validator(mode="after")
    def _has_its_outputs(self) -> Self:
        outputs = self.outputs if self.dim is not None else self.out_channels // self.in_channels
        valid = {"steps": outputs == len(self.grid or []) - 1, "data": self.grid is None, "": self.grid is None}
        if not valid.get(self.policy, self.grid is None and outputs > 1 and outputs % 2 == 1):
            told = {"outputs": outputs, "policy": self.policy or "none", "times": len(self.grid or [])}
            raise PydanticCustomError(
                "outputs",
                "policy={policy} with {outputs} outputs and a grid of {times} times; valid: steps with one time more "
                "than outputs; gaussian with an odd number of outputs, or data, without times",
                told,
            )
        return self

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            told = {"low": f"{self.sigma_min:g}", "high": f"{self.sigma_max:g}"}
            raise PydanticCustomError("range", "sigma_min={low}; valid: less than sigma_max={high}", told)
        return self


class StudentFacts(Read):
    """The parts of an exported student's distill.json that are read here."""

    kind: ShortText = "velocity"
    shape: Annotated[list[Side], Field(max_length=4)] = []
    null_class: Annotated[int, Field(ge=0)] | None = None
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    guidance_range: CheckedRange | None = None
    unconditional: bool = True
    embedded_guidance: Annotated[float, Field(ge=0, le=10_000)] | None = None
    license: str = ""


def _beside(name: str) -> str:
    if not re.fullmatch(r"[^/\\\x00]{1,200}\.safetensors", name):
        raise PydanticCustomError("name", "the name of a .safetensors file in the same folder, at most 200 letters")
    return name


class WeightIndex(Read):
    """diffusion_pytorch_model.safetensors.index.json, which maps weight names to files in the same folder."""

    weight_map: dict[str, Annotated[str, AfterValidator(_beside)]] = Field(min_length=1)


def parse(path: Path) -> Config:
    """Reads the JSON object in a file. Raises InputError if the file cannot be read or is not a JSON object."""
    try:
        with open_regular(path, follow=True) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise InputError(f"{path} has {size} bytes; valid: at most {MAX_BYTES}")
            content = file.readall()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        parsed = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise InputError(f"{path} cannot be read as JSON (nested too deeply); copy or download it again") from None
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON ({short(str(error))}); copy or download it again") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{path} does not contain a JSON object; copy or download it again")
    return parsed


def unreadable(path: Path, error: OSError) -> InputError:
    """Makes the InputError for a file or folder that cannot be opened."""
    if error.errno == errno.ENOENT:
        link = f"is a link to {short(str(path.readlink()), 200)}, which " if path.is_symlink() else ""
        return InputError(f"{path} {link}does not exist; copy or download it again")
    return InputError(f"{path} cannot be read: {error.strerror or error}; fix this, or give a readable copy")


def checked(model: type[Model], content: Config, path: Path) -> Model:
    """Validates the content of a file against `model`. Raises InputError that names the first invalid key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        entries = error.errors(include_url=False)
    if not entries[0]["loc"]:  # the error is about several keys
        raise InputError(f"{path}: {short(entries[0]['msg'], 300)}")
    key = entries[0]["loc"][0]
    if entries[0]["type"] == "missing":
        raise InputError(f"{path} has no {key}; copy or download it again")
    same = [entry for entry in entries if entry["loc"][:1] == (key,)]
    rules = dict.fromkeys(entry["msg"].removeprefix("Input should be ") for entry in same)
    where = short(".".join(str(part) for part in same[0]["loc"])) if len(same) == 1 else key
    given = short(repr(same[0]["input"] if len(same) == 1 else content.get(str(key))))
    raise InputError(f"{path}: {where}={given}; valid: {short(' or '.join(rules), 300)}")


def components(path: Path) -> list[str]:
    """The names of a pipeline's components in its model_index.json, without those that are null."""
    found = []
    for key, value in parse(path).items():
        if key.startswith("_") or not isinstance(value, list):
            continue
        if len(value) != 2 or not all(part is None or isinstance(part, str) for part in value):
            raise InputError(f"{path}: {short(key)}={short(repr(value))}; valid: a library and a class")
        if value[0] is not None:
            found.append(key)
    return sorted(found)


def lasting(config: Config) -> Config:
    """A network's config without what changes when it is written again, for digests."""
    return {name: value for name, value in config.items() if name not in ("_diffusers_version", "_name_or_path")}


def short(text: str, letters: int = 80) -> str:
    """Makes untrusted text safe for a message: printable, on one line, and cut to at most `letters` characters."""
    text = " ".join(printable(text).split())
    return text if len(text) <= letters else text[: letters - 3] + "..."
