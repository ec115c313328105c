"""Figures for notebooks and papers: one function per figure, tensors or tables in, Axes out.

``show_*`` show photos, ``plot_*`` show tables. Each draws on ``ax`` (or a row of ``axes``) where
given, else on a new figure; `panels` makes a grid of Axes, `save` writes vector graphics.
"""

from ramslib.plots.drawing import as_bytes, as_image, clean_class_name, panels, save
from ramslib.plots.figures import (
    plot_ablation,
    plot_accuracies,
    plot_class_balance,
    plot_confusion,
    plot_differences,
    plot_heat_map,
    plot_learning,
    plot_losses,
    plot_reliability,
    plot_threshold,
)
from ramslib.plots.images import (
    plot_image,
    plot_mask,
    plot_probabilities,
    plot_recursion,
    plot_samples,
    plot_strength,
    plot_strength_per_block,
    recursion_columns,
)

__all__ = [
    "as_bytes",
    "as_image",
    "panels",
    "plot_ablation",
    "plot_accuracies",
    "plot_class_balance",
    "plot_confusion",
    "plot_differences",
    "plot_heat_map",
    "plot_learning",
    "plot_losses",
    "plot_reliability",
    "plot_threshold",
    "clean_class_name",
    "save",
    "plot_strength_per_block",
    "plot_mask",
    "plot_image",
    "plot_probabilities",
    "plot_samples",
    "plot_recursion",
    "plot_strength",
    "recursion_columns",
]
