"""The explorer: what a model looks at, and what if the threshold moves."""

from ramslib.explorer.page import Explorer

__all__ = ["Explorer"]
