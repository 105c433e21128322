"""The engine of the bridge on toy trees: no torch, no SAM."""

import ml_dtypes
import numpy as np
import pytest

from convert.bridge import BridgeError, from_torch, routes, to_torch
from samjax.trees import flatten, unflatten

NAMES = [
    ("body/conv{p}", "net.stem.3{p}"),
    ("tail/{name}/odd/{p}", "net.{name}.0.{p}"),
    ("{p}", "net.{p}"),
]
LEAVES = [
    ("deconv*/kernel", "weight", "i o h w -> h w o i"),
    ("kernel", "weight", "o i h w -> h w i o"),
    ("kernel", "weight", "o i -> i o"),
    ("scale", "weight", "c -> c"),
    ("bias", "bias", "c -> c"),
    ("table_[hw]", "*", "..."),
]
# our path, our shape, their key, their shape; every dimension differs
PAIRS = [
    ("body/conv/kernel", (2, 3, 4, 5), "net.stem.3.weight", (5, 4, 2, 3)),
    ("body/conv/bias", (5,), "net.stem.3.bias", (5,)),
    ("up/deconv1/kernel", (6, 7, 8, 9), "net.up.deconv1.weight", (9, 8, 6, 7)),
    ("blocks/0/lin/kernel", (10, 11), "net.blocks.0.lin.weight", (11, 10)),
    ("blocks/10/lin/kernel", (12, 13), "net.blocks.10.lin.weight", (13, 12)),
    ("blocks/0/norm/scale", (14,), "net.blocks.0.norm.weight", (14,)),
    ("blocks/0/table_h", (15, 16, 17), "net.blocks.0.table_h", (15, 16, 17)),
    ("tail/a/b/odd/bias", (18,), "net.a.b.0.bias", (18,)),
]
ABSTRACT = unflatten({path: np.empty(shape) for path, shape, _, _ in PAIRS})


@pytest.fixture
def state_dict(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {key: rng.normal(size=shape).astype(np.float32) for _, _, key, shape in PAIRS}


def test_names_and_layouts(state_dict):
    flat = flatten(from_torch(state_dict, ABSTRACT, NAMES, LEAVES))
    assert {path: leaf.shape for path, leaf in flat.items()} == {p: s for p, s, _, _ in PAIRS}
    assert {path: route.key for path, route in routes(ABSTRACT, NAMES, LEAVES).items()} == {
        path: key for path, _, key, _ in PAIRS
    }
    for leaf in flat.values():
        assert leaf.dtype == np.float32
        assert leaf.flags.c_contiguous
    # indices, against a transposition that happens to have the right shape
    assert flat["body/conv/kernel"][1, 2, 3, 4] == state_dict["net.stem.3.weight"][4, 3, 1, 2]
    assert flat["up/deconv1/kernel"][1, 2, 3, 4] == state_dict["net.up.deconv1.weight"][4, 3, 1, 2]
    assert flat["blocks/0/lin/kernel"][1, 2] == state_dict["net.blocks.0.lin.weight"][2, 1]


def test_round_trip_is_exact(state_dict):
    back = to_torch(from_torch(state_dict, ABSTRACT, NAMES, LEAVES), NAMES, LEAVES)
    assert back.keys() == state_dict.keys()
    for key, array in back.items():
        assert array.tobytes() == state_dict[key].tobytes()
        assert array.flags.c_contiguous


def test_result_does_not_alias_the_checkpoint(state_dict):
    params = from_torch(state_dict, ABSTRACT, NAMES, LEAVES)
    for array in state_dict.values():
        array[:] = np.nan
    assert all(np.isfinite(leaf).all() for leaf in flatten(params).values())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_float32(state_dict, dtype):
    stored = {key: array.astype(dtype) for key, array in state_dict.items()}
    back = to_torch(from_torch(stored, ABSTRACT, NAMES, LEAVES), NAMES, LEAVES)
    for key, array in back.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, stored[key].astype(np.float32))


