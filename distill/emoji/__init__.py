"""A text-to-image teacher that is made offline in about 90 minutes: emoji with captions, an autoencoder, a network.

The drawings (OpenMoji 17, CC BY-SA 4.0), their English names and the text encoder (MiniLM, Apache-2.0) come from PyPI.
Everything else is trained here. The result is a stock diffusers pipeline.
"""
