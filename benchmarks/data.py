"""Speed of the data pipeline over a PyTorch DataLoader that does the same, alternating in one run.

    python -m benchmarks.data --size 1024 --workers 2

Both read the same phantom photographs (JPEG, and PNG masks), resize them to fit the frame
(Pillow, bilinear), mirror, rotate, scale and shift image and mask together, change brightness,
contrast and saturation or gamma, draw three points from the mask, pad, and make batches of uint8.
PyTorch's side is torchvision's transforms on Pillow pictures with as many worker processes; ours
runs in as many threads, and in as many processes.  Nothing is cached.

``--step`` adds the share of a training step of that model that is spent waiting for data.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks.timing import machine
from convert import reference
from samjax.atomic import write_json
from samjax.data import FolderDataset, make_loader
from samjax.data.phantom import make_phantom, target_mask
from samjax.data.throughput import Throughput
from samjax.data.transforms import Augment

AUGMENT = Augment(
    flip_horizontal=0.5,
    flip_vertical=0.5,
    rotate=10.0,
    scale=0.1,
    shift=0.05,
    brightness=0.1,
    contrast=0.1,
    gamma=0.1,
)
POINTS = 3
WARM_UP = 4  # batches


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Speed of the data pipeline over a PyTorch DataLoader."""

    size: int = 1024
    """Side of the frame in pixels."""
    source_size: tuple[int, int] = (1200, 1500)
    """Height and width of the photographs."""
    examples: int = 24
    """Photographs."""
    batches: int = 20
    """Batches a round."""
    batch: int = 4
    """Images per batch."""
    workers: int = 2
    """Threads or processes, on both sides."""
    rounds: int = 3
    """Alternating rounds."""
    step: str | None = None
    """A variant, such as vit_b, whose training step consumes the batches."""
    step_size: int = 512
    """Its frame."""
    steps: int = 6
    """Steps of it, after two that are not counted."""
    out: Path = Path("benchmarks/results/data.json")
    """Where the figures go."""


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Phantoms as a camera's JPEG, and masks of the disc; four different ones, in turn."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    drawn = [make_phantom((0, number), "colour", size) for number in range(4)]
    for number in range(count):
        phantom = drawn[number % len(drawn)]
        name = f"{number:04d}"
        Image.fromarray(phantom["image"]).save(folder / "images" / f"{name}.jpg", quality=92)
        mask = Image.fromarray(target_mask(phantom["mask"], "disc"))
        mask.save(folder / "masks" / f"{name}.png")


@cache
def torchvision() -> Any:
    """Its transforms, importable beside any PyTorch; in worker processes too."""
    reference.import_segment_anything()
    return importlib.import_module("torchvision.transforms")


class Photographs:
    """PyTorch's way to the same: Pillow pictures and torchvision's transforms."""

    def __init__(self, folder: Path, frame: int, length: int):
        self.folder, self.frame, self.length = folder, frame, length
        self.images = sorted((folder / "images").iterdir())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        transforms = torchvision()
        functional = transforms.functional
        bilinear = functional.InterpolationMode.BILINEAR
        nearest = functional.InterpolationMode.NEAREST
        rng, frame = np.random.default_rng(index), self.frame
        file = self.images[index % len(self.images)]
        image = Image.open(file).convert("RGB")
        mask = Image.open(self.folder / "masks" / f"{file.stem}.png")
        scale = frame / max(image.size)
        size = [round(image.height * scale), round(image.width * scale)]
        image = functional.resize(image, size, bilinear, antialias=True)
        mask = functional.resize(mask, size, nearest)
        for flip in (functional.hflip, functional.vflip):
            if rng.random() < 0.5:
                image, mask = flip(image), flip(mask)
        move = partial(
            functional.affine,
            angle=rng.uniform(-10, 10),
            translate=[int(rng.uniform(-0.05, 0.05) * side) for side in (size[1], size[0])],
            scale=rng.uniform(0.9, 1.1),
            shear=[0.0, 0.0],
        )
        image, mask = move(image, interpolation=bilinear), move(mask, interpolation=nearest)
        image = transforms.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1)(image)
        inside = np.argwhere(np.array(mask) > 0)
        points = np.zeros((POINTS, 2), np.float32)
        if len(inside):
            points[:] = inside[rng.integers(len(inside), size=POINTS)][:, ::-1]
        pad = [0, 0, frame - size[1], frame - size[0]]
        return {
            "image": functional.pil_to_tensor(functional.pad(image, pad)),
            "mask": functional.pil_to_tensor(functional.pad(mask, pad)),
            "points": torch.from_numpy(points),
        }


