"""Segment Anything in JAX and Flax NNX, for fine-tuning on medical images."""

__version__ = "0.1.0"

__all__ = ["__version__"]
