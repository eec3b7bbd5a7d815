"""A folder of transformers is imported with an equal function, or refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForSequenceClassification, MistralForCausalLM

from tests.warmcore.growth.families import relative_gap, wider
from tests.warmcore.huggingface.llamas import (
    SHAPE,
    checkpoint_of,
    loaded,
    our_logits,
    their_logits,
    theirs,
)
from warmcore.checkpoint.checkpoint import load_checkpoint, read_manifest
from warmcore.corpus.prepare import prepare_corpus
from warmcore.corpus.tokenizer import make_byte_json, train_bpe
from warmcore.growth.from_checkpoint import grow_checkpoint
from warmcore.huggingface.export import INDEX, WEIGHTS, export_hf
from warmcore.huggingface.importer import import_hf
from warmcore.specs import CheckpointRef, DataSpec, GrowthSpec
from warmcore.storage.file_facts import measure_file
from warmcore.training.training import Training


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Make a folder of transformers, with the tokenizer of an exported model."""
    folder = tmp_path_factory.mktemp("original")
    theirs().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(make_byte_json())
    return folder


@pytest.fixture(scope="module")
def imported(original, tmp_path_factory):
    return import_hf(original, tmp_path_factory.mktemp("imported") / "checkpoint")


@pytest.fixture
def copy(original, tmp_path):
    """Copy the folder and change its config."""

    def make(**fields):
        folder = tmp_path / "copy"
        folder.mkdir()
        for file in original.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config = {name: value for name, value in (config | fields).items() if value is not LEFT_OUT}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


LEFT_OUT = object()


@st.composite
def llamas(draw):
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 3, 6) if heads % k == 0])),
        "hidden_size": heads * draw(st.sampled_from([2, 8])),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": draw(st.sampled_from([100.0, 5e5])),
        },
    }


@given(llamas(), st.sampled_from(["Llama", "Mistral", "Qwen2"]))
@settings(max_examples=15)
def test_logits_are_equal(tmp_path_factory, fields, family):
    folder = tmp_path_factory.mktemp("import")
    model = theirs(family, **fields)
    model.save_pretrained(folder / "theirs")
    saved = import_hf(folder / "theirs", folder / "ours")
    assert relative_gap(our_logits(saved.path), their_logits(model)) < 1e-5


@pytest.mark.parametrize("deeper", [0, 1])
@pytest.mark.parametrize("operator", ["clone", "hyperclone"])
def test_imported_grown_and_exported_it_computes_the_same(
    operator, deeper, original, imported, run_spec, tmp_path
):
    base = load_checkpoint(imported.path).manifest.model
    model = wider(base, 2, depth=base.depth + deeper)
    ref = CheckpointRef(uri=str(imported.path), hash=imported.hash)
    growth = GrowthSpec(operator=operator, depth_operator="identity", base=ref)
    run = run_spec(growth=growth).model_copy(update={"model": model})
    grow_checkpoint(imported.path, tmp_path / "grown", run=run, data_hash="0" * 64)
    export_hf(tmp_path / "grown", tmp_path / "exported")
    grown = loaded(tmp_path / "exported")
    assert (grown.config.hidden_size, grown.config.num_hidden_layers) == (32, 2 + deeper)
    assert relative_gap(their_logits(grown), their_logits(loaded(original))) < 1e-5


