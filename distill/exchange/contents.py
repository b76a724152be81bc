"""Checks the files of an untrusted student: their format, and that they refer to no files that are not listed.

`DiffusionPipeline.from_pretrained` follows references. An index of shards names weight files, which are unpickled
unless they end in .safetensors. model_index.json names classes and modules, and some classes load further folders.
Configurations can name code of other repositories. Each of these may therefore refer only to files that the student
lists itself, or to classes of diffusers.
"""

import codecs
import io
import json
import re
import tokenize
from pathlib import Path
from typing import Any

from distill.core.errors import InputError
from distill.core.png import is_png
from distill.core.regular_files import open_regular, read_regular
from distill.core.text import one_line, printable
from distill.exchange import stock_students
from distill.exchange.manifest import TOKENIZER_KINDS
from distill.exchange.stock_students import NOT_LOADED
from distill.exchange.student_card import StudentCard

MAX_TEXT, MAX_HEADER = 16 << 20, 16 << 20  # bytes of a text, JSON or picture; bytes of the header of a safetensors file
MAX_VOCABULARY = 128 << 20  # bytes of a file of a tokenizer
INDEX = "model_index.json"
# The keys of a model_index.json in addition to the components of the pipeline.
FACTS = ("_class_name", "_diffusers_version", "_name_or_path")
OPTIONS = ("num_classes", "sampler", "t_grid", "t_grids", "fitted")
# Classes of diffusers that load only their own folder: no pipelines, and no classes that select another class.
CLASSES = re.compile(r"(?!Auto|Modular|Onnx|Flax)[A-Z][A-Za-z0-9]*(Model|Scheduler)|AutoencoderKL|AutoencoderTiny")
# Keys of configurations with which diffusers and similar libraries load code or weights from elsewhere.
LEADING = (
    "auto_map",
    "base_model_name_or_path",
    "custom_pipeline",
    "custom_pipelines",
    "quantization_config",
    "trust_remote_code",
)


def refuse(folder: Path, card: StudentCard) -> None:
    """Raise InputError if a listed file does not have the format of its name, or refers to anything not listed.

    The sha256 of each file must have been verified before.
    """
    for name in card.files:
        try:
            _refuse(folder / name, name, card)
        except OSError as error:
            raise InputError(f"{folder}: {name} cannot be read: {error.strerror}") from error


def _refuse(path: Path, name: str, card: StudentCard) -> None:
    if name.endswith(".safetensors"):
        _refuse_weights(path, name)
        return
    of_tokenizer = card.is_native and stock_students.is_of_tokenizer(name)
    content = read_regular(path, MAX_VOCABULARY if of_tokenizer else MAX_TEXT)
    if name.endswith(TOKENIZER_KINDS) and not of_tokenizer:
        raise InputError(f"{name} belongs in the folder of a tokenizer, which this student does not have; {NOT_LOADED}")
    if name.endswith(stock_students.BINARY):
        if not content.startswith(stock_students.SENTENCEPIECE):
            raise InputError(f"{name} is not a SentencePiece model; {NOT_LOADED}")
        return
    if name.endswith(".png"):
        refuse_picture(content, name)
        return
    text = _text(content, name, of_tokenizer)
    if name.endswith(".py"):
        _refuse_encoding(content, name)
    elif name.endswith(".json"):
        _refuse_json(text, name, card)


def refuse_picture(content: bytes, name: str) -> None:
    """Raise InputError unless the content is a PNG file."""
    if not is_png(content):
        raise InputError(f"{name} is not a PNG file; {NOT_LOADED}")


def _refuse_weights(path: Path, name: str) -> None:
    """Raise InputError unless it is a safetensors file: a JSON header, then exactly the bytes of its tensors."""
    with open_regular(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        whole = 8 < 8 + length <= size and length <= MAX_HEADER
        text = file.read(length) if whole else b""
    try:
        header = json.loads(text.decode()) if len(text) == length else None
    except (ValueError, RecursionError):
        header = None
    if not text.startswith(b"{") or not isinstance(header, dict) or _bytes(header) != size - 8 - length:
        raise InputError(f"{name} is not a safetensors file; {NOT_LOADED}")
    stock_students.refuse_header(header.get("__metadata__"), name)


def _bytes(header: dict[str, Any]) -> int | None:
    """Total bytes of the tensors in a header; None if they are not contiguous or the header is invalid."""
    spans = []
    for name, tensor in header.items():
        if name != "__metadata__":
            offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
            if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(each) is int for each in offsets):
                return None
            spans.append((offsets[0], offsets[1]))
    end = 0
    for start, stop in sorted(spans):
        if start != end or stop < start:
            return None
        end = stop
    return end


