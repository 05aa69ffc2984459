"""The authors' own files, where they are at hand."""

import pytest

from jaxgrad.data.read import read_examples


@pytest.mark.parametrize("mode", ["no_cot", "with_cot", "with_cot_gpt4o"])
def test_the_authors_files_are_read_and_their_shuffled_twins_keep_the_instructions(
    shared_data, mode
):
    name = f"aqua_train_{mode}.json"
    correct = read_examples(shared_data / "cot_500" / name).examples
    shuffled = read_examples(shared_data / "cot_500_wrong_answer_shuffle" / name).examples
    assert len(correct) == len(shuffled) == 500
    assert [e.instruction for e in correct] == [e.instruction for e in shuffled]
    pairs = list(zip(correct, shuffled, strict=True))
    assert any(a.response != b.response for a, b in pairs)
    assert all((a.id == b.id) == (a.response == b.response) for a, b in pairs)
    assert [e.index for e in correct] == list(range(500))
