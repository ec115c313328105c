"""Data sets as tables, photos as views: what goes into a model."""
