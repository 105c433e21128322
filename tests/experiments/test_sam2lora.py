"""SAM2LoRA: what is trained and how, its loss, prompts and runs, and what it says of bad input."""

from __future__ import annotations

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import tiny_models
from experiments import paper, published, sam2lora
from experiments import segmentation as seg
from experiments.fundus_pools import POOLS, SETS
from experiments.record import read_records
from experiments.report import main as report
from experiments.sam2lora import RANKS, TERMS, OneOfThree, lora_config, num_factors
from experiments.scoring import score_as_sam2lora
from samjax.data import augmentation, make_loader
from samjax.data.paper_augment import Sam2LoraAugment
from samjax.data.prompts import sample_prompt
from samjax.models.functional import abstract_params, init_params
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.sam2_config import sam2
from samjax.peft.lora import find_targets
from samjax.peft.paths import FREEZE
from samjax.trees import flatten

TINY = paper.tiny_sam2(64)
PADDED = tiny_models.SAM  # a frame of 48 x 80, into which pictures are padded
KEY = jax.random.key(7)
METHODS = ("zero_shot", "lora_r64", "full", "decoder")
SUBSETS = ("bce", "dice", "tversky", "bce_dice", "bce_tversky", "dice_tversky")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Phantoms of all sets of both pools."""
    root = tmp_path_factory.mktemp("fundus")
    sam2lora._write(root, tuple(SETS))
    return root


def arguments(**options):
    return sam2lora.Arguments(**{"smoke": True, "image_size": 64, "progress": False, **options})


def tuned(rank=4):
    """The tiny model with factors."""
    return sam2lora.prepared(arguments(), "lora", TERMS, lora=lora_config(rank))


def noisy(tree, size=0.1):
    """In NumPy: jax would compile the sum for every shape."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.asarray(x) + size * rng.normal(size=x.shape).astype("f"), tree)


def listed(data, **options):
    given = arguments(data=data, **options)
    given.check()
    return {trial.run: trial for trial in sam2lora.trials(given)}


def test_trainable_parameters_are_120208_a_rank():
    large = abstract_params(sam2("hiera_large"))
    flat, targets = flatten(large), find_targets(large, lora_config(4))
    assert {block for _, block in targets} == {"all"}
    encoder, decoder = (
        [flat[f"{layer}/kernel"].shape for layer, _ in targets if layer.startswith(part)]
        for part in ("image_encoder/trunk/", "mask_decoder/transformer/")
    )
    assert encoder == [  # Hiera-L: the first block of a stage has the width of the one before
        *[(144, 432)] * 2, (144, 864), *[(288, 864)] * 5, (288, 1728), *[(576, 1728)] * 35,
        (576, 3456), *[(1152, 3456)] * 3,
    ]  # fmt: skip
    # Twice self-attention and two attentions of half the width, and the last one of half of it.
    half = [(256, 128)] * 3 + [(128, 256)]
    assert sorted(decoder) == sorted([(256, 256)] * 8 + half * 5)
    assert (len(encoder), len(decoder), len(targets)) == (48, 28, 76)
    counts = {part: num_factors(large, 1, part) for part in ("encoder", "decoder", "both")}
    assert counts == {"encoder": 108_432, "decoder": 11_776, "both": 120_208}
    for rank in (*RANKS, 93, 94):
        assert num_factors(large, rank) == 120_208 * rank
        assert num_factors(large, rank, "encoder") == 108_432 * rank


