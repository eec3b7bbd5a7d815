"""An exported model computes in transformers the function that we trained."""

import json
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.warmcore.growth.families import relative_gap, seeded
from tests.warmcore.huggingface.llamas import (
    TOKENS,
    checkpoint_of,
    decoder_of,
    loaded,
    our_logits,
    their_logits,
)
from warmcore.checkpoint.checkpoint import MODEL, CheckpointCorruptError, load_checkpoint
from warmcore.huggingface import export
from warmcore.huggingface.export import INDEX, WEIGHTS, export_hf
from warmcore.huggingface.tensors import folded_factor, hf_name
from warmcore.model.decoder import rope_table
from warmcore.specs import ModelSpec
from warmcore.tensors.files import TensorFile
from warmcore.training.training import Training

# With these options every folded factor differs from 1.
SCALED = {
    "width": 32,
    "depth": 2,
    "head_dim": 4,
    "group_size": 2,
    "base_width": 16,
    "base_depth": 1,
    "embedding_multiplier": 3.0,
    "output_multiplier": 0.7,
    "attention_multiplier": 1.9,
    "unembedding_std": 2.0,  # after a few steps, greedy text must not repeat a single token
}


@pytest.fixture(scope="module")
def trained(run_spec, corpus, tmp_path_factory):
    training = Training.start(run_spec(steps=25, lr=0.01, **SCALED), corpus)
    list(training.train_to_end())
    return training.save(tmp_path_factory.mktemp("trained") / "checkpoint")


@st.composite
def models(draw):
    head_dim = draw(st.sampled_from([2, 4, 6, 16]))
    group_size = draw(st.sampled_from([1, 2, 3]))
    block = head_dim * group_size
    multiplier = st.sampled_from([0.3, 1.0, 2.5])
    return {
        "width": block * draw(st.integers(1, 3)),
        "depth": draw(st.integers(1, 3)),
        "head_dim": head_dim,
        "group_size": group_size,
        "ffn_ratio": draw(st.sampled_from([1.5, 2.0, 3.0])),
        "vocab_size": draw(st.sampled_from([256, 263])),
        "base_width": draw(st.sampled_from([None, block, 2 * block])),
        "base_depth": draw(st.sampled_from([None, 1, 4])),
        "parametrization": draw(st.sampled_from(["mup", "standard"])),
        "embedding_multiplier": draw(multiplier),
        "output_multiplier": draw(multiplier),
        "attention_multiplier": draw(multiplier),
        "rope_theta": draw(st.sampled_from([100.0, 500_000.0])),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
    }


@given(models())
@settings(max_examples=20)
def test_logits_are_equal(run_spec, tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("export")
    saved = checkpoint_of(run_spec(**fields), folder / "ours")
    export_hf(saved.path, folder / "theirs")
    tokens = TOKENS % fields["vocab_size"]
    gap = relative_gap(
        their_logits(loaded(folder / "theirs"), tokens), our_logits(saved.path, tokens)
    )
    assert gap < 1e-5


@pytest.mark.parametrize(("head_dim", "theta"), [(6, 100.0), (64, 10_000.0), (128, 500_000.0)])
def test_positions_are_rotated_by_the_same_angles_to_the_last_bit(head_dim, theta):
    parameters = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(num_attention_heads=1, hidden_size=head_dim, rope_parameters=parameters)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(4096)[None])
    our_cos, to_first, to_second = rope_table(1, head_dim, 4096, theta)[:, :, 0]
    our_sin = to_second - to_first
    assert torch.equal(our_cos, cos[0])
    # Our table includes the sign of the rotation; theirs does not.
    assert torch.equal(our_sin.abs(), sin[0].abs())


def test_logits_are_equal_in_a_long_context_too(run_spec, tmp_path):
    # Large weights make attention sharp, hence sensitive to angles at large positions.
    run = run_spec(width=64, head_dim=16, depth=2, init_std=0.3)
    run = run.model_copy(update={"data": run.data.model_copy(update={"context": 2048})})
    saved = checkpoint_of(run, tmp_path / "ours")
    export_hf(saved.path, tmp_path / "theirs")
    tokens = torch.randint(0, 256, (1, 2048), generator=seeded())
    theirs = their_logits(loaded(tmp_path / "theirs"), tokens)
    assert relative_gap(theirs, our_logits(saved.path, tokens)) < 1e-5


