"""RAMS-Trans workbench: fine-grained image recognition with a Vision Transformer that looks twice.

Hu et al., "RAMS-Trans: Recurrent Attention Multi-scale Transformer for Fine-grained Image
Recognition", ACM Multimedia 2021.

What a script needs is here: `Config`, `train`, `load`, `predict`, `inspect`; what an extension
needs, too: `ImageClassifier`, `Proposal`, `RecordedScale`, `ScaleOutput`, `reads`, `per_scale`.

The method is read in the modules beside this file, in the order of the data: ``attention`` ->
``dppm`` -> ``boxes`` -> ``classifier`` -> ``model`` (over a ``backbone``) -> ``evaluation``,
``localization`` and ``inspector``. docs/architecture.md follows one image through them.
"""

import importlib

__version__ = "0.2.0"

_PUBLIC = {  # name: where it is defined, imported when it is first used
    "Config": "config",
    "Explorer": "explorer.page",
    "ImageClassifier": "classifier",
    "InputError": "errors",
    "Inspector": "inspector",
    "Proposal": "dppm",
    "ProposalSettings": "model",
    "RecordedScale": "attention",
    "ScaleOutput": "classifier",
    "build_model": "model",
    "inspect": "runs.inference",
    "load": "runs.inference",
    "load_table": "data.datasets",
    "per_scale": "extensions",
    "predict": "runs.photos",
    "reads": "extensions",
    "train": "training.launch",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    """A public name; the package itself imports nothing before one is used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ramslib' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ramslib.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
