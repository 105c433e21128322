"""GaLore as an Optax transform: an optimizer that sees every matrix's gradient in few dimensions.

Paper: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection"
(arXiv 2403.03507).  Upstream: jiaweizzhao/GaLore@2cc66f8, ``galore_projector.py``, ``adamw.py``.

A kernel's gradient ``(in, out)`` is projected onto its leading singular vectors, the inner
transform (Adam, say) runs on the small matrix, and its answer is projected back.  Every
``update_gap`` steps the basis is found anew; the inner state is carried over as it is.

Differs from upstream: singular vectors have a fixed sign (the largest entry positive), or results
would differ between machines; the default refresher decomposes the smaller Gram matrix, which spans
the same space in a fraction of the time.  ``optax.contrib.galore`` is another algorithm: it
projects the longer side, upstream's ``reverse_std``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from samjax.peft.paths import path_name

Projection = Literal["std", "reverse_std", "left", "right", "full"]
Refresher = Literal["eigh", "svd", "randomized", "power"]
Basis = dict[str, jax.Array]  # by side, "in" and "out": (…, length of the side, rank)

OVERSAMPLING, POWER_ITERATIONS = 8, 2  # of the range finders


class GaloreState(NamedTuple):
    """count: updates so far; bases: a ``Basis`` in the place of each leaf, empty where it is not
    projected; inner: the inner transform's state, on projected shapes."""

    count: jax.Array
    bases: Any
    inner: optax.OptState