def test_logits_and_greedy_generations_of_a_trained_model_are_equal(trained, tmp_path):
    export_hf(trained.path, tmp_path / "theirs")
    model, ours = loaded(tmp_path / "theirs"), decoder_of(trained.path)
    assert relative_gap(their_logits(model), our_logits(trained.path)) < 1e-5
    tokens = TOKENS[:, :4]
    for _ in range(12):
        tokens = torch.cat([tokens, ours(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    generated = model.generate(
        TOKENS[:, :4],
        attention_mask=torch.ones_like(TOKENS[:, :4]),
        max_new_tokens=12,
        eos_token_id=None,
    )
    assert torch.equal(generated, tokens)
    assert len(tokens[:, 4:].unique()) > 1


@pytest.mark.parametrize(
    "forgotten", ["embedding", "attention.q", "attention.o", "ffn.down", "unembedding"]
)
def test_without_any_one_of_the_folds_logits_differ(forgotten, trained, tmp_path, monkeypatch):
    def all_but_one(name, model):
        return 1.0 if f".{name}".endswith(f".{forgotten}.weight") else folded_factor(name, model)

    monkeypatch.setattr(export, "folded_factor", all_but_one)
    export_hf(trained.path, tmp_path / "theirs")
    assert relative_gap(their_logits(loaded(tmp_path / "theirs")), our_logits(trained.path)) > 1e-3


def test_at_the_base_the_weights_are_ours_bit_for_bit(run_spec, tmp_path):
    saved = checkpoint_of(run_spec(width=24, head_dim=6), tmp_path / "ours")
    export_hf(saved.path, tmp_path / "theirs")
    written = load_file(tmp_path / "theirs" / WEIGHTS)
    ours = load_checkpoint(saved.path).weights
    assert all(torch.equal(written[hf_name(name)], ours[name]) for name in ours)
    assert len(written) == len(ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_the_wide_ones_rounded_once(dtype, trained, tmp_path):
    export_hf(trained.path, tmp_path / "wide")
    export_hf(trained.path, tmp_path / "narrow", dtype=dtype)
    wide, narrow = (load_file(tmp_path / name / WEIGHTS) for name in ("wide", "narrow"))
    assert all(torch.equal(narrow[name], wide[name].to(getattr(torch, dtype))) for name in wide)
    model = loaded(tmp_path / "narrow", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert relative_gap(their_logits(model).float(), our_logits(trained.path)) < 0.05


def test_the_files_have_the_names_that_transformers_looks_for(trained, tmp_path):
    exported = export_hf(trained.path, tmp_path / "hf")
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(exported.files) == names | {"tokenizer.json", "tokenizer_config.json"}
    assert loaded(tmp_path / "hf").generation_config.do_sample is False


def test_shards_hold_no_more_than_they_may_and_load_as_one_file_does(trained, tmp_path):
    export_hf(trained.path, tmp_path / "one")
    exported = export_hf(trained.path, tmp_path / "many", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    held = [load_file(shard) for shard in shards]
    assert all(len(tensors) == 1 or total_bytes(tensors) <= 20_000 for tensors in held)
    assert index["metadata"]["total_size"] == sum(total_bytes(tensors) for tensors in held)
    assert set(exported.files) >= {shard.name for shard in shards} | {INDEX}
    assert torch.equal(
        their_logits(loaded(tmp_path / "many")), their_logits(loaded(tmp_path / "one"))
    )


def total_bytes(tensors):
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def test_the_config_says_what_transformers_would_otherwise_assume(trained, tmp_path):
    export_hf(trained.path, tmp_path / "theirs")
    config = loaded(tmp_path / "theirs").config
    spec = load_checkpoint(trained.path).manifest.model
    assert (config.head_dim, config.num_key_value_heads) == (spec.head_dim, spec.num_kv_heads)
    assert config.max_position_embeddings == 16
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (
        None,
        0,
        False,
    )
    version_4 = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert version_4["rope_theta"] == version_4["rope_parameters"]["rope_theta"] == spec.rope_theta
    assert version_4["torch_dtype"] == version_4["dtype"] == "float32"


@pytest.fixture(scope="module")
def tokenizer(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "theirs"
    export_hf(trained.path, folder)
    return AutoTokenizer.from_pretrained(folder)


@given(
    st.one_of(st.text(), st.sampled_from(["\0", "Ā<s></s>", " a  b\r\n", "<|endoftext|>", "é🙂"]))
)
def test_text_becomes_its_bytes_and_comes_back(tokenizer, text):
    tokens = tokenizer(text).input_ids
    assert bytes(tokens) == text.encode()
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_the_tokenizer_reads_a_document_as_the_corpus_has_it(tokenizer, text_folder, corpus):
    text = min(text_folder.glob("*.py")).read_bytes().decode()
    document = bytes([*tokenizer(text).input_ids, 0])
    sides = [side.astype("u1").tobytes() for side in (corpus.train, corpus.val)]
    assert any(document in side for side in sides)


def test_what_is_there_is_not_replaced(trained, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_hf(trained.path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_weights_beyond_a_narrow_range_are_refused_and_nothing_is_left(run_spec, tmp_path):
    run = run_spec()
    tensors = {name: torch.full(shape, 1e5) for name, shape in shapes(run.model)}
    saved = checkpoint_of(run, tmp_path / "ours", tensors)
    with pytest.raises(ValueError, match=r"embedding.weight has weights up to 100000.*bfloat16"):
        export_hf(saved.path, tmp_path / "theirs", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def shapes(model: ModelSpec):
    return export.parameter_shapes(model).items()


def test_a_checkpoint_with_a_flipped_bit_is_refused(run_spec, tmp_path):
    saved = checkpoint_of(run_spec(), tmp_path / "ours")
    content = bytearray((saved.path / MODEL).read_bytes())
    content[-1] ^= 1
    (saved.path / MODEL).write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=MODEL):
        export_hf(saved.path, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_no_more_than_three_tensors_are_held_at_a_time(trained, tmp_path, monkeypatch):
    num_weights = len(load_checkpoint(trained.path).weights)
    held, most = [], 0
    read = TensorFile.__getitem__

    def record_read(self, name):
        nonlocal most
        tensor = read(self, name)
        held.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in held))
        return tensor

    monkeypatch.setattr(TensorFile, "__getitem__", record_read)
    export_hf(trained.path, tmp_path / "theirs")
    assert len(held) == num_weights
    assert 0 < most <= 3
