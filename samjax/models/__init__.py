"""Segment Anything as Flax NNX modules behind a functional boundary (see ``functional.py``)."""