def scale_by_galore(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    update_gap: int = 200,
    scale: float = 0.25,
    projection: Projection = "std",
    refresher: Refresher = "eigh",
    stacked: bool = False,
    any_rank: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on projected gradients, and multiplies what it answers by ``scale``.

    Leaves with fewer than two axes (biases, norms) go to ``inner`` as they are, without ``scale``.
    A kernel with more than two axes (a convolution's) is taken as a matrix of its last axis; with
    ``stacked``, as a stack of matrices.  Ranks by label: several of these in ``optax.partition``.

    Args:
        inner: any transform of gradients alone; it gets no parameters.
        rank: columns of a basis; at most the shorter side of every matrix.
        any_rank: a matrix with a shorter side than that keeps this side's length, as upstream's.
        update_gap: updates between two refreshes; the first update is one.
        scale: upstream's default; its recipe for fine-tuning has rank 4, gap 500, scale 4.
        projection: which side is made short. ``std``: the shorter one, the input where they are
            equal; ``reverse_std``: the other; ``right``: the input, ``left``: the output (as
            upstream calls them, whose matrices are (out, in)); ``full``: both.
        refresher: ``eigh`` of the smaller Gram matrix, and ``svd``, are exact; ``randomized`` is
            GaLore 2's range finder, ``power`` two block power iterations from the last basis:
            matrix products only, for matrices that are sharded.
        stacked: see above.
        seed: of the ``randomized`` range finder and of ``power``'s first basis.

    The transform's ``update`` takes ``refresh``: None decides by the count, within the compiled
    program; a bool decides it while tracing, so that a trainer can compile a program for each.

    Raises ``ValueError`` for a setting out of its range, and at ``init`` naming every leaf whose
    shorter side is below the rank, without ``any_rank``.
    """
    for name, value, known in (
        ("projection", projection, get_args(Projection)),
        ("refresher", refresher, get_args(Refresher)),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r}: expected one of {', '.join(known)}")
    if rank < 1 or update_gap < 1:
        raise ValueError(f"rank {rank} and update_gap {update_gap}: expected at least 1")

    def matrix(leaf: jax.Array) -> jax.Array:
        return leaf if stacked else leaf.reshape(-1, leaf.shape[-1])

    def init(params: Any) -> GaloreState:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        bases, small, problems = [], [], []
        for index, (path, leaf) in enumerate(leaves):
            if leaf.ndim < 2:
                bases.append({})
                small.append(leaf)
                continue
            shape = jax.eval_shape(matrix, leaf).shape
            if rank > min(shape[-2:]) and not any_rank:
                problems.append(f"{path_name(path)}, {shape[-2]} x {shape[-1]}")
                continue
            key = jax.random.fold_in(jax.random.key(seed), index)
            columns = min(rank, *shape[-2:])
            basis = {
                side: _first_basis((*shape[:-2], shape[-2 if side == "in" else -1], columns), key)
                for side in sides(shape, projection)
            }
            bases.append(basis)
            small.append(project(jnp.zeros(shape, leaf.dtype), basis))
        if problems:
            raise ValueError(
                f"rank {rank} exceeds the shorter side of:\n  " + "\n  ".join(problems)
            )
        bases, small = (jax.tree.unflatten(treedef, values) for values in (bases, small))
        return GaloreState(jnp.zeros((), jnp.int32), bases, inner.init(small))

    def _first_basis(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape) if refresher == "power" else jnp.zeros(shape)

    def update(updates, state, params=None, *, refresh: bool | None = None, **extra):
        del params, extra
        leaves, treedef = jax.tree.flatten(updates)
        old = treedef.flatten_up_to(state.bases)
        due = state.count % update_gap == 0
        bases, small = [], []
        for index, (leaf, basis) in enumerate(zip(leaves, old, strict=True)):
            if basis:
                gradient = matrix(leaf)
                key = jax.random.fold_in(jax.random.key(seed), state.count)
                found = _find(
                    gradient, basis, rank, refresher, jax.random.fold_in(key, index), refresh, due
                )
                bases.append(found)
                small.append(project(gradient, found))
            else:
                bases.append(basis)
                small.append(leaf)
        answers, inner_state = inner.update(jax.tree.unflatten(treedef, small), state.inner)
        full = [
            (scale * project_back(answer, basis)).reshape(leaf.shape).astype(leaf.dtype)
            if basis
            else answer
            for answer, basis, leaf in zip(jax.tree.leaves(answers), bases, leaves, strict=True)
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        state = GaloreState(count, jax.tree.unflatten(treedef, bases), inner_state)
        return jax.tree.unflatten(treedef, full), state

    return optax.GradientTransformationExtraArgs(init, update)


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    inner: optax.GradientTransformation | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """GaLore-AdamW as upstream's ``GaLoreAdamW``; ``options`` are ``scale_by_galore``'s.

    Weights decay decoupled, after the step, all of them (``optax.partition`` says otherwise).
    ``inner`` takes the place of Adam with these betas and eps.
    """
    adam = scale_by_adam_of_transformers(b1, b2, eps) if inner is None else inner
    return optax.chain(
        scale_by_galore(adam, rank, **options),
        optax.scale_by_learning_rate(learning_rate),
        decay_afterwards(learning_rate, weight_decay),
    )


def scale_by_adam_of_transformers(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformation:
    """Adam with eps beside the uncorrected root: m / (√v + eps) · √(1 - b2ᵗ) / (1 - b1ᵗ).

    As in transformers' AdamW, which upstream's is a copy of; Optax and PyTorch correct v first.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))  # for donation: two
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(updates, state, params=None):
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        factor = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: factor * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def decay_afterwards(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float
) -> optax.GradientTransformation:
    """Shrinks the updated parameters by ``learning_rate · weight_decay``; last in a chain."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("weight decay needs the parameters: update(grads, state, params)")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        decay = rate * weight_decay
        updates = jax.tree.map(lambda u, p: u - (decay * (p + u)).astype(u.dtype), updates, params)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update) if weight_decay else optax.identity()


def sides(shape: tuple[int, ...], projection: Projection) -> tuple[str, ...]:
    """Which sides of a kernel (…, in, out) are projected; see ``scale_by_galore``."""
    widens = shape[-1] >= shape[-2]
    return {
        "std": ("in",) if widens else ("out",),
        "reverse_std": ("out",) if widens else ("in",),
        "right": ("in",),
        "left": ("out",),
        "full": ("in", "out"),
    }[projection]


def project(matrix: jax.Array, basis: Basis) -> jax.Array:
    """(…, in, out) in the coordinates of the basis."""
    if "in" in basis:
        matrix = jnp.einsum("...ir,...io->...ro", basis["in"], matrix)
    if "out" in basis:
        matrix = jnp.einsum("...io,...or->...ir", matrix, basis["out"])
    return matrix


def project_back(matrix: jax.Array, basis: Basis) -> jax.Array:
    """Undoes ``project`` within the basis's span."""
    if "in" in basis:
        matrix = jnp.einsum("...ir,...ro->...io", basis["in"], matrix)
    if "out" in basis:
        matrix = jnp.einsum("...ir,...or->...io", matrix, basis["out"])
    return matrix


