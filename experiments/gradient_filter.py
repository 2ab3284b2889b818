"""What the gradient filter of Cut Cross-Entropy (arXiv 2411.09009) leaves out, written out on materialised logits.

``experiments.cut_cross_entropy`` trains with this form where the op leaves nothing out, and measures here what the
threshold does to a model's gradients. Embeddings are [N, D], classifiers [D, V], labels [N].
"""

from typing import Any, NamedTuple

from experiments.claims import Claim, Table

BLOCK = 128
_ORDERS = "token id", "random order", "average logit"
BLOCKS_HEADER = ["entries kept", "probability left out", *(f"blocks kept, by {order}" for order in _ORDERS)]


class Filter(NamedTuple):
    """Which gradients are filtered, and whether what a token leaves out is spread, as by the kernels, or dropped."""

    embeddings: bool
    classifier: bool
    spread: bool


FILTERS: dict[str, Filter] = {
    "kahan_full_c": Filter(embeddings=True, classifier=False, spread=True),
    "kahan": Filter(embeddings=True, classifier=True, spread=True),
    "cce": Filter(embeddings=True, classifier=True, spread=False),
}


def filtered_cross_entropy(how: Filter, eps: float):
    """The mean cross-entropy of (embeddings [N, D], classifier [D, V], labels [N]) on materialised logits.

    Exact forward; backward, entries of the softmax below ``eps`` are left out one by one, but never the label's.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.linear_cross_entropy import spread

    def forward(e, c, labels):
        z = jnp.einsum("nd,dv->nv", e, c, preferred_element_type=jnp.float32)
        lse = jax.nn.logsumexp(z, axis=-1)
        return (lse - jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0]).mean(), (e, c, labels, z, lse)

    def backward(residuals, cotangent):
        e, c, labels, z, lse = residuals
        p = jnp.exp(z - lse[:, None])
        hit = labels[:, None] == jnp.arange(c.shape[1])[None, :]
        left_out = (p < eps) & ~hit
        filtered = jnp.where(left_out, 0, p)
        if how.spread and eps:
            out = jnp.where(left_out, p, 0)
            cap = spread.cap(eps, c.shape[1])
            prior = jnp.minimum(jax.nn.softmax(e.mean(0, dtype=z.dtype) @ c.astype(z.dtype)), cap)[None]
            sums = (x.sum(-1, keepdims=True) for x in (left_out, jnp.where(left_out, prior, 0)))
            multiple, even = spread.rates(cap, out.sum(-1, keepdims=True), out.max(-1, keepdims=True), *sums)
            filtered = jnp.where(left_out, multiple * prior + even, p)
        de, dc = (jnp.where(on, filtered, p) - hit for on in (how.embeddings, how.classifier))
        scale = cotangent / e.shape[0]
        de = jnp.einsum("nv,dv->nd", de, c.astype(de.dtype)) * scale
        dc = jnp.einsum("nv,nd->dv", dc, e.astype(dc.dtype)) * scale
        return de.astype(e.dtype), dc.astype(c.dtype), None

    loss = jax.custom_vjp(lambda e, c, labels: forward(e, c, labels)[0])
    loss.defvjp(forward, backward)
    return loss


def materialised_cross_entropy(e, c, labels):
    """The mean cross-entropy of (embeddings [N, D], classifier [D, V], labels [N]) by Optax."""
    import jax.numpy as jnp
    import optax

    logits = jnp.einsum("nd,dv->nv", e, c, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def blocks_kept(operands: tuple[Any, Any, Any], eps: float) -> tuple[list, dict[str, Any]]:
    """Which blocks hold an entry of the gradient of at least ``eps``, by order of the vocabulary.

    ``operands`` are embeddings, classifier and labels. Returns the cells of a row under ``BLOCKS_HEADER`` and, by the
    order's name, bool [ceil(N / 128), ceil(V / 128)].
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    e, c, labels = operands
    z = jnp.einsum("nd,dv->nv", e[:512], c, preferred_element_type=jnp.float32)
    p, hit = jax.nn.softmax(z), jax.nn.one_hot(labels[:512], c.shape[1])
    large = np.asarray(jnp.abs(p - hit) >= eps)
    left_out = float(jnp.where((p < eps) & (hit == 0), p, 0).sum(-1).mean())
    by_logit = np.argsort(-np.asarray(z.mean(0)), kind="stable")
    orders = large, large[:, np.random.default_rng(0).permutation(c.shape[1])], large[:, by_logit]
    blocks = dict(zip(_ORDERS, map(block_any, orders), strict=True))
    shares = [round(float(kept.mean()), 3) for kept in blocks.values()]
    return [float(large.mean()), round(left_out, 4), *shares], blocks


