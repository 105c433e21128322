"""Blocks with experts against PyTorch, in float64: output and gradients.

The reference is written from the description of SAMora's ``hl_attn.py`` and
``samora_lora_hsam.py``, with their order of modules; it goes through the windows one by one, and
computes four separate projections and attentions.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

from torch.nn.functional import (  # noqa: E402
    gelu,
    layer_norm,
    max_pool2d,
    multi_head_attention_forward,
    pad,
    scaled_dot_product_attention,
)

from samjax.models.functional import abstract_params, bind  # noqa: E402
from samjax.models.hiera import BlockPlan  # noqa: E402
from samjax.models.hl_attention import SamoraHieraConfig, SamoraViTConfig  # noqa: E402
from samjax.trees import flatten, unflatten  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 1e-5
GRID = (6, 10)  # tokens
ALL, TWO, ONE = ("image", "patch", "pixel"), ("pixel", "image"), ("patch",)


@dataclass(frozen=True)
class OneBlock:
    """A model that is one block of an encoder."""

    encoder: Any  # SamoraViTConfig or SamoraHieraConfig
    kind: Any  # what its `build_block` takes: a window, or a plan

    def build(self, *, dtype, remat, rngs):
        model: Any = nnx.Module()
        model.block = self.encoder.build_block(self.kind, dtype=dtype, rngs=rngs)
        return model


def vit_block(window, experts=ALL, fusion_width=None):
    encoder = SamoraViTConfig(
        image_size=(48, 80),
        patch_size=8,
        width=24,
        heads=2,
        mlp_ratio=1.5,
        expert_rank=3,
        experts=experts,
        fusion_width=fusion_width,
    )
    return OneBlock(encoder, window)


def pooling_block(window):
    encoder = SamoraHieraConfig(width=12, heads=1, mlp_ratio=1.5, expert_rank=3, experts=TWO)
    return OneBlock(encoder, BlockPlan(12, 24, 2, window, pool=True))


CASES = {
    "windows with padding": vit_block(4),
    "global": vit_block(0),
    "two experts, inner width": vit_block(4, TWO, 16),
    "one expert": vit_block(4, ONE),
    "SAM 2, pooled windows with padding": pooling_block(4),
}


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x, eps):
    return layer_norm(x, x.shape[-1:], p["scale"], p["bias"], eps)


def vit_attention(p, qkv, heads):
    b, h, w, c = *qkv.shape[:3], qkv.shape[3] // 3
    q, k, v = qkv.reshape(b, h * w, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    grid = q.reshape(b, heads, h, w, -1)
    rows, columns = (torch.arange(n)[:, None] - torch.arange(n) + n - 1 for n in (h, w))
    bias_h = torch.einsum("bnhwd,hkd->bnhwk", grid, p["rel_pos_h"][rows])
    bias_w = torch.einsum("bnhwd,wkd->bnhwk", grid, p["rel_pos_w"][columns])
    bias = bias_h[..., :, None] + bias_w[..., None, :]
    out = scaled_dot_product_attention(q, k, v, bias.reshape(b, heads, h * w, h * w))
    return dense(p["proj"], out.transpose(1, 2).reshape(b, h, w, c))


def pooled(x):
    return max_pool2d(x.permute(0, 3, 1, 2), 2, 2).permute(0, 2, 3, 1)


def hiera_attention(p, qkv, heads):
    q, k, v = qkv.chunk(3, dim=-1)
    grid = pooled(q)
    q, k, v = (x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (grid, k, v))
    out = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return dense(p["proj"], out.reshape(grid.shape))


def cross_attention_fusion(p, query, below, heads):
    q = norm(p["query_norm"], query, 1e-5)
    k = norm(p["key_norm"], below, 1e-5)
    v = norm(p["value_norm"], below, 1e-5)
    names = ("q_proj", "k_proj", "v_proj")
    width, inner = p["q_proj"]["kernel"].shape
    if inner == width:  # as released: PyTorch's own module
        mixed, _ = multi_head_attention_forward(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            embed_dim_to_check=width,
            num_heads=heads,
            in_proj_weight=torch.cat([p[name]["kernel"].T for name in names]),
            in_proj_bias=torch.cat([p[name]["bias"] for name in names]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=p["attn_proj"]["kernel"].T,
            out_proj_bias=p["attn_proj"]["bias"],
            need_weights=False,
        )
        mixed = mixed.transpose(0, 1)
    else:
        q, k, v = (
            dense(p[name], x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name, x in zip(names, (q, k, v), strict=True)
        )
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        mixed = dense(p["attn_proj"], out)
    return query + dense(p["out_proj"], mixed)


def hl_attention(p, d, heads):
    fused, *coarser = (d[name] for name in ("pixel", "patch", "image") if name in d)
    for level, query in enumerate(coarser):
        own = p["levels"][str(level)]
        fused = query + own["gate"] * (cross_attention_fusion(own, query, fused, heads) - query)
    return norm(p["norm"], fused, 1e-5)


def attend(p, n, attention, heads):
    base = attention(dense(p["attn"]["qkv"], n))
    differences = {}
    for name, expert in p["experts"].items():
        q, k, v = dense(p["attn"]["qkv"], n).chunk(3, dim=-1)
        q = q + expert["gain"] * (n @ expert["q"]["a"] @ expert["q"]["b"])
        v = v + expert["gain"] * (n @ expert["v"]["a"] @ expert["v"]["b"])
        differences[name] = attention(torch.cat([q, k, v], dim=-1)) - base
    tokens = {name: d.flatten(1, 2) for name, d in differences.items()}
    return base + hl_attention(p["fusion"], tokens, heads).reshape(base.shape)


def reference(model, p, x):
    if isinstance(model.kind, BlockPlan):
        plan, window, heads = model.kind, model.kind.window, model.kind.heads
    else:
        plan, window, heads = None, model.kind, model.encoder.heads

    def attention(qkv):
        return (hiera_attention if plan else vit_attention)(p["attn"], qkv, heads)

    n = norm(p["norm1"], x, 1e-6)
    if plan:
        x = pooled(dense(p["proj"], n))
    step_h, step_w = (window, window) if window else GRID
    n = pad(n, (0, 0, 0, -GRID[1] % step_w, 0, -GRID[0] % step_h))
    rows = [
        torch.cat([attend(p, tile, attention, heads) for tile in row.split(step_w, dim=2)], dim=2)
        for row in n.split(step_h, dim=1)
    ]
    x = x + torch.cat(rows, dim=1)[:, : x.shape[1], : x.shape[2]]
    hidden = gelu(dense(p["mlp"]["lin1"], norm(p["norm2"], x, 1e-6)))
    return x + dense(p["mlp"]["lin2"], hidden)


def random_params(model):
    """No factor is zero, no gate and no gain is one."""
    rng, tree = np.random.default_rng(2), {}
    for path, leaf in flatten(abstract_params(model)).items():
        start = path.endswith(("scale", "gain", "gate"))
        # Strong experts: small differences of large numbers would be all rounding.
        spread = 0.6 if path.endswith(("/a", "/b")) else 0.2
        tree[path] = (start + rng.normal(0, spread, leaf.shape)).astype("f")
    return tree


def scale_of(path, gradients, params):
    """The size that rounding errors of a gradient are measured by."""
    if path.endswith("gain"):
        # A sum over the expert's factors whose terms cancel: LN hardly lets a common scale through.
        expert = path.removesuffix("gain")
        terms = [params[f"{expert}{b}"] * gradients[f"{expert}{b}"] for b in ("q/b", "v/b")]
        return sum(np.abs(term).sum() for term in terms) / params[path][0]
    if path.endswith(("k_proj/bias", "key_norm/bias")):
        # They move all scores of a query alike: zero but for rounding.
        path = path.replace("k_proj", "v_proj").replace("key_norm", "value_norm")
    return np.abs(gradients[path]).max()


@pytest.mark.parametrize("name", CASES)
def test_block(name, rng, record_property):
    model, flat = CASES[name], random_params(CASES[name])
    width = flat["block/norm1/scale"].size
    x = rng.normal(size=(2, *GRID, width)).astype("f")

    leaves = {path: torch.tensor(v, dtype=torch.float64) for path, v in flat.items()}
    leaves["x"] = torch.tensor(x, dtype=torch.float64)
    for leaf in leaves.values():
        leaf.requires_grad_()
    tree = unflatten({path.removeprefix("block/"): leaf for path, leaf in leaves.items()})
    expected = reference(model, tree, tree["x"])
    cotangent = rng.normal(size=expected.shape).astype("f")
    (expected * torch.tensor(cotangent)).sum().backward()
    gradients = {path: leaf.grad.numpy() for path, leaf in leaves.items()}

    @jax.jit
    def ours(params, x, cotangent):
        out, back = jax.vjp(lambda p, x: bind(model, p).block(x), params, x)
        return out, *back(cotangent)

    found, *back = ours(*jax.tree.map(jnp.asarray, (unflatten(flat), x, cotangent)))
    back = {**flatten(back[0]), "x": back[1]}
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    output = np.abs(found - expected).max() / expected.std()
    assert back.keys() == gradients.keys()
    errors = {
        path: np.abs(back[path] - expected).max() / scale_of(path, gradients, flat)
        for path, expected in gradients.items()
    }
    worst = max(errors, key=lambda path: errors[path])
    fusion = max(error for path, error in errors.items() if "/fusion/" in path)
    record_property("output", float(output))
    record_property("gradients of the fusion", float(fusion))
    record_property("worst gradient", f"{worst}: {errors[worst]:.1e}")
    print(f"\n{name}: output {output:.1e}, fusion {fusion:.1e}, {worst} {errors[worst]:.1e}")
    assert output <= TOLERANCE
    assert errors[worst] <= TOLERANCE, worst
