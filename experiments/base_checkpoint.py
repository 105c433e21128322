"""Train the small base checkpoint that the demo and the smoke runs start from.

    python -m experiments.base_checkpoint --out experiments/assets/sam_vit_xs_phantom.pth

A ``vit_xs`` from scratch on phantoms of four looks (``samjax.data.phantom``); the look
``angiogram`` is kept out, so that a demo has something to adapt to.  Half of each batch asks for
the optic disc with no prompt, a point or a box, the other half for disc, cup or vessels with a
point or a box.  The loss is SAM's in outline (arXiv 2304.02643, appendix A): the single mask, the
best of the three others, and the predicted IoU of all.  The file has Meta's layout and loads into
upstream's classes with ``strict=True``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.objectives import ARRAYS, valid_pixels
from samjax.atomic import write_json
from samjax.data import Augment, make_loader
from samjax.data.phantom import LOOKS, make_phantom, target_mask
from samjax.metrics import score_image, summarise
from samjax.models.functional import bind, init_params
from samjax.models.ops import resize_bilinear
from samjax.models.sam import SamConfig, vit_xs
from samjax.training.log import RunLog
from samjax.training.loop import adamw, fit, init_state, make_step
from samjax.training.losses import segmentation_loss
from samjax.training.schedules import warmup_cosine
from samjax.trees import Params

HELD_OUT = "angiogram"  # the look that the base never sees
TARGETS: tuple[Literal["disc", "cup", "vessel"], ...] = ("disc", "cup", "vessel")
VALIDATION_SEED = 1_000_000  # phantoms of other seeds than the training ones
VALIDATION = 24  # phantoms


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train the small base checkpoint on phantoms."""

    out: Path = Path("experiments/assets/sam_vit_xs_phantom.pth")
    """The PyTorch file to write."""
    steps: int = 1600
    """Optimizer steps."""
    phantoms: int = 360
    """Different training phantoms; augmentation does the rest."""
    batch_size: int = 8
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of everything random."""


class Phantoms:
    """Phantoms drawn once and kept; example i shows look i mod n and one of ``targets``."""

    def __init__(self, count: int, seed: int, size: tuple[int, int], targets=TARGETS):
        looks = [look for look in LOOKS if look != HELD_OUT]
        self._drawn = [make_phantom(seed + i, looks[i % len(looks)], size) for i in range(count)]
        self._targets = targets

    def __len__(self) -> int:
        return len(self._drawn) * len(self._targets)

    def __getitem__(self, index: int, /) -> dict:
        drawn = self._drawn[index // len(self._targets)]
        target = self._targets[index % len(self._targets)]
        mask = (target_mask(drawn["mask"], target) > 0).astype(np.uint8)
        return {"image": drawn["image"], "mask": mask, "name": f"phantom {index} ({target})"}

    def only(self, target: Literal["disc", "cup", "vessel"]) -> Phantoms:
        """The same pictures with one target."""
        view = object.__new__(Phantoms)
        view._drawn, view._targets = self._drawn, (target,)
        return view


def loss(config: SamConfig, params: Params, batch: dict) -> jax.Array:
    """Single mask + best other mask + squared error of the predicted IoU; ``(b,)``."""
    prediction = bind(config, params)(
        batch["image"], batch["size"], batch["coords"], batch["labels"]
    )
    logits = resize_bilinear(prediction.low_res_logits, config.image_size)  # b m h w
    valid = valid_pixels(config, batch["size"])
    each = jax.vmap(lambda z: segmentation_loss(z, batch["mask"], valid, 0.5), 1, 1)(logits)  # b m
    truth = (batch["mask"] > 0)[:, None]
    predicted = (logits > 0) & valid[:, None]
    union = (predicted | truth).sum((2, 3))
    iou = (predicted & truth).sum((2, 3)) / jnp.maximum(union, 1)
    iou_error = ((prediction.iou - iou) ** 2).mean(1)
    return each[:, 0] + each[:, 1:].min(1) + iou_error


def paired(first: Iterator[dict], second: Iterator[dict]) -> Iterator[dict]:
    """Batches of two loaders, one below the other; prompts are padded to the same length."""
    for a, b in zip(first, second, strict=True):
        slots = max(a["labels"].shape[1], b["labels"].shape[1])
        a, b = _with_slots(a, slots), _with_slots(b, slots)
        yield {name: np.concatenate([a[name], b[name]]) for name in a}


def _with_slots(batch: dict, slots: int) -> dict:
    missing = slots - batch["labels"].shape[1]
    coords = np.pad(batch["coords"], ((0, 0), (0, missing), (0, 0)))
    labels = np.pad(batch["labels"], ((0, 0), (0, missing)), constant_values=-2)
    return {**batch, "coords": coords, "labels": labels}


def run(arguments: Arguments) -> dict[str, float]:
    """Trains, writes the checkpoint and, beside it, its Dice on unseen phantoms as JSON."""
    from convert import sam, torch_io

    started = time.perf_counter()
    config = vit_xs()
    train = Phantoms(arguments.phantoms, arguments.seed, config.image_size)
    val = Phantoms(VALIDATION, VALIDATION_SEED, config.image_size)
    options = {
        "frame_size": config.image_size,
        "batch_size": arguments.batch_size // 2,
        "shuffle": True,
        "augment": Augment.preset("strong"),
        "num_epochs": None,
        "num_points": 2,
    }
    disc = make_loader(
        train.only("disc"), seed=arguments.seed, prompt_modes=("none", "points", "box"), **options
    )
    anything = make_loader(
        train, seed=arguments.seed + 1, prompt_modes=("points", "box"), **options
    )
    schedule = warmup_cosine(arguments.lr, arguments.steps, 100)
    optimizer = adamw(schedule, 0.05)
    step = make_step(lambda params, _, batch, __: loss(config, params, batch), optimizer)

    log_folder = arguments.out.parent / f"{arguments.out.stem}_log"
    with RunLog(log_folder) as log:

        def validate(index: int, params: Params) -> str:
            found = score(config, params, val)
            log.add(index, found)
            return str(found["disc, none"])

        state = fit(
            init_state(init_params(config, arguments.seed), optimizer),
            None,
            step,
            paired(iter(disc), iter(anything)),
            steps=arguments.steps,
            key=jax.random.key(arguments.seed),
            arrays=ARRAYS,
            validate_every=200,
            validate=validate,
        )
    # Half precision on disk halves the file; what is scored is what is stored.
    stored = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), state.trainable)
    dice = score(config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stored), val)
    half = {name: leaf.astype(np.float16) for name, leaf in sam.to_torch(stored).items()}
    torch_io.write_torch(arguments.out, half)
    report = {
        "steps": arguments.steps,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "looks": [look for look in LOOKS if look != HELD_OUT],
        "dice_on_unseen_phantoms": dice,
    }
    write_json(arguments.out.with_suffix(".json"), report)
    return dice


def score(config: SamConfig, params: Params, phantoms: Phantoms) -> dict[str, float]:
    """Mean Dice of the single mask, by target and prompt mode."""
    predict = jax.jit(lambda params, batch: _single_mask(config, params, batch))
    found = {}
    for target, mode in [("disc", "none")] + [(t, m) for t in TARGETS for m in ("points", "box")]:
        loader = make_loader(
            phantoms.only(target),
            frame_size=config.image_size,
            batch_size=8,
            prompt_modes=mode,
            num_points=2,
            box_jitter=0.0,
        )
        dice = []
        for batch in loader:
            masks = np.asarray(predict(params, {name: batch[name] for name in ARRAYS}))
            dice += [score_image(m, t).dice for m, t in zip(masks, batch["mask"], strict=True)]
        found[f"{target}, {mode}"] = round(summarise(dice)[0].mean, 4)
    return found


def _single_mask(config: SamConfig, params: Params, batch: dict) -> jax.Array:
    module = bind(config, params)
    prediction = module(batch["image"], batch["size"], batch["coords"], batch["labels"])
    return resize_bilinear(prediction.low_res_logits[:, 0], config.image_size) > 0


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.base_checkpoint")
    for name, dice in run(arguments).items():
        print(f"{name:<16} Dice {dice:.4f}")
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