def test_shares_are_below_5_per_cent_up_to_rank_93(capsys):
    assert sam2lora.main(["--shares"]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    base = int(re.search(r"of ([\d,]+) parameters", head)[1].replace(",", ""))
    assert base == pytest.approx(224.4e6, abs=0.05e6)  # as on SAM 2.1's model card
    shares = ("1.71%", "3.43%", "6.86%", "13.71%", "27.42%", "54.84%")
    counts = [[f"{r}", f"{120_208 * r:,}", s] for r, s in zip(RANKS, shares, strict=True)]
    assert [row.split() for row in rows] == counts
    assert last == "below 5 % up to rank 93: 120,208 a rank"
    assert 93 * 120_208 / base < 0.05 < 94 * 120_208 / base


def test_factors_begin_as_the_released_code_has_them():
    assert (lora_config(64).alpha, lora_config(64).dropout) == (128, 0.1)
    assert {lora_config(rank).scale for rank in RANKS} == {2}
    factors = flatten(tuned().trainable["factors"])
    drawn = [np.asarray(leaf).ravel() for path, leaf in factors.items() if path.endswith("/a")]
    assert not any(leaf.any() for path, leaf in factors.items() if path.endswith("/b"))
    assert len({tuple(values[:5]) for values in drawn}) == len(drawn)
    normal = np.concatenate(drawn) * 4**0.5
    assert len(normal) > 1000
    assert stats.kstest(normal, "norm").pvalue > 0.01


def test_dropout_acts_on_the_output_and_keeps_its_mean(rng):
    """Each entry is the full product over 0.9, or nothing: of x nothing was dropped."""
    tuning = tuned()
    factors = noisy(tuning.trainable["factors"], 1)

    def layer(key=None, factors=factors):
        module = tuning.bind({"params": {}, "factors": factors}, tuning.frozen, key)
        return module.image_encoder.trunk.blocks[1].attn.qkv

    x = jnp.asarray(rng.normal(size=(400, layer().kernel.shape[0])), jnp.float32)
    base = layer(factors=tuning.trainable["factors"])(x)
    a, b = (flatten(factors)[f"image_encoder/trunk/blocks/1/attn/qkv/all/{s}"] for s in "ab")
    whole, dropped = np.asarray(layer()(x) - base), np.asarray(layer(KEY)(x) - base)
    np.testing.assert_allclose(whole, 2 * x @ a @ b, atol=1e-4)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.9, atol=1e-4)
    assert kept.mean() == pytest.approx(0.9, abs=0.01)
    assert not kept.all(axis=0).any()  # nor is a whole column kept
    assert (dropped * whole).sum() / (whole**2).sum() == pytest.approx(1, abs=0.01)
    assert (layer(jax.random.key(8))(x) != layer(KEY)(x)).any()


def trained(method, **how):
    """The paths of what a method trains of the tiny model."""
    return set(flatten(sam2lora.prepared(arguments(**how), method, TERMS).trainable["params"]))


def test_what_each_run_trains(data):
    runs = listed(data, ranks=(4,), sets=("drive",))
    paths = {}
    for name in ("zero_shot", "lora_r4", "lora_r4_encoder", "lora_r4_decoder", "full", "decoder"):
        tuning = runs[f"vessel-drive_{name}"].build()
        assert tuning.objective.terms == TERMS
        every = {*flatten(tuning.trainable["params"]), *flatten(tuning.frozen)}
        assert every == set(flatten(abstract_params(TINY)))
        paths[name] = set(flatten(tuning.trainable))
    assert not paths["zero_shot"]
    qkv, projections = (
        {path for path in paths["lora_r4"] if re.fullmatch(pattern, path)}
        for pattern in (r"factors/image_.*/\d/attn/qkv/all/.", r"factors/mask_.*_proj/all/.")
    )
    assert (len(qkv), len(projections)) == (2 * 4, 2 * (12 + 4))  # four blocks, one layer
    assert qkv | projections == paths["lora_r4"]
    assert (paths["lora_r4_encoder"], paths["lora_r4_decoder"]) == (qkv, projections)
    decoder = {path for path in paths["full"] if path.startswith("params/mask_decoder/")}
    assert paths["decoder"] == decoder < paths["full"]


@cache
def gradients():
    """(trained, batch) → losses (b,), largest gradient of every parameter and factor."""
    tuning = tuned()

    def loss(trained, batch):
        losses = seg.batch_loss(tuning, trained, {}, batch, KEY)
        return losses.sum(), losses

    run = jax.jit(jax.grad(loss, has_aux=True))

    def of(trained, batch):
        found, losses = run(trained, {name: batch[name] for name in tuning.objective.arrays})
        largest = {path: np.abs(np.asarray(leaf)).max() for path, leaf in flatten(found).items()}
        return np.asarray(losses), largest

    return of


