"""The explorer: what a model proposes in an image, and what if the threshold moves."""

from ramslib.explorer.page import Explorer

__all__ = ["Explorer"]
