"""Loads the files of a LoRA student where this project cannot be imported, before an export says success.

    export(student, folder, card, packaging, lambda new: lora_verify.prove(new, student, init))

A file can load nothing without an error, so all layers must be there, and the output of the network must change.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.core import space
from distill.core.atomic import hidden_folder
from distill.core.errors import RunError
from distill.flow.draws import sample_noise
from distill.networks.experts import Experts
from distill.networks.sharing import main_dtype
from distill.networks.two_times import TwoTimes
from distill.protocols import Cond
from distill.students import isolated, lora_program, native
from distill.students.comfy_keys import key_list
from distill.students.init import StudentInit
from distill.students.lora_comfy import ENDINGS, changed_layers, read_comfy, why_not_in_diffusers
from distill.students.lora_folder import COMFY
from distill.students.lora_weights import FILE_2, LoraWeights, from_network, needs_peft
from distill.students.native import NativeStudent
from distill.teachers import checkpoint, layout

STORED = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
TEMPORARY = "base-of-lora"  # name of a folder that is hidden beside the student while its files are checked
TIMES = (0.95, 0.05)  # at which the networks are called: of two networks, each is called
TOLERANCES = {"cpu": 1e-4, "cuda": 1e-3}  # of outputs in float32, relative to the largest, by the student's device
TOLERANCE_16 = 3e-2  # of outputs in 16 bits
CHANGE, CHANGE_16 = 1e-6, 2e-2  # of the changes of the weights in the file for ComfyUI


@dataclass(frozen=True)
class LoraProof:
    """layers: how many were compared. difference: the largest one of outputs, relative to the largest output.

    comfyui: why diffusers does not read the file for ComfyUI, which was then read by this project; "" if it does.
    """

    layers: int
    difference: float
    comfyui: str = ""


def prove(folder: Path, student: NativeStudent, init: StudentInit) -> LoraProof:
    """`verify` for the folder of a LoRA student, as `lora_folder` writes it.

    init: what made the student.
    """
    given, packaging = init.conditioning, init.packaging
    return verify(
        folder,
        student,
        init.shape,
        {} if given.count is None else given.collate(torch.zeros(1, dtype=torch.int64)),
        comfyui=sorted((folder / COMFY).glob("*.safetensors")),
        base=None if packaging is None else packaging.folder,
        pipeline="" if packaging is None else packaging.pipeline,
    )


def verify(
    folder: Path,
    student: NativeStudent,
    shape: tuple[int, ...],
    cond: Cond,
    *,
    comfyui: Sequence[Path] = (),
    base: Path | None = None,
    pipeline: str = "",
    dtype: torch.dtype = torch.float32,
) -> LoraProof:
    """RunError unless diffusers loads the adapters of a student, and the same outputs, from the files in `folder`.

    The stock pipeline loads pytorch_lora_weights.safetensors and, if it can, the files for ComfyUI. Classes to which
    diffusers cannot add a LoRA are loaded with PEFT.

    student: with its adapters, on any device. shape: of one of its samples. cond: one row, as
    `conditioning.collate(torch.tensor([0]))` gives it. comfyui: the files that `write_comfy` has returned. base: the
    folder of the pipeline that the base comes from, if it is unchanged; else its weights are written to a temporary
    folder beside `folder`. pipeline: the class in model_index.json; "": the one of the network.
    dtype: of the matrices in the files.
    """
    network = native.base_of(student.network).eval()
    weights = from_network(network)
    if not weights.layers:
        raise RunError("export failed: the student has no adapters; nothing was exported")
    calls, tensors, ours = _recorded(student, network, shape, cond)
    with _disabled(network):
        _, _, without = _recorded(student, network, shape, cond)
    reason = _compare_comfy(comfyui, weights, network, dtype) if comfyui else ""
    parts = dict(native.parts_of(network))
    components = {prefix.removesuffix(".") or weights.component: part for prefix, part in parts.items()}
    first = next(iter(components.values()))
    scheduler = folder / "scheduler"
    with _bases(components, base, folder) as bases:
        arguments: dict[str, object] = {
            "folder": str(folder.absolute()),
            "pipeline": pipeline or native.convention_for(network).pipeline_of(dict(first.config)),
            "base": {name: [type(part).__name__, str(bases[name])] for name, part in components.items()},
            "scheduler": str(scheduler.absolute()) if (scheduler / layout.SCHEDULER).is_file() else None,
            "dtype": str(main_dtype(first)).removeprefix("torch."),
            "file_dtype": str(dtype).removeprefix("torch."),
            "peft": needs_peft(weights.network),
            "second": FILE_2,
            "factors": {
                component: {name: layer.alpha / layer.rank for name, layer in layers.items()}
                for component, layers in weights.parts.items()
            },
            "comfyui": {} if reason else _by_component(comfyui, network),
            "calls": calls,
            "changes": any(not torch.equal(each, without[name]) for name, each in ours.items()),
        }
        for component, layers in weights.parts.items():
            for name, layer in layers.items():
                tensors |= {f"{component}:{name}:down": layer.down, f"{component}:{name}:up": layer.up}
        text = Path(lora_program.__file__).read_text(encoding="utf-8")
        try:
            theirs = isolated.run(f"{text}\n\nmain(inputs, arguments, outputs)\n", tensors, arguments)
        except RunError as error:
            raise RunError(f"export failed: {error}; nothing was exported") from error
    expected = {"without": without, **dict.fromkeys({name.partition(":")[0] for name in theirs} - {"without"}, ours)}
    allowed = _tolerance(first)
    differences = []
    for key, each in theirs.items():
        kind, _, name = key.partition(":")
        differences.append(_difference(each.float(), expected[kind][name].float()))
        if not differences[-1] <= allowed:  # also true for NaN
            raise RunError(
                f"export failed: with the LoRA files, the stock network computes other outputs than here, relative "
                f"difference {differences[-1]:.3g} (allowed {allowed:.3g}); nothing was exported"
            )
    return LoraProof(len(weights.layers), max(differences), reason)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two outputs, relative to the largest value that is expected; 0 if they are equal."""
    error = (found - expected).abs().max()
    return (error / expected.abs().max() if error else error).item()  # infinity if zeros are expected


