"""SAMora's first stage: two teachers learn medical slices, then three experts learn without labels.

Paper: Chen et al., arXiv 2511.08626.  Code: ShChen233/SAMora@d492a95 (``trainer.py``, ``ssl/``).
The runs are listed by ``experiments.samora``.  Each trains one thing and leaves one file:

* ``simclr``, ``mae`` (``teacher.safetensors``): continual pre-training of the official SimCLRv2
  (NT-Xent at temperature 0.1, LARS) and MAE (masked patches, AdamW .9/.95).  The paper has it, its
  code has not: epochs, batch and a tenth of the original learning rates are ours.
* ``image``, ``patch``, ``pixel`` (``expert.safetensors``): low-rank factors on q and v of every
  block of SAM's encoder and a gain for each block, all else of SAM frozen, by what the teacher
  makes of the same pictures; or by taking noise away.

Where the code cannot do what the paper says, this does what the paper says:

* Teachers there are random (nothing is ever loaded), and so is the head that takes their features
  to 256 channels.  Here the student's head, which is trained, leads to the teacher's own features.
* The patch expert's tokens there are in another order than its teacher's.  Here they are taken at
  the positions that the teacher kept.
* The denoised picture there is a standardised one, which a sigmoid cannot reach and soft Dice is
  not made for.  Here it is the clean picture, 0 to 1.
* Pictures there are standardised in this stage and not in the second.  Here in neither.
* The learning rate of the very first step there is the full one, before the warmup.  Here not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.baselines import UNIT_PIXELS, compute
from experiments.paper import PaperOptions, base_model
from experiments.pretraining import Task
from samjax.data import unlabelled as views
from samjax.models.denoiser import DenoiserConfig
from samjax.models.functional import bind, init_params
from samjax.models.layers import with_remat
from samjax.models.mae import MaeConfig, random_keep, vit_tiny
from samjax.models.ops import normalise_pixels
from samjax.models.projector import ProjectorConfig
from samjax.models.sam import SamConfig
from samjax.models.sam2_config import Sam2Config
from samjax.models.sk_resnet import SkResNetConfig
from samjax.models.weights import Config, load_tensors
from samjax.peft.adapter_files import read_adapter, write_adapter
from samjax.peft.lora import Adapter, LoraConfig, init_factors
from samjax.training import contrastive, loop, schedules
from samjax.training.checkpoint import CheckpointError, fingerprint
from samjax.training.reconstruction_losses import denoising_loss, feature_mse, mae_loss
from samjax.trees import Params, flatten, unflatten

TEACHERS = ("simclr", "mae")
EXPERTS = ("image", "patch", "pixel")
TEACHER, EXPERT = "teacher.safetensors", "expert.safetensors"
MAE_RATE, MAE_DECAY, SIMCLR_DECAY = 1.5e-4, 0.05, 1e-4  # of 256 pictures a step, as official
Base = Literal["sam", "sam2"]


@dataclass(frozen=True, kw_only=True)
class StageOne:
    """How the experts are trained."""

    epochs: int = 30
    """Passes over the unlabelled slices."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 16
    """Slices per optimizer step, on all devices together."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on matrices."""
    warmup: int = 25
    """Warmup steps."""


