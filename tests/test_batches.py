"""The grid of lengths, the plan of batches, and the padding."""

import numpy as np
import pytest

from jaxgrad.data.batches import (
    MAX_SHAPES,
    Batch,
    BatchShape,
    batch_arrays,
    bucket_length,
    bucket_responses,
    choose_row_shapes,
    plan_batches,
)
from jaxgrad.data.examples import Example, Message
from jaxgrad.data.tokens import EMPTY_RESPONSE, TokenizedExample
from jaxgrad.errors import UserError

GRID = [octave + step * octave // 8 for octave in (32, 64, 128, 256) for step in range(8)] + [512]


def item(num_tokens, num_prompt, reason=None):
    """An example with token ids 1, 2, 3, ...: each tells its position, and none is the pad 0."""
    source = Example(0, "0" * 16, (Message("user", "x"),), "y")
    ids = np.arange(1, num_tokens + 1, dtype=np.int32)
    return TokenizedExample(source, ids, np.arange(num_prompt, num_tokens), False, reason)


def random_items(seed, count, max_length):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, max_length + 1, count)
    return [item(int(n), int(rng.integers(1, n))) for n in lengths]


def test_length_grid():
    for length in range(1, 513):
        assert bucket_length(length, 512) == next(g for g in GRID if g >= length)


@pytest.mark.parametrize("max_length", [2, 31, 32, 33, 100, 317, 512])
def test_max_length_caps_the_grid_and_belongs_to_it(max_length):
    grid = [g for g in GRID if g < max_length] + [max_length]
    for length in range(1, max_length + 1):
        assert bucket_length(length, max_length) == next(g for g in grid if g >= length)


def test_response_grid():
    for num_tokens in (7, 16, 40, 64, 317):
        for n in range(1, num_tokens + 1):
            assert bucket_responses(n, num_tokens) == (
                min(16, num_tokens) if n <= 16 else num_tokens
            )


def test_lengths_out_of_range():
    for length in (0, 65):
        with pytest.raises(ValueError, match=f"{length} "):
            bucket_length(length, 64)
        with pytest.raises(ValueError, match=f"{length} "):
            bucket_responses(length, 64)


@pytest.mark.parametrize("max_length", [2, 17, 64, 300, 1024])
@pytest.mark.parametrize("limit", [1, 2, 5, MAX_SHAPES])
def test_a_file_of_any_lengths_has_at_most_so_many_shapes(max_length, limit):
    items = random_items(max_length, 300, max_length)
    items += [item(n, n - 1) for n in range(2, max_length + 1, 7)]  # short responses
    rows = choose_row_shapes(items, max_length=max_length, limit=limit)
    assert len(set(rows)) == len(rows) <= limit
    plan = plan_batches(items, batch_tokens=700, max_length=max_length, row_shapes=rows)
    assert {(b.shape.num_tokens, b.shape.num_responses) for b in plan} <= set(rows)
    for batch in plan:
        for m in batch.members:
            assert items[m].num_tokens <= batch.shape.num_tokens
            assert items[m].num_response_tokens <= batch.shape.num_responses


def test_the_shape_that_costs_least_goes_first():
    """One example of 130 and fifty of 140 and 250: moving the one costs 8 tokens, any other more."""
    items = [item(130, 4)] + [item(140, 4)] * 50 + [item(250, 4)] * 50
    assert choose_row_shapes(items, max_length=512, limit=3) == [(256, 256), (144, 144)]
    items = [item(60, 4), *[item(140, 4)] * 50, *[item(250, 4)] * 50]
    assert choose_row_shapes(items, max_length=512, limit=3) == [(256, 256), (144, 144), (60, 60)]
    assert choose_row_shapes(items, max_length=512, limit=2) == [(256, 256), (144, 144)]


