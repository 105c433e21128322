"""`SamPredictor` against upstream's: vit_b at 1024², real pictures, random weights.

Upstream's encoder runs once per picture. The last layers of the hypernetworks are scaled up, so
that the logits of the random model have the size of a trained one's: otherwise all of them would
lie within 1e-3 of zero, where the masks may differ.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
if find_spec("segment_anything") is None:
    pytest.skip("segment_anything is not installed", allow_module_level=True)

from convert.reference import (  # noqa: E402
    build_reference_sam,
    import_segment_anything,
    randomise,
)
from convert.sam import convert  # noqa: E402
from convert.torch_io import write_torch  # noqa: E402
from samjax.frame import resize, resized_size, scale_coords  # noqa: E402
from samjax.models.sam import SamConfig, vit_b  # noqa: E402
from samjax.models.vit import ViTConfig  # noqa: E402
from samjax.predictor import SamModel, SamPredictor  # noqa: E402
from samjax.predictor.__main__ import main  # noqa: E402

TOLERANCE = 1e-4  # of the standard deviation; torch against itself in float64: 4e-6
UNDECIDED = 1e-3  # where a logit is nearer to zero, the masks may differ
PICTURES = ("landscape", "portrait")


def picture(folder: Path, kind: str) -> np.ndarray:
    """1200 x 1800, which is made smaller, and 534 x 350, which is made larger."""
    name = {"landscape": "truck.jpg", "portrait": "dog.jpg"}[kind]
    with Image.open(folder / "sam_example_images" / name) as image:
        pixels = np.array(image.convert("RGB"))
    return pixels if kind == "landscape" else pixels[:, 200:550]


def build(config: SamConfig):
    """Upstream's model, and ours with its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # whatever tests ran before
        theirs = randomise(build_reference_sam(config), seed=0)
    with torch.no_grad():
        for mlp in theirs.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight *= 30
            mlp.layers[-1].bias *= 30
    _, params = convert({k: v.numpy() for k, v in theirs.state_dict().items()}, config)
    return theirs, SamModel(config, params)


@pytest.fixture(scope="module")
def models():
    return build(vit_b())


@pytest.fixture(scope="module", params=PICTURES)
def predictors(request, models, shared_data: Path):
    """Upstream's predictor and ours, with the same picture set."""
    image = picture(shared_data, request.param)
    theirs = import_segment_anything().SamPredictor(models[0])
    ours = SamPredictor(models[1])
    theirs.set_image(image)
    ours.set_image(image)
    return theirs, ours, request.param


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


@pytest.mark.slow
def test_image_embedding(predictors, record_property):
    theirs, ours, kind = predictors
    assert ours.original_size == theirs.original_size
    assert ours.input_size == theirs.input_size
    difference = relative(ours.get_image_embedding(), theirs.get_image_embedding().numpy())
    record_property("relative difference", difference)
    print(f"\n{kind}, image embedding: {difference:.1e} of the standard deviation", end="")
    assert difference <= TOLERANCE


def at(theirs, *fractions: float) -> np.ndarray:
    """x, y, x, y … as fractions of the picture, in whole pixels."""
    height, width = theirs.original_size
    return np.round(np.array(fractions) * np.resize([width, height], len(fractions)))


def prompts(theirs) -> dict[str, dict]:
    """Arguments of `predict`, the same for both."""
    point = at(theirs, 0.3, 0.55)[None]
    box = at(theirs, 0.2, 0.4, 0.8, 0.9)
    points = np.stack([point[0], at(theirs, 0.7, 0.2), at(theirs, 0.5, 0.8)])
    one = {"point_coords": point, "point_labels": np.array([1])}
    _, _, earlier = theirs.predict(**one)
    return {
        "a point": one,
        "a point, single mask": {**one, "multimask_output": False},
        "three points": {"point_coords": points, "point_labels": np.array([1, 0, 1])},
        "a box": {"box": box},
        "a box as in upstream's notebook": {"box": box[None], "multimask_output": False},
        "a box and points": {
            "box": box,
            "point_coords": points[:2],
            "point_labels": np.array([0, 1]),
        },
        "a point and a mask": {**one, "mask_input": earlier[1:2]},
        "a mask": {"mask_input": earlier[:1], "multimask_output": False},
    }


@pytest.mark.slow
def test_predict(predictors, record_property):
    """Low-res logits, IoU and masks at the picture's own size, prompt by prompt."""
    theirs, ours, kind = predictors
    compare(kind, *run_both(theirs, ours, prompts(theirs)), record_property)


@pytest.mark.slow
def test_several_prompts(predictors, record_property):
    """A batch through `predict` is upstream's `predict_torch`; so is a batch through our own."""
    theirs, ours, kind = predictors
    corner = np.array([at(theirs, x, y) for x, y in [(0, 0), (0.1, 0.3), (0.5, 0.2), (0.3, 0.6)]])
    boxes = np.concatenate([corner, corner + at(theirs, 0.4, 0.35)], axis=1)
    boxes = np.concatenate([boxes, boxes[:1] + 20])  # five: not a size that is compiled for
    points, labels = corner + 25, np.array([[1], [0], [1], [1]])
    size = theirs.original_size
    in_frame = torch.as_tensor(theirs.transform.apply_boxes(boxes, size), dtype=torch.float)
    clicks = torch.as_tensor(theirs.transform.apply_coords(points[:, None], size)).float()
    expected = {
        "five boxes": theirs.predict_torch(
            None, None, in_frame, multimask_output=False, return_logits=True
        ),
        "four points": theirs.predict_torch(clicks, torch.from_numpy(labels), return_logits=True),
    }
    expected = {name: [part.numpy() for part in parts] for name, parts in expected.items()}
    found = {
        "five boxes": ours.predict(box=boxes, multimask_output=False),
        "four points": ours.predict(points[:, None], labels),
    }
    compare(kind, expected, found, record_property)
    again = ours.predict_torch(clicks, labels)
    for one, other in zip(again, found["four points"], strict=True):
        assert np.array_equal(one, other)


