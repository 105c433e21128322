"""The predictor on a tiny model: what it accepts, what comes back, what must not matter."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from samjax.models.functional import init_params
from samjax.models.weights import save_weights
from samjax.predictor import SamModel, SamPredictor, prompts, sam

SIZE = (60, 200)  # of the fixture `image`; in the frame: 38 x 128
RTOL = 2e-5  # of the deviation: float32 sums in another order


def make_image(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def assert_close(found: np.ndarray, expected: np.ndarray):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= RTOL * expected.std()


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() > 1e-3 * one.std())


def test_what_comes_back(predictor: SamPredictor):
    masks, iou, low_res = predictor.predict(np.array([[150, 30]]), np.array([1]))
    assert (masks.shape, masks.dtype) == ((5, *SIZE), bool)
    assert (iou.shape, iou.dtype) == ((5,), np.float32)
    assert (low_res.shape, low_res.dtype) == ((5, 24, 32), np.float32)
    assert 0 < masks.mean() < 1
    logits, _, _ = predictor.predict(np.array([[150, 30]]), np.array([1]), return_logits=True)
    assert logits.dtype == np.float32
    assert np.array_equal(logits > 0, masks)


def decode(predictor: SamPredictor, coords: list, labels: list) -> list[np.ndarray]:
    """Low-res logits (m, h4, w4) and IoU (m,) for four slots, given in pixels of the frame."""
    slots = jnp.array([coords], jnp.float32), jnp.array([labels], jnp.int32)
    found = sam._decode(
        predictor.model.params,
        predictor.features,
        *slots,
        None,
        config=predictor.model.config,
        dtype=jnp.dtype(jnp.float32),
    )
    return [np.asarray(result[0]) for result in found[:2]]


def test_single_mask_is_the_first_token(predictor: SamPredictor):
    box = [20, 10, 150, 50]
    masks, iou, low_res = predictor.predict(box=box, multimask_output=False, return_logits=True)
    assert (masks.shape, iou.shape, low_res.shape) == ((1, *SIZE), (1,), (1, 24, 32))
    several, several_iou, several_low_res = predictor.predict(box=box, return_logits=True)
    sx, sy = 128 / 200, 38 / 60
    corners = [[20 * sx, 10 * sy], [150 * sx, 50 * sy]]
    logits, quality = decode(predictor, [*corners, [0, 0], [0, 0]], [2, 3, -2, -2])
    assert_close(np.concatenate([low_res, several_low_res]), logits)
    assert_close(np.concatenate([iou, several_iou]), quality)
    assert all(differ(masks[0], other) for other in several)


def test_points_are_x_then_y(predictor: SamPredictor):
    """In the frame, by hand: x is scaled by 128 / 200 and y by 38 / 60."""
    _, _, low_res = predictor.predict(np.array([[150, 30]]), np.array([1]))
    point = [150 * 128 / 200, 30 * 38 / 60]
    logits, _ = decode(predictor, [point, [0, 0], [0, 0], [0, 0]], [1, -1, -2, -2])
    assert_close(low_res, logits[1:])
    with pytest.raises(ValueError, match=r"point 0 at \(x, y\) = \(30, 150\) lies outside"):
        predictor.predict(np.array([[30, 150]]), np.array([1]))
    _, _, elsewhere = predictor.predict(np.array([[30, 15]]), np.array([1]))
    assert differ(low_res, elsewhere)


def test_masks_lie_where_the_image_is(predictor: SamPredictor):
    """The padded part of the frame is cut off before the resize to the image's size."""
    logits, _, low_res = predictor.predict(np.array([[150, 30]]), np.array([1]), return_logits=True)
    frame = sam.resize_bilinear_numpy(low_res, predictor.model.config.image_size)
    assert predictor.input_size == (38, 128)
    expected = sam.resize_bilinear_numpy(frame[:, :38, :128], SIZE)
    assert_close(logits, expected)


def test_invalid_slots_do_not_matter(predictor: SamPredictor, monkeypatch: pytest.MonkeyPatch):
    points, labels = np.array([[150, 30], [20, 50], [100, 5]]), np.array([1, 0, 1])
    expected = predictor.predict(points, labels, return_logits=True)
    monkeypatch.setattr(prompts, "SLOTS", (16,))
    for found, wanted in zip(
        predictor.predict(points, labels, return_logits=True), expected, strict=True
    ):
        assert_close(found, wanted)


def test_prompts_of_a_batch_do_not_see_each_other(predictor: SamPredictor, rng):
    count = 5  # a chunk of 4 and one of 1
    points = rng.uniform([0, 0], [200, 60], (count, 2, 2))
    labels = rng.integers(0, 2, (count, 2))
    corner = rng.uniform([0, 0], [100, 30], (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 30, (count, 2))], axis=1)
    masks = rng.normal(0, 5, (count, 1, *predictor.model.config.low_res_size))
    batch = predictor.predict(points, labels, boxes, masks, return_logits=True)
    assert [len(result) for result in batch] == [count] * 3
    for i in range(count):
        own = predictor.predict(points[i], labels[i], boxes[i], masks[i], return_logits=True)
        for found, expected in zip(batch, own, strict=True):
            assert_close(found[i], expected)


