"""A seeded generator of images with captions, for runs that need no download.

Medical-like images are a working stand-in in which fine detail matters, not medical data; pictures
of everyday scenes, drawn with the same tools, stand in for the web's.
"""

from medfast.data.phantom.domains import DOMAINS
from medfast.data.phantom.layouts import LAYOUTS
from medfast.data.phantom.write import GENERATOR_VERSION, cached_phantom, source, write_phantom

__all__ = [
    "DOMAINS",
    "GENERATOR_VERSION",
    "LAYOUTS",
    "cached_phantom",
    "source",
    "write_phantom",
]