def test_plan_holds_each_measurable_example_once():
    items = random_items(0, 211, 300)
    items[5] = item(40, 40, reason=EMPTY_RESPONSE)
    plan = plan_batches(items, batch_tokens=700, max_length=300)
    members = [m for batch in plan for m in batch.members]
    assert sorted(members) == [m for m in range(len(items)) if m != 5]
    assert plan == plan_batches(list(items), batch_tokens=700, max_length=300)
    for batch in plan:
        B, T, S = batch.shape.num_examples, batch.shape.num_tokens, batch.shape.num_responses
        assert max(1, 700 // T) == B
        assert 1 <= len(batch.members) <= B
        assert list(batch.members) == sorted(batch.members)
        for m in batch.members:
            assert items[m].num_tokens <= T and items[m].num_response_tokens <= S
    order = [(b.shape.num_tokens, b.shape.num_responses) for b in plan]
    assert order == sorted(order, reverse=True)
    # Only the last batch of the short responses, and the last of the long ones, has empty rows.
    for short in (True, False):
        batches = [b for b in plan if (b.shape.num_responses == 16) == short]
        assert all(len(b.members) == b.shape.num_examples for b in batches[:-1])


def test_a_row_longer_than_batch_tokens_stands_alone():
    plan = plan_batches([item(90, 80), item(90, 80)], batch_tokens=64, max_length=128)
    assert plan == [Batch(BatchShape(1, 96, 16), (0,)), Batch(BatchShape(1, 96, 16), (1,))]


def test_empty_plans_and_bad_arguments():
    assert plan_batches([], batch_tokens=64, max_length=64) == []
    nothing = [item(5, 5, reason=EMPTY_RESPONSE)]
    assert plan_batches(nothing, batch_tokens=64, max_length=64) == []
    with pytest.raises(UserError, match="--batch_tokens=0"):
        plan_batches(nothing, batch_tokens=0, max_length=64)
    with pytest.raises(ValueError, match="65 is not in"):
        plan_batches([item(65, 3)], batch_tokens=64, max_length=64)


def test_arrays_of_one_batch():
    items = [item(5, 5, reason=EMPTY_RESPONSE), item(37, 30), item(33, 1), item(38, 31)]
    # Rows 1 and 3 share T = 40 and S = 16; row 2 has 32 targets, and no length beyond its own.
    plan = plan_batches(items, batch_tokens=130, max_length=64)
    assert plan == [Batch(BatchShape(3, 40, 16), (1, 3)), Batch(BatchShape(3, 36, 36), (2,))]
    arrays = batch_arrays(plan[0], items)
    assert arrays.tokens_T.shape == (3, 40)
    assert arrays.tokens_T.dtype == arrays.positions_S.dtype == arrays.labels_S.dtype == np.int32
    assert arrays.weights_S.dtype == np.float64
    for row, (length, prompt) in enumerate([(37, 30), (38, 31)]):
        n = length - prompt
        pad = [0] * (16 - n)
        assert arrays.tokens_T[row].tolist() == [*range(1, length + 1), *[0] * (40 - length)]
        assert arrays.positions_S[row].tolist() == [*range(prompt - 1, length - 1), *pad]
        # Ids count from 1: the token at position p + 1 is p + 2.
        assert arrays.labels_S[row].tolist() == [*range(prompt + 1, length + 1), *pad]
        assert arrays.weights_S[row].tolist() == [*[1 / n] * n, *pad]
    assert not arrays.tokens_T[2].any() and not arrays.weights_S[2].any()
    assert not arrays.positions_S[2].any() and not arrays.labels_S[2].any()


def test_targets_may_have_gaps():
    source = Example(0, "0" * 16, (Message("user", "x"),), "y")
    targets = [1, 4, 5, 9]
    ids = np.arange(1, 13, dtype=np.int32)
    gaps = TokenizedExample(source, ids, np.asarray(targets, np.int32), False, None)
    items = [gaps, item(12, 8)]
    (batch,) = plan_batches(items, batch_tokens=64, max_length=32)
    arrays = batch_arrays(batch, items)
    assert batch.shape == BatchShape(2, 32, 16)
    assert arrays.tokens_T[0, :12].tolist() == ids.tolist()
    assert arrays.positions_S[0].tolist() == [t - 1 for t in targets] + [0] * 12
    assert arrays.labels_S[0].tolist() == [t + 1 for t in targets] + [0] * 12
    assert arrays.weights_S[0].tolist() == [1 / 4] * 4 + [0] * 12


def test_arrays_of_any_batch_weigh_the_targets_and_nothing_else():
    items = random_items(1, 97, 150)
    for batch in plan_batches(items, batch_tokens=500, max_length=150):
        arrays = batch_arrays(batch, items)
        real = arrays.weights_S > 0
        counts = [items[m].num_response_tokens for m in batch.members]
        assert real.sum(axis=1).tolist() == counts + [0] * (len(real) - len(counts))
        assert np.all(arrays.weights_S[~real] == 0)
        sums = arrays.weights_S.astype(np.float64).sum(axis=1)[: len(counts)]
        np.testing.assert_allclose(sums, 1, rtol=1e-7)
        row, slot = np.nonzero(real)
        following = arrays.tokens_T[row, arrays.positions_S[row, slot] + 1]
        assert np.array_equal(following, arrays.labels_S[row, slot])
        assert np.all(following > 0)
