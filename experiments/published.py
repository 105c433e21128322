"""What the papers, their released code and pages about them say, as data for the report.

Every value has its source, and a note where it is not what it seems. Where a number was looked for
and not found there is an entry with the value None and the reason: of SAM2LoRA, MedSAGa and SAMora
only abstracts, repositories and notes of readers were within reach, not the tables of the papers.

An entry answers a run by its names: experiment, table, method, data set, prompt. Those of the
experiment `BASELINES` answer runs of every experiment whose table has the same name. The entries
of the table `SUMMARY` are about many runs at once, and are listed instead of compared.

Scores are 0..1 and never per cent, losses and HD95 (voxels) as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BASELINES = "baselines"
SUMMARY = "summary"
MEAN = "mean"  # the label of a mean over classes, and of the only class
MEAN_OF_PROMPTS = "mean of prompts"
# The table of the disc task averages to the chart's bars over these six, not over the seven modes
# of the released script, whose fifth repeats the fourth.
PROMPTS = ("none", "1 point", "2 points", "5 points", "box", "5 points+box")
# Of a training, instead of a score: the key of the history, and what the label picks from it.
HISTORY = ("loss", "val_loss")
PICKS = ("first", "lowest", "highest", "last")

VESSELS = ("CHASEDB1", "DRIVE", "FIVES", "HRF", "STARE")
DISCS = ("DRISHTI-GS", "G1020", "GRAPE", "ORIGA", "PAPILA", "REFUGE2")
# Data sets as scored by the rule of SAMed's code (`convention="samed"` of samjax.metrics), which
# all that build on it use; a score by another rule does not answer a number by this one.
SYNAPSE, BRATS, LEFT_ATRIUM, PROSTATE = (
    f"{name} (SAMed's rule)" for name in ("Synapse", "BraTS 2020", "LA", "PROMISE12")
)
ORGANS = (
    *("aorta", "gallbladder", "left kidney", "right kidney"),
    *("liver", "pancreas", "spleen", "stomach"),
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published value, or that it could not be found."""

    experiment: str
    table: str
    method: str
    data_set: str
    prompt: str
    metric: str  # of samjax.metrics, of `HISTORY`, or of a summary
    label: str  # a class's name, `MEAN`, or for a history one of `PICKS`
    value: float | None
    source: str
    note: str = ""

    @property
    def cited(self) -> str:
        """Source and note."""
        return f"{self.source}: {self.note}" if self.note else self.source


def _row(
    experiment: str,
    table: str,
    method: str,
    values: Mapping[str, float | None],
    source: str,
    note: str = "",
    *,
    prompt: str = "none",
    metric: str = "dice",
) -> list[Published]:
    """One value for each data set, of the only class or the mean over classes."""
    return [
        Published(
            experiment=experiment,
            table=table,
            method=method,
            data_set=data_set,
            prompt=prompt,
            metric=metric,
            label=MEAN,
            value=value,
            source=source,
            note=note,
        )
        for data_set, value in values.items()
    ]


def _organs(method: str, dice: Sequence[float], source: str, note: str = "") -> list[Published]:
    """Dice by organ of a baseline on Synapse."""
    return [
        Published(
            experiment=BASELINES,
            table="Synapse",
            method=method,
            data_set=SYNAPSE,
            prompt="none",
            metric="dice",
            label=label,
            value=value,
            source=source,
            note=note,
        )
        for label, value in zip(ORGANS, dice, strict=True)
    ]


def _summary(
    experiment: str,
    method: str,
    data_set: str,
    values: Mapping[str, float | None],
    source: str,
    note: str = "",
) -> list[Published]:
    """Values by metric, of many runs at once."""
    return [
        entry
        for metric, value in values.items()
        for entry in _row(
            experiment,
            SUMMARY,
            method,
            {data_set: value},
            source,
            note,
            prompt="all",
            metric=metric,
        )
    ]


_NOTEBOOK = "results.ipynb of sayanmndl21/SAM2LoRA@4dd3cde"
_CHART = "read off a chart, ±.01; mean over the prompts"
_ZERO_SHOT = "zero-shot SAM 2"
_S2L_ABSTRACT = "abstract of arXiv 2510.10288"


def _bars(
    table: str, data_sets: Sequence[str], method: str, values: Sequence[float]
) -> list[Published]:
    row = dict(zip(data_sets, values, strict=True))
    return _row("sam2lora", table, method, row, _NOTEBOOK, _CHART, prompt=MEAN_OF_PROMPTS)