def beginning():
    """Noise on what starts at zero or switched off, but for the factors."""
    return {"params": noisy(init_params(TINY, 3)), "factors": tuned().trainable["factors"]}


def discs(data, count=2):
    """A batch as in training, without augmentation."""
    dataset = SETS["drishti_gs"].open(data, "disc").train
    options = {"frame_size": (64, 64), "fit": "stretch", "batch_size": count}
    return next(iter(make_loader(dataset, **options, **sam2lora.TRAINING_PROMPTS)))


def test_what_is_trained_is_reached_and_what_is_left_is_not(data):
    every = beginning()
    _, found = gradients()(every, discs(data))
    params = {path.removeprefix("params/"): size for path, size in found.items() if path[0] == "p"}
    labels = flatten(sam2lora.labels_of(every["params"], "full"))
    frozen = {path for path, label in labels.items() if label == FREEZE}
    unreached = {path for path, size in params.items() if size == 0}
    # The random features of positions would be reached, but are a buffer upstream.
    assert frozen - unreached == {"prompt_encoder/pe_gaussian"}
    assert unreached <= frozen
    # All keys share a bias, which softmax does not see: its gradient is rounding.
    seen = {p: size for p, size in params.items() if p not in frozen and "k_proj/bias" not in p}
    assert min(seen.values()) > 1e-7, min(seen, key=seen.get)
    assert trained("full") == set(params) - frozen
    # b = 0 holds back every a, and nothing else.
    factors = {path: size for path, size in found.items() if path[0] == "f"}
    held = {path for path, size in factors.items() if size == 0}
    assert held == {path for path in factors if path.endswith("/a")}
    every["factors"] = noisy(every["factors"])
    _, found = gradients()(every, discs(data))
    assert min(found[path] for path in factors) > 1e-7


def test_a_picture_does_not_see_the_one_beside_it(data):
    """The released code decodes a whole batch with the features of its last image."""
    every = beginning()
    batch = discs(data, 3)
    pairs = [{name: value[[0, other]] for name, value in batch.items()} for other in (1, 2)]
    losses = np.stack([gradients()(every, pair)[0] for pair in pairs])
    assert losses[0, 0] == losses[1, 0]
    assert len(set(losses.ravel())) == 3
    tuning = sam2lora.prepared(arguments(), "zero-shot", TERMS)
    evaluator = seg.Evaluator(tuning)
    pairs.append({name: value[[1, 0]] for name, value in batch.items()})
    found = [
        {index: logits for index, logits, _ in evaluator.predictions(tuning.trainable, [pair])}
        for pair in pairs
    ]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[2][0], found[0][0], atol=1e-5)
    np.testing.assert_allclose(found[2][1], found[0][1], atol=1e-5)
    assert np.abs(found[0][0] - found[0][1]).max() > 1e-3


def test_the_embedding_of_no_memory_is_added_or_skipped_for_good(rng):
    added, skipped = (
        sam2lora.prepared(arguments(no_mem_embed=how), "zero-shot", TERMS)
        for how in ("add", "skip")
    )
    before, after = (jax.tree.map(np.asarray, flatten(x.frozen)) for x in (added, skipped))
    assert [path for path in before if (before[path] != after[path]).any()] == ["no_memory_embed"]
    x = jnp.asarray(rng.normal(size=(1, 4, 4, 16)), jnp.float32)
    for tuning, shift in ((added, before["no_memory_embed"][None]), (skipped, 0)):
        module = tuning.bind(tuning.trainable, tuning.frozen)
        np.testing.assert_allclose(module.without_memory(x), x + shift, atol=1e-6)
    # Full tuning must not bring back what is skipped.
    assert trained("full") - trained("full", no_mem_embed="skip") == {"no_memory_embed"}
    assert trained("decoder") == trained("decoder", no_mem_embed="skip")


