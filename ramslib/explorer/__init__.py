"""The explorer: what a model proposes in an image, and what if the threshold moves."""
