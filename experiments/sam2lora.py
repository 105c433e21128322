"""SAM2LoRA: low-rank factors in the encoder and the mask decoder of SAM 2.1, for fundus images.

Paper: Mandal, Karthikeyan and Paldhe, arXiv 2510.10288.  Code: sayanmndl21/SAM2LoRA.

    python -m experiments.sam2lora --data DIR --ckpt sam2.1_hiera_large.pt --out runs/sam2lora
    python -m experiments.sam2lora --smoke --out runs/smoke
    python -m experiments.sam2lora --shares

``--data`` holds the data sets in folders that are named as in the released code, or as by their
owners (``experiments.fundus_pools``).  ``--sets`` restricts training and tests to some, IDRiD
included; ``--data`` may be the folder of the only one.  Resized pictures stay in memory: 3 GB of
the vessels, 11 GB of the discs at 1024 pixels.

Published: Dice up to .86 of vessels and .93 of discs, AUC .98 and .99, "less than 5 %" of the
parameters trained.  The values are those of the best rank and set, as means over the kinds of
prompts; of the vessels it is rank 512 with 27 % of the parameters.  Below 5 % is rank 93 at most.

What is trained: factors of the whole fused qkv of every block of the encoder and of the 28
projections in the decoder's attention, 120,208 parameters a rank.  Mask token 1, the first of the
three, is trained and tested.  Where the code has another intent than its effect, the intent is what
is done here:

* Every prompt meets the features of its own image.  The released code decodes a whole batch with
  those of the batch's last image; that is not reproduced.
* Gradients are clipped once a step and as they are; there at each micro-batch, and scaled for fp16.
* Augmentation and prompts are drawn anew in each epoch; there once for the whole run.
* Points for tests lie in the object.  Where an erosion leaves nothing of it, as of thin vessels,
  the released code takes any pixel of the picture (``--density-released``).
* The prompt with a negative point has one; by the code's defaults it has none (``--released-e4``).
* SAM 2's "no memory" embedding is added as in SAM 2; the code leaves it out (``--no-mem-embed``).

Dice and Tversky are of each image, not of the whole micro-batch; cross-entropy is taken from
logits, without 1e-6 within the logarithms; the last step is kept, not the one of the lowest loss;
of what is tuned outright, only matrices decay.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments import baselines, paper
from experiments import segmentation as seg
from experiments.baselines import Build, Method
from experiments.fundus_pools import SETS, Opened, chosen_sets, first_of, joined
from experiments.objectives import Objective, valid_pixels
from experiments.paper import PaperOptions, base_model
from experiments.scoring import score_as_sam2lora
from experiments.trial import Test, Trial
from samjax.models.functional import abstract_params
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.ops import resize_bilinear
from samjax.models.sam2_config import Sam2Config, sam2
from samjax.models.weights import Config
from samjax.peft.lora import LoraConfig, init_factors
from samjax.peft.paths import FREEZE, in_order, label_by_path
from samjax.peft.presets import ADAMW
from samjax.training import schedules
from samjax.training.losses import binary_cross_entropy, binary_dice, weighted_sum
from samjax.training.region_losses import focal_tversky, iou_regression
from samjax.trees import Params, count_values

Placement = Literal["encoder", "decoder", "both"]
LOSSES = {"bce": binary_cross_entropy, "dice": binary_dice, "tversky": focal_tversky}
TERMS = (*LOSSES, "iou")
RANKS = (32, 64, 128, 256, 512, 1024)  # of the released grid
TOKEN = 1  # of the four mask tokens: upstream's channel 0 of its three
IOU_WEIGHT = 0.1
TARGETS: dict[str, tuple[tuple[str, str], ...]] = {
    "encoder": ((r"image_encoder/(?:trunk/)?blocks/\d+/attn/qkv", "all"),),
    "decoder": ((r"mask_decoder/transformer/.*attn\w*/(?:q|k|v|out)_proj", "all"),),
}
TRAINING_PROMPTS = {"prompt_modes": "points", "num_points": 5, "region": "general"}
# What neither the loss of token 1's mask nor that of its IoU reaches, when points are the prompts;
# and the random features of positions, a buffer upstream.
UNREACHED = (
    "prompt_encoder/(mask_downscaling/.*|pe_gaussian|point_embeddings/[023]/.*)"
    "|mask_decoder/(pred_obj_score_head|output_hypernetworks_mlps/[023])/.*"
    "|(memory_|mask_downsample/|pointer_|no_memory_pos_|no_object_|occluded_).*"
)
OUTRIGHT = {"full": ".*", "decoder": "mask_decoder/.*"}  # tuned without factors


@dataclass(frozen=True, kw_only=True)
class Arguments(PaperOptions):
    """SAM2LoRA, what it is compared with, and its ablations."""

    pools: tuple[str, ...] = ("vessel", "disc")
    """Trained jointly, one after the other: vessel, disc, cup."""
    sets: tuple[str, ...] = ()
    """Data sets to take of the pools, such as chasedb1, or idrid; by default all."""
    ablations: tuple[str, ...] = ("vessel", "disc")
    """Pools on which placement and losses are varied, at the first of --ranks."""
    ranks: tuple[int, ...] = (64,)
    """Ranks; the released grid is 32 64 128 256 512 1024."""
    pictures: int | None = None
    """Only the first so many of each part of each set."""
    density_released: bool = False
    """Points for tests as the released code draws them: of thin vessels, anywhere."""
    released_e4: bool = False
    """The prompt with a negative point without it, as by the released defaults."""
    no_mem_embed: Literal["add", "skip"] = "add"
    """SAM 2's embedding of no memory; the released code skips it."""
    mask_token: Literal[0, 1, 2, 3] = TOKEN
    """Whose mask is trained and tested; 0 for a base that has learned single masks only."""
    shares: bool = False
    """Print what share of SAM 2.1 large is trained at each rank, and stop."""

    image_size: int | None = 1024
    """Side of the model frame in pixels."""
    steps: int | None = 120_000
    """Optimizer steps."""
    batch_size: int = 8
    """Images per optimizer step, on all devices together."""
    accumulate: int = 4
    """Micro-batches per step."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 3e-4
    """AdamW's decoupled weight decay, on matrices."""
    schedule: schedules.Name = "restarts"
    """Cosine from the peak to zero, again and again; or cosine, poly, constant."""
    out: Path = Path("runs/sam2lora")
    """Folder of the results."""

    FREE = (*PaperOptions.FREE, "pools", "sets", "ablations", "ranks", "shares")

    def check(self) -> None:
        """Raises ``ValueError`` for settings that contradict each other or name what is not."""
        super().check()
        for option in ("pools", "ranks"):
            if not getattr(self, option):
                raise ValueError(f"--{option}: expected at least one")
        if self.pictures is not None and self.pictures < 1:
            raise ValueError(f"--pictures {self.pictures}: expected 1 or more")
        for pool in self.ablations:
            chosen_sets(pool, ())
        known = {name for pool in self.pools for name in chosen_sets(pool, self.sets)}
        if outside := [name for name in self.sets if name not in known]:
            raise ValueError(f"--sets {outside[0]}: in none of --pools {', '.join(self.pools)}")


