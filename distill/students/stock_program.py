"""The program that checks an exported student where distill cannot be imported; its text is run by `isolated.run`.

It imports nothing of distill. `inputs`, `arguments` and `outputs` are described in `stock_check`.
"""

import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

inputs: dict[str, Tensor] = globals().get("inputs", {})  # these three are there when the program runs
arguments: dict = globals().get("arguments", {})
outputs: dict[str, Tensor] = globals().get("outputs", {})


def sha256(tensor: Tensor) -> Tensor:
    """The digest [32] of a tensor's shape and its values in float32, which contains every bfloat16."""
    plain = (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).contiguous()
    found = hashlib.sha256(str(list(plain.shape)).encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy())
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def in_loop(pipeline: DiffusionPipeline, x: Tensor, packing: str) -> Tensor:
    """Latents [B, ...] in the form that they have in the loop of the pipeline."""
    if packing == "patches":
        return pipeline._pack_latents(x, *x.shape)
    if packing == "patches of videos":
        return pipeline._pack_latents(x)
    return x.flatten(2).transpose(1, 2) if packing == "tokens" else x


def from_loop(pipeline: DiffusionPipeline, found: Tensor, like: Tensor, packing: str) -> Tensor:
    """The inverse of `in_loop`, which only changes the order of the values."""
    order = torch.arange(like.numel(), dtype=torch.float64).reshape(like.shape)
    places = in_loop(pipeline, order, packing).reshape(-1).long()
    values = torch.empty(like.numel())
    values[places] = found.detach().float().reshape(-1)
    return values.reshape(like.shape)


def sampled(pipeline: DiffusionPipeline, steps: int) -> None:
    """Sample, and put the latents before the first step and after the last into `outputs`."""
    packing, noise, scheduler = arguments["packing"], inputs["noise"], pipeline.scheduler
    fresh: Iterator[Tensor] = iter(inputs.get(f"fresh@{steps}", ()))
    seen: list[Tensor] = []
    step = type(scheduler).step

    @functools.wraps(scheduler.step)
    def _recorded(*given: object, **more: object) -> object:
        before = given[2] if len(given) > 2 else more["sample"]
        found = step(scheduler, *given, **more)
        seen.extend([before, found[0] if isinstance(found, tuple) else found.prev_sample])
        return found

    def _drawn(shape: object, dtype: torch.dtype, **more: object) -> Tensor:
        given = next(fresh, torch.zeros_like(noise))  # a noise after the last step has the factor 0
        return in_loop(pipeline, given, packing).to(dtype)

    scheduler.step = _recorded
    vars(sys.modules[type(scheduler).__module__])["randn_tensor"] = _drawn
    taken = inspect.signature(pipeline.__call__).parameters
    call = {name: value for name, value in arguments["call"].items() if name in taken}
    call |= {name: value for name, value in condition(pipeline).items() if name in taken}
    if "latents" in taken:
        given = noise if packing == "tokens" else in_loop(pipeline, noise, packing)
        call["latents"] = given.to(pipeline.dtype)
        call["output_type"] = "latent"
    else:
        call["generator"] = torch.Generator().manual_seed(0)
        call["output_type"] = "np"
    with torch.no_grad():
        pipeline(num_inference_steps=steps, **arguments["guidance"], **call)
    outputs[f"first@{steps}"] = from_loop(pipeline, seen[0], noise, packing)
    outputs[f"latents@{steps}"] = from_loop(pipeline, seen[-1], noise, packing)


def condition(pipeline: DiffusionPipeline) -> dict[str, object]:
    """The arguments that are tensors, in the data type of the pipeline."""
    found: dict[str, object] = {}
    for name, value in inputs.items():
        if name.startswith("cond/"):
            own = value.to(pipeline.dtype) if value.is_floating_point() else value
            found[name.removeprefix("cond/")] = list(own) if name in arguments["lists"] else own
    if "prompt_embeds" in found and "prompt_attention_mask" not in found:
        found["prompt_attention_mask"] = torch.ones(inputs["cond/prompt_embeds"].shape[:2])
    return found


def main() -> None:
    """Load a student, and put digests of its weights, and samples if it is a whole pipeline, into `outputs`."""
    folder, dtype = arguments["folder"], getattr(torch, arguments["dtype"])
    if arguments["whole"]:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=arguments["has_code"]
        )
        pipeline.set_progress_bar_config(disable=True)
        networks = {name: getattr(pipeline, name) for name in arguments["networks"]}
    else:
        networks = {
            name: getattr(diffusers, own).from_pretrained(folder, subfolder=name, dtype=dtype, use_safetensors=True)
            for name, own in arguments["networks"].items()
        }
    for name, network in networks.items():
        outputs.update({f"{name}/{key}": sha256(each) for key, each in network.state_dict().items()})
    for steps in arguments["steps"]:
        sampled(pipeline, steps)


if __name__ == "__main__":
    main()