def example(rng):
    """Low-res logits (b, 4, 12, 20), predicted IoUs, and a batch with padding."""
    mask = (rng.random((4, 48, 80)) < 0.3).astype(np.uint8)
    mask[2] = 0
    size = np.array([[48, 80], [48, 52], [33, 80], [31, 77]], np.int32)
    low = rng.normal(0, 3, (4, 4, 12, 20)).astype("f")
    return low, rng.uniform(size=(4, 4)).astype("f"), {"mask": mask, "size": size}


def upsampled(low):
    torch = pytest.importorskip("torch")
    interpolate = torch.nn.functional.interpolate
    return interpolate(torch.as_tensor(low), (48, 80), mode="bilinear", align_corners=False)[:, 1]


def in_torch(low, iou, batch):
    """The terms of each picture, by the formulas of the released code, in float64."""
    torch = pytest.importorskip("torch")
    terms = {name: [] for name in TERMS}
    rows = zip(upsampled(low).double(), iou, batch["mask"], batch["size"], strict=True)
    for z, rated, mask, (h, w) in rows:
        z, y = z[:h, :w], torch.tensor(mask[:h, :w]).double()
        p = z.sigmoid()
        hit, missed, extra = (p * y).sum(), (y * (1 - p)).sum(), ((1 - y) * p).sum()
        index = (hit + 1) / (hit + 0.7 * missed + 0.3 * extra + 1)
        both, either = ((p > 0.5) & (y > 0.5)).sum(), ((p > 0.5) | (y > 0.5)).sum()
        terms["bce"].append(torch.nn.functional.binary_cross_entropy_with_logits(z, y))
        terms["dice"].append(1 - (2 * hit + 1) / (p.sum() + y.sum() + 1))
        terms["tversky"].append((1 - index) ** 0.75)
        terms["iou"].append(0.1 * abs(float(rated[1]) - both / either))
    return {name: torch.stack(values) for name, values in terms.items()}


@partial(jax.jit, static_argnums=0)
def loss_of(terms, low, iou, batch):
    return OneOfThree(terms=terms).loss(PADDED, MaskPrediction(low, iou), batch)


ONLY = [("bce",), ("dice",), ("tversky",)]


@pytest.mark.parametrize(
    "terms", [*ONLY, ("bce", "iou"), ("dice", "tversky", "iou"), TERMS], ids="+".join
)
def test_loss_is_the_sum_of_the_released_formulas(rng, terms):
    low, iou, batch = example(rng)
    parts = in_torch(low, iou, batch)
    ours = loss_of(terms, low, iou, batch)
    np.testing.assert_allclose(ours, sum(parts[name] for name in terms).numpy(), rtol=1e-6)
    # Nothing in the padding counts.
    painted = {**batch, "mask": batch["mask"].copy()}
    for mask, (h, w) in zip(painted["mask"], batch["size"], strict=True):
        mask[h:], mask[:, w:] = 1 - mask[h:], 1 - mask[:, w:]
    np.testing.assert_array_equal(ours, loss_of(terms, low, iou, painted))


def test_gradients_are_torchs_and_the_iou_teaches_its_own_rating_alone(rng):
    torch = pytest.importorskip("torch")
    low, iou, batch = example(rng)
    with_iou, without = (loss_of(terms, low, iou, batch) for terms in (TERMS, TERMS[:3]))
    np.testing.assert_allclose(with_iou - without, in_torch(low, iou, batch)["iou"], atol=1e-6)
    slope, of_iou = jax.grad(lambda *x: loss_of(TERMS, *x, batch).sum(), (0, 1))(low, iou)
    np.testing.assert_allclose(np.abs(of_iou[:, 1]), 0.1, rtol=1e-6)
    assert not np.delete(of_iou, 1, axis=1).any()
    z = torch.tensor(low, requires_grad=True)
    sum(in_torch(z, iou, batch).values()).sum().backward()
    np.testing.assert_allclose(slope, z.grad.numpy(), atol=1e-6)
    assert not np.delete(slope, 1, axis=1).any()


