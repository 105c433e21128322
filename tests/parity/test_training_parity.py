"""Thirty steps of fine-tuning in PyTorch and here: the same loss at every step.

Same weights, batches, trained tensors and optimizer. PyTorch's side is upstream's modules with the
two papers' adapters and losses as written in this file, ours is what an experiment runs.
"""

import copy
import dataclasses
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
for package in ("segment_anything", "sam2"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

import torch.nn.functional as F  # noqa: E402

import tiny_models  # noqa: E402
from convert.families import family_of  # noqa: E402
from convert.reference import build_reference_sam, randomise  # noqa: E402
from experiments import segmentation as seg  # noqa: E402
from experiments.objectives import objective_for  # noqa: E402
from sam2_reference import as_torch, nchw, sam2_pair  # noqa: E402
from samjax.models.ops import resize_bilinear  # noqa: E402
from samjax.peft.lora import LoraConfig  # noqa: E402
from samjax.peft.paths import join  # noqa: E402
from samjax.prompt_labels import FOREGROUND, INVALID  # noqa: E402
from samjax.training.loop import init_state, make_step  # noqa: E402
from samjax.training.losses import binary_cross_entropy, binary_dice, weighted_sum  # noqa: E402
from samjax.training.region_losses import focal_tversky  # noqa: E402
from samjax.training.schedules import warmup_poly  # noqa: E402
from samjax.trees import flatten  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
STEPS, BATCHES, RANK = 30, 2, 4
TOLERANCE = 1e-4  # of the loss, at every step
# Of the way that a tensor went: where a gradient is almost zero, Adam makes steps of its rounding.
# Upstream differs from itself by up to 5e-4 when each weight is moved by its last digit.
WAY_TOLERANCE = 5e-3

SAM = dataclasses.replace(tiny_models.SAM, pixel_mean=(0.0,) * 3, pixel_std=(255.0,) * 3)
SAM2 = dataclasses.replace(
    tiny_models.SAM2,
    image_encoder=dataclasses.replace(
        tiny_models.SAM2.image_encoder,
        image_size=(64, 64),
        stages=(1, 1, 2, 1),
        global_blocks=(3,),
    ),
)


@pytest.fixture(autouse=True)
def one_thread():
    """On so small a model PyTorch's threads wait longer for each other than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(rng, config, classes):
    """Batches of two noisy pictures without prompts: a rectangle of each class's own colour."""
    height, width = config.image_size
    masks = np.zeros((BATCHES, 2, height, width), np.uint8)
    for mask in masks.reshape(-1, height, width):
        for label in range(1, classes + 1):
            top, left = rng.integers(0, (height // 2, width // 2))
            mask[top : top + height // 2, left : left + width // 3] = label
    images = rng.uniform(40, 215, (classes + 1, 3))[masks] + rng.normal(0, 20, (*masks.shape, 3))
    return [
        {
            "image": image,
            "mask": mask,
            "size": np.tile(np.int32(config.image_size), (2, 1)),
            "coords": np.zeros((2, 1, 2), np.float32),
            "labels": np.full((2, 1), INVALID, np.int32),
        }
        for image, mask in zip(images.clip(0, 255).astype(np.uint8), masks, strict=True)
    ]


def run_ours(tuning, loss, batches, rate, weight_decay):
    """The loss before each step, and what was trained after the last."""
    optimizer = seg.make_optimizer(tuning, rate, weight_decay=weight_decay, clip="none", rank=RANK)
    step = make_step(partial(loss, tuning), optimizer)
    state = init_state(tuning.trainable, optimizer)
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, tuning.frozen, batches[i % BATCHES], jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return losses, {path: np.array(leaf) for path, leaf in flatten(state.trainable).items()}


def run_torch(tuning, model, loss, batches, rates, weight_decay):
    """As `run_ours`; what requires a gradient is trained, and only matrices decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for i in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rates[i]
        optimizer.zero_grad()
        value = loss(model, batches[i % BATCHES])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, by_our_paths(tuning, model)


def by_our_paths(tuning, model):
    """Of an adapted model of PyTorch's: the tensors that ours trains."""
    family = family_of(tuning.config)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    plain = {name: array for name, array in state.items() if not name.endswith((".a", ".b"))}
    params = flatten(family.convert(plain, tuning.config)[1])
    modules = family.modules(join(tuning.frozen, tuning.trainable["params"]))
    found = {}
    for path in flatten(tuning.trainable):
        kind, _, rest = path.partition("/")
        layer, *pair = rest.rsplit("/", 2)
        found[path] = params[rest] if kind == "params" else state[".".join([modules[layer], *pair])]
    return found


def compare(tuning, ours, theirs):
    (found, found_tensors), (expected, expected_tensors) = ours, theirs
    difference = np.abs(np.array(found) / expected - 1).max()
    print(f"\nloss {expected[0]:.3f} to {expected[-1]:.3f}, largest difference {difference:.1e}")
    assert np.mean(expected[-BATCHES:]) < 0.8 * np.mean(expected[:BATCHES])
    assert difference <= TOLERANCE

    ways = {}
    for path, start in flatten(tuning.trainable).items():
        way = np.linalg.norm(expected_tensors[path] - start)
        # A key's bias adds the same to all scores of a query: its gradient is rounding, and Adam
        # makes steps of it. And PyTorch leaves alone what the loss does not reach.
        if way and not path.endswith("k_proj/bias"):
            ways[path] = np.linalg.norm(found_tensors[path] - expected_tensors[path]) / way
    worst = max(ways, key=ways.get)
    print(f"{len(ways)} tensors, largest difference {ways[worst]:.1e} of its way: {worst}")
    assert sum(path.startswith("factors/") for path in ways) == len(
        jax.tree.leaves(tuning.trainable["factors"])
    )
    assert ways[worst] <= WAY_TOLERANCE


class SamedQkv(torch.nn.Linear):
    """SAMed's ``_LoRA_qkv``: low-rank paths beside the columns of q and v, unscaled."""

    def __init__(self, qkv, factors):
        super().__init__(qkv.in_features, qkv.out_features)
        self.weight, self.bias = qkv.weight, qkv.bias
        self.q, self.v = as_parameters(factors["q"]), as_parameters(factors["v"])

    def forward(self, x):
        out, width = super().forward(x), self.in_features
        out[..., :width] += x @ self.q["a"] @ self.q["b"]
        out[..., -width:] += x @ self.v["a"] @ self.v["b"]
        return out


class Sam2Lora(torch.nn.Linear):
    """SAM2LoRA's ``LoRALayer`` without dropout: a low-rank path beside all columns, α = 2r."""

    def __init__(self, layer, factors):
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.all = as_parameters(factors["all"])

    def forward(self, x):
        return super().forward(x) + 2.0 * (x @ self.all["a"] @ self.all["b"])


def as_parameters(pair):
    return torch.nn.ParameterDict({s: torch.nn.Parameter(as_torch(pair[s])) for s in "ab"})


def adapt(model, adapter, names, factors, modules):
    """Puts ``adapter`` into the place of the named layers, which are all that have factors."""
    flat = flatten(factors)
    layers = {modules[layer]: layer for layer in {path.rsplit("/", 2)[0] for path in flat}}
    assert layers.keys() == set(names)
    for name, layer in layers.items():
        own = factors
        for key in layer.split("/"):
            own = own[key]
        model.set_submodule(name, adapter(model.get_submodule(name), own))


def samed_loss(model, batch):
    """0.2 cross-entropy + 0.8 Dice, of each picture, of the masks of all tokens in the frame."""
    embedding = model.image_encoder(nchw(batch["image"]).float() / 255)
    sparse, dense = model.prompt_encoder(points=None, boxes=None, masks=None)
    positions = model.prompt_encoder.get_dense_pe()
    logits, _ = model.mask_decoder.predict_masks(embedding, positions, sparse, dense)
    logits = F.interpolate(logits, SAM.image_size, mode="bilinear", align_corners=False)
    labels = as_torch(batch["mask"]).long()
    p, y = logits.softmax(1), F.one_hot(labels, logits.shape[1]).permute(0, 3, 1, 2)
    both, total = (p * y).sum((2, 3)), (p * p).sum((2, 3)) + (y * y).sum((2, 3))
    dice = 1 - (2 * both + 1e-5) / (total + 1e-5)
    return 0.2 * F.cross_entropy(logits, labels) + 0.8 * dice.mean()


def samed_rates(peak, warmup):
    """As SAMed's trainer sets them: each after a step, for the next one."""
    rates = [peak / warmup]
    for i in range(STEPS - 1):
        warm = peak * (i + 1) / warmup
        rates.append(warm if i < warmup else peak * (1 - (i - warmup) / STEPS) ** 0.9)
    return rates


def test_samed():
    """q and v of the encoder; prompt encoder and mask decoder outright; three classes' masks."""
    torch.manual_seed(0)
    model = randomise(build_reference_sam(SAM), seed=0)
    family = family_of(SAM)
    _, params = family.convert({k: v.numpy() for k, v in model.state_dict().items()}, SAM)
    params = jax.tree.map(jnp.asarray, params)
    tuning = seg.prepare(
        SAM,
        params,
        "lora+decoder",
        lora=LoraConfig(rank=RANK),
        objective=objective_for(2, 0.8),
        fresh_head=True,
    )
    model.image_encoder.requires_grad_(False)
    names = [f"image_encoder.blocks.{i}.attn.qkv" for i in range(len(model.image_encoder.blocks))]
    adapt(model, SamedQkv, names, tuning.trainable["factors"], family.modules(params))

    batches = pictures(np.random.default_rng(0), SAM, classes=2)
    rate = warmup_poly(0.005, STEPS, warmup=5, power=0.9)
    ours = run_ours(tuning, seg.batch_loss, batches, rate, weight_decay=0.1)
    rates = samed_rates(0.005, warmup=5)
    compare(tuning, ours, run_torch(tuning, model, samed_loss, batches, rates, weight_decay=0.1))


def sam2lora_loss(tuning, trainable, frozen, batch, key):
    module = tuning.bind(trainable, frozen, key)
    prediction = module(batch["image"], batch["size"], batch["coords"], batch["labels"])
    logits = resize_bilinear(prediction.low_res_logits[:, 1], SAM2.image_size)
    parts = {"bce": binary_cross_entropy, "dice": binary_dice, "tversky": focal_tversky}
    return weighted_sum({name: (1, part) for name, part in parts.items()})(logits, batch["mask"])


def sam2lora_loss_of_torch(model, batch):
    """Of the first of three masks, each decoded from its own picture's features."""
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (SAM2.pixel_mean, SAM2.pixel_std))
    pixels = (nchw(batch["image"]).float() - mean) / std
    *high_res, embedding = model.forward_image(pixels)["backbone_fpn"]
    points = as_torch(batch["coords"]), as_torch(batch["labels"])
    sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=None)
    masks, *_ = model.sam_mask_decoder(
        image_embeddings=embedding + model.no_mem_embed.reshape(1, -1, 1, 1),
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        repeat_image=False,
        high_res_features=high_res,
    )
    masks = F.interpolate(masks, SAM2.image_size, mode="bilinear", align_corners=False)
    logits, y = masks[:, 0], as_torch(batch["mask"]).float()
    p = logits.sigmoid()
    hit, missed, wrong = ((a * b).sum((1, 2)) for a, b in ((p, y), (1 - p, y), (p, 1 - y)))
    dice = 1 - (2 * hit + 1) / (p.sum((1, 2)) + y.sum((1, 2)) + 1)
    tversky = (1 - (hit + 1) / (hit + 0.7 * missed + 0.3 * wrong + 1)) ** 0.75
    return F.binary_cross_entropy_with_logits(logits, y) + (dice + tversky).mean()


def test_sam2lora():
    """Every qkv of the encoder and all 28 attention layers of the decoder; five points."""
    shared, params = sam2_pair(SAM2)
    model = copy.deepcopy(shared).requires_grad_(False)
    targets = (
        (r"image_encoder/trunk/blocks/\d+/attn/qkv", "all"),
        (r"mask_decoder/transformer/.*attn\w*/\w+_proj", "all"),
    )
    lora = LoraConfig(rank=RANK, alpha=2 * RANK, targets=targets)
    tuning = seg.prepare(SAM2, params, "lora", lora=lora)
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    decoder = [n for n in linear if n.startswith("sam_mask_decoder.transformer") and "attn" in n]
    encoder = [n for n in linear if n.startswith("image_encoder") and n.endswith("attn.qkv")]
    assert (len(encoder), len(decoder)) == (5, 28)
    modules = family_of(SAM2).modules(params)
    adapt(model, Sam2Lora, encoder + decoder, tuning.trainable["factors"], modules)

    rng = np.random.default_rng(0)
    batches = pictures(rng, SAM2, classes=1)
    for batch in batches:
        inside = [rng.permutation(np.argwhere(mask))[:5, ::-1] for mask in batch["mask"]]
        batch["coords"] = np.array(inside, np.float32)  # x y
        batch["labels"] = np.full((2, 5), FOREGROUND, np.int32)
    rate, decay = 1e-3, 3e-4
    ours = run_ours(tuning, sam2lora_loss, batches, rate, decay)
    theirs = run_torch(tuning, model, sam2lora_loss_of_torch, batches, [rate] * STEPS, decay)
    compare(tuning, ours, theirs)
