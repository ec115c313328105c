"""RAMS-Trans workbench: a Vision Transformer that looks, chooses a region, and looks again.

Hu et al., "RAMS-Trans: Recurrent Attention Multi-scale Transformer for Fine-grained Image
Recognition", ACM Multimedia 2021. The modules follow the data:

``readers`` -> ``datasets`` -> ``transforms`` -> ``backbone`` (``weights``) -> ``attention`` ->
``strength`` -> ``regions`` -> ``dppm`` -> ``model`` -> ``training`` -> ``evaluation`` -> ``plots``.
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
    """``ramslib.load(run)`` is `run.load`; the package itself imports nothing before that."""
    if name == "load":
        return importlib.import_module("ramslib.run").load
    raise AttributeError(f"module 'ramslib' has no attribute {name!r}")