@dataclass(frozen=True, kw_only=True)
class Cpt:
    """Continual pre-training of the teachers."""

    use: bool = True
    """Whether there is any; without it, the experts learn from the official teachers."""
    epochs: int = 10
    """Passes over the unlabelled slices."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 256
    """Slices per optimizer step, on all devices together."""
    share: float = 0.1
    """Of the learning rates with which the teachers were trained at first."""


@dataclass(frozen=True, kw_only=True)
class StageOneOptions(PaperOptions):
    """What the first stage takes besides."""

    unlabelled: tuple[str, ...] = ("amos22", "lits", "kits19")
    """Sources of slices: amos22, lits, kits19, msd (a task of the Decathlon)."""
    simclr: str | None = None
    """SimCLRv2: TensorFlow's r50_2x_sk1/model.ckpt-250228, or a converted .safetensors."""
    mae: str | None = None
    """MAE: mae_pretrain_vit_large_full.pth (with its decoder), or a converted .safetensors."""
    teachers: Literal["paper", "small"] = "paper"
    """Sizes of teachers that start from scratch, where there is no file."""
    ckpt2: str | None = None
    """A checkpoint of SAM 2, for the runs on it."""
    cpt: Cpt = dataclasses.field(default_factory=Cpt)
    """Of the teachers."""
    stage1: StageOne = dataclasses.field(default_factory=StageOne)
    """Of the experts."""
    subtract_warmup: bool = False
    """Schedule poly: ends at zero with the last step, as in SAMora's code, whose runs have it."""

    FREE = (*PaperOptions.FREE, "ckpt2")

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate of a run of so many steps."""
        if self.schedule == "poly" and self.subtract_warmup:
            return samora_rate(self.lr, steps, self.warmup)
        return super().rate(steps)

    def folder(self, name: str) -> Path:
        """Of a run of the first stage; ``name`` without what the seed adds."""
        return self.out / (f"{name}_seed{self.seed}" if len(self.seeds) > 1 else name)


def samora_rate(peak: float, steps: int, warmup: int = 25, power: float = 0.9) -> optax.Schedule:
    """SAMora's learning rate of both stages (``trainer.py: _adjust_learning_rate``).

    With j = max(count - 1, 0), as in SAMed's: peak · (j + 1) / warmup for j < warmup, then
    peak · (1 - (j - warmup) / (steps - warmup))^power, whose length, unlike SAMed's, is without
    the warmup.
    """
    linear = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    after = optax.polynomial_schedule(peak, 0.0, power, max(steps - warmup, 1))
    rule = optax.join_schedules([linear, after], [warmup])
    return lambda count: rule(jnp.maximum(count - 1, 0))


# Teachers.


class Teacher(NamedTuple):
    """A network with its parameters, and where they are from."""

    config: Any  # SkResNetConfig or MaeConfig
    params: Params
    origin: str


def official(options: StageOneOptions, name: str) -> Teacher:
    """SimCLRv2 or MAE as ``--simclr`` or ``--mae`` names it, or from scratch.

    Raises ``ValueError`` for a file that is none of it, or whose patches are not SAM's.
    """
    file = getattr(options, name)
    size = options.image_size or 224
    if file is None:
        config = _from_scratch(options, name, size)
        return Teacher(config, init_params(config, options.seed), "scratch")
    from convert import mae, simclr

    found = (simclr if name == "simclr" else mae).load(file)
    config = dataclasses.replace(found.config, image_size=(size, size))
    if isinstance(config, MaeConfig) and config.patch_size != 16:
        raise ValueError(f"{file}: patches of {config.patch_size} pixels; expected SAM's, 16")
    origin = f"{Path(file).name} ({', '.join(found.metadata.values())})"
    return Teacher(config, jax.tree.map(jnp.asarray, found.params), origin)


def _from_scratch(options: StageOneOptions, name: str, size: int) -> Any:
    small = options.smoke or options.teachers == "small"
    if name == "mae":
        return vit_tiny((size, size)) if small else MaeConfig(image_size=(size, size))
    if not small:
        return SkResNetConfig(image_size=(size, size))
    blocks, channels = ((1,), 8) if options.smoke else ((1, 1, 1, 1), 32)
    return SkResNetConfig(
        image_size=(size, size), blocks=blocks, width_multiplier=1, channels=channels,
        sk_min_channels=8, head_layers=2, head_channels=64,
    )  # fmt: skip


def teacher_of(options: StageOneOptions, name: str) -> Teacher:
    """What an expert learns from: the teacher after continual pre-training, or without.

    Raises ``CheckpointError`` if that has not been trained, ``ValueError`` if it is random.
    """
    if options.cpt.use:
        run = f"stage1_{name}"
        file = options.folder(run) / TEACHER
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file; train the teacher first, by --only {run}, or take the "
                "official one, by --cpt.no-use"
            )
        return official(dataclasses.replace(options, **{name: str(file)}), name)
    if getattr(options, name) is None:
        raise ValueError(f"--cpt.no-use without --{name} FILE: the teacher would be random")
    return official(options, name)


def simclr(options: StageOneOptions, steps: int) -> Task:
    """Continual pre-training of SimCLRv2."""
    from convert import simclr as files

    config, params, origin = official(options, "simclr")

    def project(params: Params, images: jax.Array) -> tuple[jax.Array, Params]:
        return bind(config, params, **compute(options))(images, train=True)

    peak = options.cpt.share * contrastive.scaled_learning_rate(options.batch_size)
    rate = schedules.warmup_cosine(peak, steps, steps // 10)
    return Task(
        params,
        {},
        views.of_simclr,
        ("view1", "view2"),
        rate,
        contrastive.simclr_optimizer(rate, SIMCLR_DECAY),
        lambda optimizer, _: contrastive.make_contrastive_step(project, optimizer),
        lambda file, trained: files.save(file, config, trained, {"variant": "cpt"}),
        (f"teacher started from {origin}",),
    )


def mae(options: StageOneOptions, steps: int) -> Task:
    """Continual pre-training of the masked autoencoder."""
    from convert import mae as files

    config, params, origin = official(options, "mae")

    def loss(params: Params, frozen: Params, batch: loop.Batch, key: jax.Array) -> jax.Array:
        module = bind(config, params, **compute(options))
        prediction, mask = module.reconstruct(batch["image"], key)
        return mae_loss(prediction, module.patches(batch["image"]), mask)

    rate = schedules.warmup_cosine(
        options.cpt.share * MAE_RATE * options.batch_size / 256, steps, steps // 10
    )
    decays = jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    return Task(
        params,
        {},
        views.of_mae,
        ("image",),
        rate,
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=MAE_DECAY, mask=decays),
        _plain_step(loss),
        lambda file, trained: files.save(file, config, trained, {"variant": "cpt"}),
        (f"teacher started from {origin}",),
    )


# Experts.


def student_of(options: StageOneOptions, base: Base) -> tuple[Config, Params]:
    """SAM or SAM 2 with the pixels of the second stage; ``ValueError`` if it is the other one."""
    own = options
    if base == "sam2":  # --variant says what the checkpoint of SAM is
        own = dataclasses.replace(options, ckpt=options.ckpt2, variant=None)
    config, params = base_model(own, base, options.image_size or 224)
    if not isinstance(config, SamConfig if base == "sam" else Sam2Config):
        expected = {"sam": "SAM (v1), by --ckpt", "sam2": "SAM 2, by --ckpt2"}[base]
        raise ValueError(f"{own.ckpt}: a model of family {config.family}; expected {expected}")
    return dataclasses.replace(config, **UNIT_PIXELS), params


def with_gain(factors: Params, gain: jax.Array) -> Params:
    """Factors of an adapter of scale 1: each block's ``b`` times that block's gain."""
    flat = flatten(factors)
    return unflatten(
        {
            path: leaf * gain[_block(path)] if path.endswith("/b") else leaf
            for path, leaf in flat.items()
        }
    )


def _block(path: str) -> int:
    found = re.search(r"/blocks/(\d+)/", path)
    assert found is not None
    return int(found[1])


def encode(
    options: StageOneOptions, config: Config, params: Params, trainable: Params, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens before the neck and the image embedding, both of stride 16 (SAM 2: of its third
    stage), of the encoder with an expert beside it."""
    factors = with_gain(trainable["factors"], trainable["gain"])
    encoder = bind(config, params, adapter=factors, **compute(options)).image_encoder
    x = normalise_pixels(config, images, None)
    if isinstance(config, Sam2Config):
        stages = encoder.trunk(x)
        return stages[2], encoder.neck(stages)[2]
    x = encoder.embed_patches(x)
    for block in encoder.blocks:
        x = with_remat(block, encoder.remat)(x)
    return x, encoder.neck(x)


