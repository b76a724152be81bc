"""distill: students of one, two or four network calls from diffusion and flow teachers."""

__version__ = "0.1.0"
