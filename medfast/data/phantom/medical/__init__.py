"""The medical domain: radiographs, CT, MR, ultrasound and histology, with findings."""

from medfast.data.phantom.medical.captions import caption, prompts
from medfast.data.phantom.medical.cases import CLASSES, family
from medfast.data.phantom.medical.images import render

__all__ = ["CLASSES", "caption", "family", "prompts", "render"]