def expert(options: StageOneOptions, steps: int, *, name: str, rank: int, base: Base) -> Task:
    """One expert: "image", "patch" or "pixel"."""
    config, student = student_of(options, base)
    factors = init_factors(student, LoraConfig(rank=rank), jax.random.key(options.seed))
    blocks = 1 + max(_block(path) for path in flatten(factors))
    teacher = None if name == "pixel" else teacher_of(options, _TEACHER_OF[name])
    head = _head_of(options, name, config, teacher)
    trainable = {
        "factors": factors,
        "gain": jnp.ones((blocks,)),
        "head": init_params(head, options.seed),
    }
    frozen = {"student": student, "teacher": {} if teacher is None else teacher.params}
    about = {
        "expert": name,
        "rank": str(rank),
        "base": base_of(student),
        "teacher": "" if teacher is None else teacher.origin,
    }

    def loss(trainable: Params, frozen: Params, batch: loop.Batch, key: jax.Array) -> jax.Array:
        def student(images: jax.Array) -> tuple[jax.Array, jax.Array]:
            return encode(options, config, frozen["student"], trainable, images)

        def project(x: jax.Array) -> jax.Array:
            return bind(head, trainable["head"], **compute(options))(x)

        if teacher is None:
            clean = batch["image"].astype(jnp.float32) / 255
            return denoising_loss(project(student(batch["noisy"])[1]), clean)
        module = bind(teacher.config, frozen["teacher"], **compute(options))
        if name == "image":
            both = jnp.concatenate([batch["view1"], batch["view2"]])
            wanted = jax.lax.stop_gradient(module.features(both))
            found = feature_mse(project(student(both)[1]), wanted, normalise=True)
            return found.reshape(2, -1).mean(0)
        images = batch["image"]
        count = teacher.config.grid[0] * teacher.config.grid[1]
        keep, _ = random_keep(key, len(images), count, teacher.config.mask_ratio)
        wanted = jax.lax.stop_gradient(module.encode(images, keep)[:, 1:])  # no class token
        tokens = student(images)[0]
        tokens = tokens.reshape(len(images), count, -1)[jnp.arange(len(images))[:, None], keep]
        return feature_mse(project(tokens), wanted, normalise=True)

    def write(file: Path, trained: Params) -> None:
        found = Adapter(factors=trained["factors"], params={"gain": trained["gain"]})
        write_adapter(file, found, about)

    draw, arrays = _DRAWN[name]
    rate = options.rate(steps)
    notes = () if teacher is None else (f"teacher: {teacher.origin}",)
    optimizer = loop.adamw(rate, options.weight_decay, clip=None)
    return Task(trainable, frozen, draw, arrays, rate, optimizer, _plain_step(loss), write, notes)