def sorting_gathers(model: str, blocks: dict[str, Any]) -> Claim:
    """The paper's claim about the order of the vocabulary, of the blocks that ``blocks_kept`` found in a model."""
    by_id, by_logit = (float(blocks[order].mean()) for order in ("token id", "average logit"))
    return Claim(
        f"{model}: ordering the vocabulary by average logit lets the filter skip more blocks",
        expected=f"< {by_id:.3f} of the {BLOCK} x {BLOCK} blocks, as in the order of token ids",
        measured=round(by_logit, 3),
        holds=by_logit < by_id,
        source="arXiv 2411.09009, section 4.3",
    )


def block_any(large):
    """[ceil(N / 128), ceil(V / 128)] of an array [N, V]: whether a block holds any True."""
    import numpy as np

    padded = np.pad(large, [(0, -size % BLOCK) for size in large.shape])
    return padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK).any((1, 3))


def embedding_errors(model: str, operands: tuple[Any, Any, Any], eps: float) -> tuple[Table, Claim]:
    """The error of the embeddings' gradient at ``eps`` and smaller thresholds; the claim is that bfloat16's is larger.

    In roundings: 1 is the norm of what rounding the exact float32 gradient to bfloat16 takes away.
    """
    import jax
    import jax.numpy as jnp

    e, c, labels = operands

    def gradient(spread: bool, threshold: float):
        loss = filtered_cross_entropy(Filter(embeddings=True, classifier=False, spread=spread), threshold)
        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(loss))(e, c, labels)

    exact = gradient(True, 0.0)
    rounding = jnp.linalg.norm(exact.astype(jnp.bfloat16).astype(jnp.float32) - exact)
    z = jnp.einsum("nd,dv->nv", e, c, precision="highest")
    p = jax.nn.softmax(z).at[jnp.arange(labels.size), labels].set(1.0)  # labels are always kept, and not left out
    rows = []
    for threshold in (eps, eps / 4, eps / 16, eps / 64):
        errors = [float(jnp.linalg.norm(gradient(spread, threshold) - exact) / rounding) for spread in (False, True)]
        kept = p >= threshold
        left_out = float(jnp.where(kept, 0, p).sum(-1).mean())
        rows.append([threshold, round(float(kept.sum(-1).mean()), 1), round(left_out, 4), *errors])
    header = ["threshold", "entries kept a token", "probability left out", "error, dropped", "error, spread"]
    claim = Claim(
        f"{model}: the filter takes no more from the embeddings' gradient than rounding it to bfloat16 does",
        expected="<= 1 rounding",
        measured=rows[0][-1],
        holds=rows[0][-1] <= 1,
        source="arXiv 2411.09009, section 4.3",
    )
    return Table(header, rows), claim


def blocks_figure(pictures: dict[str, Any]):
    """Which blocks are kept, an order of the vocabulary a row; as ``blocks_kept`` returns them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 * len(pictures) + 0.6), layout="constrained")
    for axes, (order, blocks) in zip(figure.subplots(len(pictures), 1), pictures.items(), strict=True):
        axes.imshow(blocks, cmap="Greys", vmin=0, vmax=1.4, aspect="auto", interpolation="none")
        axes.set_title(f"by {order}: {blocks.mean():.0%} of the blocks kept", fontsize=9, loc="left")
        axes.set(yticks=[], ylabel="tokens")
    axes.set_xlabel(f"vocabulary, in blocks of {BLOCK}; dark: an entry of the gradient is above the threshold")
    return figure
