"""Fira: Adam in a low-rank subspace plus the rest of the gradient, scaled as Adam scaled the part inside.

Source: arXiv 2410.01623. GaLore (arXiv 2403.03507), its predecessor, is the same rule without the rest.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

_OPTIONS = {
    "rule": ("fira", "galore", "only_scaling"),
    "variant": ("official", "paper"),
    "scaling": ("column", "matrix", "none"),
    "proj_side": ("short", "long", "left", "right"),
    "layout": ("flax", "torch"),
    "projector": ("svd", "eigh", "subspace"),
    "signs": ("largest", "align", "none"),
    "base": ("adam", "rmsprop", "adagrad"),
}
_HOLE = optax.MaskedNode()


class FiraState(NamedTuple):
    """State of ``scale_by_fira``: trees like params, float32, with ``optax.MaskedNode`` where a leaf has no such part.

    For a projected leaf [..., m, n] with the left side projected: P [..., m, r], moments [..., r, n]; with the right
    side: P [..., n, r], moments [..., m, r].
    """

    count: jax.Array  # shape=(), dtype=int32: updates done
    mu: Any  # first moments; None for the bases that have none
    nu: Any  # second moments, or sums of squares; of the parameter's shape where it is not projected
    proj: Any  # P
    norm: Any  # norm of the limited rest at the last update, one number a matrix: shape [...]
    peak: Any  # its largest value so far; None without limiter_floor


class NormGrowthState(NamedTuple):
    """State of ``limit_norm_growth``: the norms that came out last, float32 scalars."""

    norm: Any


def scale_by_fira(
    rank: int = 128,
    update_proj_gap: ArrayLike = 200,
    alpha: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    gamma: ArrayLike = 1.01,
    scaling: str = "column",
    variant: str = "official",
    rule: str = "fira",
    proj_side: str = "short",
    layout: str = "flax",
    projector: str = "svd",
    signs: str = "largest",
    base: str = "adam",
    mask: Any | Callable[[optax.Params], Any] | None = None,
    external_refresh: bool = False,
    stagger: bool = False,
    limiter_floor: ArrayLike | None = None,
    max_scaling: ArrayLike | None = None,
) -> optax.GradientTransformation:
    """The direction of Fira: alpha P N + S, with R = Pᵀ G inside the subspace, N = Adam(R) and S the scaled rest.

    G is a gradient [..., m, n] (leading axes are stacked layers, each a matrix of its own). P holds the ``rank`` first
    singular vectors of one of its sides, renewed every ``update_proj_gap`` updates from the gradient of that update,
    the first included; the moments are carried over as they are. S = phi (G - P R) with phi = |N| / |R|, column by
    column, and its norm may grow by no more than the factor ``gamma`` from one update to the next.

    Leaves that ``mask`` leaves out, and matrices with min(m, n) <= rank, get the plain base rule.

    Memory of a projected matrix, short side m: m r + 2 n r + 1 numbers instead of Adam's 2 m n.

    The refresh is a ``lax.cond`` on the count; where the count is batched by ``vmap`` it becomes a select and P is
    computed on every update. With ``external_refresh`` the update has no such branch: call ``refresh_projection``
    before updates 0, T, 2T, ... in a program of its own. Until the first such call P is zero, and so is the update of
    projected leaves (with ``scaling="none"`` it is the gradient).

    Args:
      rank: r >= 1. Static; under ``optax.inject_hyperparams`` name it, and a ``mask`` function, in ``static_args``.
      update_proj_gap: T >= 1.
      alpha: weight of the part inside the subspace ("paper": of both parts).
      b1, b2, eps: Adam's; eps is added to the square root before bias correction. The official RMSProp has b2=0.9.
      gamma: >= 1; ``inf`` switches the limiter off. The first S and one after only zeros are not limited.
      scaling: "column" (phi for each column of R; rows when the right side is projected), "matrix" (one phi), "none"
        (phi = 1).
      variant: "official" (the authors' code, which produced the published numbers) leaves G - alpha P R as the rest,
        does not multiply S by alpha, and applies Adam's bias correction behind the limiter; "paper" is algorithm 1.
        Learning rates do not carry over between the two.
      rule: "fira"; "galore" (alpha P N alone, no norm in the state); "only_scaling" (phi G, limited, no P N and no
        alpha).
      proj_side: "short" (the paper's: the moments keep the long side), "long", or "left"/"right" of the array as
        stored.
      layout: "flax" kernels are [in, out], "torch" weights [out, in]; it matters for square matrices only, where
        "short" projects the input side.
      projector: "svd"; "eigh" of the short side's Gram matrix; "subspace", two rounds of subspace iteration from the
        old P. On TPU the SVD of a large matrix takes minutes.
      signs: singular vectors have no sign, and the carried moments depend on it. "largest" makes the largest entry of
        each column positive, "align" makes each column agree with the old one, "none" keeps what the backend gives.
      base: "adam", "rmsprop" (no bias correction) or "adagrad" (sums from zero), inside the subspace and elsewhere.
      mask: tree of bools, a prefix of params, or a function params -> such a tree: which leaves to project; None
        is ``low_rank_mask``.
      external_refresh: leave P alone.
      stagger: renew leaf or stacked layer number i at count = -i mod T instead of all at once; changes the results.
      limiter_floor: compare with at least this share (1e-3, say) of the largest norm so far, so that a matrix whose
        gradient nearly vanished for a while recovers. Zero gradients never lock the limiter.
      max_scaling: largest phi (1e6, say), for columns that are nearly dead in the subspace.

    Returns:
      ``optax.GradientTransformation`` with state ``FiraState``; all arithmetic is float32, updates have the
      gradients' dtype.

    Raises:
      ValueError: an argument out of range; a masked leaf with fewer than two axes; nothing for ``low_rank_mask``.
      TypeError: ``rank`` is not an int.

    Source: arXiv 2410.01623, algorithm 1 and equation 11; the authors' repository, package ``fira`` 1.0.2.

    >>> params = {"mlp": {"kernel": jnp.ones((8, 16))}, "bias": jnp.ones(16)}
    >>> state = scale_by_fira(rank=2).init(params)
    >>> state.proj["mlp"]["kernel"].shape, state.nu["mlp"]["kernel"].shape, state.nu["bias"].shape
    ((8, 2), (2, 16), (16,))
    """
    chosen = {"rule": rule, "variant": variant, "scaling": scaling, "proj_side": proj_side, "layout": layout}
    _validate(
        {**chosen, "projector": projector, "signs": signs, "base": base},
        {"rank": rank, "update_proj_gap": update_proj_gap, "b1": b1, "b2": b2, "eps": eps, "gamma": gamma},
    )
    mask = low_rank_mask if mask is None else mask

    def init_fn(params):
        def blank(p, projected):
            """(moment, P, norm) of one leaf."""
            if not projected or min(p.shape[-2:]) <= rank:
                return jnp.zeros_like(p, jnp.float32), _HOLE, _HOLE
            # Cut from the parameter, so that each keeps the sharding of the axis that it shares with it.
            rows, columns = p[..., :rank, :], p[..., :, :rank]
            side, moment = (columns, rows) if _left(p.shape, proj_side, layout) else (rows.mT, columns)
            norm = _HOLE if rule == "galore" else jnp.zeros(p.shape[:-2], jnp.float32)
            return jnp.zeros_like(moment, jnp.float32), jnp.zeros_like(side, jnp.float32), norm

        blanks = jax.tree.map(blank, params, _projected(mask, params))
        nu, proj, norm = (jax.tree.map(lambda _, b, i=i: b[i], params, blanks) for i in range(3))
        mu = jax.tree.map(jnp.zeros_like, nu) if base == "adam" else None
        peak = None if limiter_floor is None else jax.tree.map(jnp.zeros_like, norm)
        return FiraState(jnp.zeros([], jnp.int32), mu, nu, proj, norm, peak)

    def base_rule(g, mu, nu):
        """One step of the base rule without its bias correction: (direction, mu, nu)."""
        # float32 at once: 1 - 0.999 is 1e-5 off there, which cancels only when the bias correction is off as well.
        decay_m, decay_v = jnp.asarray(b1, jnp.float32), jnp.asarray(b2, jnp.float32)
        nu = nu + g**2 if base == "adagrad" else decay_v * nu + (1 - decay_v) * g**2
        if base == "adam":
            mu = decay_m * mu + (1 - decay_m) * g
        return (mu if base == "adam" else g) / (jnp.sqrt(nu) + eps), mu, nu

    def scaling_factors(n, r, axis):
        if scaling == "none":
            return 1.0
        axes = axis if scaling == "column" else (-2, -1)
        phi = _norm(n, axes) / (_norm(r, axes) + 1e-8)
        return phi if max_scaling is None else jnp.minimum(phi, max_scaling)

    def update_leaf(g, mu, nu, proj, norm, peak, bias):
        dtype, g = g.dtype, g.astype(jnp.float32)
        if _is_hole(proj):
            n, mu, nu = base_rule(g, mu, nu)
            return (bias * n).astype(dtype), mu, nu, norm, peak
        left = nu.shape[-2] == proj.shape[-1]
        r = _matmul(proj.mT, g) if left else _matmul(g, proj)

        def back(x):
            return _matmul(proj, x) if left else _matmul(x, proj.mT)

        n, mu, nu = base_rule(r, mu, nu)
        if rule == "galore":
            return (bias * alpha * back(n)).astype(dtype), mu, nu, norm, peak
        inner, outer = (1.0, bias) if variant == "official" else (bias, 1.0)
        n = inner * n
        phi = scaling_factors(n, r, -2 if left else -1)
        rest = phi * (g if rule == "only_scaling" else g - (alpha if variant == "official" else 1.0) * back(r))
        factor, norm, peak = _limit(_norm(rest, (-2, -1))[..., 0, 0], norm, peak, gamma, 1e-8, limiter_floor)
        rest = factor[..., None, None] * rest
        if rule == "only_scaling":
            direction = rest
        elif variant == "official":
            direction = alpha * back(n) + rest
        else:
            direction = alpha * (back(n) + rest)
        return (outer * direction).astype(dtype), mu, nu, norm, peak

    def update_fn(updates, state, params=None):
        del params
        if not external_refresh:
            proj = _refresh_when_due(updates, state, jnp.asarray(update_proj_gap), projector, signs, stagger)
            state = state._replace(proj=proj)
        count = optax.safe_increment(state.count)
        bias = 1.0
        if base == "adam":
            bias = jnp.sqrt(1 - jnp.asarray(b2, jnp.float32) ** count) / (1 - jnp.asarray(b1, jnp.float32) ** count)
        leaves, treedef = jax.tree.flatten(updates)
        columns = [
            [None] * len(leaves) if tree is None else treedef.flatten_up_to(tree)
            for tree in (state.mu, state.nu, state.proj, state.norm, state.peak)
        ]
        rows = [
            update_leaf(g, mu, nu, proj, norm, peak, bias)
            for g, mu, nu, proj, norm, peak in zip(leaves, *columns, strict=True)
        ]
        directions, mu, nu, norm, peak = (treedef.unflatten([row[i] for row in rows]) for i in range(5))
        mu, peak = (None if old is None else new for old, new in ((state.mu, mu), (state.peak, peak)))
        return directions, FiraState(count, mu, nu, state.proj, norm, peak)  # pyright: ignore[reportArgumentType]

    return optax.GradientTransformation(init_fn, update_fn)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_proj_gap: ArrayLike = 200,
    alpha: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    gamma: ArrayLike = 1.01,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    scaling: str = "column",
    variant: str = "official",
    rule: str = "fira",
    proj_side: str = "short",
    layout: str = "flax",
    projector: str = "svd",
    signs: str = "largest",
    base: str = "adam",
    external_refresh: bool = False,
    stagger: bool = False,
    limiter_floor: ArrayLike | None = None,
    max_scaling: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira with decoupled weight decay: params -= learning_rate * (direction + weight_decay * params).

    The authors shrink the parameters behind the step instead; with weight decay the two differ by
    learning_rate^2 * weight_decay * direction.

    Args:
      learning_rate: a number or a schedule; the paper takes 1e-2 for LLaMA 60M to 1B with alpha 0.25 (1B: 0.0625).
      weight_decay: 0 in the paper.
      weight_decay_mask: tree of bools or a function making one; true where decay applies.
      others: see ``scale_by_fira``.

    Returns:
      ``optax.GradientTransformationExtraArgs``; ``update`` needs params.

    Raises:
      ValueError, TypeError: as ``scale_by_fira``; ValueError for an update without params.

    Source: arXiv 2410.01623.

    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), fira(1e-2, rank=4, mask=lambda p: low_rank_mask(p, ("up",))))
    >>> state = tx.init({"up": {"kernel": jnp.ones((8, 32))}, "down": {"kernel": jnp.ones((32, 8))}})
    >>> [x.shape for x in jax.tree.leaves(state[1][0].mu)]
    [(32, 8), (4, 32)]
    """
    return optax.chain(
        scale_by_fira(
            rank=rank,
            update_proj_gap=update_proj_gap,
            alpha=alpha,
            b1=b1,
            b2=b2,
            eps=eps,
            gamma=gamma,
            scaling=scaling,
            variant=variant,
            rule=rule,
            proj_side=proj_side,
            layout=layout,
            projector=projector,
            signs=signs,
            base=base,
            mask=mask,
            external_refresh=external_refresh,
            stagger=stagger,
            limiter_floor=limiter_floor,
            max_scaling=max_scaling,
        ),
        optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),  # pyright: ignore[reportArgumentType]
        optax.scale_by_learning_rate(learning_rate),
    )


def refresh_projection(
    grads: optax.Updates, opt_state: optax.OptState, projector: str = "svd", signs: str = "largest"
) -> optax.OptState:
    """Renew P from ``grads`` in every Fira state inside ``opt_state``; nothing else changes.

    For loops that refresh outside of the update (``external_refresh=True``), before updates 0, T, 2T, ...:
    ``jax.jit(refresh_projection, donate_argnums=1)``.

    Args:
      grads: tree like params; what ``optax.masked`` holds back is ignored.
      opt_state: any Optax state (chain, ``inject_hyperparams``, ``MultiSteps``, ``masked``, ...).
      projector, signs: see ``scale_by_fira``.

    Raises:
      ValueError: no ``FiraState`` inside, an unknown option, or gradients that do not match the state.

    >>> params = {"mlp": {"kernel": jnp.diag(jnp.array([1.0, 3.0, 2.0]))}}
    >>> tx = fira(0.1, rank=1, external_refresh=True)
    >>> state = refresh_projection(params, tx.init(params))
    >>> state[0].proj["mlp"]["kernel"].round(4)[:, 0].tolist()
    [0.0, 1.0, 0.0]
    """
    _validate({"projector": projector, "signs": signs}, {})

    def is_state(node):
        return isinstance(node, FiraState)

    if not any(is_state(node) for node in jax.tree.leaves(opt_state, is_leaf=is_state)):
        raise ValueError(
            f"no FiraState in this optimizer state ({jax.tree.structure(opt_state)}); "
            "pass the state of an optimizer that contains fira or scale_by_fira"
        )

    def renewed(proj, nu, g):
        return proj if _is_hole(proj) else _bases(g, nu, proj, projector, signs)

    def fed(node):
        if not is_state(node):
            return node
        return node._replace(proj=jax.tree.map(renewed, node.proj, node.nu, grads, is_leaf=_is_hole))

    return jax.tree.map(fed, opt_state, is_leaf=is_state)


def low_rank_mask(params: optax.Params, include: tuple[str, ...] = ("attn", "attention", "mlp")) -> Any:
    """Which parameters Fira projects: kernels with one of the words of ``include`` in their path.

    Args:
      params: tree of arrays or ShapeDtypeStructs; paths are written "layers/mlp/up/kernel".
      include: parts of names, as the authors' ``divide_params`` takes them.

    Returns:
      Tree of bools: true for leaves called "kernel" (Flax) or "weight" (torch) with at least two axes and a matching
      path. Biases, norms, embeddings and heads are false, also when they are stacked over layers.

    Raises:
      ValueError: no parameter matches.

    >>> low_rank_mask({"mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones((2, 2))}})
    {'head': {'kernel': False}, 'mlp': {'bias': False, 'kernel': True}}
    """
    names = []

    def matches(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names.append(name)
        is_kernel = name.rpartition("/")[2] in ("kernel", "weight") and leaf.ndim >= 2
        return is_kernel and any(word in name for word in include)

    chosen = jax.tree_util.tree_map_with_path(matches, params)
    if names and not any(jax.tree.leaves(chosen)):
        raise ValueError(
            f"no kernel has one of {include} in its path; the parameters are {names}: name others in "
            "low_rank_mask(params, include=...), or pass a tree of bools as mask"
        )
    return chosen


def limit_norm_growth(
    gamma: ArrayLike = 1.01, per_leaf: bool = True, eps: ArrayLike = 1e-8
) -> optax.GradientTransformation:
    """Fira's limiter alone: the norm of the updates may grow by no more than the factor ``gamma`` a step.

    updates *= gamma / max(|updates| / (s + eps), gamma), with s the norm that came out last. The first non-zero
    update passes, and zero updates leave s as it is: a layer that rests for a step is not locked.

    Args:
      gamma: >= 1; ``inf`` limits nothing.
      per_leaf: a norm for each leaf (a stack of layers is one leaf); else the global norm.
      eps: added to s.

    Returns:
      ``optax.GradientTransformation`` with state ``NormGrowthState``, for any chain.

    Raises:
      ValueError: gamma < 1 or eps < 0.

    Source: arXiv 2410.01623, equation 7; the official code's order for the first step.

    >>> tx = limit_norm_growth(gamma=1.5)
    >>> _, state = tx.update(jnp.ones(4), tx.init(jnp.ones(4)))
    >>> updates, state = tx.update(jnp.full(4, 10.0), state)
    >>> updates.round(4).tolist()
    [1.5, 1.5, 1.5, 1.5]
    """
    _validate({}, {"gamma": gamma, "eps": eps})

    def init_fn(params):
        zero = jnp.zeros([], jnp.float32)
        return NormGrowthState(jax.tree.map(lambda _: zero, params) if per_leaf else zero)

    def update_fn(updates, state, params=None):
        del params
        if per_leaf:
            norms = jax.tree.map(lambda u: _norm(u.astype(jnp.float32), None).reshape(()), updates)
            pairs = jax.tree.map(lambda n, s: _limit(n, s, None, gamma, eps, None)[:2], norms, state.norm)
            factors, norm = (jax.tree.map(lambda _, p, i=i: p[i], updates, pairs) for i in range(2))
            return jax.tree.map(lambda u, f: (f * u).astype(u.dtype), updates, factors), NormGrowthState(norm)
        total = optax.tree.norm(optax.tree.cast(updates, jnp.float32))
        factor, norm, _ = _limit(total, state.norm, None, gamma, eps, None)
        return jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates), NormGrowthState(norm)

    return optax.GradientTransformation(init_fn, update_fn)


def _is_hole(node) -> bool:
    return isinstance(node, optax.MaskedNode)


def _projected(mask, params):
    """The mask as a tree like params."""
    if not jax.tree.leaves(params):  # Optax's placeholder among them
        return params
    tree = mask(params) if callable(mask) else mask

    def spread(projected, part):
        def one(leaf):
            if projected and leaf.ndim < 2:
                raise ValueError(f"mask projects a leaf of shape {leaf.shape}; a projected leaf has 2 axes or more")
            return bool(projected)

        return jax.tree.map(one, part)

    return jax.tree.map(spread, tree, params)


def _left(shape, proj_side: str, layout: str) -> bool:
    """Whether P stands on the left of its matrix."""
    if proj_side in ("left", "right"):
        return proj_side == "left"
    rows, columns = shape[-2:]
    short_is_left = rows < columns or (rows == columns and layout == "flax")
    return short_is_left == (proj_side == "short")


def _matmul(a, b):
    # The rest G - P R is a small difference when P R is nearly all of G: no bf16 passes on TPU.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _norm(x, axes):
    return jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True))


