"""Runs in a process of its own, to be killed: a small model through loader, loop and checkpoints.

    FOLDER STEPS SECONDS_A_STEP

Prints the step after each, and at the end one line of JSON: the images of every step since the
first, over all its lives, and the bytes of the weights. Exits with 143 after SIGTERM.
"""

import hashlib
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from samjax.data import Augment, make_loader
from samjax.peft.galore import galore
from samjax.training.checkpoint import Checkpoints, Preemption
from samjax.training.loop import fit, init_state, make_step

SETTINGS = {"gap": 5}


class Noise:
    """Ten images."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        return {"image": image, "mask": (image[..., 0] > 128).astype(np.uint8), "name": str(index)}


def loss(trainable, frozen, batch, key):
    pixels = batch["image"].reshape(len(batch["image"]), -1) / 255 - 0.5
    keep = jax.random.bernoulli(key, 0.9, pixels.shape)
    hidden = jnp.tanh((pixels * keep) @ trainable["first"] + frozen)
    target = batch["mask"].reshape(len(pixels), -1)
    return ((hidden @ trainable["second"] - target) ** 2).mean(1)


def main(folder, steps, pause):
    rng = np.random.default_rng(0)
    shapes = {"first": (768, 24), "second": (24, 256)}
    trainable = {n: jnp.asarray(rng.normal(0, 0.05, s), jnp.float32) for n, s in shapes.items()}
    optimizer = galore(optax.cosine_decay_schedule(0.02, int(steps)), 4, update_gap=5)
    state = init_state(trainable, optimizer, average=True)
    seen = []
    with Checkpoints(folder, SETTINGS) as checkpoints, Preemption() as preemption:
        found = checkpoints.restore(state)
        if found is not None:
            state, extra = found
            seen = extra["seen"]
        batches = make_loader(
            Noise(),
            frame_size=(16, 16),
            batch_size=4,
            shuffle=True,
            augment=Augment.preset("strong"),
            num_epochs=None,
            start_step=int(state.step),
        )

        def watched():
            for batch in batches:
                seen.append(batch["index"].tolist())
                yield batch

        def after(step, metrics):
            print(step, flush=True)
            time.sleep(float(pause))

        state = fit(
            state,
            jnp.ones((1, 1)),
            make_step(loss, optimizer, 2, refresh_gap=5),
            watched(),
            steps=int(steps),
            key=jax.random.key(7),
            arrays=("image", "mask"),
            on_step=after,
            save=lambda state: checkpoints.save(state, {"seen": seen}),
            save_due=lambda step: step % 3 == 0,
            stop=preemption.requested,
            progress=False,
        )
    if int(state.step) < int(steps):
        return 143
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    print(json.dumps({"seen": seen, "weights": digest.hexdigest()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
