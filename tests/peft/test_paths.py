"""Labels by path: exactly one for every parameter, and no rule without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samjax.peft.paths import (
    FREEZE,
    in_order,
    join,
    label_by_path,
    path_name,
    split_by_label,
    table,
)

PARAMS = {
    "encoder": {
        "blocks": {
            "0": {"qkv": {"kernel": jnp.zeros((2, 6)), "bias": jnp.zeros(6)}},
            "1": {"qkv": {"kernel": jnp.zeros((2, 6)), "bias": jnp.zeros(6)}},
        }
    },
    "decoder": {"head": {"kernel": jnp.zeros((3, 4), jnp.bfloat16)}},
}


def test_in_order_the_first_matching_rule_decides():
    labels = label_by_path(
        PARAMS,
        in_order(
            [
                (r"encoder/blocks/1/.*", "train"),
                (r".*/bias", "other"),
                (r"encoder/.*|decoder/.*", FREEZE),
            ]
        ),
    )
    assert labels == {
        "encoder": {
            "blocks": {
                "0": {"qkv": {"kernel": FREEZE, "bias": "other"}},
                "1": {"qkv": {"kernel": "train", "bias": "train"}},
            }
        },
        "decoder": {"head": {"kernel": FREEZE}},
    }


def test_a_rule_must_match_the_whole_path():
    with pytest.raises(ValueError, match="nothing matches 'encoder'"):
        label_by_path(PARAMS, [("encoder", "train"), (".*", FREEZE)])


def test_everything_that_is_not_covered_is_named():
    rules = [(r"encoder/.*/bias", "train"), (r"encoder/neck/.*", "train"), (r"memory/.*", FREEZE)]
    with pytest.raises(ValueError, match="every parameter exactly") as error:
        label_by_path(PARAMS, rules)
    assert str(error.value).splitlines()[1:] == [
        "  no rule for decoder/head/kernel",
        "  no rule for encoder/blocks/0/qkv/kernel",
        "  no rule for encoder/blocks/1/qkv/kernel",
        "  nothing matches 'encoder/neck/.*'",
        "  nothing matches 'memory/.*'",
    ]


def test_a_rule_behind_a_wider_one_is_idle():
    with pytest.raises(ValueError, match=r"nothing matches .*decoder/"):
        label_by_path(PARAMS, in_order([(".*", FREEZE), ("decoder/.*", "train")]))


def test_a_parameter_with_two_labels_is_named():
    with pytest.raises(ValueError, match="is labelled") as error:
        label_by_path(PARAMS, [(".*", FREEZE), ("decoder/.*", "train")])
    assert str(error.value).splitlines()[1:] == [
        "  decoder/head/kernel is labelled 'freeze' and 'train'"
    ]
    twice = label_by_path(PARAMS, [(".*", FREEZE), ("decoder/.*", FREEZE)])
    assert set(jax.tree.leaves(twice)) == {FREEZE}


def test_path_names_of_other_trees():
    tree = {"a": [jnp.zeros(1), (jnp.zeros(2), {"b": jnp.zeros(3)})]}
    labels = label_by_path(tree, [("a/0", "x"), ("a/1/0", "y"), ("a/1/1/b", "z")])
    assert labels == {"a": ["x", ("y", {"b": "z"})]}
    assert path_name(()) == ""


def test_split_parts_by_label_without_empty_branches():
    labels = label_by_path(PARAMS, in_order([(".*/bias", "train"), (".*", FREEZE)]))
    train, rest = split_by_label(PARAMS, labels, "train")
    assert sorted(train) == ["encoder"]
    assert sorted(train["encoder"]["blocks"]["0"]["qkv"]) == ["bias"]
    assert sorted(rest["encoder"]["blocks"]["0"]["qkv"]) == ["kernel"]
    assert (
        train["encoder"]["blocks"]["1"]["qkv"]["bias"]
        is (PARAMS["encoder"]["blocks"]["1"]["qkv"]["bias"])
    )
    nothing, everything = split_by_label(PARAMS, labels, "unused")
    assert nothing == {}
    assert sorted(everything) == sorted(PARAMS)


names = st.sampled_from("abcd")
trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))


@settings(deadline=None)  # the first call on a busy machine is slow
@given(trees)
def test_join_undoes_split(tree):
    def parity(tree):
        return {k: parity(v) if isinstance(v, dict) else v % 2 for k, v in tree.items()}

    odd, even = split_by_label(tree, parity(tree), 1)
    assert join(odd, even) == tree
    assert join(even, odd) == tree


def test_join_refuses_what_both_hold():
    with pytest.raises(ValueError, match="both trees hold a leaf at 'b'"):
        join({"a": {"b": 1}}, {"a": {"b": 2}})
    with pytest.raises(ValueError, match="both trees hold a leaf at 'b'"):
        join({"a": {"b": 1}}, {"a": {"b": {"c": 2}}})


def test_table_counts_parameters_and_bytes():
    labels = label_by_path(PARAMS, in_order([("decoder/.*", "train"), (".*", FREEZE)]))
    lines = table(PARAMS, labels).splitlines()
    assert "weights MiB  gradients MiB  state MiB" in lines[0]
    assert lines[1].split() == ["freeze", "4", "36", "75.00%", "0.00", "0.00", "0.00"]
    assert lines[2].split() == ["train", "1", "12", "25.00%", "0.00", "0.00", "0.00"]
    assert len(lines) == 3

    big = {"a": np.zeros((1024, 1024), np.float32), "b": np.zeros((1024, 1024), np.float16)}
    states = {"y": {"moment": np.zeros((512, 1024), np.float32), "none": ()}}
    first, second = table(big, {"a": FREEZE, "b": "y"}, states).splitlines()[1:]
    assert first.split() == ["freeze", "1", "1,048,576", "50.00%", "4.00", "0.00", "0.00"]
    assert second.split() == ["y", "1", "1,048,576", "50.00%", "2.00", "2.00", "2.00"]