def torch_loader(folder: Path, arguments: Arguments) -> Any:
    """A DataLoader with worker processes, started without JAX's threads."""
    from torch.utils.data import DataLoader

    batches = WARM_UP + arguments.batches + 2 * max(arguments.workers, 1)
    return DataLoader(
        Photographs(folder, arguments.size, batches * arguments.batch),  # type: ignore[arg-type]
        batch_size=arguments.batch,
        shuffle=True,
        num_workers=arguments.workers,
        multiprocessing_context="spawn" if arguments.workers else None,
    )


def our_loader(folder: Path, arguments: Arguments, *, processes: bool, size: int) -> Any:
    """The same of ours; without end, as in training, so that workers start once."""
    return make_loader(
        FolderDataset(folder / "images", folder / "masks"),
        frame_size=(size, size),
        batch_size=arguments.batch,
        shuffle=True,
        augment=AUGMENT,
        prompt_modes="points",
        num_points=POINTS,
        num_epochs=None,
        cache=False,
        threads=None if processes else arguments.workers,
        workers=arguments.workers if processes else 0,
    )


def timed(loader: Any, count: int) -> float:
    """Seconds for so many batches, after those in which workers start and buffers fill."""
    batches = iter(loader)
    for _ in islice(batches, WARM_UP):
        pass
    started = time.perf_counter()
    taken = sum(1 for _ in islice(batches, count))
    passed = time.perf_counter() - started
    if taken < count:
        raise RuntimeError(f"{taken} batches instead of {count}")
    if hasattr(batches, "close"):
        batches.close()  # threads and processes must not work on into the next one's time
    return passed


def compare(folder: Path, arguments: Arguments) -> dict[str, Any]:
    """Images/s of the three in alternating rounds, and the medians of our ratios."""
    loaders = {
        "torch": torch_loader(folder, arguments),
        "threads": our_loader(folder, arguments, processes=False, size=arguments.size),
        "processes": our_loader(folder, arguments, processes=True, size=arguments.size),
    }
    rounds = [
        {name: timed(loader, arguments.batches) for name, loader in loaders.items()}
        for _ in range(arguments.rounds)
    ]
    images = arguments.batches * arguments.batch
    report: dict[str, Any] = {
        f"{name}_images_per_second": [round(images / taken[name], 2) for taken in rounds]
        for name in loaders
    }
    for name in ("threads", "processes"):
        ratio = statistics.median(taken["torch"] / taken[name] for taken in rounds)
        report[f"{name}_over_torch_median"] = round(ratio, 3)
    return report


def waiting(folder: Path, arguments: Arguments) -> dict[str, Any]:
    """The share of a training step spent waiting for the batch."""
    from benchmarks.training import OurStep
    from experiments.memory import config_of

    size = arguments.step_size
    config = config_of(str(arguments.step), size)
    loader = our_loader(folder, arguments, processes=False, size=size)
    watch = Throughput(loader, skip=2)
    step = None
    for batch in islice(watch, arguments.steps + 2):
        if step is None:
            step = OurStep(config, "lora+decoder", 4, batch, dtype="float32", remat=False)
        step.feed(batch)
        step()
    return {
        "variant": arguments.step,
        "size": size,
        "batch": arguments.batch,
        "images_per_second": round(watch.images_per_second, 3),
        "share_waiting": round(watch.waiting, 4),
    }


def run(arguments: Arguments) -> dict[str, Any]:
    """The benchmark; returns what goes to the file."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photographs(folder, arguments.examples, arguments.source_size)
        report = {
            **machine(),
            **{
                name: getattr(arguments, name)
                for name in ("size", "source_size", "batch", "workers")
            },
            "pipeline": compare(folder, arguments),
        }
        if arguments.step:
            report["step"] = waiting(folder, arguments)
    return report


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.data")
    report = run(arguments)
    write_json(arguments.out, report)
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
