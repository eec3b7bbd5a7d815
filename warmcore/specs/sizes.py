"""Parameters, steps and FLOPs of a run, by arithmetic (torch-free). METHOD, Symbols."""

from dataclasses import dataclass

from warmcore.specs.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class ParamCount:
    """Parameters of a model, in numbers of scalars."""

    embedding: int
    hidden: int
    gains: int
    unembedding: int

    @property
    def total(self) -> int:
        """N, every parameter."""
        return self.embedding + self.hidden + self.gains + self.unembedding

    @property
    def non_embedding(self) -> int:
        """N_nonemb: all parameters but those of the embedding and of the unembedding."""
        return self.hidden + self.gains


def count_params(model: ModelSpec) -> ParamCount:
    """Count by role: q, o: n^2; k, v: n n_kv; gate, up, down: n n_ffn; gains: n (2L + 1)."""
    # Width 64, depth 2, 4 heads, as many key/value heads, n_ffn 192: 2 (4 * 64^2 + 3 * 64 * 192)
    # = 106 496 hidden parameters.
    n, depth = model.width, model.depth
    hidden = depth * (2 * n * n + 2 * n * model.kv_width + 3 * n * model.ffn_width)
    return ParamCount(
        embedding=model.vocab_size * n,
        hidden=hidden,
        gains=(2 * depth + 1) * n,
        unembedding=model.vocab_size * n,
    )


def flops_per_token(model: ModelSpec, context: int) -> float:
    """Return the training FLOPs per token: 6 (N_hidden + N_unembedding) + causal attention.

    C = 6 N D counts a multiply-add as two FLOPs, and the backward pass as two forward passes. The
    unembedding is a matrix product and is counted; the embedding is a look-up and is not.
    """
    params = count_params(model)
    # A token attends to context / 2 positions on average: n multiply-adds for each score and n for
    # mixing each value, in each layer. 6 * 2 * L * n * context / 2.
    attention = 6 * model.depth * model.width * context
    return 6.0 * (params.hidden + params.unembedding) + attention


@dataclass(frozen=True, kw_only=True)
class GrowthFactors:
    """The growth factor `g` by three definitions: publications differ in the definition."""

    g_width: float
    g_nonembedding: float
    g_total: float


def growth_factors(base: ModelSpec, target: ModelSpec) -> GrowthFactors:
    """Return the ratios target / base of width, non-embedding parameters and all parameters."""
    # Doubling the width at the same depth: g_width 2, g_nonembedding 4 (but for the gains).
    b, t = count_params(base), count_params(target)
    return GrowthFactors(
        g_width=target.width / base.width,
        g_nonembedding=t.non_embedding / b.non_embedding,
        g_total=t.total / b.total,
    )