def run_both(theirs, ours, given: dict[str, dict]) -> tuple[dict, dict]:
    expected = {name: theirs.predict(**one, return_logits=True) for name, one in given.items()}
    return expected, {name: ours.predict(**one) for name, one in given.items()}


def compare(kind: str, expected: dict, found: dict, record_property):
    # A single prediction has no deviation: its scale is that of all predictions on the picture.
    spread = np.concatenate([np.ravel(iou) for _, iou, _ in expected.values()]).std()
    worst = {}
    print()
    for name, (logits, iou, low_res_logits) in expected.items():
        masks, our_iou, our_low_res_logits = found[name]
        assert masks.shape == logits.shape
        assert our_iou.shape == iou.shape
        disagree = masks != (logits > 0)
        worst[name] = {
            "logits": relative(our_low_res_logits, low_res_logits),
            "iou": float(np.abs(our_iou - iou).max() / spread),
            "masks": float(np.abs(logits[disagree]).max(initial=0)),
        }
        print(
            f"{kind}, {name}: low-res logits {worst[name]['logits']:.1e}, "
            f"IoU {worst[name]['iou']:.1e} of the standard deviation; "
            f"{disagree.sum()} of {disagree.size} mask pixels differ, {(logits > 0).mean():.0%} "
            f"are foreground, {(np.abs(logits) < UNDECIDED).mean():.2%} undecided"
        )
        assert 0.001 < (logits > 0).mean() < 0.999, "a mask that could be all the same"
    for measure, limit in (("logits", TOLERANCE), ("iou", TOLERANCE), ("masks", UNDECIDED)):
        record_property(measure, max(one[measure] for one in worst.values()))
        assert {name: one[measure] for name, one in worst.items() if one[measure] >= limit} == {}


# Without the encoder.


@pytest.mark.parametrize("size", [(1200, 1800), (1800, 1200), (37, 53), (534, 350), (1024, 1024)])
def test_preprocessing(size: tuple[int, int], rng: np.random.Generator):
    """Pixels bit for bit, coordinates to the last digit."""
    import_segment_anything()
    from segment_anything.utils.transforms import ResizeLongestSide

    theirs = ResizeLongestSide(1024)
    frame = (1024, 1024)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    assert np.array_equal(resize(image, resized_size(size, frame)), theirs.apply_image(image))
    points = rng.uniform(0, min(size), (4, 3, 2))
    assert np.array_equal(scale_coords(points, size, frame), theirs.apply_coords(points, size))
    boxes = rng.uniform(0, min(size), (5, 4))
    ours = SamPredictor(SamModel(vit_b(), {})).transform
    assert np.array_equal(ours.apply_boxes(boxes, size), theirs.apply_boxes(boxes, size))


SMALL = SamConfig(
    image_encoder=ViTConfig(
        image_size=(128, 128), width=24, depth=2, heads=2, window=3, global_blocks=(1,)
    ),
    decoder_mlp_width=44,
    iou_head_width=36,
)


@pytest.fixture(scope="module")
def small_predictors(shared_data: Path):
    theirs, ours = build(SMALL)
    theirs, ours = import_segment_anything().SamPredictor(theirs), SamPredictor(ours)
    image = picture(shared_data, "landscape")[::2, ::2]
    theirs.set_image(image)
    ours.set_image(image)
    return theirs, ours, "small"


def test_small_model(small_predictors, record_property):
    """The same comparison where there is no time for vit_b."""
    theirs, ours, kind = small_predictors
    difference = relative(ours.get_image_embedding(), theirs.get_image_embedding().numpy())
    print(f"\nsmall, image embedding: {difference:.1e} of the standard deviation", end="")
    assert difference <= TOLERANCE
    compare(kind, *run_both(theirs, ours, prompts(theirs)), record_property)


@pytest.mark.slow
def test_command_takes_a_torch_checkpoint(tmp_path: Path, shared_data: Path, small_predictors):
    theirs, _, _ = small_predictors
    weights = {k: v.numpy() for k, v in theirs.model.state_dict().items()}
    write_torch(tmp_path / "small.pth", weights)
    image = picture(shared_data, "landscape")[::2, ::2]
    Image.fromarray(image).save(tmp_path / "photo.png")
    files = ["--ckpt", str(tmp_path / "small.pth"), "--image", str(tmp_path / "photo.png")]
    assert main([*files, "--box", "100,200,700,500", "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "mask_000.png") as written:
        found = np.array(written) == 255
    logits, _, _ = theirs.predict(
        box=np.array([100, 200, 700, 500]), multimask_output=False, return_logits=True
    )
    assert (found != (logits[0] > 0))[np.abs(logits[0]) >= UNDECIDED].sum() == 0
