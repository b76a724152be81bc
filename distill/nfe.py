"""Network calls for a sample (NFE), by what makes it: an ODE solver, or the sampler of a student. No tensors."""


def network_calls(method: str, steps: int) -> int:
    """In so many steps, to t = 0: of Heun's, which take two calls, the last is Euler's."""
    return {"heun": 2 * steps - 1, "accelerated": steps + 1}.get(method, steps)


def per_velocity(guidance_scale: float) -> int:
    """For one velocity: two under classifier-free guidance."""
    return 1 if guidance_scale == 1 else 2
