"""Data: read, pair, augment, prompt, batch. numpy, Pillow and Grain; nothing here imports JAX."""

from samjax.data.folder import FolderDataset, SegmentationDataset, Subset, split
from samjax.data.images import DataError, read_image, read_mask
from samjax.data.pipeline import Batch, Loader, make_loader
from samjax.data.prompts import num_slots, sample_prompt
from samjax.data.transforms import Augment
from samjax.frame import pad_to_frame, resize, resize_to_frame, resized_size

__all__ = [
    "Augment",
    "Batch",
    "DataError",
    "FolderDataset",
    "Loader",
    "SegmentationDataset",
    "Subset",
    "make_loader",
    "num_slots",
    "pad_to_frame",
    "read_image",
    "read_mask",
    "resize",
    "resize_to_frame",
    "resized_size",
    "sample_prompt",
    "split",
]
