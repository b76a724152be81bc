"""The pipeline of a distilled student: noise to samples in one, two or four network calls.

Load the folder that this file lies in with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from distill.networks.velocity_call import call

# In a student folder, the text of its sampler and of the call for its kind stands here instead (shipped.py).
from distill.students.samplers.euler import SAMPLER, num_fresh, sample


class DistilledPipeline(DiffusionPipeline):
    """Noise to data by `sample`, in N steps along the linear path x_t = (1 - t) data + t noise.

    The times are 1, (N-1)/N, ..., 0, or those of the student (`t_grids`), which then has no other N.
    """

    model_cpu_offload_seq = "unet"
    # diffusers runs the pipeline.py of every local folder in the same module, so a folder that is loaded later replaces
    # the names above. The class keeps its own.
    sampler_name = SAMPLER
    num_fresh = staticmethod(num_fresh)
    sample = staticmethod(sample)
    call = staticmethod(call)

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: FlowMapEulerDiscreteScheduler,
        num_classes: int | None = None,
        sampler: str = SAMPLER,
        t_grids: dict[str, list[float]] | None = None,
        fitted: dict[str, list[list[float]]] | None = None,
    ) -> None:
        super().__init__()
        if sampler != self.sampler_name:
            raise ValueError(
                f"sampler={sampler!r}; valid: {self.sampler_name!r}, the only one in this student's pipeline.py"
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(num_classes=num_classes, sampler=sampler, t_grids=t_grids, fitted=fitted)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample: (dim,) or (channels, height, width)."""
        config = self.unet.config
        if "dim" in config:
            return (config["dim"],)
        size = config["sample_size"]
        return (config["in_channels"], *((size, size) if isinstance(size, int) else size))

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int | None = None,
        class_labels: Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        fresh: Sequence[Tensor] | Tensor | None = None,
        guidance_scale: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples, as `.images`.

        num_inference_steps: N; None: the fewest that the student is made for.
        latents: the noise, [B, *sample_shape], standard normal; None: drawn from `generator`.
        class_labels: B class ids, needed where the student has classes.
        batch_size: number of samples; None: as many as latents, else class_labels, else 1.
        output_type: "pil" and "np" ([B, H, W, C] in [0, 1]) are clamped; "pt" is the tensor [B, *sample_shape] as the
        last step left it, around [-1, 1]. Vectors are returned as they are: "np" an array, otherwise a tensor.
        fresh: further noises like latents, as many as `num_fresh` says; None: drawn from `generator`.
        guidance_scale: for students that take it as an input, within `unet.config.guidance_range`; None: its middle.
        """
        times = self._times(num_inference_steps)
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r}; valid: 'pil', 'np', 'pt'")
        shape, device, dtype = self.sample_shape, self._execution_device, self.unet.dtype
        batch_size = self._batch_size(batch_size, latents, class_labels)
        labels = self._labels(class_labels, batch_size, device)
        if latents is None:
            noise = randn_tensor((batch_size, *shape), generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape[1:]) != shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; valid: [batch, {', '.join(map(str, shape))}]")
        else:
            noise = latents.to(device=device, dtype=dtype)

        more = self._fresh(fresh, self.num_fresh(len(times) - 1), noise, generator)
        if self.config["fitted"]:
            more = [self._rows(len(times) - 1)]
        cond = {} if labels is None else {"class_labels": labels}
        cond |= self._guidance(guidance_scale, batch_size, device)
        samples = self.sample(partial(self.call, self.unet), noise, times, cond, *more)
        images = self._finish(samples, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _times(self, steps: int | None) -> Tensor:
        """[N + 1], from 1 to 0."""
        grids = self.config["t_grids"] or {}
        if steps is None:
            steps = min(map(int, grids), default=1)
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps}; give 1 or more")
        if grids and str(steps) not in grids:
            made = ", ".join(map(str, sorted(map(int, grids))))
            raise ValueError(f"num_inference_steps={steps}; this student is made for: {made}")
        own = grids[str(steps)][:-1] if grids else None  # the scheduler appends 0 itself
        self.scheduler.set_timesteps(steps, sigmas=own)
        return self.scheduler.sigmas

    def _rows(self, steps: int) -> Tensor:
        """The weights of the fitted sampler, [N, N + 1], with zeros where a row is shorter."""
        rows = self.config["fitted"][str(steps)]
        filled = [[*row, *[0.0] * (steps + 1 - len(row))] for row in rows]
        return torch.tensor(filled, dtype=torch.float64)

    def _fresh(
        self,
        fresh: Sequence[Tensor] | Tensor | None,
        count: int,
        noise: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> list[Tensor]:
        """`count` noises like `noise`: those given, or drawn."""
        if fresh is None:
            return [randn_tensor(noise.shape, generator, noise.device, noise.dtype) for _ in range(count)]
        shapes = [list(each.shape) for each in fresh]
        if shapes != count * [list(noise.shape)]:
            raise ValueError(
                f"fresh holds noises of shape {shapes}; by the sampler {self.sampler_name} this student takes "
                f"{count} of {list(noise.shape)}"
            )
        return [each.to(noise) for each in fresh]

    def _batch_size(
        self, batch_size: int | None, latents: Tensor | None, class_labels: Sequence[int] | Tensor | None
    ) -> int:
        if latents is not None:
            rows = latents.shape[0]
            if batch_size not in (None, rows):
                raise ValueError(f"batch_size={batch_size}, but latents have {rows} rows; leave batch_size out")
            return rows
        if batch_size is not None:
            return batch_size
        return 1 if class_labels is None else len(class_labels)

    def _labels(
        self, class_labels: Sequence[int] | Tensor | None, batch_size: int, device: torch.device
    ) -> Tensor | None:
        classes = self.config["num_classes"]
        if classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this student is unconditional; leave them out")
            return None
        if class_labels is None:
            raise ValueError(
                f"this student needs class_labels: {batch_size} ids from 0 to {classes - 1}, one per sample"
            )
        labels = torch.as_tensor(class_labels, dtype=torch.int64, device=device)
        if labels.ndim != 1 or len(labels) != batch_size:
            raise ValueError(
                f"class_labels have shape {list(labels.shape)}, but {batch_size} samples are asked for; "
                "give one id per sample"
            )
        if ((labels < 0) | (labels >= self.unet.config["num_class_embeds"])).any():
            raise ValueError(f"class_labels {labels.tolist()} are not all valid; this student knows 0 to {classes - 1}")
        return labels

    def _guidance(self, scale: float | None, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """The guidance scale [B] by name, if the network takes it as an input."""
        known = self.unet.config.get("guidance_range")
        if known is None:
            if scale is not None:
                raise ValueError("guidance_scale was given, but this student does not take it; leave it out")
            return {}
        scale = sum(known) / 2 if scale is None else scale
        if not known[0] <= scale <= known[1]:
            raise ValueError(f"guidance_scale={scale}; this student knows {known[0]:g} to {known[1]:g}")
        return {"guidance_scale": torch.full((batch_size,), float(scale), device=device)}

    def _finish(self, x: Tensor, output_type: str) -> object:
        if output_type == "pt":
            return x
        if x.ndim != 4:
            return x.float().cpu().numpy() if output_type == "np" else x
        array = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()  # [B, H, W, C]
        return array if output_type == "np" else self.numpy_to_pil(array)
