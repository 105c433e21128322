"""SAMora's heat maps: what each expert adds to each token of a slice (arXiv 2511.08626)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import segmentation as seg
from experiments.trial import Trial
from samjax.atomic import atomic_write
from samjax.data import pad_to_frame, resize
from samjax.frame import size_in_frame
from samjax.models.hl_attention import ViTBlock
from samjax.models.ops import in_windows, normalise_pixels
from samjax.trees import Params

DRAWN = 3  # slices


def contributions(tuning: seg.Tuning, trainable: Params, frozen: Params, batch: dict) -> jax.Array:
    """What each expert adds to each token, (experts, b, gh, gw): |d_e| / |base|, mean over blocks.

    Experts from fine to coarse; of SAM's encoder.
    """
    encoder = tuning.bind(trainable, frozen).image_encoder
    x = encoder.embed_patches(normalise_pixels(tuning.config, batch["image"], batch["size"]))
    total = jnp.zeros(())
    for block in encoder.blocks:
        found = in_windows(partial(_shares, block), block.norm1(x), block.window)
        total = total + found / len(encoder.blocks)
        x = block(x)
    return jnp.moveaxis(total, -1, 0)


def _shares(block: ViTBlock, tokens: jax.Array) -> jax.Array:
    attn, qkv = block.attn, block.attn.qkv(tokens)
    base = attn.proj(attn.mix(qkv))
    length = jnp.linalg.norm(base, axis=-1)
    several = [attn.proj(attn.mix(qkv + block.experts[name](tokens))) for name in block.order]
    return jnp.stack([jnp.linalg.norm(one - base, axis=-1) / length for one in several], axis=-1)


def draw(trial: Trial, tuning: seg.Tuning, trainable: Params) -> None:
    """``heatmaps.png``: what each expert adds, on the first test slices with the most labels."""
    dataset, config = trial.tests[0].dataset, tuning.config
    places = np.unique(np.linspace(0, len(dataset) - 1, 24).round().astype(int))
    examples = [dataset[int(place)] for place in places]
    examples.sort(key=lambda example: -np.count_nonzero(example["mask"]) / example["mask"].size)
    pictures, sizes = [], []
    for example in examples[:DRAWN]:
        size = size_in_frame(example["mask"].shape, config.image_size, config.fit)
        pictures.append(pad_to_frame(resize(example["image"], size), config.image_size))
        sizes.append(size)
    batch = {"image": jnp.asarray(np.stack(pictures)), "size": jnp.asarray(sizes, jnp.int32)}
    heat = np.asarray(jax.jit(partial(contributions, tuning))(trainable, tuning.frozen, batch))
    names = config.image_encoder.fusion_order
    cell = config.image_size[0] // heat.shape[2]
    figure = Figure(figsize=(2.6 * (1 + len(names)), 2.7 * len(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), 1 + len(names), squeeze=False)
    for row, (height, width) in enumerate(sizes):
        picture = pictures[row][:height, :width]
        for column, axis in enumerate(axes[row]):
            axis.imshow(picture)
            axis.set_axis_off()
            if not column:
                axis.set_title(examples[row]["name"][-24:], fontsize=8, parse_math=False)
                continue
            shown = np.kron(heat[column - 1, row], np.ones((cell, cell)))[:height, :width]
            drawn = axis.imshow(shown, cmap="inferno", alpha=0.6, vmin=0)
            axis.set_title(f"{names[column - 1]} expert: |d| / |base|", fontsize=8)
            figure.colorbar(drawn, ax=axis, shrink=0.8)
    with atomic_write(trial.folder / "heatmaps.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)
