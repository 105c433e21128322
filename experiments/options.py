"""What the command of every experiment takes: how to train, on how many devices, what to keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh

from experiments.segmentation import Clip, Moments
from samjax.models.layers import Remat
from samjax.peft.galore import Projection
from samjax.training import schedules
from samjax.training.sharding import make_mesh

RematName = Literal["no", "dots", "all"]
REMAT: dict[RematName, Remat] = {"no": False, "dots": "dots", "all": True}


@dataclass(frozen=True, kw_only=True)
class Devices:
    """All devices of all processes, as data x fsdp x tensor."""

    data: int | None = None
    """Groups that share out the batch; by default all devices that the other two leave."""
    fsdp: int = 1
    """Devices that share out the batch, and the parameters, their gradients and moments."""
    tensor: int = 1
    """Devices that share out the columns or rows of every layer."""
    coordinator: str | None = None
    """Several processes: HOST:PORT of the first one, or auto on SLURM, GKE and TPU pods."""
    processes: int | None = None
    """With HOST:PORT: how many processes."""
    process: int | None = None
    """With HOST:PORT: which one this is, from 0."""

    def start(self) -> Mesh:
        """Joins the other processes, if there are any, and makes the mesh.

        Raises ``ValueError`` for settings that contradict each other, where no cluster is found,
        and as ``make_mesh`` does.  Where the others do not answer, JAX ends the process after five
        minutes, with a message of its own.
        """
        numbers = (self.processes, self.process)
        if self.coordinator in (None, "auto") and numbers != (None, None):
            raise ValueError(
                "--mesh.processes and --mesh.process go with --mesh.coordinator HOST:PORT"
            )
        if self.coordinator == "auto":
            _join_cluster()
        elif self.coordinator is not None:
            _join(self.coordinator, *numbers)
        return make_mesh(self.data, self.fsdp, self.tensor)


def _join_cluster() -> None:
    """Where the others are, the cluster's environment says, and which devices are this one's."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            "--mesh.coordinator auto: this is no job of SLURM, Open MPI, GKE or a TPU pod "
            f"({error}): expected HOST:PORT, with --mesh.processes and --mesh.process"
        ) from error


def _join(coordinator: str, processes: int | None, process: int | None) -> None:
    """All devices of this machine are this process's, whatever a cluster's environment says."""
    if processes is None or process is None:
        raise ValueError(
            f"--mesh.coordinator {coordinator} needs --mesh.processes and --mesh.process"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--mesh.coordinator {coordinator}: expected HOST:PORT or auto")
    if not 0 <= process < processes:
        raise ValueError(
            f"--mesh.process {process}: expected 0 to {processes - 1}, for there are "
            f"{processes} processes"
        )
    jax.distributed.initialize(
        coordinator, processes, process, cluster_detection_method="deactivate"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train."""

    epochs: int = 50
    """Passes over the training images."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 4
    """Images per optimizer step, on all devices together."""
    accumulate: int = 1
    """Micro-batches per step: memory for batch_size / accumulate images is enough."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    schedule: schedules.Name = "cosine"
    """After the warmup: cosine to zero, poly (SAMed's power 0.9), constant; or cosine restarts."""
    schedule_epochs: int | None = None
    """Epochs that the schedule is made for, if not those of the run."""
    period: int = 1000
    """Steps of one cycle of restarts."""
    warmup: int = 20
    """Warmup steps."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices."""
    clip: Clip = "global"
    """Gradients are clipped to norm 1: all together, or (with less memory) each array by itself."""
    dice_weight: float = 0.5
    """Share of Dice in the loss; the rest is cross-entropy."""
    average: float | None = None
    """Decay of a moving average of what is trained, such as 0.999; it is what is kept then."""
    validate_every: int | None = None
    """Steps between validations; by default one epoch, or 20 times a run if that is rarer."""
    patience: int | None = None
    """Stop after so many validations without a better Dice."""

    galore_gap: int = 200
    """GaLore: steps between two refreshes of the bases."""
    galore_scale: float = 0.25
    """GaLore: factor of its steps."""
    galore_projection: Projection = "std"
    """GaLore: which side of a matrix is made short."""
    galore_any_rank: bool = False
    """GaLore: a matrix with a side below the rank keeps that side, instead of an error."""
    moments: Moments = "float32"
    """Of the optimizer's moments: 8bit takes a quarter of the memory."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""
    remat: RematName = "no"
    """What of a block the backward pass computes anew, for less memory in more time: nothing, all
    but its products with weights, or all."""
    cache_embeddings: Literal["no", "ram", "disk"] = "no"
    """Run the image encoder once per image, where nothing of it is trained or augmented."""
    mesh: Devices = field(default_factory=Devices)
    """Which devices do what."""

    seed: int = 0
    """Seed of everything random."""
    workers: int = 0
    """Worker processes that load data; 0: threads."""
    checkpoint_every: int | None = None
    """Steps between checkpoints to resume from; by default at each validation; 0: none."""
    keep: int = 2
    """Checkpoints to keep, besides the best."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, if there is one."""
    progress: bool = True
    """Show the progress bar."""
    out: Path = Path("runs/finetune")
    """Folder of the results."""

    # What may change between a run and its continuation.
    FREE = (
        *("mesh", "workers", "checkpoint_every", "keep", "resume", "progress", "out"),
        *("cache_embeddings", "torch_export", "test_images", "test_masks"),
    )

    def check(self) -> None:
        """Raises ``ValueError`` for settings that contradict each other."""
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size {self.batch_size} is no multiple of --accumulate {self.accumulate}"
            )
        if self.resume and self.checkpoint_every == 0:
            raise ValueError("--resume needs checkpoints, but --checkpoint-every is 0")

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate of a run of so many steps."""
        warmup = 0 if self.schedule == "restarts" else self.warmup
        return schedules.by_name(self.schedule, self.lr, steps, warmup, period=self.period)

    def fixed(self) -> dict[str, Any]:
        """The settings that a continued run must share."""
        return {name: value for name, value in asdict(self).items() if name not in self.FREE}


def is_first_process() -> bool:
    """Whether this process writes the results."""
    return jax.process_index() == 0