def _find(gradient, basis, rank, refresher, key, refresh, due) -> Basis:
    """The basis, found anew if ``refresh``; if that is None, when it is ``due``."""

    def anew() -> Basis:
        with jax.default_matmul_precision("highest"):
            found = _FINDERS[refresher](gradient.astype(jnp.float32), basis, rank, key)
        return {side: canonical_signs(vectors) for side, vectors in found.items()}

    if refresh is None:
        return jax.lax.cond(due, anew, lambda: basis)
    return anew() if refresh else basis


def canonical_signs(vectors: jax.Array) -> jax.Array:
    """Columns (…, k, r) with the sign that makes the entry of largest magnitude positive."""
    largest = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
    return vectors * jnp.where(jnp.take_along_axis(vectors, largest, axis=-2) < 0, -1.0, 1.0)


def _by_eigh(gradient: jax.Array, basis: Basis, rank: int, key: jax.Array) -> Basis:
    del key
    along_in = gradient.shape[-2] <= gradient.shape[-1]
    narrow = gradient if along_in else gradient.mT  # (…, short, long)
    _, vectors = jnp.linalg.eigh(narrow @ narrow.mT)
    short = vectors[..., ::-1][..., :rank]
    names = ("in", "out") if along_in else ("out", "in")
    found = {names[0]: short}
    if names[1] in basis:
        found[names[1]] = jnp.linalg.qr(narrow.mT @ short).Q
    return {side: found[side] for side in basis}


def _by_svd(gradient: jax.Array, basis: Basis, rank: int, key: jax.Array) -> Basis:
    del key
    left, _, right = jnp.linalg.svd(gradient, full_matrices=False)
    found = {"in": left[..., :rank], "out": right.mT[..., :rank]}
    return {side: found[side] for side in basis}


def _by_random_range(gradient: jax.Array, basis: Basis, rank: int, key: jax.Array) -> Basis:
    """Halko, Martinsson, Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1."""
    width = min(rank + OVERSAMPLING, *gradient.shape[-2:])
    probes = jax.random.normal(key, (*gradient.shape[:-2], gradient.shape[-1], width))
    for _ in range(POWER_ITERATIONS):
        probes = jnp.linalg.qr(gradient.mT @ jnp.linalg.qr(gradient @ probes).Q).Q
    span = jnp.linalg.qr(gradient @ probes).Q
    left, _, right = jnp.linalg.svd(span.mT @ gradient, full_matrices=False)
    found = {"in": (span @ left)[..., :rank], "out": right.mT[..., :rank]}
    return {side: found[side] for side in basis}


def _by_power(gradient: jax.Array, basis: Basis, rank: int, key: jax.Array) -> Basis:
    del rank, key
    found = {}
    for side, vectors in basis.items():
        tall = gradient if side == "in" else gradient.mT
        for _ in range(POWER_ITERATIONS):
            vectors = jnp.linalg.qr(tall @ (tall.mT @ vectors)).Q
        found[side] = vectors
    return found


_FINDERS = {
    "eigh": _by_eigh,
    "svd": _by_svd,
    "randomized": _by_random_range,
    "power": _by_power,
}
