"""The pipeline of a student that is a flow map: that of its teacher, which also tells the network where a step ends.

Load the folder that this file lies in with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

import functools
import inspect

import diffusers
import torch
from torch import Tensor, nn


def __getattr__(name: str) -> type:
    """The class FlowMapX, for the pipeline class X of diffusers. It is called as X is.

    A student that takes the guidance scale as an input has a further argument, `guidance`: the scale, within
    `second_time.config.guidance_range`, whose middle is the default.
    """
    if not name.startswith("FlowMap"):
        raise AttributeError(name)
    stock = getattr(diffusers, name.removeprefix("FlowMap"))

    def _initialise(self: diffusers.DiffusionPipeline, second_time: diffusers.ModelMixin, **components: object) -> None:
        stock.__init__(self, **components)
        self.register_modules(second_time=second_time)

    @functools.wraps(stock.__call__)
    def _call(self: diffusers.DiffusionPipeline, *given: object, **options: object) -> object:
        known, scale = self.second_time.config.get("guidance_range"), options.pop("guidance", None)
        if known is None and scale is not None:
            raise ValueError("guidance was given, but this student does not take it; leave it out")
        if known is not None:
            scale = sum(known) / 2 if scale is None else scale
            if not known[0] <= scale <= known[1]:
                raise ValueError(f"guidance={scale}; this student knows {known[0]:g} to {known[1]:g}")

        def _add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            step = self.scheduler.step_index or 0  # None before the first step
            t, s = self.scheduler.sigmas[step : step + 2]  # of this step: on the linear path, sigma is the time
            difference = (t - s).reshape(1).to(device=output.device, dtype=torch.float32)
            return output + self.second_time(difference, scale).to(output.dtype)

        places = [place.split(".", 1) for place in self.second_time.config["layers"]]
        layers = [getattr(self, component).get_submodule(layer) for component, layer in places]
        hooks = [layer.register_forward_hook(_add) for layer in layers]
        try:
            return stock.__call__(self, *given, **options)
        finally:
            for hook in hooks:
                hook.remove()

    # diffusers reads the names of the components from the signature.
    second = inspect.Parameter("second_time", inspect.Parameter.KEYWORD_ONLY, annotation=diffusers.ModelMixin)
    signature = inspect.signature(stock.__init__)
    _initialise.__signature__ = signature.replace(parameters=[*signature.parameters.values(), second])  # type: ignore[attr-defined]
    kept = [*stock._exclude_from_cpu_offload, "second_time"]
    return type(name, (stock,), {"__init__": _initialise, "__call__": _call, "_exclude_from_cpu_offload": kept})