def _compare_comfy(files: Sequence[Path], weights: LoraWeights, network: nn.Module, dtype: torch.dtype) -> str:
    """Reads the files here, and compares the changes of all weights. Returns why diffusers cannot read them, or ""."""
    found, allowed = read_comfy(files, network), CHANGE if dtype == torch.float32 else CHANGE_16
    for name, layer in found.layers.items():
        change = layer.change
        ours = weights.layers[name].change if name in weights.layers else torch.zeros_like(change)
        if not (change - ours).abs().max() <= allowed * ours.abs().max():
            raise RunError(f"export failed: the file for ComfyUI has another change of {name}; nothing was exported")
    if lost := sorted(weights.layers.keys() - found.layers.keys()):
        raise RunError(f"export failed: the file for ComfyUI has no change of {lost[0]}; nothing was exported")
    keys = key_list(weights.network)
    assert keys is not None, "there are files"
    reasons = [why_not_in_diffusers(layers, keys, rows) for layers, rows in changed_layers(weights, network).values()]
    return next((reason for reason in reasons if reason), "")


def _by_component(files: Sequence[Path], network: nn.Module) -> dict[str, str]:
    """The files by the folder of the network that they are for."""
    endings = ENDINGS if isinstance(network, Experts) else {native.convention_for(network).folder: ""}
    return {name: str(path.absolute()) for path in files for name, end in endings.items() if path.stem.endswith(end)}


@contextmanager
def _bases(networks: Mapping[str, ModelMixin], base: Path | None, beside: Path) -> Iterator[dict[str, Path]]:
    """The folder of each network without adapters: in the pipeline `base`, or in a temporary folder beside `beside`."""
    found = {component: base / component for component in networks} if base is not None else {}
    found = {name: each for name, each in found.items() if any((each / file).is_file() for file in STORED)}
    missing = {component: network for component, network in networks.items() if component not in found}
    with ExitStack() as until:
        if missing:
            found |= until.enter_context(_written(missing, beside.absolute().with_name(TEMPORARY)))
        yield {component: each.absolute() for component, each in found.items()}


@contextmanager
def _written(networks: Mapping[str, ModelMixin], path: Path) -> Iterator[dict[str, Path]]:
    """The networks without adapters, each in a folder of a hidden temporary folder in the parent of `path`."""
    plain = {component: _plain(network) for component, network in networks.items()}
    need = sum(each.numel() * each.element_size() for part in plain.values() for each in part.state_dict().values())
    space.require(path.parent, need, f"the weights of the base in {path.parent}, with which the LoRA files are checked")
    with ExitStack() as until:
        try:
            folder = until.enter_context(hidden_folder(path))
            for component, part in plain.items():
                part.save_pretrained(folder / component, max_shard_size="5GB")
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"export failed: cannot write the weights of the base to {path.parent}, with which the LoRA files are "
                f"checked: {getattr(error, 'strerror', None) or error}; nothing was exported"
            ) from error
        yield {component: folder / component for component in plain}


