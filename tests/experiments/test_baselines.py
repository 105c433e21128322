"""The shared methods: their rates, losses and optimizers as upstream writes them, what each trains,
and all of them the whole way; the command around them; the bars."""

import dataclasses
import os
import signal
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments import medsaga, paper
from experiments import trial as trials_of
from experiments.bars import class_bars
from experiments.baselines import METHODS, Method, TwoLevels, momentum_of, named, of_sam, trial
from experiments.objectives import LabelMap
from experiments.paper import PaperOptions
from experiments.record import RESULT, Record, read_records
from samjax.data import Subset, make_loader
from samjax.data.opening import class_names_of
from samjax.models.hsam import HSamPrediction
from samjax.models.mask_decoder import MaskPrediction
from samjax.trees import flatten

K = 8  # classes of Synapse


def options_of(name, **changes):
    """What a method makes of options that the user left alone."""
    given = PaperOptions(**changes)
    made = trial(METHODS[name], given, K, experiment="e", table="t", tests=())
    assert isinstance(made.options, PaperOptions)
    return made.options


def rates_of_upstream(base, warmup, steps, max_iterations, power=0.9):
    """SAMed's loop, and H-SAM's: what the optimizer has at each step. The rate that a step works
    out is set after it, for the next one, and the first step has the one that AdamW was made with.
    """
    used, rate = [], base / warmup if warmup else base
    for it in range(steps):
        used.append(rate)
        if it < warmup:
            rate = base * (it + 1) / warmup
        else:
            rate = base * (1 - (it - warmup) / max_iterations) ** power
    return used


