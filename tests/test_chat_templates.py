"""Published chat templates of every kind: what the protocols make of them.

The templates are the models' own (chat_templates.json), on one small tokenizer that, like Llama 3's,
adds a BOS of its own.
"""

import json
from pathlib import Path

import pytest
import tiny_models
from test_parity import example
from tiny_models import BOS

import jaxgrad
from jaxgrad import reference
from jaxgrad.data.examples import Example, Message
from jaxgrad.data.tokens import Protocol, tokenize
from jaxgrad.errors import UserError
from jaxgrad.options import AnalyzeOptions
from jaxgrad.reference.compare import check_tokens

FOLDER = Path(__file__).parent
TEMPLATES = {
    name: entry["template"]
    for name, entry in json.loads((FOLDER / "chat_templates.json").read_text("utf-8")).items()
}
SYSTEM = "You are a helpful assistant."
ASKED, ANSWER = "How long does the train wait?", "1 hour and 12 minutes"
RECORD = example(0, ASKED, ANSWER)
DAY = "2024-02-29"

# What each kind does with the authors' system message and with BOS, read off the templates.
REFUSES_SYSTEM = {"gemma-2-2b-it", "Mistral-7B-Instruct-v0.1 (first release)"}
PRINTS_BOS = {
    "Llama-3.1-8B-Instruct",
    "Llama-3.2-3B-Instruct",
    "Llama-2-7b-chat-hf",
    "gemma-2-2b-it",
    "gemma-3-1b-it",
    "Mistral-7B-Instruct-v0.1",
    "Mistral-7B-Instruct-v0.1 (first release)",
    "Mistral-7B-Instruct-v0.3",
    "OLMo-2-1124-7B-Instruct",
}
# Its whole conversation lacks a system message that its prompt has.
LOSES_SYSTEM = {"Mistral-7B-Instruct-v0.3"}
# Its {% generation %} marks begin before "assistant".
MARKS_THE_HEADER = {"SmolLM3-3B"}
# Granite prints it only where there is no system message.
PRINTS_DATE = {"Llama-3.2-3B-Instruct", "SmolLM3-3B"}


@pytest.fixture(params=TEMPLATES)
def name(request):
    return request.param


def tokenizer_with(name):
    tokenizer = tiny_models.build_tokenizer("llama-bpe")
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def rendered(name, protocol):
    """Our tokens as text: prompt and response."""
    tokenizer = tokenizer_with(name)
    item = tokenize(RECORD, tokenizer, Protocol(protocol, True, 4096))
    ids = item.token_ids.tolist()
    assert item.reason is None and not item.truncated
    return tuple(
        tokenizer.decode(part)
        for part in (ids[: item.num_prompt_tokens], ids[item.num_prompt_tokens :])
    )


def test_the_prompt_is_the_template_s_and_the_response_is_the_record_s(name):
    prompt, response = rendered(name, "paper")
    # A token may be in both; `paper` counts it as prompt.
    assert (prompt + response).endswith(ANSWER)
    assert ANSWER.endswith(response) and len(response) >= len(ANSWER) - 3
    assert prompt.count(ASKED) == 1
    assert (SYSTEM in prompt) == (name not in REFUSES_SYSTEM)
    if SYSTEM in prompt:
        assert prompt.index(SYSTEM) < prompt.index(ASKED)


def test_clean_measures_what_the_template_renders(name):
    system = [] if name in REFUSES_SYSTEM else [{"role": "system", "content": SYSTEM}]
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]
    whole = tokenizer_with(name).apply_chat_template([*system, *turns], tokenize=False)
    prompt, response = rendered(name, "clean")
    assert (prompt + response).removeprefix(BOS) == whole.removeprefix(BOS)
    assert response.count(ANSWER) == 1 and ASKED not in response
    if name in MARKS_THE_HEADER:
        assert response.startswith("<|im_start|>assistant")
    else:
        assert response.removeprefix("<think>\n\n</think>\n\n").strip().startswith(ANSWER)


def test_a_bos_that_the_template_prints_comes_on_top_of_the_tokenizer_s_in_paper(name):
    paper, clean = (rendered(name, protocol)[0] for protocol in ("paper", "clean"))
    assert paper.startswith(BOS) and clean.startswith(BOS)
    assert paper.startswith(BOS + BOS) == (name in PRINTS_BOS)
    assert not clean.startswith(BOS + BOS)
    if name not in LOSES_SYSTEM | MARKS_THE_HEADER:
        assert paper.removeprefix(BOS).removeprefix(BOS) == clean.removeprefix(BOS)


def test_both_sides_read_it_alike(name):
    tokenizer = tokenizer_with(name)
    for protocol in ("paper", "clean"):
        options = AnalyzeOptions(protocol=protocol, chat="yes", max_length=4096, date=DAY)
        ours = tokenize(RECORD, tokenizer, options.protocol_for(tokenizer))
        check_tokens(ours, reference.encode_example(RECORD, tokenizer, options))


def test_the_date_is_the_one_asked_for(name):
    tokenizer = tokenizer_with(name)
    texts = set()
    for day in (DAY, "2025-03-01"):
        options = AnalyzeOptions(chat="yes", max_length=4096, date=day)
        item = tokenize(RECORD, tokenizer, options.protocol_for(tokenizer))
        texts.add(tokenizer.decode(item.token_ids))
    assert (len(texts) == 2) == (name in PRINTS_DATE)
    if len(texts) == 2:
        assert sum("29" in text and "2024" in text for text in texts) == 1


@pytest.mark.parametrize("name", sorted(REFUSES_SYSTEM))
def test_a_system_message_of_the_record_s_own_is_not_dropped(name):
    messages = (Message("system", "Be brief."), Message("user", ASKED))
    record = Example(7, "id7", messages, ANSWER)
    with pytest.raises(UserError, match="record 7: the chat template fails"):
        tokenize(record, tokenizer_with(name), Protocol("paper", True, 4096))


def test_a_run_goes_on_with_the_date_that_it_began_with(tmp_path, monkeypatch):
    """Killed before midnight and continued after, it measures the same texts."""
    directory = tiny_models.save_tiny(
        tiny_models.Tiny(2, 1, tied=True, width=14, head_size=6, mlp_width=11, num_layers=2),
        tmp_path / "model",
    )
    (directory / "chat_template.jinja").write_text(TEMPLATES["Llama-3.2-3B-Instruct"])
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": ASKED, "output": ANSWER}]))

    def run(output, **options):
        (summary,) = jaxgrad.run_analysis(
            model_path=str(directory),
            data_paths=[data],
            output_dir=tmp_path / output,
            options=AnalyzeOptions(max_length=257, parameters="1.*q_proj", **options),
            say=lambda _: None,
            progress=False,
        )
        return summary.reused, json.loads((tmp_path / output / "run.json").read_text())["identity"]

    _, first = run("a", date=DAY)
    assert first["options"]["date"] == DAY
    reused, again = run("a")
    assert reused and again == first
    _, today = run("b")
    assert today["tokens_sha256"] != first["tokens_sha256"]
    with pytest.raises(UserError, match="date"):
        run("a", date="2025-03-01")
    with pytest.raises(UserError, match="--date=tomorrow is not a day"):
        run("c", date="tomorrow")