def test_exported_again_it_is_the_same_bit_for_bit(original, imported, tmp_path):
    export_hf(imported.path, tmp_path / "again")
    before, after = load_file(original / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokenizers = [folder / "tokenizer.json" for folder in (original, tmp_path / "again")]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
    first, second = (
        json.loads((p / "config.json").read_text()) for p in (original, tmp_path / "again")
    )
    same = set(first) & set(second) - {"dtype"}
    assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_exported_and_imported_a_run_of_ours_computes_the_same(run_spec, tmp_path):
    run = run_spec(width=32, base_width=16, embedding_multiplier=3.0, attention_multiplier=0.5)
    saved = checkpoint_of(run, tmp_path / "ours")
    export_hf(saved.path, tmp_path / "theirs")
    back = import_hf(tmp_path / "theirs", tmp_path / "back")
    assert relative_gap(our_logits(back.path), our_logits(saved.path)) < 1e-5
    export_hf(back.path, tmp_path / "again")
    for name in (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (tmp_path / "theirs" / name).read_bytes()


def test_the_manifest_says_where_it_is_from_and_claims_no_training(original, imported):
    manifest, found = read_manifest(imported.path)
    assert found == imported.hash
    assert (manifest.run, manifest.data_hash, manifest.base_hash) == (None, None, None)
    assert (manifest.tokens, manifest.progress.step, manifest.progress.val_losses_nats) == (
        0,
        0,
        (),
    )
    origin = manifest.imported
    assert (origin.architecture, origin.dtypes) == ("LlamaForCausalLM", ("float32",))
    assert not origin.tied_embeddings
    for name in ("config.json", WEIGHTS):
        assert origin.source_files[name] == measure_file(original / name)
    assert (origin.model.base_width, origin.model.base_depth) == (16, 2)
    assert origin.model.width_multiplier == origin.model.depth_multiplier == 1.0
    assert origin.model.init_std == SHAPE["initializer_range"]
    assert "tokenizer.json" in manifest.files


def test_a_run_grows_from_it_and_none_resumes_it(imported, run_spec, corpus, tmp_path):
    ref = CheckpointRef(uri=str(imported.path), hash=imported.hash)
    base = load_checkpoint(imported.path).manifest.model
    run = run_spec(steps=3, growth=GrowthSpec(operator="clone", base=ref))
    run = run.model_copy(update={"model": wider(base, 2)})
    training = Training.start(run, corpus, base=imported.path)
    list(training.train_to_end())
    assert training.base_hash == imported.hash
    assert training.step == 3
    with pytest.raises(ValueError, match="was imported, and no run can continue it"):
        Training.resume(run, corpus, imported.path)
    with pytest.raises(ValueError, match="data_hash is None and the base was imported"):
        grow_checkpoint(imported.path, tmp_path / "grown", run=run)


def test_a_target_is_trained_on_the_tokens_of_its_imported_base_and_exported_with_them(
    text_folder, data_spec, corpus, run_spec, cache, tmp_path
):
    texts = [path.read_text() for path in sorted(text_folder.iterdir())]
    theirs(vocab_size=300).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(train_bpe(texts, 300))
    base = import_hf(tmp_path / "theirs", tmp_path / "base")
    growth = GrowthSpec(operator="clone", base=CheckpointRef(uri="x", hash=base.hash))
    model = wider(load_checkpoint(base.path).manifest.model, 2)
    run = run_spec(steps=3, growth=growth).model_copy(update={"model": model})
    with pytest.raises(ValueError, match=r"growth.base reads tokens of tokenizer .* are of byte"):
        Training.start(run, corpus, base=base.path)
    tokenizer = {"tokenizer": str(base.path / "tokenizer.json")}
    run = run.with_data(DataSpec.model_validate(data_spec.model_dump() | tokenizer))
    tokens = prepare_corpus(run.data, cache)
    training = Training.start(run, tokens, base=base.path)
    list(training.train_to_end())
    export_hf(training.save(tmp_path / "trained").path, tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert loaded(tmp_path / "exported").config.eos_token_id == exported.eos_token_id
    document = np.array([*exported(texts[0]).input_ids, exported.eos_token_id], "<u2").tobytes()
    assert any(document in side.astype("<u2").tobytes() for side in (tokens.train, tokens.val))


@pytest.mark.parametrize("rule", ["transfer", "transfer_old_reset_new"])
def test_it_has_no_optimizer_state_to_transfer(rule, imported, run_spec, corpus):
    ref = CheckpointRef(uri="x", hash=imported.hash)
    growth = GrowthSpec(operator="clone", base=ref, optimizer_state=rule)
    base = load_checkpoint(imported.path).manifest.model
    run = run_spec(growth=growth).model_copy(update={"model": wider(base, 2)})
    with pytest.raises(ValueError, match=f"optimizer_state {rule} needs .* use reset"):
        Training.start(run, corpus, base=imported.path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "3KB"])
def test_narrow_weights_in_any_number_of_shards_become_float32(dtype, max_shard_size, tmp_path):
    model = theirs().to(dtype)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    assert (tmp_path / "theirs" / INDEX).exists() == (max_shard_size == "3KB")
    saved = import_hf(tmp_path / "theirs", tmp_path / "ours")
    weights = load_checkpoint(saved.path).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert relative_gap(our_logits(saved.path), their_logits(loaded(tmp_path / "theirs"))) < 1e-5
    origin = load_checkpoint(saved.path).manifest.imported
    assert origin.dtypes == (str(dtype).removeprefix("torch."),)


def test_tied_embeddings_become_two_tensors(tmp_path):
    theirs(tie_word_embeddings=True).save_pretrained(tmp_path / "theirs")
    assert "lm_head.weight" not in load_file(tmp_path / "theirs" / WEIGHTS)
    saved = load_checkpoint(import_hf(tmp_path / "theirs", tmp_path / "ours").path)
    assert torch.equal(saved.weights["embedding.weight"], saved.weights["unembedding.weight"])
    assert saved.manifest.imported.tied_embeddings


def test_an_old_config_means_what_it_meant(copy, imported, tmp_path):
    """Version 4 wrote no rope_parameters, a torch_dtype, and a null rope_scaling."""
    folder = copy(
        rope_parameters=LEFT_OUT, rope_theta=10000.0, rope_scaling=None, head_dim=LEFT_OUT
    )
    saved = import_hf(folder, tmp_path / "ours")
    ours = load_checkpoint(saved.path)
    assert ours.manifest.model == load_checkpoint(imported.path).manifest.model


@pytest.mark.parametrize("window", [64, 65, None])
def test_a_window_no_shorter_than_the_context_masks_nothing(window, tmp_path):
    model = theirs("Mistral", sliding_window=window)
    assert isinstance(model, MistralForCausalLM)
    model.save_pretrained(tmp_path / "theirs")
    saved = import_hf(tmp_path / "theirs", tmp_path / "ours")
    tokens = torch.arange(64)[None] % 256
    assert relative_gap(our_logits(saved.path, tokens), their_logits(model, tokens)) < 1e-5


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
REFUSED = [
    (
        {"architectures": ["GPT2LMHeadModel"]},
        r"architectures is \['GPT2LMHeadModel'\]; LlamaForCausalLM",
    ),
    ({"architectures": LEFT_OUT}, "architectures = .*Field required"),
    ({"architectures": None}, "architectures = None"),
    ({"hidden_size": -16}, "hidden_size = -16: Input should be greater than 0"),
    ({"hidden_size": LEFT_OUT}, "hidden_size = .*Field required"),
    ({"num_attention_heads": 3}, "num_attention_heads is 3; a divisor of hidden_size 16 works"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3; a divisor of num_attention_heads 4"),
    ({"head_dim": 8}, "head_dim is 8; hidden_size 16 / num_attention_heads 4 = 4 works"),
    (
        {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 1},
        "head_dim 1 must be even",
    ),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; silu works"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters is .*default"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*'linear'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "the same in all layers"),
    ({"rope_theta": 5e5}, "rope_parameters.rope_theta is 10000.0; it works if .* 500000.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; 1 works"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is 'gptq'"),
    ({"auto_map": {"AutoModelForCausalLM": "theirs.Model"}}, "auto_map is"),
    (
        MISTRAL | {"sliding_window": 32},
        "sliding_window is 32; null works, or max_position_embeddings 32",
    ),
    (MISTRAL | {"max_position_embeddings": 8192}, "sliding_window is 4096"),
    (QWEN2 | {"use_sliding_window": True, "sliding_window": 32}, "sliding_window is 32"),
    ({"num_hidden_layers": 3}, r"model.layers.2.* is missing, and 8 more of 30 tensors"),
    ({"num_hidden_layers": 1}, "model.layers.1.* is no known tensor of LlamaForCausalLM"),
    ({"intermediate_size": 32}, r"gate_proj.weight is \[24, 16\]; config.json makes it \[32, 16\]"),
    ({"vocab_size": 300}, r"embed_tokens.weight is \[256, 16\]; config.json makes it \[300, 16\]"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_config_of_another_function_is_refused(fields, message, copy, tmp_path):
    folder = copy(**fields)
    with pytest.raises(ValueError, match=message):
        import_hf(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def changed(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
Q = "model.layers.0.self_attn.q_proj.weight"
TENSORS = [
    (
        put(Q_BIAS, torch.full((16,), 0.5)),
        f"{Q_BIAS} has values up to 0.5; our models have no biases",
    ),
    (
        put("model.layers.0.self_attn.q_norm.weight", torch.ones(4)),
        "q_norm.weight is no known tensor of",
    ),
    (lambda tensors: tensors.pop(Q), f"{Q} is missing, and 0 more of 21 tensors"),
    (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight is missing"),
    (put(Q, torch.ones(16, 8)), rf"{Q} is \[16, 8\]; config.json makes it \[16, 16\]"),
    (put(Q, torch.ones(16, 16, dtype=torch.float64)), f"{Q} is torch.float64; float32"),
    (put(Q, torch.ones(16, 16, dtype=torch.int8)), f"{Q} is of dtype I8; F32, BF16 or F16 work"),
    (put(Q, torch.ones(16, 16, dtype=torch.float8_e4m3fn)), f"{Q} is of dtype F8_E4M3"),
    (put(Q, torch.full((16, 16), torch.nan)), f"{Q} has weights that are infinite or not a number"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_tensors_of_another_function_are_refused(change, message, copy, tmp_path):
    folder = copy()
    changed(folder, change)
    with pytest.raises(ValueError, match=message):
        import_hf(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_what_is_the_same_as_nothing_is_dropped(copy, imported, tmp_path):
    folder = copy(attention_bias=True)
    changed(folder, put(Q_BIAS, torch.zeros(16)))
    changed(folder, put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2)))
    saved = import_hf(folder, tmp_path / "ours")
    assert torch.equal(our_logits(saved.path), our_logits(imported.path))


FILES = [
    (
        {WEIGHTS: None, "pytorch_model.bin": b"any"},
        "only pytorch_model.bin, a pickle.*save_pretrained",
    ),
    ({WEIGHTS: None}, f"has no {WEIGHTS}$"),
    ({WEIGHTS: b""}, "is corrupt or incomplete"),
    (
        {WEIGHTS: b"not a header at all, but long enough to be read as one"},
        "is corrupt or incomplete",
    ),
    ({"config.json": None}, "config.json cannot be read"),
    ({"config.json": b"{"}, "Invalid JSON"),
    (
        {INDEX: b'{"weight_map": {"a": "model-1.safetensors"}}'},
        "lacks 1 of 1 shards, first model-1",
    ),
    ({INDEX: b'{"weight_map": {"a": "../model.safetensors"}}'}, "is no file in its folder"),
    ({INDEX: b'{"weight_map": {}}'}, "is corrupt"),
    ({INDEX: b"[]"}, "is corrupt: it has no weight_map"),
    (
        {
            INDEX: b'{"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}}',
            "b.safetensors": None,
        },
        "lacks 1 of 2",
    ),
]


@pytest.mark.parametrize(("files", "message"), FILES)
def test_files_that_are_not_there_or_not_whole_are_refused(files, message, copy, tmp_path):
    folder = copy()
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_hf(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_a_file_that_ends_early_is_refused(part, copy, tmp_path):
    folder = copy()
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match="is corrupt or incomplete"):
        import_hf(folder, tmp_path / "ours")


def test_a_tensor_in_two_shards_is_refused(copy, tmp_path):
    folder = copy()
    (folder / "b.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    weight_map = {"weight_map": {"a": WEIGHTS, "b": "b.safetensors"}}
    (folder / INDEX).write_text(json.dumps(weight_map))
    with pytest.raises(ValueError, match="and another shard too"):
        import_hf(folder, tmp_path / "ours")


def test_a_model_of_another_head_is_refused(tmp_path):
    config = theirs().config
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        import_hf(tmp_path / "theirs", tmp_path / "ours")


def test_what_is_there_is_not_replaced(original, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        import_hf(original, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