def _plain(network: ModelMixin) -> ModelMixin:
    """The network without adapters. It shares its weights."""
    found = _on_meta(network)
    state = {
        name.replace(".base_layer.", "."): each for name, each in network.state_dict().items() if ".lora_" not in name
    }
    found.load_state_dict(state, assign=True)
    return found


def _on_meta(network: ModelMixin) -> ModelMixin:
    """A network of the same config without memory for weights."""
    with torch.device("meta"):
        return type(network).from_config(network.config)


@torch.no_grad()
def _recorded(
    student: NativeStudent, network: nn.Module, shape: tuple[int, ...], cond: Cond
) -> tuple[dict[str, list[object]], dict[str, Tensor], dict[str, Tensor]]:
    """Calls the networks of a student at `TIMES`, with a small sample. Returns by component the arguments of the calls
    as JSON, in which {"tensor": NAME} is a tensor; these tensors; and by COMPONENT:NUMBER the output of each call.
    """
    calls: dict[str, list[object]] = {}
    tensors: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    convention = native.convention_for(network)
    handles = []
    for prefix, part in native.parts_of(network):
        component = prefix.removesuffix(".") or convention.folder

        def keep(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, component: str = component
        ) -> None:
            number = len(calls.setdefault(component, []))
            place = f"{component}:call:{number}"
            calls[component].append(_stored({"args": list(args), "kwargs": kwargs}, place, tensors))
            outputs[f"{component}:{number}"] = lora_program.first_tensor(output).detach().cpu()

        handles.append(part.register_forward_hook(keep, with_kwargs=True))
    first = next(part for _, part in native.parts_of(network))
    device = next(first.parameters()).device
    x = sample_noise(0, [0], checkpoint.small_shape(convention, dict(first.config), shape)).to(device)
    cond = {name: each.to(device) for name, each in cond.items()}
    try:
        with _one_time(student.network), _stock_attention(network):
            for time in TIMES:
                native.call_of(student)(network, x, torch.full((1,), time, device=device), cond)
    finally:
        for handle in handles:
            handle.remove()
    return calls, tensors, outputs


@contextmanager
def _one_time(network: nn.Module) -> Iterator[None]:
    """The second time of a flow map has no effect, because it is not in the files of its LoRA."""
    if not isinstance(network, TwoTimes):
        yield
        return
    with network.with_one_time():
        yield


@contextmanager
def _stock_attention(network: nn.Module) -> Iterator[None]:
    """Attentions are computed as in the stock network, also if the convention of the class does it otherwise."""
    replaced: list[tuple[Attention, object]] = []
    for _, part in native.parts_of(network):
        assert isinstance(part, ModelMixin)
        for name, stock in _on_meta(part).named_modules():
            if isinstance(stock, Attention) and type(stock.processor) is not type(part.get_submodule(name).processor):
                module = part.get_submodule(name)
                replaced.append((module, module.processor))
                module.processor = stock.processor
    try:
        yield
    finally:
        for module, processor in replaced:
            module.processor = processor


@contextmanager
def _disabled(network: nn.Module) -> Iterator[None]:
    """Adapters have no effect."""
    adapted = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    trained = {parameter: parameter.requires_grad for module in adapted for parameter in module.parameters()}
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)
        for parameter, was in trained.items():  # PEFT sets it, too
            parameter.requires_grad_(was)


def _stored(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON. Its tensors are added to `tensors` under names that begin with `place`."""
    match value:
        case Tensor():
            tensors[place] = value.detach().cpu()
            return {"tensor": place}
        case tuple() | list():
            found = [_stored(each, f"{place}.{i}", tensors) for i, each in enumerate(value)]
            return {"tuple": found} if isinstance(value, tuple) else found
        case dict():
            return {name: _stored(each, f"{place}.{name}", tensors) for name, each in value.items()}
        case None | bool() | int() | float() | str():
            return value
    raise AssertionError(f"a network is called with a {type(value).__name__}")


def _tolerance(network: nn.Module) -> float:
    if main_dtype(network) != torch.float32:
        return TOLERANCE_16
    return TOLERANCES[next(network.parameters()).device.type]