def test_a_batch_of_one_has_no_batch_axis(predictor: SamPredictor):
    """As upstream, whose notebook writes `box=input_box[None, :]`; `predict_torch` keeps it."""
    box = np.array([20, 10, 150, 50])
    for one, other in zip(
        predictor.predict(box=box), predictor.predict(box=box[None]), strict=True
    ):
        assert np.array_equal(one, other)
    in_frame = predictor.transform.apply_boxes(box, SIZE)
    kept = predictor.predict_torch(None, None, in_frame)
    assert [result.ndim for result in kept] == [4, 2, 4]
    for one, other in zip(predictor.predict(box=box), kept, strict=True):
        assert np.array_equal(one, other[0])


def test_a_mask_prompt_counts(predictor: SamPredictor):
    point = np.array([[150, 30]]), np.array([1])
    _, iou, low_res = predictor.predict(*point)
    _, _, refined = predictor.predict(*point, mask_input=low_res[iou.argmax()][None])
    assert differ(low_res, refined)
    alone, _, _ = predictor.predict(mask_input=low_res[:1])
    assert alone.shape == (5, *SIZE)


def test_no_prompt_at_all(predictor: SamPredictor):
    """A model fine-tuned without prompts is asked without."""
    masks, iou, _ = predictor.predict(multimask_output=False)
    assert masks.shape == (1, *SIZE)
    assert np.isfinite(iou).all()


def test_nothing_recompiles(model: SamModel, image: np.ndarray):
    def use(predictor: SamPredictor, image: np.ndarray) -> None:
        predictor.set_image(image)
        height, width = image.shape[:2]
        for count in (1, 2, 3):
            points = np.tile([width / 2, height / 2], (count, 1))
            predictor.predict(points, np.ones(count))
        predictor.predict(box=[0, 0, width, height], multimask_output=True)

    def compiled() -> list[int]:
        return [function._cache_size() for function in (sam._encode, sam._decode, sam._select)]

    use(SamPredictor(model), image)
    before = compiled()
    other = SamModel(model.config, init_params(model.config, seed=2))
    second = SamPredictor(other)
    use(second, make_image((151, 73), seed=3))
    use(second, make_image((300, 444), seed=4))
    assert compiled() == before


def test_bgr(predictor: SamPredictor, model: SamModel, image: np.ndarray):
    flipped = SamPredictor(model)
    flipped.set_image(image[..., ::-1], image_format="BGR")
    assert np.array_equal(flipped.get_image_embedding(), predictor.get_image_embedding())
    flipped.set_image(image[..., ::-1])
    assert differ(flipped.get_image_embedding(), predictor.get_image_embedding())


def test_image_that_was_resized_already(predictor: SamPredictor, model: SamModel, image):
    other = SamPredictor(model)
    resized = other.transform.apply_image(image)
    other.set_torch_image(resized.transpose(2, 0, 1)[None], SIZE)
    assert np.array_equal(other.get_image_embedding(), predictor.get_image_embedding())
    with pytest.raises(ValueError, match=r"expected shape \(1, 3, 38, 128\)"):
        other.set_torch_image(resized[None], SIZE)
    with pytest.raises(ValueError, match="NaN or values outside"):
        other.set_torch_image(np.full((1, 3, 38, 128), np.nan), SIZE)


def test_states(model: SamModel, image: np.ndarray):
    predictor = SamPredictor(model)
    assert not predictor.is_image_set
    with pytest.raises(RuntimeError, match="no image is set"):
        predictor.predict(np.array([[1, 1]]), np.array([1]))
    with pytest.raises(RuntimeError, match="no image is set"):
        predictor.get_image_embedding()
    predictor.set_image(image)
    assert predictor.is_image_set
    assert predictor.original_size == SIZE
    assert predictor.get_image_embedding().shape == (1, 32, 6, 8)
    predictor.reset_image()
    assert not predictor.is_image_set
    predictor.set_image(image)
    with pytest.raises(ValueError, match="image"):
        predictor.set_image(image[..., 0])
    # Nobody should get masks of the image before for the one that was refused.
    assert not predictor.is_image_set


