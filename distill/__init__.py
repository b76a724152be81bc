"""distill: students of one, two or four network calls from diffusion and flow teachers."""

__version__ = "0.2.0"
