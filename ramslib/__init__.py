"""RAMS-Trans workbench: a Vision Transformer that looks, chooses a region, and looks again.

Hu et al., "RAMS-Trans: Recurrent Attention Multi-scale Transformer for Fine-grained Image
Recognition", ACM Multimedia 2021. The method is read in one sitting, in the
modules beside this file, in the order of the data:

``attention`` -> ``strength`` -> ``regions`` -> ``dppm`` -> ``model`` (over a ``backbone``)
-> ``evaluation`` and ``localization``. Beside it ``transfg``, to compare with; ``looks`` is what
both models give.

What it stands on and what stands on it have a folder each: ``data`` and ``weights`` below,
``runs``, ``training``, ``experiments``, ``plots`` and ``explorer`` above. Imports go that way only.
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
    """``ramslib.load(run)`` is `run.load`; the package itself imports nothing before that."""
    if name == "load":
        return importlib.import_module("ramslib.runs.run").load
    raise AttributeError(f"module 'ramslib' has no attribute {name!r}")