@dataclass(frozen=True, kw_only=True)
class OneOfThree(Objective):
    """One mask by one token, with the sum of some of SAM2LoRA's losses.

    terms: of ``TERMS``, at least one that is not "iou"; another is a ``ValueError``.
    """

    terms: tuple[str, ...] = TERMS
    token: int = TOKEN

    def __post_init__(self) -> None:
        if unknown := [term for term in self.terms if term not in TERMS]:
            raise ValueError(f"loss {unknown[0]!r}: expected some of {', '.join(TERMS)}")

    def logits(self, config: Config, prediction: MaskPrediction, *, train: bool) -> jax.Array:
        """``(b, h, w)``."""
        del train  # tested is what was trained
        return resize_bilinear(prediction.low_res_logits[:, self.token], config.image_size)

    def loss(self, config: Config, prediction: MaskPrediction, batch: dict) -> jax.Array:
        """Cross-entropy + soft Dice + focal Tversky + 0.1 |predicted IoU - IoU|, ``(b,)``."""
        logits = self.logits(config, prediction, train=True)
        mask, valid = batch["mask"], valid_pixels(config, batch["size"])
        total = weighted_sum({name: (1, LOSSES[name]) for name in self.terms if name in LOSSES})
        loss = total(logits, mask, valid)
        if "iou" in self.terms:
            predicted = prediction.iou[:, self.token]
            loss += IOU_WEIGHT * iou_regression(predicted, logits, mask, valid)
        return loss


def lora_config(rank: int, placement: Placement = "both") -> LoraConfig:
    """SAM2LoRA's factors: α = 2r, dropout of 0.1 on their output, a ~ N(0, 1) / √r."""
    parts = ("encoder", "decoder") if placement == "both" else (placement,)
    return LoraConfig(
        rank=rank,
        alpha=2.0 * rank,
        dropout=0.1,
        drop_output=True,
        init="normal",
        any_rank=True,
        targets=tuple(target for part in parts for target in TARGETS[part]),
    )


