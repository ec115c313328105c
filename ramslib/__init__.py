"""RAMS-Trans workbench: a Vision Transformer that looks, chooses a region, and looks again.

Hu et al., "RAMS-Trans: Recurrent Attention Multi-scale Transformer for Fine-grained Image
Recognition", ACM Multimedia 2021. The modules follow the data:

``readers`` -> ``datasets`` -> ``transforms`` -> ``backbone`` (``weights``) -> ``attention`` ->
``strength`` -> ``regions`` -> ``dppm`` -> ``model`` -> ``training`` -> ``evaluation`` -> ``plots``.
"""

__version__ = "0.1.0"