def test_bfloat16(model: SamModel, predictor: SamPredictor, image: np.ndarray):
    rough = SamPredictor(model, dtype="bfloat16")
    rough.set_image(image)
    assert rough.features.dtype == jnp.bfloat16
    assert rough.get_image_embedding().dtype == np.float32
    _, _, found = rough.predict(box=[20, 10, 150, 50])
    _, _, expected = predictor.predict(box=[20, 10, 150, 50])
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 0.5 * expected.std()


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\); repeat a greyscale image"),
        (np.zeros((8, 8, 4), np.uint8), "alpha"),
        (np.zeros((3, 8, 8), np.uint8), "channels come last"),
        (np.zeros((8, 8, 3), np.float32), "expected uint8 .* got float32"),
        (np.full((8, 8, 3), np.nan), "with NaN"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
    ],
)
def test_bad_image(model: SamModel, image: np.ndarray, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        SamPredictor(model).set_image(image)


def test_bad_format(model: SamModel, image: np.ndarray):
    with pytest.raises(ValueError, match="image_format 'HSV'"):
        SamPredictor(model).set_image(image, "HSV")


MASK = np.zeros((1, 24, 32))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"point_coords": [[201.5, 3]], "point_labels": [1]}, r"\(201.5, 3\) lies outside .* 200"),
        ({"point_coords": [[3, 4], [5, -2]], "point_labels": [1, 0]}, "point 1 at"),
        (
            {"point_coords": [[[3, 4]], [[5, 70]]], "point_labels": [[1], [1]]},
            "point 0 of prompt 1 at",
        ),
        ({"point_coords": [[3, np.nan]], "point_labels": [1]}, "point_coords: holds NaN"),
        ({"point_coords": [[3, 4]]}, "go together, got point_coords alone"),
        ({"point_labels": [1]}, "go together, got point_labels alone"),
        ({"point_coords": [[3, 4]], "point_labels": [1, 0]}, r"one per point, shape \(1,\)"),
        ({"point_coords": [[3, 4]], "point_labels": [2]}, "point_labels: 2 at point 0"),
        ({"point_coords": [[3, 4]], "point_labels": [np.nan]}, "point_labels: nan at point 0"),
        ({"point_coords": [3, 4], "point_labels": [1]}, r"point_coords: expected .* \(p, 2\)"),
        ({"point_coords": [[1, 2], [3]], "point_labels": [1, 1]}, "point_coords: expected"),
        ({"point_coords": np.zeros((0, 2)), "point_labels": []}, r"got shape \(0, 2\)"),
        ({"box": [20, 10, 150, 61.5]}, r"\[20, 10, 150, 61.5\] does not lie within the image"),
        ({"box": [-3, 10, 150, 50]}, "does not lie within"),
        ({"box": [300, 10, 350, 50]}, "200 wide and 60 high"),
        ({"box": [150, 10, 20, 50]}, r"\[150, 10, 20, 50\] is empty; .* x0 < x1"),
        ({"box": [20, 10, 20, 50]}, "is empty"),
        ({"box": [20, 10, 150]}, r"box: expected .* \(4,\) or \(b, 4\)"),
        ({"box": [20, 10, np.inf, 50]}, "box: holds NaN or infinite"),
        ({"mask_input": np.zeros((1, 25, 32))}, r"mask_input: expected .* \(1, 24, 32\)"),
        ({"mask_input": MASK[0]}, r"got shape \(24, 32\)"),
        ({"mask_input": MASK * np.nan}, "mask_input: holds NaN"),
        (
            {"box": [[1, 1, 9, 9]] * 3, "mask_input": MASK},
            r"unequal numbers of prompts \(box: 3, mask_input: 1\)",
        ),
    ],
)
def test_bad_prompt(predictor: SamPredictor, given: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        predictor.predict(**given)


def test_prompts_on_the_edge_are_fine(predictor: SamPredictor):
    predictor.predict(np.array([[200, 60]]), np.array([1]))
    predictor.predict(box=[-0.5, 0, 200.6, 60])
    # A filler has no place, so any will do.
    predictor.predict(np.array([[5, 5], [-99, 999]]), np.array([1, -1]))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 23, 64])
def test_chunks_cover_all(count: int):
    rows = [row for piece in prompts.chunks(count) for row in range(count)[piece]]
    assert rows == list(range(count))
    assert all(piece.stop - piece.start in prompts.PROMPTS for piece in prompts.chunks(count))


@pytest.mark.parametrize(("slots", "padded"), [(0, 4), (4, 4), (5, 16), (64, 64), (65, 128)])
def test_slots_come_in_few_sizes(slots: int, padded: int):
    coords, labels = prompts.pad_slots(np.ones((2, slots, 2)), np.ones((2, slots), np.int32))
    assert coords.shape == (2, padded, 2)
    assert (labels[:, slots:] == -2).all()
    assert (labels[:, :slots] == 1).all()


def test_load(model: SamModel, tmp_path: Path, image: np.ndarray, predictor: SamPredictor):
    save_weights(tmp_path / "tiny.safetensors", model.config, model.params)
    loaded = SamModel.load(tmp_path / "tiny.safetensors")
    assert (loaded.config, loaded.image_format, loaded.mask_threshold) == (model.config, "RGB", 0.0)
    again = SamPredictor(loaded)
    again.set_image(image)
    assert np.array_equal(again.get_image_embedding(), predictor.get_image_embedding())
    larger = SamModel.load(tmp_path / "tiny.safetensors", image_size=(128, 128))
    assert larger.config.image_size == (128, 128)
    assert larger.params["image_encoder"]["pos_embed"].shape == (1, 8, 8, 24)
