"""SAMora: SAM's encoder with three experts that learned without labels, fused for few labels.

Paper: Chen et al., arXiv 2511.08626 (ICCV 2025).  Code: ShChen233/SAMora@d492a95.

    python -m experiments.samora --data DIR --ckpt sam_vit_b_01ec64.pth \\
        --simclr r50_2x_sk1/model.ckpt-250228 --mae mae_pretrain_vit_large_full.pth
    python -m experiments.samora --smoke --out runs/smoke

``--data`` holds ``AMOS22/``, ``LiTS/`` and ``KiTS19/`` for the first stage (``--unlabelled``), and
``Synapse/``, ``LA2018/`` and ``PROMISE12/`` for the second (``experiments.sets``).  The runs of the
first stage, ``stage1_*``, are described in ``experiments.samora_stage1``; ``--only 'stage1_*'``
makes them alone, ``--experts DIR`` takes those of another ``--out``.

Published: the best Dice on Synapse, LA and PROMISE12, all of it and few scans, with 90 % fewer
epochs of fine-tuning.  Its tables could not be read by us.

What is trained in the second stage: the fusion in every block (HL-Attn, 71.0 M parameters of
ViT-B) and the mask decoder; encoder, experts, their gains and the prompt encoder stay.  The loss
and the k + 1 masks are SAMed's, those of H-SAMora H-SAM's with 0.8 Dice.  As in the code, not as in
SAMed: the learning rate reaches zero with the last step.

The released second stage cannot run: the encoder of its SAMora is never given the experts, labels
of full size meet small logits, and decoders are called that return something else.  Decoders,
losses and data are therefore SAMed's and H-SAM's, at 224 pixels, of which the splits of LA and
PROMISE12 are H-SAM's too.  SAMed and H-SAM have the epochs, size, batch and warmup of the method on
them.  The variant on SAM 2 is ours (``--ckpt2``): there is neither code nor description.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments import heat_maps, paper, pretraining, samora_stage1
from experiments import segmentation as seg
from experiments.baselines import (
    METHODS,
    SAMED,
    Method,
    TwoLevels,
    compute,
    grown,
    label_map,
    trial,
)
from experiments.objectives import LabelMap
from experiments.paper import PaperOptions
from experiments.samora_stage1 import EXPERT, EXPERTS, TEACHERS, StageOneOptions
from experiments.sets import SETS, check_names
from experiments.trial import Trial
from samjax.data import few_shot
from samjax.data.opening import class_names_of
from samjax.models import hl_attention as hl
from samjax.models.hsam import HSamConfig
from samjax.peft.paths import FREEZE, in_order, label_by_path
from samjax.peft.presets import ADAMW, MASK_HEAD, STILL, UNREACHED
from samjax.trees import Params, flatten

On = Literal["sam", "hsam", "sam2"]
TABLES = {"la2018": "LA 4 scans", "promise12": "PROMISE12 3 scans"}  # beside the sets' own titles
OWN = {**SAMED, "warmup": 25, "subtract_warmup": True}
OF_HSAM: dict[str, Any] = {"lr": 2.5e-3, "epochs": 30}


@dataclass(frozen=True, kw_only=True)
class Arguments(StageOneOptions):
    """SAMora, its two stages, and what it is compared with.

    The first stage knows no micro-batches, averages, moments of 8 bits or clipping, whatever the
    second one has.
    """

    sets: tuple[str, ...] = ("synapse", "la2018", "promise12")
    """Labelled data sets: synapse, la2018, promise12, msd (a task of the Decathlon)."""
    few: tuple[str, ...] = ("synapse",)
    """Of these, a tenth of the slices as well: 221 of Synapse."""
    ablations: tuple[str, ...] = ("synapse",)
    """Data sets for the ablations of experts, fusion, rank and the first stage."""
    ranks: tuple[int, ...] = (2, 8, 16)
    """Ranks of the experts beside 4."""
    experts: Path | None = None
    """The --out of another run, whose first stage is taken."""

    image_size: int | None = 224
    """Side of the model frame in pixels."""
    epochs: int = 20
    """Passes over the labelled slices."""
    batch_size: int = 32
    """Slices per optimizer step, on all devices together."""
    seeds: tuple[int, ...] = (1234,)
    """Each run, of both stages, is made once for each of them."""
    out: Path = Path("runs/samora")
    """Folder of the results."""

    FREE = (*StageOneOptions.FREE, "sets", "few", "ablations", "ranks", "experts")


def samora(
    name: str = "SAMora",
    run: str = "samora",
    *,
    on: On = "sam",
    experts: tuple[str, ...] = EXPERTS,
    fusion: Literal["hl_attn", "sum"] = "hl_attn",
    rank: int = 4,
    untrained: bool = False,
    **settings: Any,
) -> Method:
    """The method, by default all of it; ``untrained``: with experts as they are before stage 1."""

    def build(options: PaperOptions, classes: int) -> seg.Tuning:
        assert isinstance(options, Arguments)
        fields: dict[str, Any] = {"experts": experts, "fusion": fusion, "expert_rank": rank}
        return prepared(options, classes, on, fields, untrained=untrained)

    return Method(
        name=name,
        run=run,
        build=build,
        settings={**OWN, **settings},
        augment="hsam" if on == "hsam" else "samed",
    )


def prepared(
    options: Arguments, classes: int, on: On, fields: Mapping[str, Any], *, untrained: bool = False
) -> seg.Tuning:
    """The model of the second stage; ``fields`` are those of ``hl_attention.ExpertFields``.

    Raises ``ValueError`` if the experts are not there or belong to another model.
    """
    base = "sam2" if on == "sam2" else "sam"
    config, params = samora_stage1.student_of(options, base)
    own = config_of(dataclasses.replace(config, num_multimask=classes), on, fields)
    tree = grown(own, params, options.seed)
    if not untrained:
        fingerprint = samora_stage1.base_of(params)
        rank = own.image_encoder.expert_rank
        source = dataclasses.replace(options, out=options.experts or options.out)
        found = {
            name: samora_stage1.read_expert(
                source.folder(expert_run(name, rank, base)) / EXPERT, name, fingerprint
            )
            for name in own.image_encoder.experts
        }
        tree = hl.install_experts(
            tree,
            {name: factors for name, (factors, _) in found.items()},
            {name: gains for name, (_, gains) in found.items()},
        )
    return seg.prepare(
        own,
        tree,
        "samora",
        labels=labels_of(tree),
        objective=label_map(options, classes, TwoLevels if on == "hsam" else LabelMap),
        prompts=(),
        seed=options.seed,
        **compute(options),
    )


def config_of(config: Any, on: On, fields: Mapping[str, Any]) -> Any:
    """SAM, H-SAM or SAM 2 with experts, from the config of SAM or SAM 2."""
    kind, encoder = {
        "sam": (hl.SamoraConfig, hl.SamoraViTConfig),
        "hsam": (HSamConfig, hl.SamoraViTConfig),
        "sam2": (hl.SamoraSam2Config, hl.SamoraHieraConfig),
    }[on]
    own = encoder(**{**vars(config.image_encoder), **fields})
    return kind(**{**vars(config), "image_encoder": own})


def labels_of(params: Params) -> Params:
    """What the second stage trains: fusion and mask decoders, all of it whose masks are used."""
    rules = [
        ("mask_decoder/iou_prediction_head/.*", STILL),
        (MASK_HEAD, ADAMW),
        (UNREACHED, FREEZE),
        ("mask_decoder2?/.*", ADAMW),
        (r"image_encoder/(trunk/)?blocks/\d+/fusion/.*", ADAMW),
        (".*", FREEZE),
    ]
    if not any("/fusion/" in path for path in flatten(params)):  # the sum has no parameters
        del rules[-2]
    return label_by_path(params, in_order(rules))


def expert_run(name: str, rank: int, base: str) -> str:
    """The run of the first stage that makes an expert."""
    on, of_rank = "sam2_" if base == "sam2" else "", "" if rank == 4 else f"_r{rank}"
    return f"stage1_{on}{name}{of_rank}"


def ablations(ranks: tuple[int, ...]) -> list[Method]:
    """One expert, two, their sum, other ranks, and no first stage."""
    some = [
        samora(f"SAMora, {' + '.join(names)}", f"samora_{'_'.join(names)}", experts=names)
        for count in (1, 2)
        for names in itertools.combinations(hl.EXPERTS, count)
    ]
    by_rank = [samora(f"SAMora r={rank}", f"samora_r{rank}", rank=rank) for rank in ranks]
    return [
        *some,
        samora("SAMora, sum", "samora_sum", fusion="sum"),
        *by_rank,
        samora("SAMora, no stage 1", "samora_untrained", untrained=True),
    ]


def baselines() -> list[Method]:
    """SAMed and H-SAM with the budget of SAMora and H-SAMora."""
    samed, hsam = METHODS["samed"], METHODS["hsam"]
    note = "epochs, size, batch and warmup as {}'s, not as published"
    return [
        dataclasses.replace(
            samed, settings={**samed.settings, "warmup": 25}, notes=(note.format("SAMora"),)
        ),
        dataclasses.replace(
            hsam,
            settings={**hsam.settings, **OF_HSAM, "warmup": 25},
            notes=(note.format("H-SAMora"),),
        ),
    ]


def trials(arguments: Arguments) -> list[Trial]:
    """All runs: teachers, experts, methods by data set, ablations."""
    return list(_trials(arguments))


def _trials(arguments: Arguments) -> Iterator[Trial]:
    sources = pretraining.chosen(arguments.unlabelled)
    check_names(arguments, "sets", "few", "ablations")
    data = paper.data_folder(arguments, lambda folder: _write(folder, arguments))
    on_sam2 = arguments.ckpt2 is not None or arguments.smoke
    if arguments.experts is None:
        yield from _stage_one(arguments, sources, data, on_sam2)
    for name in arguments.sets:
        train, test = SETS[name].open(data)
        classes = len(class_names_of(test.dataset) or ("foreground",))
        hsamora = samora("H-SAMora", "hsamora", on="hsam", **OF_HSAM)
        parts = [(TABLES.get(name, SETS[name].title), "", train)]
        if name in arguments.few:
            few = few_shot(train, max(len(train) // 10, 2), arguments.seed)
            parts.append((f"{SETS[name].title} 10 %", "few_", few))
        for table, prefix, part in parts:
            methods = [samora(), hsamora, *baselines()]
            if name in arguments.ablations and not prefix:
                methods += ablations(arguments.ranks)
                methods += [samora("SAMora on SAM 2", "samora_sam2", on="sam2")] * on_sam2
            if prefix:
                methods.append(samora("SAMora, no stage 1", "samora_untrained", untrained=True))
            for method in methods:
                yield trial(
                    method,
                    arguments,
                    classes,
                    experiment="samora",
                    table=table,
                    run=f"{name}_{prefix}{method.run}",
                    train=part,
                    tests=(test,),
                    draw=heat_maps.draw if method.run == "samora" else None,
                )


def _stage_one(
    arguments: Arguments, sources: Mapping[str, pretraining.Source], data: Path, on_sam2: bool
) -> Iterator[Trial]:
    def run(name: str, row: str, result: str, options: Arguments, task: Any) -> Trial:
        return Trial(
            experiment="samora",
            table="stage 1",
            method=row,
            run=name,
            options=options,
            build=_no_tuning,
            tests=(),
            smoke=arguments.smoke,
            instead=partial(
                pretraining.run,
                sources=sources,
                data=data,
                side=arguments.image_size or 224,
                store=arguments.out / "slices",
                result=result,
                task_of=partial(task, options),
            ),
        )

    def settings(part: Any) -> dict[str, Any]:
        own = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        return {k: v for k, v in own.items() if k not in ("use", "share")}

    if arguments.cpt.use:
        options = dataclasses.replace(arguments, **settings(arguments.cpt))
        for name in TEACHERS:
            task = getattr(samora_stage1, name)
            row = {"simclr": "teacher SimCLRv2", "mae": "teacher MAE"}[name]
            yield run(f"stage1_{name}", row, samora_stage1.TEACHER, options, task)
    own = {**settings(arguments.stage1), "schedule": "poly", "subtract_warmup": True}
    options = dataclasses.replace(arguments, **own)
    wanted = [("sam", 4)]
    if set(arguments.ablations) & set(arguments.sets):  # else nobody asks for the others
        wanted += [("sam", rank) for rank in dict.fromkeys(arguments.ranks) if rank != 4]
        wanted += [("sam2", 4)] * on_sam2
    for base, rank in wanted:
        for name in EXPERTS:
            task = partial(samora_stage1.expert, name=name, rank=rank, base=base)
            row = f"{name} expert r={rank}" + (" on SAM 2" if base == "sam2" else "")
            yield run(expert_run(name, rank, base), row, EXPERT, options, task)


def _no_tuning() -> seg.Tuning:
    raise ValueError("the first stage tunes nothing")


def _write(folder: Path, arguments: Arguments) -> None:
    small: dict[str, Any] = {"shape": (40, 32, 3)}
    for source in pretraining.chosen(arguments.unlabelled).values():
        source.write(folder / source.folder, **small)
    for name in arguments.sets:
        SETS[name].write(folder / SETS[name].folder, **small)


def smoke(arguments: Arguments) -> dict[str, Any]:
    """What ``--smoke`` changes."""

    def short(name: str) -> Any:
        own = [k for k in ("steps", "batch_size") if f"{name}.{k}" not in arguments.given()]
        return dataclasses.replace(getattr(arguments, name), **dict.fromkeys(own, 2))

    first = [f"stage1_{name}" for name in (*TEACHERS, *EXPERTS)]
    only = (*first, "synapse_samora", "synapse_samed")
    stages = {"stage1": short("stage1"), "cpt": short("cpt")}
    return {**paper.SMOKE, "ranks": (8,), "only": only, **stages}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return paper.main("samora", Arguments, trials, argv, smoke)


if __name__ == "__main__":
    sys.exit(main())