def _cells(
    table: str, method: str, data_set: str, dice: Sequence[float], prompts: Sequence[str] = PROMPTS
) -> list[Published]:
    return [
        entry
        for prompt, value in zip(prompts, dice, strict=True)
        for entry in _row("sam2lora", table, method, {data_set: value}, _NOTEBOOK, prompt=prompt)
    ]


def _grid(data_sets: str, values: Mapping[str, float]) -> list[Published]:
    note = "over the means of a rank and a data set, each over the prompts"
    return _summary("sam2lora", "SAM2LoRA, 6 ranks", data_sets, values, _NOTEBOOK, note)


SAM2LORA = (
    *_bars("vessel", VESSELS, _ZERO_SHOT, (0.13, 0.12, 0.11, 0.05, 0.15)),
    *_bars("vessel", VESSELS, "SAM2LoRA r=32", (0.73, 0.78, 0.80, 0.48, 0.74)),
    *_bars("vessel", VESSELS, "SAM2LoRA r=64", (0.82, 0.76, 0.83, 0.45, 0.80)),
    *_bars("vessel", VESSELS, "SAM2LoRA r=128", (0.70, 0.67, 0.72, 0.41, 0.62)),
    *_bars("vessel", VESSELS, "SAM2LoRA r=256", (0.73, 0.70, 0.76, 0.57, 0.74)),
    *_bars("vessel", VESSELS, "SAM2LoRA r=512", (0.825, 0.795, 0.856, 0.62, 0.77)),
    *_bars("vessel", VESSELS, "SAM2LoRA r=1024", (0.74, 0.80, 0.84, 0.53, 0.79)),
    *_bars("disc", DISCS, _ZERO_SHOT, (0.70, 0.54, 0.32, 0.65, 0.59, 0.585)),
    *_bars("disc", DISCS, "SAM2LoRA r=64", (0.915, 0.84, 0.77, 0.875, 0.89, 0.885)),
    *_bars("disc", DISCS, "SAM2LoRA r=1024", (0.88, 0.89, 0.81, 0.905, 0.845, 0.93)),
    *_cells("vessel", _ZERO_SHOT, "CHASEDB1", (0.086, 0.130, 0.148, 0.117, 0.160), PROMPTS[:5]),
    *_cells("vessel", "SAM2LoRA r=1024", "STARE", (0.778, 0.781, 0.770, 0.801, 0.800), PROMPTS[1:]),
    *_row(
        *("sam2lora", "vessel", "SAM2LoRA r=1024", {"STARE": 0.961}),
        _NOTEBOOK,
        "about; given behind the last cell of the row, perhaps for all of it",
        prompt="5 points+box",
        metric="auc",
    ),
    *_cells("disc", "SAM2LoRA r=64", "DRISHTI-GS", (0.833, 0.872, 0.911, 0.950, 0.968, 0.950)),
    *_cells("disc", "SAM2LoRA r=64", "G1020", (0.393, 0.903, 0.931, 0.941, 0.937, 0.933)),
    *_cells("disc", "SAM2LoRA r=64", "GRAPE", (0.698, 0.443, 0.698, 0.920, 0.945, 0.930)),
    *_cells("disc", "SAM2LoRA r=64", "ORIGA", (0.682, 0.904, 0.907, 0.920, 0.922, 0.921)),
    *_cells("disc", "SAM2LoRA r=64", "PAPILA", (0.750, 0.853, 0.893, 0.958, 0.954, 0.941)),
    *_cells("disc", "SAM2LoRA r=64", "REFUGE2", (0.581, 0.939, 0.943, 0.953, 0.954, 0.944)),
    *_summary(
        *("sam2lora", "SAM2LoRA", "vessels, the best of 11 data sets"),
        {"dice": 0.86, "auc": 0.98},
        _S2L_ABSTRACT,
        "the notebook's highest mean of a rank and a data set over prompts; the Dice is that of "
        "FIVES at r=512, where 27.4 % of the parameters are trained",
    ),
    *_summary(
        *("sam2lora", "SAM2LoRA", "discs, the best of 11 data sets"),
        {"dice": 0.93, "auc": 0.99},
        _S2L_ABSTRACT,
        "the notebook's highest mean of a rank and a data set over prompts; the Dice is that of "
        "REFUGE2 at r=1024, where 54.9 % of the parameters are trained",
    ),
    *_summary(
        *("sam2lora", "SAM2LoRA", "all"),
        {"trainable share, less than": 0.05},
        _S2L_ABSTRACT,
        "holds for r=32 and r=64 of the released grid only",
    ),
    *_grid(
        "vessels, 5 data sets",
        {"mean dice": 0.712, "median dice": 0.742, "highest dice": 0.8565}
        | {"mean auc": 0.941, "highest auc": 0.9843, "mean iou": 0.596, "highest iou": 0.766},
    ),
    *_grid(
        "discs, 6 data sets",
        {"mean dice": 0.8626, "median dice": 0.877, "highest dice": 0.9307}
        | {"mean auc": 0.992, "highest auc": 0.9982, "highest iou": 0.8737},
    ),
    *_grid(
        "cups, 6 data sets",
        {"mean dice": 0.7489, "highest dice": 0.8379, "mean auc": 0.982, "highest auc": 0.9935},
    ),
    *_summary(
        *("sam2lora", "SAM2LoRA", "all"),
        {"dice of the ablations of placement and losses": None},
        _S2L_ABSTRACT,
        "not found: the abstract names the ablations, the paper's tables could not be read",
    ),
)