def _limit(total, norm, peak, gamma, eps, floor):
    """(factor, norm, peak) for a rest of norm ``total`` after one of ``norm``."""
    reference = norm if floor is None else jnp.maximum(norm, floor * peak)
    # gamma / max(total / (s + eps), gamma), written so that gamma = inf gives 1.
    factor = jnp.where(norm > 0, jnp.minimum(gamma * (reference + eps) / total, 1), 1)
    limited = jnp.where(total > 0, factor * total, norm)
    return factor, limited, None if floor is None else jnp.maximum(peak, limited)


def _refresh_when_due(grads, state: FiraState, gap, projector: str, signs: str, stagger: bool):
    """P of every leaf, renewed where ``count`` says so."""
    leaves, treedef = jax.tree.flatten(grads)
    proj, nu = treedef.flatten_up_to(state.proj), treedef.flatten_up_to(state.nu)
    places = [i for i, p in enumerate(proj) if not _is_hole(p)]
    old = [proj[i] for i in places]

    def renewed(due=None):
        counts = [math.prod(p.shape[:-2]) for p in old]
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        return [
            _bases(leaves[i], nu[i], p, projector, signs, None if due is None else due(first + jnp.arange(count)))
            for i, p, first, count in zip(places, old, firsts, counts, strict=True)
        ]

    if stagger:
        new = renewed(lambda number: ((state.count + number) % gap == 0) | (state.count == 0))
    else:
        new = jax.lax.cond(state.count % gap == 0, renewed, lambda: old)
    for i, p in zip(places, new, strict=True):
        proj[i] = p
    return treedef.unflatten(proj)


