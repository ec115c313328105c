"""Figures for notebooks and papers: one function per figure, tensors or tables in, Axes out.

Each draws on ``ax`` (or ``axes``) where given, else on a new figure, in the style ``STYLE``. With
``plt.style.use(plots.STYLE)`` a notebook's own figures have it, too, and vector graphics real text.
"""

from ramslib.plots.drawing import STYLE, clean_class_name, output_color, styled
from ramslib.plots.figures import (
    plot_ablation,
    plot_attention,
    plot_class_balance,
    plot_confusion,
    plot_differences,
    plot_heat_map,
    plot_learning,
    plot_reliability,
    plot_threshold,
)
from ramslib.plots.images import (
    plot_image,
    plot_map,
    plot_mask,
    plot_patch_grid,
    plot_probabilities,
    plot_problems,
    plot_recursion,
    plot_samples,
    plot_strength,
    plot_strength_per_block,
)