_SAMED = "README of hitachinsk/SAMed@e351840; HD95 in voxels"
_DAE = "test log of mindflow-institue/DAEFormer@9460d3a; HD95 in voxels"
_NO_TABLES = "not found: the paper's tables could not be read"
_FEW = {"Synapse 10 %": SYNAPSE, "LA 4 scans": LEFT_ATRIUM, "PROMISE12 3 scans": PROSTATE}


def _synapse(method: str, dice: float, hd95: float, source: str) -> list[Published]:
    entries = _row(BASELINES, "Synapse", method, {SYNAPSE: dice}, source)
    return entries + _row(BASELINES, "Synapse", method, {SYNAPSE: hd95}, source, metric="hd95")


_OF_SAMED = (0.8777, 0.6911, 0.8045, 0.7995, 0.9480, 0.7217, 0.8872, 0.8206)
_OF_SAMED_H = (0.8781, 0.7472, 0.8576, 0.8152, 0.9576, 0.7063, 0.9046, 0.8777)
_OF_DAE = (0.881, 0.714, 0.861, 0.818, 0.946, 0.666, 0.911, 0.816)

OF_BASELINES = (
    *_synapse("SAMed", 0.8188, 20.64, _SAMED),
    *_organs("SAMed", _OF_SAMED, _SAMED),
    *_synapse("SAMed_h", 0.8430, 16.02, _SAMED),
    *_organs("SAMed_h", _OF_SAMED_H, _SAMED),
    *_synapse("SAMed_s", 0.7778, 31.72, _SAMED),
    *_row(
        *(BASELINES, "Synapse", "H-SAM", {SYNAPSE: 0.8649}),
        "wizwand.com/paper/68fa72b6",
        "ViT-L at 224 pixels",
    ),
    *_synapse("DAE-Former", 0.8266, 26.79, _DAE),
    *_organs(
        *("DAE-Former", _OF_DAE, _DAE),
        "the log has no names; the order is most likely TransUNet's, which is taken here",
    ),
    *(
        entry
        for table, data_set in _FEW.items()
        for entry in _row(
            *(BASELINES, table, "H-SAM", {data_set: None}, "arXiv 2403.18271"),
            "not found: few-shot values are not in the repository",
        )
    ),
    *_summary(
        *(BASELINES, "H-SAM", "Synapse 10 %", {"dice above other prompt-free SAMs": 0.0478}),
        "abstract of arXiv 2403.18271",
    ),
)

_S1 = "abstract and figures of arXiv 2407.15042"
_WANDB = "logs in Annie2603/MedSAGa, "
_MEDSAGA = {"Synapse": SYNAPSE, "BraTS 2020": BRATS, "ChestX-ray8": "ChestX-ray8"}

