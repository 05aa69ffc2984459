"""Untrusted files, mutated: each ends in a clear error or a right result, in bounded time and memory.

run_mutated.py and run_atheris.py run the same functions longer; docs/hostile_input.md has the results.
"""

import limits
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import READERS

# Numbers of files; opening a whole model takes 10 to 100 ms.
SLOW = {"description": 20, "gguf": 60, "config": 60, "gguf_tokenizer": 60}


@pytest.mark.parametrize("name", READERS)
def test_the_valid_files_are_read(name):
    assert all(READERS[name].one_input(valid) for valid in READERS[name].valid)


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_end_in_an_error_or_a_right_result(name):
    reader = READERS[name]
    outcomes = set()

    @settings(
        max_examples=SLOW.get(name, 150),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def one_file(rng):
        data = reader.mutated(rng)
        with limits.limited():
            outcomes.add(reader.one_input(data))

    one_file()
    assert False in outcomes  # mutations that never break a file test nothing
