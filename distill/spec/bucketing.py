"""The sizes of the buckets of `data.buckets`: images of different aspect ratios with nearly the same area."""

from math import gcd, isqrt

MOST = 1000  # maximum number of buckets
ROUNDING = 1e-9  # relative, of aspect ratios


def sizes(size: tuple[int, int], step: int, max_aspect: float) -> list[tuple[int, int]]:
    """The sizes (height, width) of the buckets of images of `size`, from the widest to the highest.

    Their sides are multiples of `step`, their area is 0.9 to 1 times that of `size`, and the longer side is at most
    `max_aspect` times the shorter one. If two have the same aspect ratio, only the larger one is a bucket. ValueError
    if there are more than MOST.

    For size 1024x1024, step 64 and max_aspect 4, these are the 40 sizes that SDXL was trained with (Podell et al. 2023,
    arXiv 2307.01952, appendix I), and 1344x704, which is missing there, although 704x1344 is listed.
    """
    area = size[0] * size[1]
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for short in range(step, isqrt(area) + 1, step):
        least, most = max(short, -(-9 * area // (10 * short))), area // short
        for long in range(-(-least // step) * step, most + 1, step):
            if long / short > max_aspect * (1 + ROUNDING):
                break
            divisor = gcd(short, long)
            found[short // divisor, long // divisor] = (short, long)  # the last one of an aspect ratio is the largest
            if len(found) > MOST:
                raise ValueError(f"step={step} gives more than {MOST:,} sizes; increase it")
    wide = sorted(found.values(), key=lambda sides: sides[0] / sides[1])
    both = wide + [(long, short) for short, long in reversed(wide) if long != short]
    if len(both) > MOST:
        raise ValueError(f"step={step} gives more than {MOST:,} sizes; increase it")
    return both


def checked(size: tuple[int, int], step: int, max_aspect: float) -> list[tuple[int, int]]:
    """`sizes`. ValueError if `size` is not one of them, or the only one."""
    height, width = size
    if height % step or width % step:
        raise ValueError(f"step={step} does not divide the sides of data.size, {height}x{width}; change either")
    if max(size) / min(size) > max_aspect * (1 + ROUNDING):
        raise ValueError(
            f"max_aspect={max_aspect:g} is less than the aspect ratio of data.size, {height}x{width}; increase it"
        )
    found = sizes(size, step, max_aspect)
    if len(found) == 1:
        raise ValueError(
            f"step={step} and max_aspect={max_aspect:g} allow only the size {height}x{width}, so there is one bucket; "
            "decrease step, increase max_aspect, or remove buckets"
        )
    return found
