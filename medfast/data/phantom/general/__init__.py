"""The general domain: photographs of everyday scenes, with things in them."""

from medfast.data.phantom.general.captions import caption, prompts
from medfast.data.phantom.general.cases import CLASSES, family
from medfast.data.phantom.general.images import render

__all__ = ["CLASSES", "caption", "family", "prompts", "render"]
