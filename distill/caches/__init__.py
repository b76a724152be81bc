"""Caches: latents of images and embeddings of prompts, encoded once and stored in shards.

Training that reads them needs neither the autoencoder nor the text encoders.
"""

from distill.caches import latents, prompts
from distill.caches.manifest import LatentManifest
from distill.caches.read import CachedLatents, open_latents, verify

__all__ = ["CachedLatents", "LatentManifest", "latents", "open_latents", "prompts", "verify"]
