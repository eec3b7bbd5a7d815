"""Pairs of models that growth accepts, and warnings about them (torch-free). METHOD §3."""

from collections.abc import Iterator

from warmcore.specs.growth import GrowthOptions
from warmcore.specs.model import ModelSpec
from warmcore.specs.train import TrainSpec

# No operator changes these, therefore base and target must agree on them.
SAME = (
    "head_dim",
    "group_size",
    "vocab_size",
    "ffn_ratio",
    "rope_theta",
    "norm_eps",
    "parametrization",
)
# Copying rescales the unembedding for another output multiplier. Nothing rescales for these two.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier")


def check_growth(options: GrowthOptions, base: ModelSpec, target: ModelSpec) -> None:
    """Raise ValueError unless `base` can be grown into `target` with these options."""
    check_depth(options, base, target)
    _check_width(options, base, target)
    for name in SAME:
        if getattr(base, name) != getattr(target, name):
            raise ValueError(
                f"{name} must be the same in base and target: "
                f"{getattr(base, name)} is not {getattr(target, name)}"
            )
    # Outside of muP no factor depends on a base size. None stands for the model's own size.
    if target.parametrization == "mup":
        _check_same_base("width", base.base_width or base.width, target.base_width or target.width)
        _check_same_base("depth", base.base_depth or base.depth, target.base_depth or target.depth)
    _check_noise(options)
    _check_optimizer_state(options)


def check_depth(options: GrowthOptions, base: ModelSpec, target: ModelSpec) -> None:
    """Raise ValueError unless the depth operator can grow `base` as deep as `target`."""
    operator = options.depth_operator
    if target.depth < base.depth:
        raise ValueError(
            f"target depth {target.depth} is smaller than base depth {base.depth}; "
            "growth only deepens"
        )
    if target.depth != base.depth and operator is None:
        raise ValueError(
            f"target depth {target.depth} differs from base depth {base.depth} and depth_operator "
            f"is None; use depth {base.depth}, or depth_operator stack, interleave or identity"
        )
    # Stacking depth 4 into 10 would repeat two layers three times and two layers twice.
    if operator in ("stack", "interleave") and target.depth % base.depth:
        below = target.depth // base.depth * base.depth
        raise ValueError(
            f"cannot {operator} depth {base.depth} into {target.depth}: ratio "
            f"{target.depth / base.depth:g} is not an integer; {below} or {below + base.depth} "
            "work, or depth_operator identity"
        )


def _check_width(options: GrowthOptions, base: ModelSpec, target: ModelSpec) -> None:
    if target.width < base.width:
        raise ValueError(
            f"target width {target.width} is smaller than base width {base.width}; "
            "growth only widens"
        )
    if options.operator in ("clone", "hyperclone") and target.width % base.width:
        below, above = _find_exact_widths(base, target)
        raise ValueError(
            f"cannot {options.operator} width {base.width} into {target.width}: ratio "
            f"{target.width / base.width:g} is not an integer; {below} or {above} work"
        )


def _check_same_base(axis: str, base: int, target: int) -> None:
    if base != target:
        raise ValueError(
            f"base_{axis} must be the same in base and target: {base} is not {target}; "
            f"set the target's base_{axis} to {base}"
        )


def _check_noise(options: GrowthOptions) -> None:
    # `noise` belongs to the copying operators, `perturb` to the padding operators.
    if options.noise and options.copying_operator is None:
        raise ValueError(
            f"noise {options.noise:g} needs operator clone, hyperclone or net2net, "
            f"not {options.operator}; use perturb, or noise 0"
        )


def _check_optimizer_state(options: GrowthOptions) -> None:
    if options.optimizer_state == "transfer" and options.copying_operator is None:
        raise ValueError(
            f"optimizer_state transfer needs operator clone, hyperclone or net2net: "
            f"{options.operator} appends units that have no optimizer state; "
            "use transfer_old_reset_new or reset"
        )


def check_optimizers(options: GrowthOptions, base: TrainSpec | None, target: TrainSpec) -> None:
    """Raise ValueError unless the target's optimizer can go on from the base's state.

    `base` is None where the base was imported: nobody here trained it.
    """
    rule = options.optimizer_state
    if rule == "reset":
        return
    if base is None:
        raise ValueError(
            f"optimizer_state {rule} needs the base's optimizer state, and an imported base has "
            "none; use reset"
        )
    if base.optimizer != target.optimizer:
        raise ValueError(
            f"optimizer_state {rule} needs one optimizer in base and target: "
            f"{base.optimizer} is not {target.optimizer}; use reset, or optimizer {base.optimizer}"
        )


def check_base_weights(options: GrowthOptions, base: TrainSpec) -> None:
    """Raise ValueError unless the base's run keeps the weights that growth will read."""
    needs = {"raw": None, "ema": "ema_half_life", "swa": "swa_fraction"}[options.base_weights]
    if needs is not None and getattr(base, needs) is None:
        raise ValueError(
            f"base_weights {options.base_weights} needs a base that was trained with "
            f"train.{needs}; use raw"
        )


def find_warnings(options: GrowthOptions, base: ModelSpec, target: ModelSpec) -> Iterator[str]:
    """Yield why the target will not compute the base's function as the operator promises."""
    if options.copying_operator is None:
        return
    if target.width % base.width:
        below, above = _find_exact_widths(base, target)
        yield (
            f"{options.operator} only approximates the base at width ratio "
            f"{target.width / base.width:g}, as some units have more copies than others; "
            f"at width {below} or {above} it is exact"
        )
    for name in MULTIPLIERS:
        if getattr(base, name) != getattr(target, name):
            yield (
                f"{name} {getattr(target, name):g} in place of the base's {getattr(base, name):g} "
                f"changes the function that {options.operator} keeps"
            )
    if target.depth != base.depth and options.depth_operator != "identity":
        yield (
            f"depth_operator {options.depth_operator} changes the function that "
            f"{options.operator} keeps; identity keeps it"
        )


def _find_exact_widths(base: ModelSpec, target: ModelSpec) -> tuple[int, int]:
    """Return the two multiples of the base's width around the target's width."""
    below = target.width // base.width * base.width
    return below, below + base.width
