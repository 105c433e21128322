import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.training.clipping import clip_each


def test_each_leaf_is_clipped_as_torch_clips_it_alone(rng):
    torch = pytest.importorskip("torch")
    shapes = {"long": (30, 40), "short": (7,), "one": ()}
    gradients = {name: np.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}
    gradients["short"] *= np.float32(1e-3)  # the norm of all together would shrink this one too
    gradients["zero"] = np.zeros((2, 3), np.float32)
    clip = clip_each(0.5)
    ours, _ = jax.jit(clip.update)(jax.tree.map(jnp.array, gradients), clip.init(gradients))
    for name, gradient in gradients.items():
        parameter = torch.zeros(gradient.shape)
        parameter.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        np.testing.assert_allclose(ours[name], parameter.grad, rtol=3e-6, err_msg=name)
    np.testing.assert_allclose(np.linalg.norm(ours["long"]), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(ours["short"], gradients["short"])


@pytest.mark.parametrize("norm", [0, -1.0, float("nan")])
def test_a_norm_that_is_not_positive_is_refused(norm):
    with pytest.raises(ValueError, match=f"max_norm is {norm}"):
        clip_each(norm)
