"""Figures for notebooks and papers: one function per figure, tensors or tables in, Axes out.

``show_*`` show photos, ``plot_*`` show tables. Each draws on ``ax`` (or a row of ``axes``) where
given, else on a new figure; `panels` makes a grid of Axes, `save` writes vector graphics.
"""

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
from ramslib.plots.pictures import as_bytes, as_image, panels, readable, save
from ramslib.plots.stories import (
    show_build_up,
    show_mask,
    show_photo,
    show_probabilities,
    show_samples,
    show_story,
    show_strength,
    story_columns,
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
    "readable",
    "save",
    "show_build_up",
    "show_mask",
    "show_photo",
    "show_probabilities",
    "show_samples",
    "show_story",
    "show_strength",
    "story_columns",
]