def labels_of(params: Params, method: str, still: str = UNREACHED) -> Params:
    """A tree like ``params``: what ``full`` tuning or the ``decoder`` alone trains, or nothing.

    ``still``: what no method trains.
    """
    chosen = [(OUTRIGHT[method], ADAMW)] if method in OUTRIGHT else []
    rest = [] if method == "full" else [(".*", FREEZE)]
    return label_by_path(params, in_order([(still, FREEZE), *chosen, *rest]))


def prepared(options: PaperOptions, method: str, terms: tuple[str, ...], **how: Any) -> seg.Tuning:
    """The base model split for a method; ``how`` goes to ``segmentation.prepare``.

    Raises ``ValueError`` if SAM 1 is to skip the embedding of no memory, which it does not have.
    """
    assert isinstance(options, Arguments)
    config, params = base_model(options, "sam2", options.image_size or 1024)
    others = "0123".replace(str(options.mask_token), "")
    still = UNREACHED.replace("mlps/[023]", f"mlps/[{others}]")
    if options.no_mem_embed == "skip":
        if not isinstance(config, Sam2Config):
            base = options.ckpt or options.variant
            raise ValueError(f"--no-mem-embed skip is for SAM 2; {base} is SAM 1")
        params = {**params, "no_memory_embed": jnp.zeros_like(params["no_memory_embed"])}
        still += "|no_memory_embed"  # full tuning would bring it back
    return seg.prepare(
        config,
        params,
        method,
        labels=None if "lora" in how else labels_of(params, method, still),
        objective=OneOfThree(terms=terms, token=options.mask_token),
        seed=options.seed,
        **baselines.compute(options),
        **how,
    )


def with_factors(rank: int, placement: Placement = "both", terms: tuple[str, ...] = TERMS) -> Build:
    """Builds SAM2LoRA."""
    lora = lora_config(rank, placement)
    return lambda options, classes: prepared(options, "lora", terms, lora=lora)


def without_factors(method: str) -> Build:
    """Builds a base model of which the method's part is tuned, or nothing."""
    return lambda options, classes: prepared(options, method, TERMS)


def methods(ranks: Sequence[int], ablations: bool) -> list[Method]:
    """The rows of a pool's table; the first is not trained."""
    made, ranks = partial(Method, augment="sam2lora"), tuple(dict.fromkeys(ranks))
    rows = [
        made(name="zero-shot SAM 2", run="zero_shot", build=without_factors("zero-shot")),
        *(made(name=_name(r), run=f"lora_r{r}", build=with_factors(r)) for r in ranks),
        made(name="full tuning", run="full", build=without_factors("full")),
        made(name="decoder only", run="decoder", build=without_factors("decoder")),
    ]
    if not ablations:
        return rows
    rank = ranks[0]
    for placement in ("encoder", "decoder"):
        build = with_factors(rank, placement)
        row = made(name=f"{_name(rank)}, {placement}", run=f"lora_r{rank}_{placement}", build=build)
        rows.append(row)
    for terms in [c for count in (1, 2) for c in combinations(tuple(LOSSES), count)]:
        build = with_factors(rank, terms=(*terms, "iou"))
        loss = " + ".join({"bce": "BCE", "dice": "Dice", "tversky": "Tversky"}[t] for t in terms)
        run = f"lora_r{rank}_{'_'.join(terms)}"
        rows.append(made(name=f"{_name(rank)}, {loss}", run=run, build=build))
    return rows


def prompt_kinds(
    *, density_released: bool = False, released_e4: bool = False
) -> dict[str, dict[str, Any]]:
    """The seven kinds of prompts e0 to e6, by their names in the tables."""
    region = "density_released" if density_released else "density"
    points = {"prompt_modes": "points", "region": region}
    negatives = 0 if released_e4 else 1
    return {
        "none": {"prompt_modes": "none"},
        "1 point": {**points, "num_points": 1},
        "2 points": {**points, "num_points": 2},
        "5 points": {**points, "num_points": 5},
        f"5 points+{negatives} negative": {
            **points,
            "num_points": 5,
            "num_negatives": negatives,
        },
        "box": {"prompt_modes": "box", "box_rule": "sam2lora"},
        "5 points+box": {
            **points,
            "prompt_modes": "points+box",
            "num_points": 5,
            "box_rule": "sam2lora",
        },
    }


