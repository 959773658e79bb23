"""Published weights, and those of earlier runs, in medfast's own model."""

from medfast.models.pretrained.files import pretrained_tokenizer
from medfast.models.pretrained.load import Loaded, load_pretrained

__all__ = ["Loaded", "load_pretrained", "pretrained_tokenizer"]
