"""Checks the files of students that have the network class of a stock pipeline of diffusers.

Everything that a loader may meet is known beforehand: the pipeline class, the classes of its components, the folders,
and the files in them. Whatever is not listed here is refused. Complete pipelines may have the code of `own_code`, which
is checked as that of other students.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from distill.core.errors import InputError
from distill.core.text import one_line, printable
from distill.exchange import own_code
from distill.exchange.lora_use import ADAPTER_CONFIG, LORA_FILES
from distill.exchange.student_card import StudentCard

NOT_LOADED = "the student is not loaded because it may be unsafe or damaged"


@dataclass(frozen=True)
class StockNetwork:
    """A network class of diffusers: its folder in a pipeline, and the pipeline classes that call it as distill does."""

    folder: str
    pipelines: tuple[str, ...]


NETWORKS: Mapping[str, StockNetwork] = {
    "AuraFlowTransformer2DModel": StockNetwork("transformer", ("AuraFlowPipeline",)),
    "ChromaTransformer2DModel": StockNetwork("transformer", ("ChromaPipeline",)),
    "CogView4Transformer2DModel": StockNetwork("transformer", ("CogView4Pipeline",)),
    "DiTTransformer2DModel": StockNetwork("transformer", ("DiTPipeline",)),
    "Flux2Transformer2DModel": StockNetwork("transformer", ("Flux2Pipeline", "Flux2KleinPipeline")),
    "FluxTransformer2DModel": StockNetwork("transformer", ("FluxPipeline",)),
    "HunyuanDiT2DModel": StockNetwork("transformer", ("HunyuanDiTPipeline",)),
    "LTXVideoTransformer3DModel": StockNetwork("transformer", ("LTXPipeline",)),
    "Lumina2Transformer2DModel": StockNetwork("transformer", ("Lumina2Pipeline",)),
    "PixArtTransformer2DModel": StockNetwork("transformer", ("PixArtAlphaPipeline", "PixArtSigmaPipeline")),
    "QwenImageTransformer2DModel": StockNetwork("transformer", ("QwenImagePipeline",)),
    "SD3Transformer2DModel": StockNetwork("transformer", ("StableDiffusion3Pipeline",)),
    "SanaTransformer2DModel": StockNetwork("transformer", ("SanaPipeline",)),
    "UNet2DConditionModel": StockNetwork("unet", ("StableDiffusionPipeline", "StableDiffusionXLPipeline")),
    "WanTransformer3DModel": StockNetwork("transformer", ("WanPipeline",)),
    "ZImageTransformer2DModel": StockNetwork("transformer", ("ZImagePipeline",)),
}
SCHEDULERS = frozenset(
    [
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    ]
)
AUTOENCODERS = frozenset(
    [
        "AutoencoderDC",
        "AutoencoderKL",
        "AutoencoderKLFlux2",
        "AutoencoderKLLTXVideo",
        "AutoencoderKLQwenImage",
        "AutoencoderKLWan",
        "VQModel",
    ]
)
TEXT_ENCODERS = frozenset(
    [
        "BertModel",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "Gemma2ForCausalLM",
        "Gemma2Model",
        "Gemma2PreTrainedModel",
        "GlmModel",
        "Mistral3ForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3Model",
        "T5EncoderModel",
        "UMT5EncoderModel",
    ]
)
TOKENIZERS = frozenset(  # with "Fast" at their end, too
    [
        "BertTokenizer",
        "CLIPTokenizer",
        "GemmaTokenizer",
        "LlamaTokenizer",
        "PixtralProcessor",
        "PreTrainedTokenizer",
        "Qwen2Tokenizer",
        "SentencePieceBackend",
        "T5Tokenizer",
        "TokenizersBackend",
    ]
)
# Components by name: the library and the classes that they may have. Numbers at the end of a name do not count.
COMPONENTS: Mapping[str, tuple[str, frozenset[str]]] = {
    "scheduler": ("diffusers", SCHEDULERS),
    "vae": ("diffusers", AUTOENCODERS),
    "vqvae": ("diffusers", AUTOENCODERS),
    "text_encoder": ("transformers", TEXT_ENCODERS),
    "tokenizer": ("transformers", TOKENIZERS),
    "image_encoder": ("transformers", frozenset({"CLIPVisionModelWithProjection", "SiglipVisionModel"})),
    "feature_extractor": ("transformers", frozenset({"CLIPImageProcessor", "SiglipImageProcessor"})),
    "safety_checker": ("stable_diffusion", frozenset({"StableDiffusionSafetyChecker"})),
}
WEIGHTS = re.compile(r"[A-Za-z0-9._-]+\.safetensors|[A-Za-z0-9._-]+\.safetensors\.index(\.\w+)?\.json|config\.json")
# Folders, without numbers at the ends of their names, and the files that they may have.
ENCODER_FILES = re.compile(rf"{WEIGHTS.pattern}|generation_config\.json")
FOLDERS: Mapping[str, re.Pattern[str]] = {
    "": re.compile(
        r"model_index\.json|README\.md|LICENSE\.(md|txt)|[\w-]+\.png|"
        + "|".join(map(re.escape, (*LORA_FILES, f"{own_code.PIPELINE}.py")))
    ),
    **dict.fromkeys(("transformer", "unet", "vae", "vqvae"), WEIGHTS),
    "acceleration": re.compile(rf"{WEIGHTS.pattern}|{re.escape(ADAPTER_CONFIG)}"),
    **dict.fromkeys(("text_encoder", "image_encoder", "safety_checker"), ENCODER_FILES),
    "second_time": re.compile(rf"{WEIGHTS.pattern}|{own_code.SECOND_TIME[0]}\.py"),
    "scheduler": re.compile(rf"scheduler_config\.json|{own_code.SCHEDULER[0]}\.py"),
    "tokenizer": re.compile(r"[\w-]+\.(json|txt|model|jinja)"),
    "feature_extractor": re.compile(r"preprocessor_config\.json"),
    "comfyui": re.compile(r"[A-Za-z0-9._-]+\.safetensors"),
}
BINARY = (".model",)  # files that are not text: SentencePiece models
SENTENCEPIECE = b"\x0a"  # their first byte: the first entry of the list of pieces
# Keys with which transformers runs kernels of other repositories, and the values that name its own code.
KERNELS = re.compile(r"_?(attn|experts)_implementation(_internal)?|use_kernels|kernel_config")
OWN_KERNEL = re.compile(r"eager|sdpa|flash_attention_[23]|flex_attention")
OWN_FILES = re.compile(r"(vocab|merges|tokenizer|spm|sentencepiece|source_spm|target_spm)_file")
LAYER = re.compile(r"\^?[A-Za-z0-9_.-]{1,300}")


def refuse_card(card: StudentCard) -> None:
    """Raise InputError unless the network class and the names of all files are known."""
    if card.network not in NETWORKS:
        raise InputError(f"{card.network} is not a network class that students have; valid: {', '.join(NETWORKS)}")
    if card.component != NETWORKS[card.network].folder:
        raise InputError(
            f"distill.json has the {card.network} in the folder {card.component!r}; valid: "
            f"{NETWORKS[card.network].folder}; {NOT_LOADED}"
        )
    for name in card.files:
        if not _is_known(name):
            raise InputError(
                f"{one_line(name, 100)} is not a file of a student with the network class of a stock pipeline "
                f"({card.network}); {NOT_LOADED}"
            )


def is_of_tokenizer(name: str) -> bool:
    """Whether it is the name of a file in the folder of a tokenizer."""
    return name.count("/") == 1 and _plain(name.partition("/")[0]) == "tokenizer"


def _is_known(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    pattern = FOLDERS.get(_plain(folder))
    return pattern is not None and pattern.fullmatch(file) is not None


def _plain(name: str) -> str:
    """The name without the number of a second or third component of this kind."""
    return re.sub(r"_[23]$", "", name)


def refuse_index(parsed: Mapping[str, Any], name: str, card: StudentCard) -> None:
    """Raise InputError unless a model_index.json names a known pipeline class and known classes of components."""
    network = NETWORKS[card.network]
    pipeline = parsed.get("_class_name")
    has_code = not isinstance(pipeline, str)
    if own_code.stock_class(pipeline) not in network.pipelines or (has_code and own_code.FILES[0] not in card.files):
        raise InputError(
            f"{name}: _class_name is {_shown(pipeline)}; valid for a {card.network}: {', '.join(network.pipelines)}; "
            f"{NOT_LOADED}"
        )
    for part, value in parsed.items():
        if part == "_class_name":
            continue
        valid = "true, false, null or a number"
        if part.startswith("_"):
            known = part in ("_diffusers_version", "_name_or_path") and _is_line(value)
            valid = "a line of text, for one of the keys _class_name, _diffusers_version, _name_or_path"
        elif isinstance(value, list):
            library, classes = _component(part, card.network, network.folder)
            known = value == [None, None] or _is_component(value, library, classes) or _is_own(part, value, card)
            valid = f'[null, null] or ["{library}", CLASS] with {", ".join(sorted(classes))}'
        elif part == "id2label":  # the names of DiT's classes
            known = isinstance(value, dict) and all(key.isdecimal() and _is_line(each) for key, each in value.items())
            valid = "a name for each class id"
        else:
            known = value is None or isinstance(value, bool | int | float)
        if not known:
            raise InputError(f"{name}: {one_line(part, 100)} is {_shown(value)}; valid: {valid}; {NOT_LOADED}")


def _component(part: str, network: str, folder: str) -> tuple[str, frozenset[str]]:
    if _plain(part) == folder:
        return "diffusers", frozenset({network})
    return COMPONENTS.get(_plain(part), ("", frozenset()))


def _is_component(value: list[Any], library: str, classes: frozenset[str]) -> bool:
    if len(value) != 2 or value[0] != library or not isinstance(value[1], str):
        return False
    return value[1] in classes or (classes is TOKENIZERS and value[1].removesuffix("Fast") in TOKENIZERS)


def _is_own(part: str, value: list[Any], card: StudentCard) -> bool:
    """Whether it is a component with code of ours, which is among the files."""
    own = own_code.COMPONENTS.get(part)
    return own is not None and value == list(own) and f"{part}/{own[0]}.py" in card.files


def refuse_config(parsed: object, name: str, card: StudentCard) -> None:
    """Raise InputError if a configuration makes a loader run other code, or read files that are not listed."""
    if PurePosixPath(name).name == ADAPTER_CONFIG:
        _refuse_settings(parsed, name)
    for key, value in entries(parsed):
        if KERNELS.fullmatch(key) and not (value in (None, False) or OWN_KERNEL.fullmatch(str(value))):
            raise InputError(f"{name} refers to code or weights elsewhere ({key}); {NOT_LOADED}")
        if is_of_tokenizer(name) and OWN_FILES.fullmatch(key) and isinstance(value, str):
            path = PurePosixPath(name).parent / value
            if str(path) not in card.files:
                raise InputError(
                    f"{name}: {key} is {_shown(value)}; valid: the name of a file in the same folder; {NOT_LOADED}"
                )


def refuse_header(metadata: object, name: str) -> None:
    """Raise InputError if the header of a LoRA has settings with which PEFT does more than to add matrices."""
    text = metadata.get("lora_adapter_metadata") if isinstance(metadata, dict) else None
    if text is None:
        return
    try:
        settings = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        settings = None
    _refuse_settings(settings, name)


def _refuse_settings(settings: object, name: str) -> None:
    """Raise InputError unless the settings of a LoRA are those of `lora_weights`."""
    if not isinstance(settings, dict):
        raise InputError(f"{name}: the settings of its LoRA are not valid JSON; {NOT_LOADED}")
    for key, value in settings.items():
        option = key.rpartition(".")[2]
        match option:
            case "target_modules":
                known = isinstance(value, list) and all(
                    isinstance(each, str) and LAYER.fullmatch(each) for each in value
                )
            case "rank_pattern" | "alpha_pattern":
                known = isinstance(value, dict) and all(
                    LAYER.fullmatch(layer) and type(each) in (int, float) for layer, each in value.items()
                )
            case "peft_type":
                known = value == "LORA"
            case "r" | "lora_alpha":
                known = type(value) in (int, float)
            case _:
                known = option == "use_rslora" and isinstance(value, bool)
        if not known:
            raise InputError(
                f"{name}: the settings of its LoRA have {one_line(key, 100)}={_shown(value)}; valid: r, lora_alpha, "
                f"target_modules, rank_pattern, alpha_pattern, use_rslora; {NOT_LOADED}"
            )


def entries(parsed: object) -> Iterator[tuple[str, Any]]:
    """All keys in JSON content with their values, at any depth."""
    todo = [parsed]
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            yield from each.items()
            todo.extend(each.values())
        elif isinstance(each, list):
            todo.extend(each)


def _is_line(value: object) -> bool:
    return isinstance(value, str) and printable(value) == value


def _shown(value: object) -> str:
    return one_line(json.dumps(value), 200)