@pytest.mark.parametrize("certain", [120, 400])
@pytest.mark.parametrize("terms", [*ONLY, TERMS[:3]], ids="+".join)
def test_gradients_are_finite_at_a_perfect_prediction(rng, terms, certain):
    low, iou, batch = example(rng)
    background = np.arange(20) < rng.integers(0, 21, (4, 4, 1, 1))  # the columns at the left
    low = np.where(background, -certain, certain) * np.ones_like(low)
    batch["mask"] = (upsampled(low).numpy() > 0).astype(np.uint8)
    value, slope = jax.value_and_grad(lambda low: loss_of(terms, low, iou, batch).sum())(low)
    assert 0 <= float(value) < 1e-5
    assert np.isfinite(slope).all()


def test_one_mask_is_predicted_and_it_is_that_of_token_1(rng):
    low, iou, _ = example(rng)
    prediction = MaskPrediction(jnp.asarray(low), jnp.asarray(iou))
    logits = [OneOfThree().logits(PADDED, prediction, train=train) for train in (True, False)]
    np.testing.assert_array_equal(*logits)
    np.testing.assert_allclose(logits[0], upsampled(low), atol=1e-5)


def test_unknown_losses_are_told():
    with pytest.raises(ValueError, match="loss 'focal': expected some of bce, dice, tversky, iou"):
        OneOfThree(terms=("bce", "focal"))


def test_the_rate_is_torchs_cosine_with_restarts():
    torch = pytest.importorskip("torch")
    rate = sam2lora.Arguments().rate(120_000)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1000)
    theirs = []
    for _ in range(2001):
        theirs.append(optimizer.param_groups[0]["lr"])
        restarts.step()
    restarts.step(119_999)
    theirs = {**dict(enumerate(theirs)), 119_999: optimizer.param_groups[0]["lr"]}
    for step in (0, 1, 2, 250, 500, 998, 999, 1000, 1001, 1500, 1999, 2000, 119_999):
        assert float(rate(jnp.int32(step))) == pytest.approx(theirs[step], abs=1e-11), step
    assert float(rate(1000)) == float(rate(0)) == np.float32(1e-4)
    assert float(rate(999)) < 1e-9


