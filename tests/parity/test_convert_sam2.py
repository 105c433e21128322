"""The SAM 2 bridge against Meta's own builders and loader."""

import os
from importlib.util import find_spec

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if find_spec("sam2") is None:
    pytest.skip("sam2 is not installed", allow_module_level=True)

import tiny_models  # noqa: E402
from convert.reference import build_reference_sam2, import_sam2, randomise  # noqa: E402
from convert.sam2 import convert, main, to_torch  # noqa: E402
from convert.sam2_verify import verify  # noqa: E402
from samjax.models.sam2_config import VARIANTS, sam2  # noqa: E402

QUICK = ("sam2_hiera_tiny", "sam2.1_hiera_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back(name, tmp_path, capsys):
    """Meta's builder and loader, its file format, and both of our commands."""
    if name not in QUICK and not os.environ.get("SAMJAX_EVERY_SIZE"):
        pytest.skip("set SAMJAX_EVERY_SIZE=1 for all eight models")
    import_sam2()
    from sam2.build_sam import build_sam2

    short = name.replace("base_plus", "b+").replace("tiny", "t").replace("small", "s")
    short = short.replace("large", "l")
    yaml = f"configs/{'sam2.1' if '2.1' in name else 'sam2'}/{short}.yaml"
    theirs = randomise(build_sam2(yaml, device="cpu"), 0)
    source, converted, back = (tmp_path / file for file in ("a.pt", "a.safetensors", "back.pt"))
    torch.save({"model": theirs.state_dict()}, source)
    assert main(["--ckpt", str(source), "--variant", name]) == 0
    assert main(["--ckpt", str(converted), "--to-torch", str(back)]) == 0
    said = capsys.readouterr().out
    assert f"{name}, image 1024 x 1024" in said
    fresh = build_sam2(yaml, str(back), device="cpu")  # loads strictly
    for key, tensor in theirs.state_dict().items():
        found = fresh.state_dict()[key].numpy()
        assert np.array_equal(found.view(np.uint32), tensor.numpy().view(np.uint32)), key


def test_the_reference_is_upstreams_own():
    """Our way to build a model of any size makes the one that upstream's files describe."""
    import_sam2()
    from sam2.build_sam import build_sam2_video_predictor

    yaml = "configs/sam2.1/sam2.1_hiera_t.yaml"
    official = build_sam2_video_predictor(yaml, device="cpu")
    ours = build_reference_sam2(sam2("hiera_tiny"))
    described = {
        key: value
        for key, value in vars(official).items()
        if isinstance(value, bool | int | float | str | tuple)
    }
    described["fill_hole_area"] = 0  # upstream fills holes on CUDA only
    assert {key: vars(ours)[key] for key in described} == described
    shapes = {key: tensor.shape for key, tensor in official.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("config", [tiny_models.SAM2, tiny_models.SAM2_0], ids=["2.1", "2.0"])
def test_verify(config, quick_compilation, capsys):
    theirs = randomise(build_reference_sam2(config), 0)
    state = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    _, params = convert(state, config)
    assert all(np.array_equal(state[key], array) for key, array in to_torch(params).items())
    stages = verify(config, params)
    assert [stage.name for stage in stages][-2:] == ["memory", "conditioned embedding"]
    assert max(stage.relative for stage in stages) < 2e-5