def _text(content: bytes, name: str, of_tokenizer: bool = False) -> str:
    """Text, or the vocabulary of a tokenizer, which may have control characters but no NUL."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text; {NOT_LOADED}") from None
    # Code may contain any control character except NUL: they are replaced when the code is shown to the user.
    if re.search(r"\x00" if name.endswith(".py") or of_tokenizer else r"[\x00-\x08\x0e-\x1f\x7f-\x9f]", text):
        raise InputError(f"{name} contains control characters; {NOT_LOADED}")
    return text


def _refuse_encoding(content: bytes, name: str) -> None:
    """Refuse code that declares another encoding than UTF-8: it would run as something else than what is shown."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    except SyntaxError:
        encoding = ""
    if encoding != "utf-8" or content.startswith(codecs.BOM_UTF8):
        raise InputError(f"{name} is Python code that is not encoded in UTF-8; {NOT_LOADED}")


def _refuse_json(text: str, name: str, card: StudentCard) -> None:
    try:
        parsed: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({one_line(str(error), 100)}); {NOT_LOADED}") from None
    for key, _ in stock_students.entries(parsed):
        if key in LEADING:
            raise InputError(f"{name} refers to code or weights elsewhere ({key}); {NOT_LOADED}")
    if card.is_native:
        stock_students.refuse_config(parsed, name, card)
    parts = name.split("/")
    if parts[-1] == INDEX:
        if len(parts) > 1:
            raise InputError(f"{name} would load a second pipeline inside the pipeline; {NOT_LOADED}")
        _refuse_index(parsed, name, card)
    elif isinstance(parsed, dict) and ("weight_map" in parsed or name.endswith(".index.json")):
        _refuse_shards(parsed, name, card)


def _refuse_shards(parsed: dict[str, Any], name: str, card: StudentCard) -> None:
    """Refuse an index unless its shards are listed .safetensors files in the same folder."""
    shards, above = parsed.get("weight_map"), name.rpartition("/")[0]
    if not isinstance(shards, dict):
        raise InputError(f"{name} is an index of weights without a valid weight_map; {NOT_LOADED}")
    for shard in shards.values():
        plain = isinstance(shard, str) and "/" not in shard and shard.endswith(".safetensors")
        if not plain or f"{above}/{shard}".lstrip("/") not in card.files:
            raise InputError(
                f"{name} refers to weights in {_shown(shard)}; valid: .safetensors files in the same folder that "
                f"distill.json lists; {NOT_LOADED}"
            )


def _refuse_index(parsed: Any, name: str, card: StudentCard) -> None:  # noqa: ANN401
    """Refuse a model_index.json unless its classes are from diffusers or from listed files."""
    if not isinstance(parsed, dict):
        raise InputError(f"{name} is not a JSON object; {NOT_LOADED}")
    if card.is_native:
        stock_students.refuse_index(parsed, name, card)
        return
    for part, value in parsed.items():
        pair = value if isinstance(value, list) and len(value) == 2 else [None, None]
        module, title = (each if isinstance(each, str) else "" for each in pair)
        valid = "[null, null], a model or scheduler class of diffusers, or a .py file listed in that folder"
        if part == "_class_name":
            valid = "a class of a .py file that distill.json lists"
            known = bool(title) and f"{module}.py" in card.files
        elif part.startswith("_"):
            valid = f"printable text, for one of the keys {', '.join(FACTS)}"
            known = part in FACTS and isinstance(value, str) and printable(value) == value
        elif isinstance(value, list):
            own = bool(title) and f"{part}/{module}.py" in card.files
            known = value == [None, None] or own or (module == "diffusers" and CLASSES.fullmatch(title) is not None)
        else:  # text is refused, as diffusers would take a text of two letters for [module, class]
            known = part in OPTIONS or not isinstance(value, str | dict)
        if not known:
            raise InputError(f"{name}: {one_line(part, 100)} is {_shown(value)}; valid: {valid}; {NOT_LOADED}")


def _shown(value: Any) -> str:  # noqa: ANN401
    return one_line(json.dumps(value), 200)
