"""What the commands of the papers share: data and checkpoint, or phantoms and a tiny model.

    python -m experiments.<paper> --data DIR --ckpt FILE --out DIR
    python -m experiments.<paper> --smoke --out DIR

A paper's file has a dataclass of arguments with its own defaults and ``trials(arguments)``, which
lists its runs; ``main`` here runs those that ``--only`` names.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import tyro

from experiments import trial as trials_of
from experiments.options import TrainingOptions, is_first_process
from experiments.record import Record
from experiments.trial import Trial
from samjax.data.images import DataError
from samjax.metrics import summarise_cases
from samjax.models.functional import init_params
from samjax.models.hiera import HieraConfig
from samjax.models.sam import VARIANTS, SamConfig
from samjax.models.sam2_config import Sam2Config
from samjax.models.vit import ViTConfig
from samjax.models.weights import Config, resize_params
from samjax.training.loop import TrainingError
from samjax.trees import Params

SIGTERM_EXIT = 128 + 15  # as of a process that SIGTERM ended: clusters then start it again


@dataclass(frozen=True, kw_only=True)
class PaperOptions(TrainingOptions):
    """What every paper's command takes."""

    data: Path | None = None
    """Folder of the data sets, each as its owners publish it; see the top of the file."""
    ckpt: str | None = None
    """Checkpoint to start from: Meta's .pth or .pt, a converted .safetensors, or a name on the
    Hugging Face hub."""
    variant: str | None = None
    """What the checkpoint has to be; without one, train this small model from scratch: vit_xs."""
    image_size: int | None = None
    """Side of the model frame in pixels; by default the paper's."""
    smoke: bool = False
    """Phantoms in the official layout and a tiny model, two steps of everything."""
    seeds: tuple[int, ...] = (0,)
    """Each run is made once for each of them."""
    only: tuple[str, ...] = ("*",)
    """Names of runs, such as lora_r4* (patterns of a shell); --list prints all."""
    list: bool = False
    """Print the names of the runs and stop."""

    chosen: Annotated[tuple[str, ...] | None, tyro.conf.Suppress] = None
    """The options that stand on the command line; methods' own settings yield to them."""

    FREE = (*TrainingOptions.FREE, "data", "only", "list", "seeds", "chosen")

    def given(self) -> set[str]:
        """The options that the user has set: on the command line, or else to no default."""
        if self.chosen is not None:
            return set(self.chosen)
        return {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)}

    def check(self) -> None:
        """Raises ``ValueError`` for settings that contradict each other."""
        super().check()
        if not self.smoke and (self.data is None or (self.ckpt is None and self.variant is None)):
            raise ValueError("give --data DIR and --ckpt FILE, or --smoke for phantoms")


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


Options = TypeVar("Options", bound=PaperOptions)

# Settings of every ``--smoke``: two steps in a frame of 64 pixels.
SMOKE: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "image_size": 64,
    "progress": False,
}


def base_model(options: PaperOptions, family: str, size: int) -> tuple[Config, Params]:
    """The model to start from at a square frame of ``size`` pixels.

    The checkpoint; without one ``--variant`` from scratch, or a tiny model for ``--smoke``.
    ``family`` is the paper's, "sam" or "sam2"; another one is told to be taken in its place only
    where the checkpoint is of it.

    Raises ``WeightsError``, a ``ValueError``, for a file that is no such checkpoint.
    """
    if options.ckpt is not None:
        from convert import families

        loaded = families.load(options.ckpt, options.variant)
        config, params = resize_params(loaded.config, loaded.params, (size, size))
        return config, jax.tree.map(jnp.asarray, params)
    if options.smoke:
        config = tiny_sam(size) if family == "sam" else tiny_sam2(size)
    elif options.variant in VARIANTS:
        config = VARIANTS[str(options.variant)]((size, size))
    else:
        known = ", ".join(VARIANTS)
        raise ValueError(f"--variant {options.variant} from scratch: expected one of {known}")
    return config, init_params(config, options.seed)


def tiny_sam(size: int = 64) -> SamConfig:
    """A SAM of 0.05 M parameters: quick to compile, good for nothing else."""
    vit = ViTConfig(
        image_size=(size, size), width=32, depth=2, heads=2, window=3, global_blocks=(1,),
        out_channels=32,
    )  # fmt: skip
    return SamConfig(
        image_encoder=vit,
        mask_channels=8,
        decoder_depth=1,
        decoder_mlp_width=32,
        iou_head_width=16,
    )


