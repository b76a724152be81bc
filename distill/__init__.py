"""distill: distils diffusion and flow models into students that sample in one, two or four network calls."""

__version__ = "0.2.0"