def test_settings_are_those_of_the_released_script(data):
    run = listed(data, sets=("drive",))["vessel-drive_lora_r64"]
    options = run.options
    assert (options.lr, options.weight_decay, options.clip) == (1e-4, 3e-4, "global")
    assert (options.schedule, options.period, options.steps) == ("restarts", 1000, 120_000)
    assert (options.batch_size // options.accumulate, options.accumulate) == (2, 4)
    assert sam2lora.Arguments().image_size == 1024
    assert run.prompts == {"prompt_modes": "points", "num_points": 5, "region": "general"}
    assert isinstance(augmentation(run.augment), Sam2LoraAugment)
    assert run.val is None
    assert {score for test in run.tests for score in test.scores.values()} == {score_as_sam2lora}


ROWS, COLUMNS = np.mgrid[:64, :80]
DISC = (ROWS - 30) ** 2 + (COLUMNS - 44) ** 2 < 20**2
VESSEL = (ROWS == 31) & (COLUMNS > 5)


def drawn(mask, prompt, seed=0):
    options = {name: value for name, value in prompt.items() if name != "prompt_modes"}
    rng = np.random.default_rng(seed)
    return sample_prompt(mask, prompt["prompt_modes"], rng, box_jitter=0.0, **options)


def at(mask, points):
    x, y = points.astype(int).T
    return mask[y, x]


def test_seven_kinds_of_prompts():
    kinds = sam2lora.prompt_kinds()
    expected = {  # points inside and outside, padding points, corners
        "none": (0, 0, 0, 0),
        "1 point": (1, 0, 1, 0),
        "2 points": (2, 0, 1, 0),
        "5 points": (5, 0, 1, 0),
        "5 points+1 negative": (5, 1, 1, 0),
        "box": (0, 0, 0, 2),
        "5 points+box": (5, 0, 0, 2),
    }
    assert list(kinds) == list(expected)
    assert set(published.PROMPTS) == set(kinds) - {"5 points+1 negative"}
    box = np.argwhere(DISC)[:, ::-1]
    for name, (inside, outside, padding, corners) in expected.items():
        coords, labels = drawn(DISC, kinds[name])
        wanted = [1] * inside + [0] * outside + [2, 3] * (corners > 0) + [-1] * padding
        assert labels.tolist() == wanted, name
        assert at(DISC, coords[labels == 1]).all()
        assert not at(DISC, coords[labels == 0]).any()
        if corners:  # tight around the mask eroded by 2 x 2 pixels, whose anchor is below right
            np.testing.assert_array_equal(coords[labels == 2][0], box.min(0) + 1)
            np.testing.assert_array_equal(coords[labels == 3][0], box.max(0))


def test_released_points_of_thin_vessels_lie_anywhere():
    ours, released = sam2lora.prompt_kinds(), sam2lora.prompt_kinds(density_released=True)
    assert list(ours) == list(released)
    hits, released_hits = (
        np.mean([at(VESSEL, drawn(VESSEL, kinds["5 points"], seed)[0][:5]) for seed in range(40)])
        for kinds in (ours, released)
    )
    assert hits == 1
    assert released_hits == pytest.approx(VESSEL.mean(), abs=0.03)
    for name in ours:  # of discs the two are the same
        for one, other in zip(drawn(DISC, ours[name]), drawn(DISC, released[name]), strict=True):
            np.testing.assert_array_equal(one, other)


def test_released_e4_is_e3():
    kinds = sam2lora.prompt_kinds(released_e4=True)
    assert list(kinds)[4] == "5 points+0 negative"
    assert kinds["5 points+0 negative"] == {**kinds["5 points"], "num_negatives": 0}


@pytest.mark.parametrize("flag", ["density_released", "released_e4"])
def test_flags_reach_the_tests(data, flag):
    for given in ({flag: False}, {flag: True}):
        runs = listed(data, sets=("drive",), ablations=(), **given).values()
        assert all(t.prompts == sam2lora.prompt_kinds(**given) for run in runs for t in run.tests)


def test_runs_are_methods_and_ablations_of_both_pools(data):
    runs = listed(data, ranks=(64, 4, 64))
    ablations = [f"lora_r64_{name}" for name in ("encoder", "decoder", *SUBSETS)]
    names = ["zero_shot", "lora_r64", "lora_r4", "full", "decoder", *ablations]
    assert list(runs) == [f"{pool}_{name}" for pool in ("vessel", "disc") for name in names]
    assert {run.table for run in runs.values()} == {"vessel", "disc"}
    vessel, disc = runs["vessel_lora_r64"], runs["disc_lora_r64"]
    assert len(vessel.train) == 20 + 3 + 3 + 32 + 15
    assert len(disc.train) == 3 + 765 + 473 + 487 + 366 + 3
    assert tuple(test.name for test in vessel.tests) == published.VESSELS
    assert tuple(test.name for test in disc.tests) == published.DISCS
    assert [len(test.dataset) for test in vessel.tests] == [8, 3, 3, 13, 5]
    untrained = [name for name, run in runs.items() if run.train is None]
    assert untrained == ["vessel_zero_shot", "disc_zero_shot"]
    assert vessel.settings == {"sets": list(published.VESSELS)}
    assert runs["vessel_lora_r64_dice_tversky"].method == "SAM2LoRA r=64, Dice + Tversky"
    assert runs["disc_lora_r64_encoder"].method == "SAM2LoRA r=64, encoder"
    terms = {name: runs[f"vessel_lora_r64_{name}"].build().objective.terms for name in SUBSETS}
    assert terms == {name: (*name.split("_"), "iou") for name in SUBSETS}


def test_every_published_number_has_a_run(data):
    runs = listed(data, ranks=RANKS, ablations=()).values()
    cells = {(run.table, run.method, test.name) for run in runs for test in run.tests}
    prompts = {*sam2lora.prompt_kinds(), published.MEAN_OF_PROMPTS}
    entries = [entry for entry in published.SAM2LORA if entry.table != published.SUMMARY]
    assert {(entry.table, entry.method, entry.data_set) for entry in entries} <= cells
    assert {entry.prompt for entry in entries} <= prompts
    assert {entry.experiment for entry in entries} == {run.experiment for run in runs}


def test_sets_and_pictures_make_runs_smaller(data):
    runs = listed(data, sets=("stare", "idrid", "papila"), ablations=(), pictures=2)
    prefixes = ("vessel-stare", "disc-papila-idrid")
    assert list(runs) == [f"{prefix}_{name}" for prefix in prefixes for name in METHODS]
    run = runs["disc-papila-idrid_full"]
    assert run.table == "disc: PAPILA + IDRiD"
    assert [len(test.dataset) for test in run.tests] == [2, 2]
    names = [run.train[i]["name"].split("/")[0] for i in range(len(run.train))]
    assert names == ["PAPILA"] * 2 + ["IDRiD"] * 2
    assert len(runs["vessel-stare_full"].train) == 2
    whole = listed(data, pools=("vessel",), sets=POOLS["vessel"][::-1], ablations=())
    assert list(whole) == [f"vessel_{name}" for name in METHODS]
    alone = listed(data / "STARE", sets=("stare",), ablations=())
    assert [run.table for run in alone.values()] == ["vessel: STARE"] * len(METHODS)


def test_cups_are_a_pool_of_their_own(data):
    runs = listed(data, pools=("disc", "cup"), sets=("drishti_gs",), ablations=("cup",))
    assert "cup-drishti_gs_lora_r64_bce" in runs
    assert "disc-drishti_gs_lora_r64_bce" not in runs
    classes = {run.table: run.train.class_names for run in runs.values() if run.train is not None}
    assert classes == {"disc: DRISHTI-GS": ("disc",), "cup: DRISHTI-GS": ("cup",)}


def test_phantoms_are_added_to_those_of_an_earlier_run(tmp_path):
    for name in ("stare", "drive", "stare"):
        given = arguments(out=tmp_path, sets=(name,), ablations=())
        assert len(sam2lora.trials(given)) == len(METHODS)
    assert {folder.name for folder in (tmp_path / "phantoms").iterdir()} == {"STARE", "DRIVE"}


def test_other_base_models_are_told(data, tiny_checkpoint, monkeypatch):
    def notes(**options):
        return next(iter(listed(data, sets=("drive",), **options).values())).notes

    (note,) = notes()
    assert "SAM 2 of 0.7 M parameters at 64 pixels; the paper's is SAM 2.1 large" in note
    (note,) = notes(ckpt=str(tiny_checkpoint))
    assert "base model: SAM 1 of" in note
    large = sam2("hiera_large", image_size=(1024, 1024))
    monkeypatch.setattr(sam2lora, "base_model", lambda *_: (large, {}))
    assert notes(image_size=1024) == ()


def test_the_whole_way_and_the_report(tmp_path, capsys):
    out = tmp_path / "runs"
    argv = ["--smoke", "--sets", "drive", "--out", str(out)]
    assert sam2lora.main([*argv, "--only", "*_lora_r4", "*_zero_shot"]) == 0
    records = {record.run: record for record in read_records(out)}
    tuned, untuned = (records[f"vessel-drive_{name}"] for name in ("lora_r4", "zero_shot"))
    assert (tuned.method, untuned.method) == ("SAM2LoRA r=4", "zero-shot SAM 2")
    assert tuned.parameters["trainable"] == num_factors(abstract_params(TINY), 4)
    assert (untuned.parameters["trainable"], untuned.history) == (0, [])
    assert tuned.smoke
    assert tuned.settings["sets"] == ["DRIVE"]
    assert [entry["step"] for entry in tuned.history] == [1, 2]
    assert tuned.history[0]["learning_rate"] == pytest.approx(1e-4)
    assert all(np.isfinite(entry["loss"]) for entry in tuned.history)
    for record in (tuned, untuned):
        assert [scores.prompt for scores in record.scores] == list(sam2lora.prompt_kinds())
        for scores in record.scores:
            assert (scores.data_set, scores.class_names) == ("DRIVE", ("vessel",))
            assert [case.case for case in scores.cases] == ["01_test", "02_test"]
            for case in scores.cases:
                assert {"dice", "iou", "auc", "hd95", "sensitivity"} <= set(case.values)
    for name in ("curve.png", "overlays.png", "adapter.safetensors"):
        assert (out / tuned.run / name).stat().st_size
    assert (out / untuned.run / "overlays.png").stat().st_size
    assert not (out / untuned.run / "adapter.safetensors").exists()
    assert "Dice DRIVE, none: " in capsys.readouterr().out
    assert report(["--results", str(out), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert all(method in page for method in ("SAM2LoRA r=4", "zero-shot SAM 2"))
    assert sam2lora.main([*argv, "--only", "*_lora_r4"]) == 1
    assert "holds a result: choose another --out, or --resume" in capsys.readouterr().err
    assert sam2lora.main([*argv, "--only", "*_lora_r4", "--resume"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --data DIR and --ckpt FILE, or --smoke"),
        (["--data", "nowhere", "--variant", "vit_xs"], "nowhere: no such folder"),
        (["--data", ".", "--ckpt", "broken.pt"], "experiments.sam2lora: error: broken.pt: "),
        (["--smoke", "--sets", "chase"], "data set 'chase': expected some of chasedb1, drive"),
        (["--smoke", "--pools", "veins"], "pool 'veins': expected one of vessel, disc, cup"),
        (["--smoke", "--ablations", "veins"], "pool 'veins': expected one of vessel, disc, cup"),
        (["--smoke", "--sets", "drive", "idrid", "--pools", "vessel"], "--sets idrid: in none of"),
        (["--smoke", "--pools"], "--pools: expected at least one"),
        (["--smoke", "--ranks"], "--ranks: expected at least one"),
        (["--smoke", "--sets", "drive", "--ranks", "0"], "rank must be at least 1, got 0"),
        (["--smoke", "--pictures", "0"], "--pictures 0: expected 1 or more"),
        (["--smoke", "--sets", "drive", "--only", "x"], "--only x: no such run; there are vessel-"),
        (["--smoke", "--batch-size", "3", "--accumulate", "2"], "--batch-size 3 is no multiple of"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    assert sam2lora.main([*argv, "--out", str(tmp_path / "runs")]) == 1
    assert message in capsys.readouterr().err


def test_a_wrong_tree_is_shown_beside_the_expected_one(tmp_path, capsys):
    (tmp_path / "data" / "holiday").mkdir(parents=True)
    argv = ["--smoke", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]
    for sets, words in (([], "Image_01L.jpg"), (["--sets", "stare"], "stare-images/")):
        assert sam2lora.main([*argv, *sets]) == 1
        told = capsys.readouterr().err
        assert "found there: holiday/); expected" in told
        assert words in told
    assert not (tmp_path / "runs").exists()


def test_sam_1_has_no_embedding_to_skip(data, tmp_path, tiny_checkpoint, capsys):
    argv = ["--data", str(data), "--sets", "drive", "--no-mem-embed", "skip", "--image-size", "64"]
    argv += ["--only", "*_zero_shot", "--out", str(tmp_path), "--ckpt", str(tiny_checkpoint)]
    assert sam2lora.main(argv) == 1
    told = capsys.readouterr().err
    assert f"--no-mem-embed skip is for SAM 2; {tiny_checkpoint} is SAM 1" in told
    given = arguments(smoke=False, variant="vit_xs", no_mem_embed="skip")
    with pytest.raises(ValueError, match="is for SAM 2; vit_xs is SAM 1"):
        sam2lora.prepared(given, "full", TERMS)
