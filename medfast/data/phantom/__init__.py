"""A seeded generator of medical-like images with captions, for runs that need no download.

It is a working stand-in in which fine detail matters, not medical data.
"""

from medfast.data.phantom.layouts import LAYOUTS
from medfast.data.phantom.write import GENERATOR_VERSION, cached_phantom, source, write_phantom

__all__ = ["GENERATOR_VERSION", "LAYOUTS", "cached_phantom", "source", "write_phantom"]
