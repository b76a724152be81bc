"""The pipeline of a distilled student: noise to samples in one, two or four network calls.

This file is shipped inside student folders: it imports torch and diffusers only. Load a folder with
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor


class DistilledPipeline(DiffusionPipeline):
    """Steps on the linear path along t = 1, (N-1)/N, ..., 0, or along times of its own, by what the network knows:

    sampler "euler": its velocity v(x_t, t), x_s = x_t + (s - t) v.
    sampler "same_noise": data = x_t - t v(x_t, t), x_s = (1 - s) data + s noise, with the noise that it began from.
    sampler "jump": its average velocity u(x_t, t, s) from t to s, x_s = x_t + (s - t) u.
    sampler "renoise": data = x_t - t u(x_t, t, 0), x_s = (1 - s) data + s fresh noise.
    sampler "accelerated": its velocity v at the noise, one call more, and its acceleration a(x_t, t, v),
    x_s = x_t + (s - t) (v + ((t + s) / 2 - 1) a).
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: FlowMapEulerDiscreteScheduler,
        num_classes: int | None = None,
        sampler: str = "euler",
        t_grids: dict[str, list[float]] | None = None,
    ) -> None:
        super().__init__()
        if sampler not in ("euler", "same_noise", "jump", "renoise", "accelerated"):
            raise ValueError(f"sampler={sampler!r}; valid: 'euler', 'same_noise', 'jump', 'renoise', 'accelerated'")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(num_classes=num_classes, sampler=sampler, t_grids=t_grids)

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
        class_labels: Sequence[int] | torch.Tensor | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        fresh: Sequence[torch.Tensor] | torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples, as `.images`.

        num_inference_steps: N, network calls ("accelerated": N + 1); None: the fewest that the student is made for.
        latents: the noise, [B, *sample_shape], standard normal; None: drawn from `generator`.
        class_labels: B class ids, needed where the student has classes.
        batch_size: number of samples; None: as many as latents, else class_labels, else 1.
        output_type: "pil" and "np" ([B, H, W, C] in [0, 1]) are clamped; "pt" is the tensor [B, *sample_shape] as the
        last step left it, around [-1, 1]. Vectors are returned as they are: "np" an array, otherwise a tensor.
        fresh: the further noises of sampler "renoise", N - 1 like latents; None: drawn from `generator`.
        """
        steps = self._set_times(num_inference_steps)
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r}; valid: 'pil', 'np', 'pt'")
        shape, device, dtype = self.sample_shape, self._execution_device, self.unet.dtype
        batch_size = self._batch_size(batch_size, latents, class_labels)
        labels = self._labels(class_labels, batch_size, device)
        if latents is None:
            x_t = randn_tensor((batch_size, *shape), generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape[1:]) != shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; valid: [batch, {', '.join(map(str, shape))}]")
        else:
            x_t = latents.to(device=device, dtype=dtype)

        sampler, start = self.config["sampler"], x_t
        self._check_fresh(fresh, steps - 1 if sampler == "renoise" else 0, x_t)
        times = self.scheduler.sigmas  # [N + 1], 1 ... 0
        begun: dict[str, torch.Tensor] = {}  # what the network is given beside times and classes
        if sampler == "accelerated":
            begun["velocity"] = self.unet(
                x_t, 1000 * torch.ones_like(times[:1]).expand(batch_size), class_labels=labels
            ).sample
        for step, timestep in enumerate(self.scheduler.timesteps):
            t, s = times[step], times[step + 1]
            known = {"jump": [t, s], "renoise": [t, torch.zeros_like(s)]}.get(sampler, [t])
            known = [(1000 * time.to(torch.float32)).expand(batch_size) for time in known]  # the network takes 1000 t
            velocity = self.unet(x_t, *known, class_labels=labels, **begun).sample
            if begun:  # what it gave is the acceleration
                velocity = begun["velocity"] + ((t + s) / 2 - 1) * velocity
            if sampler == "renoise":
                x_t = x_t - t * velocity
                if step < steps - 1:
                    noise = randn_tensor(x_t.shape, generator, device, dtype) if fresh is None else fresh[step].to(x_t)
                    x_t = (1 - s) * x_t + s * noise
            elif sampler == "same_noise":
                x_t = (1 - s) * (x_t - t * velocity) + s * start
            else:
                x_t = self.scheduler.step(velocity, timestep, x_t, return_dict=False)[0]

        images = self._finish(x_t, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _set_times(self, steps: int | None) -> int:
        """The scheduler's, for so many steps; returns their number."""
        grids, device = self.config["t_grids"] or {}, self._execution_device
        if steps is None:
            steps = min(map(int, grids), default=1)
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps}; give 1 or more")
        if grids and str(steps) not in grids:
            made = ", ".join(map(str, sorted(map(int, grids))))
            raise ValueError(f"num_inference_steps={steps}; this student is made for: {made}")
        own = grids[str(steps)][:-1] if grids else None  # the scheduler appends 0 itself
        self.scheduler.set_timesteps(steps, device=device, sigmas=own)
        return steps

    def _check_fresh(
        self, fresh: Sequence[torch.Tensor] | torch.Tensor | None, count: int, latents: torch.Tensor
    ) -> None:
        if fresh is not None and [list(noise.shape) for noise in fresh] != count * [list(latents.shape)]:
            raise ValueError(
                f"fresh holds noises of shape {[list(noise.shape) for noise in fresh]}; by the sampler "
                f"{self.config['sampler']} this student takes {count} of {list(latents.shape)}"
            )

    def _batch_size(
        self, batch_size: int | None, latents: torch.Tensor | None, class_labels: Sequence[int] | torch.Tensor | None
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
        self, class_labels: Sequence[int] | torch.Tensor | None, batch_size: int, device: torch.device
    ) -> torch.Tensor | None:
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

    def _finish(self, x: torch.Tensor, output_type: str) -> object:
        if output_type == "pt":
            return x
        if x.ndim != 4:
            return x.float().cpu().numpy() if output_type == "np" else x
        array = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()  # [B, H, W, C]
        return array if output_type == "np" else self.numpy_to_pil(array)
