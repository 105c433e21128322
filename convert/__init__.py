"""Checkpoints of the official PyTorch models to samjax and back.

`bridge` is the engine, `torch_io` reads and writes PyTorch files, and each model has a module with
its name tables and its command: `python -m convert.sam`. Nothing in samjax imports this package,
so that samjax itself runs without PyTorch.
"""
