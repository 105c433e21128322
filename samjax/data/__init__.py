"""Data: read, pair, augment, prompt, batch. numpy, Pillow and Grain; nothing here imports JAX."""

from samjax.data.clicks import next_click
from samjax.data.folder import FolderDataset
from samjax.data.images import DataError, read_image, read_mask
from samjax.data.paper_augment import augmentation
from samjax.data.pipeline import Batch, Loader, make_loader
from samjax.data.prompts import num_slots, sample_prompt
from samjax.data.slices import Slices
from samjax.data.subsets import SegmentationDataset, Subset, few_shot, split, without_bad
from samjax.data.throughput import Throughput
from samjax.data.transforms import Augment
from samjax.frame import pad_to_frame, resize, resize_to_frame, resized_size

__all__ = [
    "Augment",
    "Batch",
    "DataError",
    "FolderDataset",
    "Loader",
    "SegmentationDataset",
    "Slices",
    "Subset",
    "Throughput",
    "augmentation",
    "few_shot",
    "make_loader",
    "next_click",
    "num_slots",
    "pad_to_frame",
    "read_image",
    "read_mask",
    "resize",
    "resize_to_frame",
    "resized_size",
    "sample_prompt",
    "split",
    "without_bad",
]
