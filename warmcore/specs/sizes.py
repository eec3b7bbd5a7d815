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
        """N_nonemb: everything but the input embedding's table look-up and the unembedding."""
        return self.hidden + self.gains


def count_params(model: ModelSpec) -> ParamCount:
    """Count by role: q,o: n^2; k,v: n*n_kv; gate,up,down: n*n_ffn; gains: n*(2L + 1)."""
    n, depth = model.width, model.depth
    hidden = depth * (2 * n * n + 2 * n * model.kv_width + 3 * n * model.ffn_width)
    return ParamCount(
        embedding=model.vocab_size * n,
        hidden=hidden,
        gains=(2 * depth + 1) * n,
        unembedding=model.vocab_size * n,
    )


def flops_per_token(model: ModelSpec, context: int) -> float:
    """Training FLOPs per token: 6*(N_hidden + N_unembedding) + causal attention.

    C = 6*N*D counts a multiply-add as two and the backward pass as two forwards. The unembedding
    is a matmul and is counted; the embedding is a look-up and is not. Causal attention scores and
    mixes `context`/2 positions on average: 6 * 2 * L * n * context / 2.
    """
    params = count_params(model)
    attention = 6 * model.depth * model.width * context
    return 6.0 * (params.hidden + params.unembedding) + attention


@dataclass(frozen=True, kw_only=True)
class GrowthFactors:
    """`g` three ways, side by side: the literature means different ones."""

    g_width: float
    g_nonembedding: float
    g_total: float


def growth_factors(base: ModelSpec, target: ModelSpec) -> GrowthFactors:
    """Ratios target/base of width, non-embedding parameters and all parameters."""
    b, t = count_params(base), count_params(target)
    return GrowthFactors(
        g_width=target.width / base.width,
        g_nonembedding=t.non_embedding / b.non_embedding,
        g_total=t.total / b.total,
    )