_TEACHER_OF = {"image": "simclr", "patch": "mae"}
_DRAWN: Mapping[str, tuple[views.Draw, tuple[str, ...]]] = {
    "image": (views.of_samora, ("view1", "view2")),
    "patch": (views.plain, ("image",)),
    "pixel": (views.noisy, ("image", "noisy")),
}


def _head_of(options: StageOneOptions, name: str, config: Config, teacher: Teacher | None) -> Any:
    encoder = config.image_encoder
    hidden = 32 if options.smoke else 2048
    if teacher is None:
        widths = (16, 8, 8, 8, 8) if options.smoke else DenoiserConfig().widths
        return DenoiserConfig(features=encoder.out_channels, widths=widths)
    if name == "image":
        return ProjectorConfig(
            features_in=encoder.out_channels,
            hidden=hidden,
            features_out=teacher.config.feature_channels,
            pool=True,
        )
    width = config.image_encoder.width
    if isinstance(config, Sam2Config):
        width = config.image_encoder.stage_widths[2]
    return ProjectorConfig(features_in=width, hidden=hidden, features_out=teacher.config.width)


def read_expert(file: Path, name: str, base: str) -> tuple[Params, list[float]]:
    """Factors, and the gain of each block, of an expert of that name and base model.

    Raises ``CheckpointError`` if there is no such file, ``ValueError`` if it is another's.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no such file; train the experts first, by --only 'stage1_*', or name the "
            "folder of a run that has, by --experts"
        )
    about = load_tensors(file)[1]
    found = read_adapter(file)
    if about.get("expert") != name or set(found.params) != {"gain"}:
        raise ValueError(f"{file}: of the expert {about.get('expert')!r}; expected {name!r}")
    if about.get("base") != base:
        raise ValueError(f"{file}: trained on another base model, or at another image size")
    return found.factors, np.ravel(found.params["gain"]).tolist()


def base_of(params: Params) -> str:
    """Fingerprint of the encoder that an expert belongs to."""
    return fingerprint(params["image_encoder"])


def _plain_step(loss: loop.Loss) -> Callable[..., loop.Step]:
    return lambda optimizer, placement: loop.make_step(loss, optimizer, placement=placement)