def _bases(g, nu, old, projector: str, signs: str, due=None):
    """P of each matrix of a stack [..., m, n], or only of those that are ``due`` (bools, one a matrix)."""
    left = nu.shape[-2] == old.shape[-1]

    def one(matrix):
        g, old, due = matrix

        def basis():
            return _basis(g.astype(jnp.float32), old, left, projector, signs)

        return basis() if due is None else jax.lax.cond(due, basis, lambda: old)

    if g.ndim == 2:
        return one((g, old, None if due is None else due[0]))
    # One after the other: a batch takes the work space of all, and the batched SVD of jaxlib 0.10 waits for itself for
    # ever when several CPU devices run it.
    return jax.lax.map(one, (*(x.reshape(-1, *x.shape[-2:]) for x in (g, old)), due)).reshape(old.shape)


def _basis(g, old, left: bool, projector: str, signs: str):
    """Orthonormal columns [side, r] that span the leading directions of g [m, n]."""
    rank = old.shape[-1]
    if projector == "svd":
        u, _, vh = jnp.linalg.svd(g, full_matrices=False)
        q = u[:, :rank] if left else vh[:rank].T
    else:
        a = g if left else g.T
        a = a / jnp.maximum(jnp.max(jnp.abs(a)), jnp.finfo(jnp.float32).tiny)
        if projector == "subspace":
            # P is zero before the first refresh; a fixed random start is almost surely orthogonal to nothing.
            start = jax.random.normal(jax.random.key(0), old.shape)
            q = jnp.where(jnp.any(old != 0), old, start)
            for _ in range(2):
                q = jnp.linalg.qr(_matmul(a, _matmul(a.T, q)))[0]
        elif a.shape[-2] <= a.shape[-1]:
            q = jnp.linalg.eigh(_matmul(a, a.T))[1][:, ::-1][:, :rank]
        else:
            v = jnp.linalg.eigh(_matmul(a.T, a))[1][:, ::-1][:, :rank]
            q = jnp.linalg.qr(_matmul(a, v))[0]
    if signs != "none":
        largest = jnp.take_along_axis(q, jnp.argmax(jnp.abs(q), axis=0, keepdims=True), axis=0)
        q = jnp.where(largest < 0, -q, q)
    if signs == "align":
        q = jnp.where(jnp.sum(q * old, axis=0, keepdims=True) < 0, -q, q)
    return q


def _validate(options: dict[str, str], numbers: dict[str, Any]) -> None:
    for name, value in options.items():
        if value not in _OPTIONS[name]:
            raise ValueError(f"{name}={value!r}; choose one of {_OPTIONS[name]}")
    if not isinstance(numbers.get("rank", 1), int):
        raise TypeError(
            f"rank={numbers['rank']!r} must be an int; under optax.inject_hyperparams name it in static_args"
        )
    bounds = {
        "rank": (lambda v: v >= 1, "at least 1"),
        "update_proj_gap": (lambda v: v >= 1 and v == int(v), "an integer >= 1"),
        "b1": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "b2": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "eps": (lambda v: v >= 0, ">= 0"),
        "gamma": (lambda v: v >= 1, ">= 1"),
    }
    for name, value in numbers.items():
        valid, allowed = bounds[name]
        if not isinstance(value, jax.core.Tracer) and not valid(value):
            raise ValueError(f"{name}={value}; it must be {allowed}")