def tiny_sam2(size: int = 64) -> Sam2Config:
    """The same of SAM 2."""
    hiera = HieraConfig(
        image_size=(size, size), width=16, heads=1, stages=(1, 1, 1, 1), windows=(4, 2, 2, 2),
        global_blocks=(2,), position_grid=(2, 2), out_channels=16,
    )  # fmt: skip
    return Sam2Config(
        image_encoder=hiera,
        mask_channels=8,
        decoder_depth=1,
        decoder_mlp_width=32,
        iou_head_width=16,
    )


def data_folder(options: PaperOptions, write: Callable[[Path], None]) -> Path:
    """``--data``, or phantoms that ``write`` puts below ``--out`` unless they are there already."""
    if options.data is not None:
        if not options.data.is_dir():
            raise DataError(f"{options.data}: no such folder (--data)")
        return options.data
    folder = options.out / "phantoms"
    if not folder.exists():
        write(folder)
    return folder


def replaced(options: Options, settings: Mapping[str, Any]) -> Options:
    """The options with ``settings``, but for what the user has set."""
    given = options.given()
    return dataclasses.replace(options, **{k: v for k, v in settings.items() if k not in given})


def compile_quickly() -> None:
    """Tells XLA to compile tiny programs quickly rather than well, from now on in this process."""
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # the older way to emit fusions takes half the time
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()


def run_all(options: Options, trials: Callable[[Options], Sequence[Trial]]) -> list[Record]:
    """Runs the trials that ``--only`` names, each once for each seed; returns their records."""
    options.check()
    mesh = options.mesh.start()
    records: list[Record] = []
    for number, seed in enumerate(options.seeds):
        of_seed = dataclasses.replace(options, seed=seed)
        every = trials(of_seed)
        chosen = [t for t in every if any(fnmatch.fnmatch(t.run, p) for p in options.only)]
        if not chosen:
            names = ", ".join(t.run for t in every)
            raise ValueError(f"--only {' '.join(options.only)}: no such run; there are {names}")
        for trial in chosen:
            if len(options.seeds) > 1:
                trial = dataclasses.replace(trial, run=f"{trial.run}_seed{seed}")
            if options.list:
                if number == 0:
                    print(f"{trial.run:<44}{trial.table}: {trial.method}")
                continue
            if is_first_process():
                print(f"\n{trial.run}: {trial.method} ({trial.table})", flush=True)
            records.append(trials_of.run(trial, mesh))
            if is_first_process():
                print(line_of(records[-1]), flush=True)
    return records


def line_of(record: Record) -> str:
    """The mean Dice of a record by data set and prompt, for a person."""
    parts = []
    for scores in record.scores:
        found = summarise_cases(scores.cases, resamples=1)
        if "dice" in found:
            parts.append(f"{scores.data_set}, {scores.prompt}: {found['dice'].mean:.4f}")
    return "  Dice " + ("; ".join(parts) or "not measured")


def main(
    name: str,
    kind: type[Options],
    trials: Callable[[Options], Sequence[Trial]],
    argv: Sequence[str] | None = None,
    smoke: Callable[[Options], dict[str, Any]] = lambda options: {},
) -> int:
    """The command of a paper; exit code 1 and one clear message on bad input, 143 after SIGTERM.

    ``smoke`` gives the settings that ``--smoke`` changes.
    """
    from experiments.training import Preempted

    try:
        argv = sys.argv[1:] if argv is None else argv
        options = tyro.cli(kind, args=argv, prog=f"python -m experiments.{name}")
        words = [word[2:].partition("=")[0] for word in argv if word[:2] == "--"]
        words += [word.removeprefix("no-") for word in words]  # --no-resume sets resume
        names = [word.replace("-", "_") for word in words]
        options = dataclasses.replace(options, chosen=tuple(names))
        if options.smoke:
            compile_quickly()
            options = replaced(options, smoke(options))
        records = run_all(options, trials)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        print(f"experiments.{name}: error: {error}", file=sys.stderr)
        return 1
    except Preempted as error:
        print(f"experiments.{name}: {error}; continue with --resume", file=sys.stderr)
        return SIGTERM_EXIT
    if is_first_process() and records:
        print(f"\n{len(records)} runs in {options.out}; python -m experiments.report makes tables")
    return 0