@pytest.mark.parametrize(
    ("name", "base", "warmup"),
    [("samed", 5e-3, 250), ("hsam", 2.5e-3, 250), ("dae_former", 5e-2, 0)],
)
def test_rates_are_upstreams(name, base, warmup):
    """Upstream's epochs are 200 of the schedule's and 160 of the run's: the end is not zero."""
    horizon, steps = 200 * 92, 160 * 92
    expected = rates_of_upstream(base, warmup, steps, horizon)
    found = options_of(name).rate(horizon)
    counts = np.array([0, 1, 2, 249, 250, 251, 252, steps // 2, steps - 1], np.int32)
    rates = np.asarray(jax.vmap(found)(counts)) / base
    np.testing.assert_allclose(rates, np.array(expected)[counts] / base, atol=1e-6)
    if warmup:
        assert rates[0] == rates[1] == pytest.approx(1 / 250, rel=1e-4)
        assert rates[3] < 1 - 1e-3
        assert rates[4:6] == pytest.approx([1, 1], abs=1e-6)
    assert rates[-1] > 0.2


def test_settings_are_the_released_ones():
    shared = {"weight_decay": 0.1, "schedule": "poly", "warmup": 250, "clip": "none"}
    for name in ("samed", "samed_s", "full", "decoder"):
        options = options_of(name)
        assert {key: getattr(options, key) for key in shared} == shared
        assert (options.lr, options.dice_weight) == (5e-3, 0.8)
    assert options_of("hsam").dice_weight == 0.9
    dae = options_of("dae_former")
    assert (dae.lr, dae.weight_decay, dae.dice_weight, dae.warmup) == (0.05, 1e-4, 0.6, 0)
    assert {method.augment for method in METHODS.values()} == {"samed", "hsam", "strong"}
    assert named(["full", "samed"]) == [METHODS["full"], METHODS["samed"]]


def test_what_the_user_gives_beats_a_methods_settings():
    assert options_of("samed", lr=0.3).lr == 0.3
    assert options_of("samed", lr=0.3).weight_decay == 0.1
    default = PaperOptions().lr
    assert options_of("samed", lr=default, chosen=("lr",)).lr == default, "given, though a default"
    assert options_of("samed", lr=0.3, chosen=()).lr == 5e-3, "a paper's own, on no command line"
    for name in METHODS:
        options = options_of(name, dice_weight=0.25, weight_decay=0.02, smoke=True, image_size=64)
        assert objective_of(name, options).dice_weight == 0.25
    assert decay_of_a_step(options_of("dae_former", weight_decay=0.02)) == pytest.approx(0.02)
    assert decay_of_a_step(options_of("dae_former")) == pytest.approx(1e-4)


def decay_of_a_step(options):
    """By how much of a weight 1 DAE-Former's first step of rate 1 without a gradient takes it."""
    optimizer = momentum_of(options)(None, optax.constant_schedule(1.0))
    params = {"bias": jnp.ones(1)}
    updates, _ = optimizer.update({"bias": jnp.zeros(1)}, optimizer.init(params), params)
    return -float(updates["bias"][0])


def tuning_of(name, options, rank=None):
    """A method's tuning with shapes in the place of arrays."""
    method = METHODS[name]
    build = method.build if rank is None else of_sam("lora+decoder", rank=rank)
    kept = []

    def run():
        kept.append(build(options, K))
        return kept[0].trainable, kept[0].frozen

    trainable, frozen = jax.eval_shape(run)
    return dataclasses.replace(kept[0], trainable=trainable, frozen=frozen)


@cache
def _objective(name, share):
    return tuning_of(name, PaperOptions(smoke=True, image_size=64, dice_weight=share)).objective


def objective_of(name, options):
    return _objective(name, options.dice_weight)


def sizes(tree):
    return {path: leaf.size for path, leaf in flatten(tree).items()}


@cache
def of_vit_b(name, rank=None):
    return tuning_of(name, options_of(name, variant="vit_b", image_size=512), rank)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_samed_trains_36864_a_rank_and_both_of_prompt_and_decoder(rank):
    """On the q and v columns of all twelve qkv; the decoder whole, with a fresh head."""
    tuning = of_vit_b("samed", rank)
    factors, params = sizes(tuning.trainable["factors"]), sizes(tuning.trainable["params"])
    assert sum(factors.values()) == 36_864 * rank
    assert {path.rsplit("/", 1)[0] for path in factors} == {
        f"image_encoder/blocks/{block}/attn/qkv/{part}" for block in range(12) for part in "qv"
    }
    assert not [path for path in params if path.startswith("image_encoder/")]
    assert sum(path.startswith("image_encoder/") for path in sizes(tuning.frozen)) == 177
    decoder = {path for path in params if path.startswith("mask_decoder/")}
    # No loss reaches SAM's IoU head; it is fresh, and therefore part of what the run leaves.
    labels = flatten(tuning.labels["params"])
    still = {path for path in decoder if labels[path] == "still"}
    assert still == {path for path in decoder if "/iou_prediction_head/" in path}
    assert sum("output_hypernetworks_mlps/" in p and p.endswith("/kernel") for p in decoder) == 27
    assert flatten(tuning.trainable["params"])["mask_decoder/mask_tokens/embedding"].shape[0] == 9
    assert not [path for path in sizes(tuning.frozen) if path.startswith("mask_decoder/")]
    # The prompt encoder without prompts is one vector.
    assert set(params) - decoder == {"prompt_encoder/no_mask_embed/embedding"}


def test_samed_s_has_factors_in_the_place_of_the_decoders_transformer():
    tuning = of_vit_b("samed_s")
    factors, params = sizes(tuning.trainable["factors"]), set(sizes(tuning.trainable["params"]))
    whole = set(sizes(of_vit_b("samed").trainable["params"]))
    transformer = {path for path in whole if path.startswith("mask_decoder/transformer/")}
    assert params == whole - transformer
    assert transformer <= set(sizes(tuning.frozen))
    attentions = [
        *(f"layers/{i}/{kind}" for i in (0, 1) for kind in (
            "self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")),
        "final_attn_token_to_image",
    ]  # fmt: skip
    in_decoder = {path: size for path, size in factors.items() if path.startswith("mask_decoder/")}
    assert {path.rsplit("/", 2)[0] for path in in_decoder} == {
        f"mask_decoder/transformer/{attention}/{part}_proj"
        for attention in attentions
        for part in "qv"
    }
    # 2 of 256 -> 256 and 5 of 256 -> 128, q and v each.
    assert sum(in_decoder.values()) == 4 * (2 * 2 * 512 + 5 * 2 * 384)
    assert sum(factors.values()) - sum(in_decoder.values()) == 147_456


def test_hsam_trains_both_decoders_with_rank_5():
    tuning = of_vit_b("hsam")
    params = sizes(tuning.trainable["params"])
    assert sum(sizes(tuning.trainable["factors"]).values()) == 36_864 * 5
    assert {path.split("/")[0] for path in params} == {
        "mask_decoder", "mask_decoder2", "prompt_encoder",
    }  # fmt: skip
    assert tuning.config.image_size == (512, 512)


def test_decoder_and_full_are_the_two_ends():
    decoder, full = of_vit_b("decoder"), of_vit_b("full")
    assert not decoder.trainable["factors"]
    assert set(sizes(decoder.trainable["params"])) == set(
        sizes(of_vit_b("samed").trainable["params"])
    )
    left = set(sizes(full.frozen))
    assert all(path.startswith("prompt_encoder/") for path in left)
    everything = sum(sizes(full.trainable).values()) + sum(sizes(full.frozen).values())
    assert everything == sum(sizes(decoder.trainable).values()) + sum(
        sizes(decoder.frozen).values()
    )


class DiceLoss:
    """SAMed's and H-SAM's `DiceLoss(k + 1)` of one image: squares below, the background too."""

    def __init__(self, torch):
        self.torch = torch

    def __call__(self, logits, labels):
        p = logits.softmax(1)
        total = 0.0
        for i in range(logits.shape[1]):
            score, target = p[:, i], (labels == i).to(p)
            above = 2 * (score * target).sum() + 1e-5
            total += 1 - above / ((score * score).sum() + (target * target).sum() + 1e-5)
        return total / logits.shape[1]


def theirs(torch, logits, labels, share):
    entropy = torch.nn.functional.cross_entropy(logits, labels)
    return (1 - share) * entropy + share * DiceLoss(torch)(logits, labels)


def random_case(frame=64, batch=3):
    """Logits of a quarter of the frame and of the frame, and labels of few classes each."""
    rng = np.random.default_rng(0)
    low = 4 * rng.normal(size=(batch, K + 1, frame // 4, frame // 4)).astype(np.float32)
    full = 4 * rng.normal(size=(batch, K + 1, frame, frame)).astype(np.float32)
    labels = rng.integers(0, [[[2]], [[5]], [[9]]], (batch, frame, frame)).astype(np.uint8)
    batch_ = {"mask": labels, "size": np.full((batch, 2), frame, np.int32)}
    return low, full, jax.tree.map(jnp.asarray, batch_)


def value_and_slopes(objective, config, predict, arrays, batch):
    """The loss of each example and the gradient of their sum."""

    def total(arrays):
        losses = objective.loss(config, predict(*arrays), batch)
        return losses.sum(), losses

    (_, losses), slopes = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
    return np.asarray(losses), [np.asarray(slope) for slope in slopes]


def compare(found, slopes, expected, tensors):
    np.testing.assert_allclose(found, [loss.item() for loss in expected], rtol=1e-6)
    sum(expected).backward()
    for slope, tensor in zip(slopes, tensors, strict=True):
        largest = tensor.grad.abs().max().item()
        difference = np.abs(slope - tensor.grad.numpy()).max() / largest
        print(f"\nloss {np.abs(found / [e.item() for e in expected] - 1).max():.1e}, "
              f"gradient {difference:.1e}", end="")  # fmt: skip
        assert difference <= 1e-6


def by_scipys_zoom(labels, size):
    from scipy import ndimage

    return ndimage.zoom(labels, (1, *(size / side for side in labels.shape[1:])), order=0)


@pytest.mark.parametrize(("name", "share"), [("samed", 0.8), ("dae_former", 0.6)])
def test_loss_and_gradient_are_torchs(name, share):
    """SAMed's on the decoder's own logits, DAE-Former's on those of the frame."""
    torch = pytest.importorskip("torch")
    objective = objective_of(name, options_of(name))
    assert (type(objective), objective.dice_weight) == (LabelMap, share)
    tuning = tuning_of(name, options_of(name, smoke=True, image_size=64))
    low, full, batch = random_case()
    given = low if objective.low_res else full
    labels = by_scipys_zoom(np.asarray(batch["mask"]), given.shape[-1])
    found, slopes = value_and_slopes(
        objective,
        tuning.config,
        lambda logits: MaskPrediction(logits, jnp.zeros((3, K + 1))),
        (jnp.asarray(given),),
        batch,
    )
    tensor = torch.tensor(given, dtype=torch.float64, requires_grad=True)
    truth = torch.tensor(labels, dtype=torch.int64)
    expected = [theirs(torch, tensor[i : i + 1], truth[i : i + 1], share) for i in range(3)]
    compare(found, slopes, expected, [tensor])


def test_hsam_loss_of_two_levels_and_its_gradient_are_torchs():
    torch = pytest.importorskip("torch")
    objective = objective_of("hsam", options_of("hsam"))
    assert (type(objective), objective.dice_weight) == (TwoLevels, 0.9)
    tuning = tuning_of("hsam", options_of("hsam", smoke=True, image_size=64))
    low, full, batch = random_case()
    epochs = np.float32([0, 40, 299])
    found, slopes = value_and_slopes(
        objective,
        tuning.config,
        lambda low, full: HSamPrediction(low, jnp.zeros((3, K + 1)), full),
        (jnp.asarray(low), jnp.asarray(full)),
        {**batch, "epoch": jnp.asarray(epochs)},
    )
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (low, full)]
    labels = np.asarray(batch["mask"])
    truths = [torch.tensor(by_scipys_zoom(labels, side), dtype=torch.int64) for side in (16, 64)]
    expected = []
    for i, epoch in enumerate(epochs):
        first, second = (
            theirs(torch, logits[i : i + 1], truth[i : i + 1], 0.9)
            for logits, truth in zip(tensors, truths, strict=True)
        )
        weight = 0.6 ** (0.990 ** float(epoch))
        expected.append((1 - weight) * first + weight * second)
    compare(found, slopes, expected, tensors)


def test_dae_former_optimizer_is_torchs_sgd():
    """With a rate that its trainer sets after each step; biases decay as well."""
    torch = pytest.importorskip("torch")
    options = options_of("dae_former")
    optimizer = momentum_of(options)(None, options.rate(12))
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}
    ours = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    tensors = {
        k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in params.items()
    }
    sgd = torch.optim.SGD(tensors.values(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    state = optimizer.init(ours)

    @jax.jit
    def step(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for it in range(8):
        gradients = {k: rng.normal(size=v.shape) for k, v in params.items()}
        given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradients)
        ours, state = step(given, state, ours)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        sgd.step()
        for group in sgd.param_groups:
            group["lr"] = 0.05 * (1 - it / 12) ** 0.9
    for name, tensor in tensors.items():
        np.testing.assert_allclose(ours[name], tensor.detach(), atol=1e-6)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """MedSAGa's smoke runs on Synapse's phantoms, and the folder of all results here."""
    out = tmp_path_factory.mktemp("baselines")
    arguments = medsaga.Arguments(smoke=True, out=out, sets=("synapse",), few_shot=())
    given = {"sets", "few_shot"}
    smoke = {k: v for k, v in medsaga.smoke(arguments).items() if k not in given}
    arguments = dataclasses.replace(arguments, **smoke, checkpoint_every=0, chosen=())
    return arguments, {found.run: found for found in medsaga.trials(arguments)}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_two_steps(name, shared):
    arguments, runs = shared
    like = runs["synapse_samed"]
    short = dataclasses.replace(like.tests[0], dataset=Subset(like.tests[0].dataset, range(2)))
    found = runs.get(f"synapse_{name}") or trial(
        METHODS[name], arguments, K, experiment="medsaga", table="Synapse", run=f"synapse_{name}",
        train=like.train, tests=(),
    )  # fmt: skip
    before, after = [], []

    def build():
        tuning = found.build()
        before.append(jax.tree.map(np.array, (tuning.frozen, tuning.trainable)))
        return tuning

    def draw(_, tuning, best):
        after.append(jax.tree.map(np.asarray, (tuning.frozen, best)))
        labels.append(flatten(tuning.labels["params"]))

    labels = []
    watched = dataclasses.replace(found, build=build, draw=draw, tests=(short,))
    record = trials_of.run(watched, arguments.mesh.start())
    (frozen, trained), (frozen_after, trained_after) = before[0], after[0]
    assert flatten(frozen).keys() == flatten(frozen_after).keys()
    for path, leaf in flatten(frozen).items():
        np.testing.assert_array_equal(flatten(frozen_after)[path], leaf, err_msg=path)
    moved = {path for path, leaf in flatten(trained).items()
             if (flatten(trained_after)[path] != leaf).any()}  # fmt: skip
    still = {f"params/{path}" for path, label in labels[0].items() if label == "still"}
    assert not moved & still
    assert set(flatten(trained)) == still | moved
    assert record.parameters["trainable"] == sum(leaf.size for leaf in flatten(trained).values())
    total = record.parameters["trainable"] + sum(leaf.size for leaf in flatten(frozen).values())
    assert record.parameters["total"] == total
    method = METHODS[name]
    rate = method.settings["lr"] / max(method.settings["warmup"], 1)
    rates = [entry["learning_rate"] for entry in record.history]
    assert rates == pytest.approx([rate, rate], abs=1e-6 * method.settings["lr"])
    assert all(np.isfinite(entry["loss"]) for entry in record.history)
    assert record.notes == method.notes
    assert [scores.data_set for scores in record.scores] == ["Synapse", "Synapse (SAMed's rule)"]
    assert (watched.folder / RESULT).is_file()


TINY = Method(name="decoder only, tiny", run="tiny", build=of_sam("prompting"))


def small_paper(more=(), loader=make_loader):
    """The command of a paper of three runs without training, and some that train."""
    seen = []

    def instead(found, mesh):
        del mesh
        seen.append((found.run, found.options.seed, found.options.lr))
        return Record(
            experiment="e", table=found.table, method=found.method, run=found.run, smoke=True,
            settings={}, seed=found.options.seed, data={}, parameters={}, memory={}, seconds=0.0,
            images_per_second=None, history=[], scores=[],
        )  # fmt: skip

    def trials(options):
        arguments = medsaga.Arguments(smoke=True, out=options.out / "data")
        names = {"samed": "lora_r4", "full": "full", "decoder": "lora_r16"}
        made = [
            trial(METHODS[name], options, 1, experiment="e", table="T", run=run, tests=(),
                  instead=instead)
            for name, run in names.items()
        ]  # fmt: skip
        if more:
            data = paper.data_folder(
                arguments, lambda folder: medsaga.SETS["chestxray8"].write(folder / "ChestX-ray8")
            )
            train, test = medsaga.SETS["chestxray8"].open(data)
            classes = len(class_names_of(test.dataset) or ("foreground",))
            made += [
                trial(
                    method, options, classes, experiment="e", table="T", train=train, tests=(test,),
                    loader=loader,
                )
                for method in more
            ]  # fmt: skip
        return made

    def main(*argv):
        return paper.main("small", PaperOptions, trials, argv, lambda options: paper.SMOKE)

    return main, seen


def test_list_names_the_runs_and_makes_none(tmp_path, capsys):
    main, seen = small_paper()
    assert main("--smoke", "--list", "--out", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["lora_r4", "full", "lora_r16"]
    assert lines[1].endswith("T: full tuning")
    assert main("--smoke", "--list", "--out", str(tmp_path), "--only", "lora_r1*") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["lora_r16"]
    assert not seen
    assert not list(tmp_path.iterdir())


def test_only_and_seeds(tmp_path, capsys):
    main, seen = small_paper()
    smoke = ("--smoke", "--out", str(tmp_path))
    assert main(*smoke, "--only", "lora_r1?", "full", "--seeds", "3", "5") == 0
    runs = ("full", 3), ("lora_r16", 3), ("full", 5), ("lora_r16", 5)
    assert seen == [(f"{run}_seed{seed}", seed, 5e-3) for run, seed in runs]
    assert "4 runs in" in capsys.readouterr().out
    seen.clear()
    assert main(*smoke, "--only", "full", "--seeds", "7", "--lr=0.125") == 0
    assert seen == [("full", 7, 0.125)], "one seed is not in the name; the user's rate counts"
    assert main(*smoke, "--only", "FULL") == 1
    assert "--only FULL: no such run; there are lora_r4, full, lora_r16" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_ends_with_143_and_the_run_goes_on_later(tmp_path, capsys):
    def loader(*arguments, **options):
        if options.get("shuffle") and not options["start_step"]:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGTERM)
        return make_loader(*arguments, **options)

    main, _ = small_paper([TINY], loader)
    before = signal.getsignal(signal.SIGTERM)
    command = ("--smoke", "--only", "tiny", "--out", str(tmp_path))
    assert main(*command) == paper.SIGTERM_EXIT == 143
    assert signal.getsignal(signal.SIGTERM) is before
    folder = tmp_path / "tiny"
    assert f"SIGTERM at step 1; the last good checkpoint is {folder}/checkpoints/1" in (
        error := capsys.readouterr().err
    )
    assert error.rstrip().endswith("continue with --resume")
    assert not (folder / RESULT).exists()
    assert main(*command, "--resume") == 0
    assert "continuing after step 1" in capsys.readouterr().out
    (record,) = read_records(folder)
    assert [entry["step"] for entry in record.history] == [1, 2]


NOTHING = float("nan")


def test_bars_by_class(tmp_path, monkeypatch):
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1]
    )
    methods = {
        "SAMed": {"liver": (0.9, 0.85, 0.95), "gall $bladder": (0.5, 0.1, 0.7)},
        "full": {"liver": (0.8, NOTHING, NOTHING), "spleen": (NOTHING, NOTHING, NOTHING)},
    }
    class_bars(tmp_path / "bars.png", methods, "Dice by class")
    with Image.open(tmp_path / "bars.png") as file:
        assert file.format == "PNG"
        assert np.asarray(file.convert("L")).std() > 10
    (axes,) = saved[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "liver", "gall $bladder", "spleen",
    ]  # fmt: skip
    heights = [bar.get_height() for bars in axes.containers[::2] for bar in bars]
    assert heights == [0.9, 0.5, 0, 0.8, 0, 0]
    places = [bar.get_x() + bar.get_width() / 2 for bars in axes.containers[::2] for bar in bars]
    missing = sorted(text.get_position()[0] for text in axes.texts)
    assert missing == pytest.approx(sorted(places[i] for i in (2, 4, 5)))
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == ["SAMed", "full"]
    class_bars(tmp_path / "bars.pdf", {"a": {"HD95": (20.0, 9.0, 40.0)}}, label="mm", shares=False)
    assert (tmp_path / "bars.pdf").read_bytes()[:4] == b"%PDF"
    assert saved[1].axes[0].get_ylim()[1] > 40


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({}, "no bars to draw"),
        ({"SAMed": {}}, "no bars to draw"),
        ({"SAMed": {"liver": (0.5, 0.6, 0.4)}}, r"SAMed, liver: mean 0\.5 of 0\.6 to 0\.4"),
        ({"SAMed": {"liver": (1.5, 0.4, 0.6)}}, "expected an interval and a mean between 0 and 1"),
    ],
)
def test_bars_that_cannot_be(tmp_path, methods, message):
    with pytest.raises(ValueError, match=message):
        class_bars(tmp_path / "bars.png", methods)
    assert not list(tmp_path.iterdir())