def trials(arguments: Arguments) -> list[Trial]:
    """All runs: of each pool the methods, then the placements and losses."""
    return list(_trials(arguments))


def _trials(arguments: Arguments) -> Iterator[Trial]:
    chosen = {pool: chosen_sets(pool, arguments.sets) for pool in arguments.pools}
    every = list(dict.fromkeys(name for names in chosen.values() for name in names))
    data = paper.data_folder(arguments, lambda folder: None)
    if arguments.data is None:
        _write(data, every)
    notes = _about_base(arguments)
    for pool, names in chosen.items():
        if not names:
            continue
        target = "cup" if pool == "cup" else "disc"
        opened = {SETS[n].title: SETS[n].open(data, target, alone=len(every) == 1) for n in names}
        whole = names == chosen_sets(pool, ())
        table = pool if whole else f"{pool}: {' + '.join(opened)}"
        prefix = pool if whole else "-".join((pool, *names))
        for method in methods(arguments.ranks, pool in arguments.ablations):
            yield baselines.trial(
                method,
                arguments,
                1,
                experiment="sam2lora",
                table=table,
                run=f"{prefix}_{method.run}",
                **_data(opened, arguments, trained=method.run != "zero_shot"),
                prompts=TRAINING_PROMPTS,
                settings={"sets": list(opened)},
                notes=(*notes, *(note for found in opened.values() for note in found.notes)),
            )


def _data(opened: Mapping[str, Opened], arguments: Arguments, *, trained: bool) -> dict[str, Any]:
    prompts = prompt_kinds(
        density_released=arguments.density_released, released_e4=arguments.released_e4
    )
    tests = (
        Test(
            name=title,
            dataset=first_of(found.test, arguments.pictures),
            prompts=prompts,
            scores={"": score_as_sam2lora},
            drawn="5 points",  # as in training
        )
        for title, found in opened.items()
    )
    train = {title: first_of(found.train, arguments.pictures) for title, found in opened.items()}
    return {"tests": tuple(tests), "train": joined(train) if trained else None}


def _about_base(arguments: Arguments) -> tuple[str, ...]:
    """A note wherever the base is not the paper's."""
    size = arguments.image_size or 1024
    config, params = base_model(arguments, "sam2", size)
    if config == sam2("hiera_large", image_size=(1024, 1024)):
        return ()
    family = "SAM 2" if isinstance(config, Sam2Config) else "SAM 1"
    return (
        f"base model: {family} of {count_values(params) / 1e6:.1f} M parameters at {size} pixels; "
        "the paper's is SAM 2.1 large at 1024",
    )


def _name(rank: int) -> str:
    return f"SAM2LoRA r={rank}"


def _write(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        root = folder / SETS[name].folders[0]
        if not root.exists():  # of an earlier run of some of the sets
            SETS[name].write(root)


def share_table(config: Config | None = None, ranks: Sequence[int] = RANKS) -> str:
    """Factors and their share of the base model by rank, of SAM 2.1 large by default."""
    params = abstract_params(config or sam2("hiera_large"))
    base = count_values(params)
    lines = [f"{'rank':>5}{'factors':>14}{'share':>8}  of {base:,} parameters"]
    for rank in ranks:
        count = num_factors(params, rank)
        lines.append(f"{rank:>5}{count:>14,}{count / base:>8.2%}")
    each = num_factors(params, 1)
    lines.append(f"below 5 % up to rank {(base // 20 - 1) // each}: {each:,} a rank")
    return "\n".join(lines)


def num_factors(params: Params, rank: int, placement: Placement = "both") -> int:
    """Trained parameters; ``params`` may be shapes only."""
    config = lora_config(rank, placement)
    return count_values(
        jax.eval_shape(lambda key: init_factors(params, config, key), jax.random.key(0))
    )


def smoke(arguments: Arguments) -> dict[str, Any]:
    """What ``--smoke`` changes."""
    return {
        **paper.SMOKE,
        "accumulate": 1,
        "pictures": 2,
        "ranks": (4, 64),
        "ablations": ("vessel",),
        "only": ("vessel_lora_r4", "vessel_zero_shot"),
    }


def main(argv: list[str] | None = None) -> int:
    """The command."""
    if "--shares" in (sys.argv[1:] if argv is None else argv):
        print(share_table())
        return 0
    return paper.main("sam2lora", Arguments, trials, argv, smoke)


if __name__ == "__main__":
    sys.exit(main())
