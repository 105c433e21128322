"""A training run from its data sets to what validated best: shared by the experiments.

Everything runs on a mesh, of one device or of many processes' devices.  The first process writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments import segmentation as seg
from experiments.options import TrainingOptions, is_first_process
from experiments.results import MOST_SHOWN, Shown
from samjax.data import SegmentationDataset, augmentation, make_loader
from samjax.data.pipeline import Loader
from samjax.metrics import ImageScore, mean_over_classes, summarise
from samjax.peft.adapter_files import write_adapter
from samjax.training.checkpoint import CheckpointError, Checkpoints, Preemption, fingerprint
from samjax.training.features import FeatureCache
from samjax.training.log import RunLog
from samjax.training.loop import TrainingError, TrainState, fit, make_step
from samjax.training.sharding import (
    batch_parts,
    check_batch,
    place_batch,
    place_state,
    process_rows,
    replicate,
    shardings_of,
    to_host,
)
from samjax.trees import Params, count_bytes


class Preempted(Exception):
    """SIGTERM came; the run can be continued from the checkpoint that the message names."""


MakeOptimizer = Callable[[seg.Tuning, optax.Schedule], optax.GradientTransformation]
MakeLoader = Callable[..., Loader]  # with the arguments of ``samjax.data.make_loader``


class Trained(NamedTuple):
    """What a run leaves: on the host, what it keeps, the step that it is of, and the speed."""

    best: Params
    best_step: int
    images_per_second: float | None  # by the median step; None of a run of a single step
    state_bytes: int  # of the optimizer, on all devices


def make_optimizer(
    options: TrainingOptions, tuning: seg.Tuning, rank: int, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """The optimizer of the settings; ``rank`` is GaLore's."""
    return seg.make_optimizer(
        tuning,
        rate,
        weight_decay=options.weight_decay,
        clip=options.clip,
        moments=options.moments,
        rank=rank,
        update_gap=options.galore_gap,
        scale=options.galore_scale,
        projection=options.galore_projection,
        any_rank=options.galore_any_rank,
    )


