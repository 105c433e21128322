"""One training step, its losses and its metrics; knows a model only by its call signature."""