MEDSAGA = (
    *(
        entry
        for table, data_set in _MEDSAGA.items()
        for entry in _row("medsaga", table, "MedSAGa r=4", {data_set: None}, _S1, _NO_TABLES)
    ),
    *_summary(
        *("medsaga", "MedSAGa", "mean of 4 data sets", {"GPU memory saved": 0.66}),
        _S1,
        "against the state of the art, which is not named; the released code cannot show what "
        "saves it: GaLore is off in all logged runs, and at its last commit the encoder is frozen",
    ),
    *_summary(
        *("medsaga", "MedSAGa", "ChestX-ray8", {"images at which Dice levels off, about": 500}),
        _S1,
        "of Fig. 2",
    ),
    *_summary(
        *("medsaga", "MedSAGa as released", "BraTS 2020"),
        {
            "GiB on the first GPU": 12.26,
            "GiB on the second GPU": 7.32,
            "GiB on the third GPU": 7.33,
        },
        _WANDB + "run a32l0uvj at 9240b4e",
        "240², 12 images a GPU, plain AdamW on the encoder's blocks, decoder frozen",
    ),
    *_summary(
        *("medsaga", "MedSAGa as released", "Synapse"),
        {"GiB on the first GPU": 7.84, "GiB on the second GPU": 7.32, "GiB on the third GPU": 7.30},
        _WANDB + "run c96a4gia",
        "240², 3 GPUs",
    ),
    *_summary(
        *("medsaga", "MedSAGa as released", "Synapse"),
        {
            "training loss, epoch 249": 0.0448,
            "dice of the worst test case, epochs 79 and 159": 0.33,
            "dice of the best test case, epochs 79 and 159": 0.69,
        },
        _WANDB + "240²",
    ),
    *_summary(
        *("medsaga", "MedSAGa as released", "BraTS 2020, 3 classes"),
        {
            "training loss, epoch 149": 0.3465,
            "cross-entropy, epoch 149": 0.147,
            "Dice loss, epoch 149": 0.396,
        },
        _WANDB + "240²",
    ),
    *_summary(
        *("medsaga", "MedSAGa as released, attention only", "BraTS 2020, 1 class"),
        {"dice, epoch 39": 0.2446, "hd95, epoch 39": 77.46},
        _WANDB + "240²",
    ),
)

_S2 = "abstract of arXiv 2511.08626"

SAMORA = (
    *(
        entry
        for table, data_set in {"Synapse": SYNAPSE, **_FEW}.items()
        for method in ("SAMora", "H-SAMora")
        for entry in _row("samora", table, method, {data_set: None}, _S2, _NO_TABLES)
    ),
    *_summary(
        *("samora", "SAMora", "all", {"fine-tuning epochs saved": 0.9}),
        _S2,
        "20 epochs in the released settings against SAMed's 160 to 200",
    ),
)

_S3 = "Chikumbu, University of Cape Town, 2024"
_MEN = "BraTS-MEN 2023"


def _losses(
    method: str, metric: str, values: Mapping[str, float], note: str = ""
) -> list[Published]:
    return [
        Published(
            experiment="samseg",
            table="rank",
            method=method,
            data_set=_MEN,
            prompt="box",
            metric=metric,
            label=label,
            value=value,
            source=_S3,
            note=note,
        )
        for label, value in values.items()
    ]


_OF_TEXT = "of the text on 50 epochs; the abstract says .1 → .02"
SAMSEG = (
    *_losses("SAMSEG r=64", "val_loss", {"first": 0.1, "lowest": 0.02}, "of the abstract"),
    *_losses("SAMSEG r=64", "loss", {"highest": 0.14, "lowest": 0.06}, "of the study of ranks"),
    *_losses("SAMSEG r=128", "loss", {"first": 0.30, "last": 0.17}, "of the study of ranks"),
    *_losses("SAMSEG r=64, 50 epochs", "val_loss", {"first": 0.08, "lowest": 0.03}, _OF_TEXT),
    *_losses(
        *("SAMSEG r=64, 50 epochs", "loss", {"first": 0.30, "lowest": 0.05}),
        "of the text on 50 epochs, in the first 33; the study of ranks has a highest value of .14",
    ),
    *(
        entry
        for rank in (64, 128, 256)
        for entry in _row(
            *("samseg", "rank", f"SAMSEG r={rank}", {_MEN: None}, _S3),
            "not found: Fig. 9 calls it “completely deteriorated”, without a number",
            prompt="box",
        )
    ),
    *_summary(
        *("samseg", "full tuning", _MEN, {"best of 150 epochs": 125}),
        _S3,
        "on every tumour slice",
    ),
)

PUBLISHED: tuple[Published, ...] = (*SAM2LORA, *OF_BASELINES, *MEDSAGA, *SAMORA, *SAMSEG)
