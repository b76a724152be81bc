"""The scheduler of a student that is sampled on the linear path, whatever schedule its network was trained with.

Load the pipeline that this file belongs to with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from distill.networks.linear_path import edm_velocity, vp_velocity


class LinearPathScheduler(SchedulerMixin, ConfigMixin):
    """Steps x_s = x_t + (s - t) v on the path x_t = (1 - t) data + t noise, from t = 1 to 0.

    v is the velocity, or the average velocity of a flow map. It is computed from the output of the network, which is
    called in the schedule that it was trained with, on x_t as it is there.

    t_grids: number of steps N -> its N + 1 times from 1 to 0, and no other N is possible; None: 1, (N-1)/N, ..., 0.
    prediction: what the network predicts: velocity on the linear path, else epsilon, sample or v_prediction.
    num_train_timesteps: on the linear path, the network is called with num_train_timesteps * t.
    inverted: it is called with num_train_timesteps * (1 - t), and predicts the negative velocity.
    before_shift: it is called with the time u for which t = mu u / (1 + (mu - 1) u), where the pipeline gives mu.
    log_sigmas: of a VP schedule: log(sigma/alpha) for each of its times.
    edm: of an EDM schedule: the sign of the output, sigma_data, sigma_min and sigma_max.
    teacher: the scheduler config of the teacher, which has no effect here.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        t_grids: dict[str, list[float]] | None = None,
        prediction: str = "velocity",
        num_train_timesteps: int = 1000,
        inverted: bool = False,
        before_shift: bool = False,
        log_sigmas: list[float] | None = None,
        edm: list[float] | None = None,
        teacher: dict | None = None,
    ) -> None:
        self._table = None if log_sigmas is None else torch.tensor(log_sigmas, dtype=torch.float64)
        self.set_timesteps(min(map(int, t_grids), default=1) if t_grids else 1)

    @property
    def step_index(self) -> int:
        """The number of steps that were made."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the number of the first step."""
        self._step_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | Tensor | None = None,
        timesteps: list[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Start again, with N = num_inference_steps steps.

        Some pipelines give sigmas or timesteps instead: then N is their number. The times are those of the student.
        """
        given = sigmas if sigmas is not None else timesteps
        steps = num_inference_steps if given is None else len(given)
        grids = self.config["t_grids"]
        if steps is None or steps < 1 or (grids and str(steps) not in grids):
            made = ", ".join(map(str, sorted(map(int, grids)))) if grids else "any number from 1"
            raise ValueError(f"num_inference_steps={steps}; this student is made for: {made}")
        times = grids[str(steps)] if grids else torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        self.num_inference_steps, self._step_index = steps, 0
        self._given: Tensor | None = None  # what `scale_model_input` was called with
        self._scaled: Tensor | None = None  # and what it returned
        self.sigmas = torch.tensor(times, dtype=torch.float64)  # [N + 1]; on the linear path, sigma is t
        found = [float(self._seen(torch.zeros(1), t)[1]) for t in times[:-1]]
        if self.config["before_shift"] and mu is not None:
            found = [n / (t + mu * (1 - t)) for n, t in zip(found, times[:-1], strict=True)]
        self.timesteps = torch.tensor(found, dtype=torch.float32, device=device)

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """x_t [B, ...] as the network takes it."""
        self._given = sample
        self._scaled = self._seen(sample, self.sigmas[self._step_index].item())[0]
        return self._scaled

    def step(
        self, model_output: Tensor, timestep: object, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """x_s, from x_t and the output of the network, all [B, ...]. As a tuple, with the data that it expects.

        Some pipelines take that in one step, in which it is the same.
        """
        if sample is self._scaled:  # the pipeline of DiT gives what `scale_model_input` has returned
            sample = self._given
        t, s = self.sigmas[self._step_index : self._step_index + 2].tolist()
        x = sample.float()
        v = self._velocity(x, model_output.float(), t)
        found, data = (x + (s - t) * v).to(sample.dtype), (x - t * v).to(sample.dtype)
        self._step_index += 1
        self._given = self._scaled = None
        return SchedulerOutput(prev_sample=found) if return_dict else (found, data)

    def _seen(self, x: Tensor, t: float) -> tuple[Tensor, float | Tensor]:
        """(x_t as the network takes it, the network's own time)."""
        if self._table is None and self.config["edm"] is None:
            return x, self.config["num_train_timesteps"] * (1 - t if self.config["inverted"] else t)
        seen: list[tuple[Tensor, Tensor]] = []

        def native(scaled: Tensor, time: Tensor) -> Tensor:
            seen.append((scaled, time[0]))
            return scaled

        self._converted(native, x, t)
        return seen[0]

    def _velocity(self, x: Tensor, output: Tensor, t: float) -> Tensor:
        if self._table is None and self.config["edm"] is None:
            return -output if self.config["inverted"] else output
        return self._converted(lambda scaled, time: output, x, t)

    def _converted(self, native: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: float) -> Tensor:
        """The velocity of a network of a VP or EDM schedule, which is called once."""
        time = torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
        if self._table is not None:
            return vp_velocity(native, self.config["prediction"], self._table, x, time)
        sign, sigma_data, sigma_min, sigma_max = self.config["edm"]
        return edm_velocity(native, sign, sigma_data, sigma_min, sigma_max, x, time)
