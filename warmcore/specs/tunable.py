"""Hyperparameters that a study may tune, and those that do not transfer (torch-free)."""

MODEL_PARAMS = frozenset(
    {
        "init_std",
        "embedding_std",
        "embedding_multiplier",
        "output_multiplier",
        "attention_multiplier",
    }
)
TRAIN_PARAMS = frozenset(
    {
        "lr",
        "muon_lr_ratio",
        "muon_momentum",
        "weight_decay",
        "beta1",
        "beta2",
        "eps",
        "grad_clip",
        "warmup_fraction",
        "cooldown_fraction",
        "batch_size",
    }
)
TUNABLE_PARAMS = MODEL_PARAMS | TRAIN_PARAMS
WHOLE_PARAMS = frozenset({"batch_size"})
# METHOD §2: a value that is best for a proxy is not, or not quite, best for a wider target.
NOT_TRANSFERABLE = {
    "batch_size": "the best batch size changes with model and data size",
    "weight_decay": "weight decay transfers as lr x weight_decay, and only mostly",
}
