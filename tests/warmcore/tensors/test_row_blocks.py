"""No number of a tensor depends on its division into blocks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.warmcore.growth.families import COPYING, PADDING, moments_of, seeded, tensors_of, wider
from warmcore.growth.growth import Growth
from warmcore.model.decoder import Decoder, init_weights_
from warmcore.specs import GrowthOptions, ModelSpec
from warmcore.tensors import row_blocks as blocks
from warmcore.tensors.files import TensorStream, write_tensors
from warmcore.tensors.row_blocks import fill_from_blocks, split_rows

BASE = ModelSpec(width=32, depth=1, head_dim=4, group_size=2, vocab_size=50)
TARGET = wider(BASE, 2, depth=2)
OPTIONS = [
    *({"operator": o, "optimizer_state": "transfer_old_reset_new"} for o in (*PADDING, *COPYING)),
    *({"operator": o, "optimizer_state": "transfer", "noise": 0.1} for o in COPYING),
    {"operator": "clone", "optimizer_state": "transfer", "depth_operator": "identity"},
]
shapes = st.lists(st.integers(0, 90), min_size=1, max_size=3).map(tuple)


@pytest.fixture
def small_blocks(monkeypatch):
    """A function that makes all blocks from then on 16 rows long, or a few more."""
    return lambda: monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1)


@given(shapes, st.integers(1, 3000))
def test_blocks_are_all_rows_in_order_at_multiples_of_16_and_none_is_shorter(shape, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", size)
        found = split_rows(shape)
    ends = [rows.stop for rows in found]
    assert [rows.start for rows in found] == [0, *ends[:-1]]
    assert ends[-1] == shape[0]
    if len(found) > 1:
        assert all(rows.start % 16 == 0 and rows.stop - rows.start >= 16 for rows in found)


def draw_normal(shape, parts):
    tensor, generator = torch.empty(shape), seeded()
    for rows in parts:
        tensor[rows].normal_(0.0, 0.3, generator=generator)
    return tensor, torch.rand(1, generator=generator)


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 3000))
def test_what_is_drawn_in_blocks_is_what_is_drawn_at_once(num_rows, num_columns, size):
    shape = (num_rows, num_columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", size)
        found = draw_normal(shape, split_rows(shape))
    assert all(map(torch.equal, found, draw_normal(shape, [slice(None)])))


def test_in_other_blocks_other_numbers_are_drawn():
    whole, _ = draw_normal((40, 3), [slice(None)])
    # 60 numbers do not end at a multiple of 16; the last 9 numbers are fewer than 16.
    assert not torch.equal(draw_normal((40, 3), [slice(0, 20), slice(20, 40)])[0], whole)
    assert not torch.equal(draw_normal((40, 3), [slice(0, 37), slice(37, 40)])[0], whole)


def test_a_model_is_initialised_the_same_in_any_blocks(small_blocks):
    spec = TARGET.model_copy(update={"unembedding_std": 0.2})
    whole = init_weights_(Decoder(spec, context=8), spec, seeded()).state_dict()
    small_blocks()
    parts = init_weights_(Decoder(spec, context=8), spec, seeded()).state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def grow_blocks(options):
    generator = seeded()
    plan = Growth.plan(BASE, TARGET, GrowthOptions(**options), generator)
    yield from plan.grow_weights(tensors_of(BASE), generator)
    yield from plan.grow_moments(moments_of(BASE))


@pytest.mark.parametrize("options", OPTIONS)
def test_growth_is_the_same_in_any_blocks(options, small_blocks):
    whole = dict(grow_blocks(options))
    small_blocks()
    parts = list(grow_blocks(options))
    assert len(parts) > 2 * len(whole)
    # NaN where no block was copied.
    together = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
    fill_from_blocks(together, parts)
    assert list(dict(parts)) == list(whole)
    assert all(torch.equal(together[name], whole[name]) for name in whole)


def test_a_file_is_the_same_in_any_blocks(tmp_path):
    tensors = tensors_of(BASE)
    whole = TensorStream.from_tensors(tensors)
    pairs = ((n, t[a:b]) for n, t in tensors.items() for a, b in cut_rows(len(t)))
    parts = TensorStream(layout=whole.layout, tensors=pairs)
    assert write_tensors(tmp_path / "a", parts) == write_tensors(tmp_path / "b", whole)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def cut_rows(num_rows):
    return itertools.pairwise((0, num_rows // 3, num_rows))


def test_blocks_that_are_missing_are_noticed(tmp_path):
    tensors = tensors_of(BASE)
    layout = TensorStream.from_tensors(tensors).layout
    # The last row of each tensor is missing.
    short = [(name, tensor[:-1]) for name, tensor in tensors.items()]
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "a", TensorStream(layout=layout, tensors=iter(short)))
    with pytest.raises(AssertionError):
        TensorStream(layout=layout, tensors=iter(short)).read_into_memory()