def optimise(
    options: TrainingOptions,
    tuning: seg.Tuning,
    evaluator: seg.Evaluator,
    train: SegmentationDataset,
    val: SegmentationDataset | None,
    log: RunLog,
    *,
    rank: int,
    base: str,
    augment: str,
    prompts: Mapping[str, Any],
    optimizer_of: MakeOptimizer | None = None,
    loader: MakeLoader = make_loader,
) -> Trained:
    """Trains, and keeps (on disk as well) what validates best; without ``val``, the last.

    ``tuning`` lies on its mesh, and its trainable arrays are used up.  ``base`` is the fingerprint
    of the untuned model, ``prompts`` are ``make_loader``'s arguments; ``optimizer_of`` makes
    another optimizer than the settings' AdamW or GaLore, ``loader`` other batches.

    Raises ``TrainingError``, ``CheckpointError``, and ``Preempted`` after SIGTERM.
    """
    mesh = tuning.mesh
    assert mesh is not None
    batch_size = min(options.batch_size, len(train))
    check_batch(mesh, batch_size, options.accumulate)
    per_epoch = max(len(train) // batch_size, 1)
    steps = options.steps or options.epochs * per_epoch
    every = options.validate_every or max(per_epoch, -(-steps // 20))
    horizon = options.schedule_epochs
    rate = options.rate(steps if horizon is None else horizon * per_epoch)
    if optimizer_of is None:
        optimizer = make_optimizer(options, tuning, rank, rate)
    else:
        optimizer = optimizer_of(tuning, rate)
    frame = {"frame_size": tuning.config.image_size, "fit": tuning.config.fit}
    settings = {**options.fixed(), "base": base, "num_images": len(train)}
    arrays, place = tuning.objective.arrays, partial(place_batch, mesh=mesh)
    if options.cache_embeddings != "no":
        if augment != "none":
            raise ValueError(
                f"--cache-embeddings {options.cache_embeddings} needs --augment none, not "
                f"{augment}: an augmented image has another embedding"
            )
        cache = cached_features(options, tuning, train, settings)
        arrays = (*(name for name in arrays if name != "image"), "index")

        def place(batch: Any) -> Any:
            return place_batch({**batch, "features": cache[batch["index"]]}, mesh)

    state = place_state(tuning.trainable, optimizer, mesh, options.average is not None)
    for leaf in jax.tree.leaves(tuning.trainable):
        leaf.delete()  # the state has its own copy, and one is enough on a device

    with ExitStack() as stack:
        checkpoints = None
        if options.checkpoint_every != 0:
            folder = options.out / "checkpoints"
            checkpoints = stack.enter_context(Checkpoints(folder, settings, keep=options.keep))
        watch = Watch(
            options=options,
            tuning=tuning,
            evaluator=evaluator,
            val_batches=None
            if val is None
            else loader(val, batch_size=batch_size, **frame, **{**prompts, "box_jitter": 0.0}),
            every=every,
            log=log,
            checkpoints=checkpoints,
            preemption=stack.enter_context(Preemption()),
        )
        state = watch.begin(state)
        index, count = process_rows(mesh)
        batches = loader(
            train,
            batch_size=batch_size,
            seed=options.seed,
            shuffle=True,
            augment=augmentation(augment),
            num_epochs=None,
            start_step=int(state.step),
            workers=options.workers,
            process_index=index,
            process_count=count,
            **frame,
            **prompts,
        )
        step = make_step(
            partial(seg.batch_loss, tuning),
            optimizer,
            options.accumulate,
            options.galore_gap if "galore" in tuning.method else None,
            shardings_of(state),
            options.average or 0.0,
        )
        times: list[float] = []

        def record(index: int, metrics: dict[str, float]) -> None:
            times.append(time.perf_counter())
            log.add(index, {**metrics, "learning_rate": float(rate(index - 1))})

        try:
            state = fit(
                state,
                tuning.frozen,
                step,
                _with_epoch(batches, int(state.step), per_epoch),
                steps=steps,
                key=replicate(jax.random.key(options.seed), mesh),
                arrays=arrays,
                place=place,
                on_step=record,
                validate_every=0 if val is None else every,
                validate=watch.validate,
                save=None if checkpoints is None else watch.save,
                save_due=watch.save_due,
                stop=watch.stop,
                describe=partial(names_of, train),
                progress=options.progress and is_first_process(),
            )
        except TrainingError as error:
            raise TrainingError(f"{error}; {last_of(checkpoints)}") from error
        if watch.preempted:
            raise Preempted(f"SIGTERM at step {int(state.step)}; {last_of(checkpoints)}")
    if val is None:
        watch.keep(int(state.step), state.tuned)
    speed = batch_size / float(np.median(np.diff(times))) if len(times) > 1 else None
    held = count_bytes(state.optimizer)
    return Trained(watch.best, watch.best_step, speed, held)


def _with_epoch(batches: Iterable[dict], step: int, per_epoch: int) -> Iterator[dict]:
    """The batches from a step on, with the epoch of each for losses that change with it."""
    for number, batch in enumerate(batches, step):
        epoch = np.full(len(batch["valid"]), number // per_epoch, np.float32)
        yield {**batch, "epoch": epoch}


def begin(
    state: TrainState, options: TrainingOptions, checkpoints: Checkpoints | None, log: RunLog
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state to begin with, and what was saved beside it: with ``--resume``, those of the last
    checkpoint, whose history goes into the log; else the state as it is, and None.

    Raises ``CheckpointError`` if there is a run already and it is not to be resumed.
    """
    if checkpoints is None:
        return state, None
    if not options.resume:
        if checkpoints.steps:
            raise CheckpointError(
                f"{checkpoints.folder} holds a run, at step {checkpoints.steps[-1]}: continue it "
                "with --resume, or choose another --out"
            )
        return state, None
    found = checkpoints.restore(state)
    if found is None:
        print(f"no checkpoint in {checkpoints.folder} yet: starting from the beginning")
        return state, None
    restored, extra = found
    print(f"continuing after step {int(restored.step)}")
    log.restore(extra["history"])
    return restored, extra


@dataclass(kw_only=True)
class Watch:
    """What a run does besides its steps: validates, keeps the best, saves, knows when to stop."""

    options: TrainingOptions
    tuning: seg.Tuning
    evaluator: seg.Evaluator
    val_batches: Loader | None  # None: nothing is validated, the last is kept
    every: int  # steps between validations
    log: RunLog
    checkpoints: Checkpoints | None
    preemption: Preemption

    best: Params = field(default_factory=dict)  # on the host
    best_dice: float = -1.0
    best_step: int = 0
    preempted: bool = False

    def begin(self, state: TrainState) -> TrainState:
        """The state to begin with: with ``--resume``, that of the last checkpoint."""
        checkpoints = self.checkpoints
        restored, extra = begin(state, self.options, checkpoints, self.log)
        if checkpoints is None or extra is None:
            return state
        self.best_dice, self.best_step = extra["dice"], extra["step"]
        if self.best_step == int(restored.step):
            self.best = to_host(restored.tuned)
        elif self.best_step:
            self.best = to_host(checkpoints.restore_step(self.best_step, state).tuned)
        return restored

    def validate(self, index: int, tuned: Params) -> str:
        """Dice and IoU of the validation set, for the progress bar."""
        assert self.val_batches is not None
        losses: list[float] = []
        scores = self.evaluator.frame_scores(tuned, self.val_batches, losses)
        dice, iou = (mean_over_classes(summarise(v)) for v in zip(*scores, strict=True))
        if not np.isfinite(dice):
            raise TrainingError("no validation image holds any foreground: Dice is undefined")
        loss = {"val_loss": float(np.mean(losses))} if losses else {}
        self.log.add(index, {**loss, "val_dice": dice, "val_iou": iou})
        if dice > self.best_dice:
            self.best_dice = dice
            self.keep(index, tuned)
        return f"val Dice {dice:.4f} (best {self.best_dice:.4f})"

    def keep(self, index: int, tuned: Params) -> None:
        """What was tuned so far is the run's result, until there is a better one."""
        self.best_step, self.best = index, to_host(tuned)
        if is_first_process():
            path = self.options.out / "adapter.safetensors"
            write_adapter(path, self.tuning.adapter(self.best), {"step": str(index)})

    def save(self, state: TrainState) -> None:
        """A checkpoint."""
        assert self.checkpoints is not None
        best = {"dice": self.best_dice, "step": self.best_step}
        history = {"history": self.log.history}
        self.checkpoints.save(state, {**best, **history}, best_step=self.best_step)

    def save_due(self, index: int) -> bool:
        """Every so many steps, and when the best is there: a resumed run must find it."""
        return index == self.best_step or index % (self.options.checkpoint_every or self.every) == 0

    def stop(self, index: int) -> bool:
        """After SIGTERM, or too many validations without a better one."""
        self.preempted = self.preemption.requested(index)
        patience = None if self.val_batches is None else self.options.patience
        return self.preempted or bool(patience and index - self.best_step >= patience * self.every)


def cached_features(
    options: TrainingOptions,
    tuning: seg.Tuning,
    train: SegmentationDataset,
    settings: Mapping[str, Any],
) -> FeatureCache:
    """The frozen encoder's output for every training image, in memory or below ``--out``.

    One on the disk serves a run with the same ``settings``, images included, and no other.
    """
    fit = {"frame_size": tuning.config.image_size, "fit": tuning.config.fit}
    whole_everywhere = NamedSharding(tuning.mesh, PartitionSpec())
    encode = jax.jit(partial(seg.encode_frozen, tuning), out_shardings=whole_everywhere)

    def whole(batch: Mapping[str, Any]) -> Any:
        return encode(tuning.frozen, {name: batch[name] for name in ("image", "size")})

    on_disk = options.cache_embeddings == "disk"
    return FeatureCache(
        whole,
        make_loader(train, batch_size=1, cache=False, **fit),
        len(train),
        folder=options.out / f"embeddings_{jax.process_index()}" if on_disk else None,
        fingerprint=json.dumps(settings, default=str, sort_keys=True),
        progress=options.progress and is_first_process(),
    )


def last_of(checkpoints: Checkpoints | None) -> str:
    """For a message: where the run can be continued."""
    if checkpoints is None:
        return "there are no checkpoints (--checkpoint-every 0)"
    checkpoints.wait()
    if not checkpoints.steps:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {checkpoints.folder}/{checkpoints.steps[-1]}"


def names_of(dataset: SegmentationDataset, batch: Mapping[str, Any]) -> str:
    """For a message: the images of a batch."""
    return ", ".join(dataset[int(i)]["name"] for i in batch["index"])


def evaluate(
    options: TrainingOptions,
    tuning: seg.Tuning,
    evaluator: seg.Evaluator,
    trainable: Params,
    dataset: SegmentationDataset,
    modes: tuple[str, ...],
    num_points: int,
) -> tuple[dict[str, list[ImageScore]], Shown]:
    """Scores at original resolution for each prompt mode, and (example, prediction) pairs of the
    first images, by mode, for the overlays."""
    assert tuning.mesh is not None
    parts = batch_parts(tuning.mesh)
    scores, shown = {}, {}
    for mode in modes:
        batches = make_loader(
            dataset,
            frame_size=tuning.config.image_size,
            fit=tuning.config.fit,
            batch_size=-(-min(options.batch_size, len(dataset)) // parts) * parts,
            prompt_modes=mode,
            num_points=num_points,
            box_jitter=0.0,
        )
        scores[mode], shown[mode] = [], []
        for index, logits, _ in evaluator.predictions(trainable, batches):
            example = dataset[index]
            labels = seg.labels_at(logits, example["mask"].shape)
            scores[mode].append(seg.score_image(labels, example["mask"], tuning.num_classes))
            if len(shown[mode]) < MOST_SHOWN:
                shown[mode].append((example, labels))
    return scores, shown


def base_fingerprint(tuning: seg.Tuning) -> str:
    """Of the model before training."""
    return fingerprint({**tuning.trainable["params"], "frozen": tuning.frozen})