def test_integers_are_refused(state_dict):
    state_dict["net.stem.3.bias"] = np.arange(5)
    with pytest.raises(ValueError, match=r"'net\.stem\.3\.bias' is int64; expected floating"):
        from_torch(state_dict, ABSTRACT, NAMES, LEAVES)


def test_all_mismatches_at_once(state_dict):
    del state_dict["net.stem.3.bias"]
    del state_dict["net.blocks.0.table_h"]
    state_dict["net.blocks.0.lin.weight"] = np.zeros((10, 11), np.float32)  # transposed
    state_dict["net.blocks.0.lin.bias"] = np.zeros(7, np.float32)
    with pytest.raises(BridgeError) as caught:
        from_torch(state_dict, ABSTRACT, NAMES, LEAVES)
    error = caught.value
    assert error.missing == {"net.stem.3.bias": (5,), "net.blocks.0.table_h": (15, 16, 17)}
    assert error.unexpected == {"net.blocks.0.lin.bias": (7,)}
    assert error.misshaped == {"net.blocks.0.lin.weight": ((11, 10), (10, 11))}
    assert isinstance(error, ValueError)
    text = str(error)
    assert "2 missing, 1 left over, 1 of another shape" in text
    assert "missing      net.stem.3.bias (5,)" in text
    assert "left over    net.blocks.0.lin.bias (7,)" in text
    assert "other shape  net.blocks.0.lin.weight: expected (11, 10), found (10, 11)" in text


def test_same_size_of_another_shape_is_a_mismatch(state_dict):
    state_dict["net.stem.3.bias"] = state_dict["net.stem.3.bias"].reshape(5, 1)
    with pytest.raises(BridgeError) as caught:
        from_torch(state_dict, ABSTRACT, NAMES, LEAVES)
    assert caught.value.misshaped == {"net.stem.3.bias": ((5,), (5, 1))}


def test_a_long_list_is_cut_and_counted():
    with pytest.raises(BridgeError) as caught:
        from_torch({f"x{i}": np.zeros(1) for i in range(100)}, ABSTRACT, NAMES, LEAVES)
    assert len(caught.value.unexpected) == 100
    assert "… and 60 more" in str(caught.value)


def test_ignored_keys_are_not_left_over(state_dict):
    state_dict["net.counter"] = np.zeros(1)
    params = from_torch(state_dict, ABSTRACT, NAMES, LEAVES, ignore=[("*.counter", "a step")])
    assert flatten(params).keys() == {path for path, _, _, _ in PAIRS}


def test_nan_and_signed_zero_survive():
    """The bridge moves bits; whether they make sense is the reader's question."""
    bits = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    abstract = {"x": {"bias": np.empty(4)}}
    back = to_torch(from_torch({"net.x.bias": bits}, abstract, NAMES, LEAVES), NAMES, LEAVES)
    assert back["net.x.bias"].tobytes() == bits.tobytes()


@pytest.mark.parametrize(
    ("tree", "names", "leaves", "complaint"),
    [
        ({"x": {"beta": np.empty(3)}}, NAMES, LEAVES, "no leaf rule fits 'x/beta' with 1 axes"),
        ({"x": {"kernel": np.empty((1, 2, 3))}}, NAMES, LEAVES, "no leaf rule fits 'x/kernel'"),
        ({"x": {"bias": np.empty(3)}}, [("y/{p}", "y.{p}")], LEAVES, "no name rule fits 'x/bias'"),
        (
            {"x": {"bias": np.empty(3)}, "y": {"bias": np.empty(3)}},
            [("{a}/bias", "same")],
            LEAVES,
            "both 'x/bias' and 'y/bias' map to 'same'",
        ),
        (
            {"x": {"bias": np.empty((3, 4))}},
            NAMES,
            [("bias", "bias", "a b -> a a")],
            "not a transposition",
        ),
    ],
)
def test_mistakes_in_the_tables(tree, names, leaves, complaint):
    with pytest.raises(ValueError, match=complaint):
        routes(tree, names, leaves)
