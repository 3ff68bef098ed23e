import pytest
from hypothesis import given
from hypothesis import strategies as st

from heretic_kl.engine.length_buckets import SMALLEST_BUCKET, length_buckets


@given(st.lists(st.integers(1, 200), max_size=80), st.integers(1, 32))
def test_every_sequence_is_in_one_bucket_of_at_most_max_rows(lengths, max_rows):
    buckets = length_buckets(lengths, max_rows)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(lengths)))
    assert all(1 <= len(bucket) <= max_rows for bucket in buckets)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=80))
def test_little_is_padding_unless_a_bucket_is_small(lengths):
    for bucket in length_buckets(lengths, 32, max_padding=0.1):
        padded = max(lengths[i] for i in bucket) * len(bucket)
        waste = 1 - sum(lengths[i] for i in bucket) / padded
        assert waste <= 0.1 or len(bucket) <= SMALLEST_BUCKET


def test_grouping_is_a_function_of_the_lengths():
    assert length_buckets([5, 1, 5, 1], 2) == [[1, 3], [0, 2]]
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        length_buckets([1], 0)
