"""SimCLRv2's checkpoints: TensorFlow's files without TensorFlow, upstream's names, the command.

`WRITTEN_BY_TENSORFLOW` is what TensorFlow 2.21 wrote. Larger files are written here, after the
format as LevelDB (`doc/table_format.md`) and TensorFlow (`tensor_bundle.proto`) publish it; that
TensorFlow reads those as well was tried once.
"""

import base64
import functools
import json
import struct

import numpy as np
import pytest

from convert import bridge, simclr
from convert.simclr import convert, layer_names, load, main, save, unused, variant_name
from convert.tf_bundle import Bundle, crc32c
from convert.torch_io import CheckpointError
from data_sets import cut, replaced
from samjax.models.sk_resnet import SkResNetConfig
from samjax.models.weights import save_tensors
from samjax.trees import flatten

TINY = SkResNetConfig(
    blocks=(1, 2),
    width_multiplier=1,
    channels=6,
    sk_ratio=1.25,
    sk_min_channels=9,
    head_layers=2,
    head_channels=7,
)
WRITTEN_BY_TENSORFLOW = {  # by `tf.compat.v1.train.Saver`, and an index by `tf.train.Checkpoint`
    "one.index": (
        "AAAGCAEaAggBABgbYmFzZV9tb2RlbC9jb252MmQva2VybmVsCAESEBICCAESAggCEgIIARICCAMoGDVNycA3GAkd"
        "L01vbWVudHVtCAESEBICCAESAggCEgIIARICCAMgGCgYNc/0X3wAAQ1kCAISACAwKAg13NhDWwALDWdsb2JhbF9z"
        "dGVwCAkSACA4KAg11c0HqgAEEWhhbGYIExIEEgIIAiBAKAQ1FYP2NAAAAAABAAAAAAa83SQAAAAAAQAAAADA8qGw"
        "AAEDaQC0AQAAAAABAAAAABV0Vh65AQjGAQ8AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAFf7gIsk"
        "dUfb"
    ),
    "one.data-00000-of-00001": (
        "AAAAAAAAgD4AAAA/AABAPwAAgD8AAKA/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACkB00QMAAAAAAAA8"
        "AEE="
    ),
    "two.index": (
        "AAAGCAEaAggBABwNX0NIRUNLUE9JTlRBQkxFX09CSkVDVF9HUkFQSAgHEgAgCChhNRhtc18AHg9tL3YvLkFUVFJJ"
        "QlVURVMvVkFSSUFCTEVfVkFMVUUIARIEEgIIAigINVk85TUAAAAAAQAAAAB8K2VEAAAAAAEAAAAAwPKhsAABAm4A"
        "bQAAAAABAAAAAKdDfHpyCH8OAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAV/uAiyR1R9s="
    ),
}
DATA = "model.ckpt-25.data-00000-of-00001"


