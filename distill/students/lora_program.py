"""What loads the files of a LoRA where this project cannot be imported (see `lora_verify`). It imports nothing of it.

The stock pipeline gets the network of the base and nothing else. Each file is loaded as its users load it, and then the
layers of the network and its outputs are compared.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

Loaded = dict[str, dict[str, tuple[Tensor, Tensor, float]]]  # component -> layer -> A, B and the factor of B A


def main(inputs: Mapping[str, Tensor], arguments: Mapping[str, Any], outputs: dict[str, Tensor]) -> None:
    """Raises an error that says what is wrong.

    inputs: COMPONENT:LAYER:down and :up of the adapters, and the tensors of the calls. arguments: base: the folder of
    each component; pipeline: a class; scheduler: a folder or null; dtype: of the base; file_dtype: of the matrices in
    the files; factors: of each layer by component; folder; comfyui: files for pipeline.load_lora_weights by component;
    calls: arguments of the network by component, in which {"tensor": NAME} is a tensor; changes: whether the adapters
    change the outputs. outputs: LOADED:COMPONENT:NUMBER of each call.
    """
    pipeline = _pipeline(arguments)
    given: Loaded = {component: {} for component in arguments["factors"]}
    for component, factors in arguments["factors"].items():
        for name, factor in factors.items():
            down, up = (inputs[f"{component}:{name}:{each}"] for each in ("down", "up"))
            given[component][name] = (down, up, factor)
    calls = {component: _filled(each, inputs) for component, each in arguments["calls"].items()}
    without = _outputs(pipeline, calls)
    dtype = getattr(torch, arguments["file_dtype"])
    for what, load, unload in _ways(pipeline, arguments):
        load()
        found = {component: dict(_adapters(getattr(pipeline, component))) for component in given}
        if what == "diffusers":
            _same_matrices(found, given, dtype)
        else:
            _same_changes(found, given, dtype)
        now = _outputs(pipeline, calls)
        if arguments["changes"] and all(torch.equal(now[name], without[name]) for name in now):
            raise ValueError(f"the LoRA file for {what} was loaded and has no effect on the output")
        outputs.update({f"{what}:{name}": each for name, each in now.items()})
        unload()
    outputs.update({f"without:{name}": each for name, each in without.items()})


def _pipeline(arguments: Mapping[str, Any]) -> Any:
    """The stock pipeline with the networks of the base, a scheduler, and None for all others."""
    kind = getattr(diffusers, arguments["pipeline"])
    dtype = getattr(torch, arguments["dtype"])
    parts: dict[str, object] = {
        name: None
        for name, each in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and each.default is inspect.Parameter.empty
    }
    for component, (network, folder) in arguments["base"].items():
        parts[component] = getattr(diffusers, network).from_pretrained(folder, torch_dtype=dtype).eval()
    if arguments["scheduler"] is not None:
        config = json.loads((Path(arguments["scheduler"]) / "scheduler_config.json").read_text())
        parts["scheduler"] = getattr(diffusers, config["_class_name"]).from_pretrained(arguments["scheduler"])
    return kind(**parts)


def _ways(
    pipeline: Any, arguments: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """What loads each kind of file, and what takes it out again."""
    folder, components = arguments["folder"], list(arguments["factors"])
    if arguments["peft"]:
        (component,) = components
        network = getattr(pipeline, component)
        models: list[peft.PeftModel] = []

        def add() -> None:
            models.append(peft.PeftModel.from_pretrained(network, folder))

        yield "diffusers", add, lambda: models.pop().unload()
        return
    second = {"weight_name": arguments["second"], "load_into_transformer_2": True}

    def load() -> None:
        for component in components:
            pipeline.load_lora_weights(folder, **(second if component == "transformer_2" else {}))

    yield "diffusers", load, pipeline.unload_lora_weights
    files = arguments["comfyui"]
    if files:

        def load_files() -> None:
            for component, path in files.items():
                options = {"load_into_transformer_2": True} if component == "transformer_2" else {}
                pipeline.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name, **options)

        yield "ComfyUI", load_files, pipeline.unload_lora_weights


def _adapters(network: nn.Module) -> Iterator[tuple[str, tuple[Tensor, Tensor, float]]]:
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer) and module.lora_A:
            (adapter,) = module.lora_A
            if module.merged or module.disable_adapters or adapter not in module.active_adapters:
                raise ValueError(f"the adapter of {name} was loaded and is not active")
            down, up = (each[adapter].weight.detach() for each in (module.lora_A, module.lora_B))
            yield name, (down, up, module.scaling[adapter])


def _same_matrices(found: Loaded, given: Loaded, dtype: torch.dtype) -> None:
    """Raises an error unless each layer was loaded, bit for bit."""
    for component, layers in given.items():
        if different := sorted(layers.keys() ^ found[component].keys()):
            lost = different[0] in layers
            raise ValueError(f"diffusers {'does not load' if lost else 'also loads'} the layer {different[0]}")
        for name, (down, up, factor) in layers.items():
            now = found[component][name]
            for ours, theirs in ((down, now[0]), (up, now[1])):
                if not torch.equal(ours.to(dtype).to(theirs.dtype), theirs):
                    raise ValueError(f"diffusers loads other numbers of the layer {name}")
            if abs(now[2] - factor) > 1e-6 * abs(factor):
                raise ValueError(f"diffusers multiplies the layer {name} by {now[2]}, and not by {factor}")


def _same_changes(found: Loaded, given: Loaded, dtype: torch.dtype) -> None:
    """Raises an error unless the changes of all weights are the same, relative to the largest one of a layer.

    The matrices are stored as `dtype`, and loaded in the data type of the base, so they may be rounded to 16 bits.
    """
    for component, layers in given.items():
        if lost := sorted(layers.keys() - found[component].keys()):
            raise ValueError(f"diffusers does not load the layer {lost[0]} from the file for ComfyUI")
        for name, now in found[component].items():
            theirs, exact = _change(*now), {dtype, now[0].dtype} == {torch.float32}
            ours = _change(*layers[name]) if name in layers else torch.zeros_like(theirs)
            error, largest = (theirs - ours).abs().max().item(), ours.abs().max().item()
            if not error <= (1e-6 if exact else 2e-2) * largest:
                raise ValueError(
                    f"diffusers loads another change of the layer {name} from the file for ComfyUI: the difference is "
                    f"{error:.3g}, the largest change {largest:.3g}"
                )


def _change(down: Tensor, up: Tensor, factor: float) -> Tensor:
    return factor * up.double().flatten(1) @ down.double().flatten(1)


@torch.no_grad()
def _outputs(pipeline: Any, calls: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        f"{component}:{number}": first_tensor(getattr(pipeline, component)(*call["args"], **call["kwargs"]))
        for component, each in calls.items()
        for number, call in enumerate(each)
    }


def first_tensor(output: Any) -> Tensor:
    """The output of a network in all that it returns."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _filled(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A value of JSON with tensors and tuples in their places."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        if value.keys() == {"tuple"}:
            return tuple(_filled(each, tensors) for each in value["tuple"])
        return {name: _filled(each, tensors) for name, each in value.items()}
    return [_filled(each, tensors) for each in value] if isinstance(value, list) else value
