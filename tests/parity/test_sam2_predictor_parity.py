"""`SAM2ImagePredictor` against upstream's, with a tiny model on pictures of several sizes."""

import warnings
from importlib.util import find_spec

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if find_spec("sam2") is None:
    pytest.skip("sam2 is not installed", allow_module_level=True)

import tiny_models  # noqa: E402
from convert.reference import import_sam2  # noqa: E402
from sam2_reference import relative, sam2_pair  # noqa: E402
from samjax.predictor import SAM2ImagePredictor, SamModel, SamPredictor  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 1e-4
PICTURES = [tiny_models.moving_disc(1, size)[0] for size in ((90, 160), (200, 70))]
POINTS = {"point_coords": np.array([[40.0, 45.0], [60, 20]]), "point_labels": np.array([1, 0])}
BOXES = np.array([[10.0, 20, 50, 60], [5, 5, 60, 80], [30, 10, 65, 70]])
PROMPTS = {
    "one point": {"point_coords": np.array([[40.0, 45.0]]), "point_labels": np.array([1])},
    "points": POINTS,
    "box": {"box": BOXES[0]},
    "boxes": {"box": BOXES},
    "box and point": {"box": BOXES[1], **POINTS},
    "fractions": {"box": np.array([0.1, 0.2, 0.6, 0.7]), "normalize_coords": False},
    "nothing": {},
}


@pytest.fixture(scope="module")
def both():
    import_sam2()
    from sam2.sam2_image_predictor import SAM2ImagePredictor as Upstream

    theirs, params = sam2_pair(tiny_models.SAM2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which upstream uses
        upstream = Upstream(theirs)
    upstream._bb_feat_sizes = [(32, 32), (16, 16), (8, 8)]  # it has those of 1024² in its code
    return upstream, SAM2ImagePredictor(SamModel(tiny_models.SAM2, params))


def compare(found, expected):
    masks, iou, low_res = found
    assert relative(masks, expected[0]) < TOLERANCE
    assert np.abs(iou - expected[1]).max() < 1e-5
    assert relative(low_res, expected[2]) < TOLERANCE


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_image(both, prompt, multimask):
    for picture in PICTURES:
        for predictor in both:
            predictor.set_image(picture)
        given = {**PROMPTS[prompt], "multimask_output": multimask, "return_logits": True}
        expected, found = (predictor.predict(**given) for predictor in both)
        compare(found, expected)
        given["mask_input"] = expected[2][..., :1, :, :]
        expected, found = (predictor.predict(**given) for predictor in both)
        compare(found, expected)
        masks, _, _ = both[1].predict(**{**given, "return_logits": False})
        np.testing.assert_array_equal(masks, found[0] > 0)


def test_a_batch(both):
    for predictor in both:
        predictor.set_image_batch(PICTURES)
    coords, labels = [POINTS["point_coords"], None], [POINTS["point_labels"], None]
    boxes = [None, BOXES]
    given = {"point_coords_batch": coords, "point_labels_batch": labels, "box_batch": boxes}
    expected, found = (p.predict_batch(**given, return_logits=True) for p in both)
    for theirs, ours in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True):
        compare(ours, theirs)
    assert both[1].get_image_embedding().shape == (2, 64, 8, 8)


def test_states(both):
    ours = both[1]
    ours.reset_predictor()
    with pytest.raises(RuntimeError, match="call set_image"):
        ours.predict()
    ours.set_image_batch(PICTURES)
    with pytest.raises(RuntimeError, match="use predict_batch"):
        ours.predict()
    with pytest.raises(ValueError, match="box_batch: expected 2, one per image, got 1"):
        ours.predict_batch(box_batch=[BOXES])
    with pytest.raises(ValueError, match="image 1 of the batch: box"):
        ours.predict_batch(box_batch=[BOXES, [[0, 0, 500, 9]]])
    with pytest.raises(ValueError, match="at least one image"):
        ours.set_image_batch([])
    with pytest.raises(ValueError, match="use SAM2ImagePredictor"):
        SamPredictor(ours.model)