@functools.cache
def checksum_of_bits(content):
    """Castagnoli's, a bit at a time, as it is stored: turned and with a constant added."""
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    register ^= 0xFFFFFFFF
    return ((register >> 15 | register << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number):
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def message(*fields):
    """Of protocol buffers: (number, int), (number, bytes) or (number, "fixed", int)."""
    found = b""
    for number, *value in fields:
        match value:
            case [int(value)]:
                found += varint(number << 3) + varint(value)
            case [bytes(value)]:
                found += varint(number << 3 | 2) + varint(len(value)) + value
            case ["fixed", value]:
                found += varint(number << 3 | 5) + struct.pack("<I", value)
    return found


def write_table(path, items, per_block, compression):
    """Sorted keys; in a block each says how much it shares with the one before, but every 16th."""
    content, handles = b"", []

    def block(pairs, every=16):
        nonlocal content
        body, restarts, before = b"", [], b""
        for number, (key, value) in enumerate(pairs):
            shared = 0
            if number % every == 0:
                restarts.append(len(body))
            else:
                while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                    shared += 1
            body += varint(shared) + varint(len(key) - shared) + varint(len(value))
            body += key[shared:] + value
            before = key
        restarts = restarts or [0]
        body += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
        handle = varint(len(content)) + varint(len(body))
        kind = bytes([compression])
        content += body + kind + struct.pack("<I", checksum_of_bits(body + kind))
        return handle

    for start in range(0, len(items), per_block):
        pairs = items[start : start + per_block]
        handles.append((pairs[-1][0], block(pairs)))
    places = block([]) + block(handles, every=1)
    footer = places + bytes(40 - len(places)) + bytes.fromhex("57fb808b247547db")
    path.write_bytes(content + footer)


def write_checkpoint(folder, variables, *, per_block=7, compression=0, name="model.ckpt-25"):
    """Both files; returns what their names begin with."""
    types = {"<f4": 1, "<f8": 2, "<i8": 9, "<f2": 19}
    items = [(b"", message((1, 1), (3, message((1, 1)))))]
    data = b""
    for key, array in sorted(variables.items()):
        array = np.asarray(array)
        shape = message(*((2, message((1, side))) for side in array.shape))
        content = array.tobytes()
        fields = [(1, types[array.dtype.str]), (2, shape), (4, len(data)), (5, len(content))]
        checksum = (6, "fixed", checksum_of_bits(content))
        items.append((key.encode(), message(*fields, checksum)))
        data += content
    write_table(folder / f"{name}.index", items, per_block, compression)
    (folder / f"{name}.data-00000-of-00001").write_bytes(data)
    return folder / name


def upstreams_shapes(config, average=False):
    """Name and shape of each variable, in the order in which upstream's `resnet.py` makes them."""
    found, counts = {}, {"conv2d": 0, "batch_normalization": 0}
    prefix = "ema_model/" if average else ""

    def numbered(kind):
        number = counts[kind]
        counts[kind] += 1
        return f"{prefix}base_model/{kind}" + (f"_{number}" if number else "")

    def norm(name, channels, center=True):
        for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
            if center or leaf != "beta":
                found[f"{name}/{leaf}"] = (channels,)

    def conv(size, channels, filters, normed=True):
        found[numbered("conv2d") + "/kernel"] = (size, size, channels, filters)
        if normed:
            norm(numbered("batch_normalization"), filters)
        return filters

    width = config.channels * config.width_multiplier
    x = conv(3, 3, width // 2)
    x = conv(3, x, width // 2)
    x = conv(3, x, width)
    for stage, blocks in enumerate(config.blocks):
        filters = width * 2**stage
        for block in range(blocks):
            if block == 0:
                conv(1, x, 4 * filters)
            conv(1, x, filters)
            conv(3, filters, 2 * filters)
            hidden = conv(1, filters, max(int(filters * config.sk_ratio), config.sk_min_channels))
            conv(1, hidden, 2 * filters, normed=False)
            x = conv(1, filters, 4 * filters)
    for i in range(config.head_layers):
        last = i == config.head_layers - 1
        filters = config.head_channels if last else x
        found[f"{prefix}head_contrastive/nl_{i}/dense/kernel"] = (x, filters)
        norm(f"{prefix}head_contrastive/nl_{i}/batch_normalization", filters, center=not last)
        x = filters
    return found


def random_variables(config=TINY, average=False, seed=0):
    """With what else a checkpoint of upstream holds."""
    rng = np.random.default_rng(seed)
    shapes = upstreams_shapes(config, average)
    found = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    trained = [name for name in found if "/moving_" not in name]
    found |= {f"{name}/Momentum": np.zeros(2, np.float32) for name in trained}
    found["head_supervised/linear_layer/dense/kernel"] = np.zeros((3, 2), np.float32)
    found["head_supervised/linear_layer/dense/bias"] = np.zeros(2, np.float32)
    return {**found, "global_step": np.int64(250228)}


@pytest.fixture(scope="module")
def variables():
    return random_variables()


@pytest.fixture
def checkpoint(tmp_path, variables):
    return write_checkpoint(tmp_path, variables)


def test_checksums():
    """RFC 3720, appendix B.4; and the way for long contents, at lengths about powers of two."""
    vectors = {
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        bytes(reversed(range(32))): 0x113FDB5C,
        b"123456789": 0xE3069283,
        b"": 0,
    }
    for content, expected in vectors.items():
        assert crc32c(content) == expected
    long = np.random.default_rng(0).bytes(140_000)
    for length in (65_535, 65_536, 65_537, 131_073, 140_000):
        content = long[:length]
        found = crc32c(content)
        masked = ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert masked == checksum_of_bits(content)


def test_what_tensorflow_wrote(tmp_path):
    for name, content in WRITTEN_BY_TENSORFLOW.items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
    bundle = Bundle(tmp_path / "one")
    read = {name: bundle.read(name) for name in bundle.entries}
    kernel = np.arange(6, dtype=np.float32).reshape(1, 2, 1, 3) / 4
    expected = {
        "base_model/conv2d/kernel": kernel,
        "base_model/conv2d/kernel/Momentum": np.zeros_like(kernel),
        "d": np.float64(3.25),
        "global_step": np.int64(250228),
        "half": np.float16([1, 2.5]),
    }
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(read[name], array)
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
    assert set(simclr.read_variables(tmp_path / "one")) == {"base_model/conv2d/kernel", "d", "half"}
    with pytest.raises(CheckpointError, match=r"two: a checkpoint of TensorFlow 2; take that of"):
        load(tmp_path / "two")
    with pytest.raises(ValueError, match="is of TensorFlow's type 7, which is not read"):
        Bundle(tmp_path / "two").read("_CHECKPOINTABLE_OBJECT_GRAPH")


@pytest.mark.parametrize("per_block", [1, 5, 1000])
def test_tables_of_many_blocks(tmp_path, variables, per_block):
    bundle = Bundle(write_checkpoint(tmp_path, variables, per_block=per_block))
    assert bundle.entries.keys() == variables.keys()
    for name, array in variables.items():
        np.testing.assert_array_equal(bundle.read(name), array)


# Of the published r50_2x_sk1: where stages begin and end, and what has no norm.
PUBLISHED = {
    "base_model/conv2d/kernel": (3, 3, 3, 64),
    "base_model/conv2d_2/kernel": (3, 3, 64, 128),
    "base_model/conv2d_3/kernel": (1, 1, 128, 512),  # the shortcut comes before its block
    "base_model/conv2d_4/kernel": (1, 1, 128, 128),
    "base_model/conv2d_5/kernel": (3, 3, 128, 256),  # two kernels at once
    "base_model/conv2d_6/kernel": (1, 1, 128, 32),
    "base_model/conv2d_7/kernel": (1, 1, 32, 256),
    "base_model/conv2d_8/kernel": (1, 1, 128, 512),
    "base_model/batch_normalization_6/gamma": (32,),
    "base_model/batch_normalization_7/moving_variance": (512,),
    "base_model/conv2d_19/kernel": (1, 1, 512, 1024),
    "base_model/conv2d_86/kernel": (1, 1, 1024, 4096),
    "base_model/batch_normalization_70/beta": (4096,),
    "head_contrastive/nl_0/dense/kernel": (4096, 4096),
    "head_contrastive/nl_2/dense/kernel": (4096, 128),
    "head_contrastive/nl_2/batch_normalization/moving_mean": (128,),
}


@pytest.mark.parametrize("average", [False, True])
def test_names_and_shapes_of_the_published_network(average):
    """Each of its variables, left out alone, is all that is missing: the others have a place."""
    shapes = upstreams_shapes(SkResNetConfig(), average)
    prefix = "ema_model/" if average else ""
    assert {name: shapes[prefix + name] for name in PUBLISHED} == PUBLISHED
    assert len(shapes) == 87 + 71 * 4 + 3 + 3 * 4 - 1
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    in_head = sum(size for name, size in sizes.items() if "head_contrastive/" in name)
    assert (sum(sizes.values()) - in_head, in_head) == (140_428_864, 34_111_872)
    assert f"{prefix}head_contrastive/nl_2/batch_normalization/beta" not in shapes
    everything = {k: np.broadcast_to(np.float32(0), shape) for k, shape in shapes.items()}
    for name in (next(iter(shapes)), f"{prefix}base_model/conv2d_7/kernel", list(shapes)[-1]):
        with pytest.raises(bridge.BridgeError) as caught:
            convert({k: v for k, v in everything.items() if k != name}, None, average)
        assert caught.value.missing == {name: shapes[name]}
        assert not caught.value.unexpected
        assert not caught.value.misshaped


def test_names_of_other_networks():
    assert variant_name(SkResNetConfig()) == "r50_2x_sk1"
    deep = SkResNetConfig(blocks=(3, 8, 36, 3), width_multiplier=3)
    assert variant_name(deep) == "r152_3x_sk1"
    assert variant_name(TINY) == "custom"
    assert len(layer_names(deep)) == 2 * (3 + 50 * 5 + 4) - 50 + 2 * 3
    for config in (deep, TINY):
        made = {name.rsplit("/", 1)[0] for name in upstreams_shapes(config)}
        assert {theirs for _, theirs in layer_names(config)} == made


def test_why_a_variable_is_left_out():
    assert unused("base_model/conv2d/kernel") is None
    assert unused("head_contrastive/nl_0/dense/kernel") is None
    assert unused("somewhere/else") is None
    assert unused("base_model/conv2d/kernel/Momentum") == "state of the optimizer"
    assert unused("head_supervised/linear_layer/dense/bias") == "classifier of ImageNet"
    assert unused("global_step") == "number of training steps"
    assert unused("ema_model/base_model/conv2d/kernel").startswith("average of the weights")
    assert unused("ema_model/base_model/conv2d/kernel", average=True) is None
    assert unused("base_model/conv2d/kernel", average=True).startswith("last weights")


def test_there_and_back(checkpoint, variables):
    """From TensorFlow's file to ours and again: the same bits, and what is known of them."""
    loaded = load(checkpoint, TINY)
    assert loaded.config == TINY
    assert set(loaded.metadata) == {"variant", "sha256", "source", "weights"}
    assert loaded.metadata["source"] == "model.ckpt-25"
    assert loaded.metadata["weights"] == "last"
    found = flatten(loaded.params)
    assert sum(leaf.size for leaf in found.values()) == sum(
        int(np.prod(shape)) for shape in upstreams_shapes(TINY).values()
    )
    anchors = {
        "stem/0/conv/kernel": "base_model/conv2d/kernel",
        "stem/2/norm/scale": "base_model/batch_normalization_2/gamma",
        "stages/0/0/shortcut/norm/bias": "base_model/batch_normalization_3/beta",
        "stages/0/0/selective/kernels/conv/kernel": "base_model/conv2d_5/kernel",
        "stages/0/0/selective/select/kernel": "base_model/conv2d_7/kernel",
        "stages/0/0/expand/norm/variance": "base_model/batch_normalization_7/moving_variance",
        "stages/1/1/reduce/norm/mean": "base_model/batch_normalization_13/moving_mean",
        "head/1/dense/kernel": "head_contrastive/nl_1/dense/kernel",
    }
    for path, name in anchors.items():
        np.testing.assert_array_equal(found[path], variables[name].reshape(found[path].shape))
    target = checkpoint.with_name("simclr.safetensors")
    save(target, *loaded)
    again = load(target)
    assert (again.config, again.metadata) == (loaded.config, loaded.metadata)
    assert flatten(again.params).keys() == found.keys()
    for path, leaf in flatten(again.params).items():
        np.testing.assert_array_equal(leaf, found[path], err_msg=path)
    # The index names the checkpoint as well.
    by_index = load(checkpoint.with_name("model.ckpt-25.index"), TINY)
    np.testing.assert_array_equal(
        by_index.params["head"]["0"]["dense"]["kernel"], found["head/0/dense/kernel"]
    )


def test_the_average_is_another_network(tmp_path, variables):
    averaged = random_variables(average=True, seed=1)
    path = write_checkpoint(tmp_path, {**averaged, **variables})
    for average, source, prefix in ((False, variables, ""), (True, averaged, "ema_model/")):
        loaded = load(path, TINY, average)
        assert loaded.metadata["weights"] == ("averaged" if average else "last")
        expected = source[f"{prefix}base_model/conv2d_1/kernel"]
        np.testing.assert_array_equal(flatten(loaded.params)["stem/1/conv/kernel"], expected)
    with pytest.raises(bridge.BridgeError) as caught:
        load(write_checkpoint(tmp_path, variables), TINY, average=True)
    assert set(caught.value.missing) == set(upstreams_shapes(TINY, average=True))


def test_all_mismatches_at_once(tmp_path, variables):
    broken = dict(variables)
    del broken["base_model/conv2d_3/kernel"], broken["head_contrastive/nl_0/dense/kernel"]
    broken["base_model/conv2d_99/kernel"] = np.ones((1, 1, 2, 3), np.float32)
    broken["base_model/batch_normalization/beta"] = np.ones(4, np.float32)
    path = write_checkpoint(tmp_path, broken)
    with pytest.raises(bridge.BridgeError, match=f"{path} does not fit the model: 2 m") as caught:
        load(path, TINY)
    assert caught.value.missing == {
        "base_model/conv2d_3/kernel": (1, 1, 6, 24),
        "head_contrastive/nl_0/dense/kernel": (48, 48),
    }
    assert caught.value.unexpected == {"base_model/conv2d_99/kernel": (1, 1, 2, 3)}
    assert caught.value.misshaped == {"base_model/batch_normalization/beta": ((3,), (4,))}


def test_other_networks_are_told(tmp_path, variables):
    plain = {**variables, "base_model/conv2d/kernel": np.ones((7, 7, 3, 4), np.float32)}
    path = write_checkpoint(tmp_path, plain)
    with pytest.raises(
        CheckpointError, match=f"{path}: a network without selective kernels; .*sk1"
    ):
        load(path, TINY)
    spoiled = variables["base_model/conv2d_1/kernel"].copy()
    spoiled[0, 0, 0, 0] = np.nan
    path = write_checkpoint(tmp_path, {**variables, "base_model/conv2d_1/kernel": spoiled})
    with pytest.raises(CheckpointError, match=f"{path}: NaN or infinite values in 1 of .*conv2d_1"):
        load(path, TINY)


def test_damaged_files_are_named(checkpoint, capsys):
    index, data = checkpoint.with_name("model.ckpt-25.index"), checkpoint.with_name(DATA)
    whole = index.read_bytes()
    numbers = data.read_bytes()
    flipped = bytearray(numbers)
    flipped[40] ^= 4
    misspelt = whole.replace(b"kernel", b"kernal", 1)
    for file, content, message in (
        (index, whole[: len(whole) // 2], "the index is cut off, or of another kind of file"),
        (index, b"", "the index is cut off"),
        (index, bytes(100), "the index is cut off"),
        (index, misspelt, "the index is damaged: the checksum of a block is another one"),
        (index, b"\xff" * 40 + whole[-8:], r"index is damaged|the index is cut off"),
        (index, whole[-48:], "the index is damaged"),
        (data, bytes(flipped), "its checksum is another one"),
        (data, numbers[: len(numbers) // 2], f"{DATA} ends within "),
        (data, None, "No such file"),
    ):
        with replaced(file, content):
            with pytest.raises(CheckpointError, match=message) as caught:
                load(checkpoint, TINY)
            assert str(caught.value).startswith(f"{checkpoint}: a damaged or incomplete checkpoint")
    load(checkpoint, TINY)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"no such checkpoint; expected the file model\.ckpt"):
        load(checkpoint, TINY)
    assert main(["--ckpt", str(checkpoint)]) == 1
    assert "convert.simclr: error: " in capsys.readouterr().err


def test_a_compressed_index_is_told(tmp_path, variables):
    path = write_checkpoint(tmp_path, variables, compression=1)
    with pytest.raises(CheckpointError, match="the index is compressed, which TensorFlow's own"):
        load(path, TINY)


def test_converted_files_that_do_not_fit(checkpoint, tmp_path):
    params = load(checkpoint, TINY).params
    path = tmp_path / "simclr.safetensors"
    save(path, SkResNetConfig(**{**TINY.to_dict(), "blocks": (1, 1)}), params)
    with pytest.raises(bridge.BridgeError, match=rf"{path} .* 0 missing, 21 left over"):
        load(path)
    config = json.dumps(TINY.to_dict())
    for metadata, message in (
        ({"family": "sam", "config": config}, "a model of family 'sam'; expected 'simclr'"),
        ({"family": "simclr", "config": '{"depth": 50}'}, "config in its metadata cannot be used"),
    ):
        save_tensors(path, params, metadata)
        with pytest.raises(CheckpointError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
    save(path, TINY, params)
    cut(path)
    with pytest.raises(ValueError, match=f"{path}: "):
        load(path)


def test_command(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(simclr, "SkResNetConfig", lambda **_: TINY)
    assert main(["--ckpt", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    monkeypatch.undo()
    target = checkpoint.with_name("model.ckpt-25.safetensors")
    count = sum(int(np.prod(shape)) for shape in upstreams_shapes(TINY).values())
    assert f"{count:,}" in said
    assert "weights        last" in said
    assert str(target) in said
    assert load(target).config == TINY
    other = checkpoint.with_name("other.safetensors")
    assert main(["--ckpt", str(checkpoint), "--out", str(other), "--width", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"convert.simclr: error: {checkpoint} does not fit the model: ")
    assert not other.exists()
