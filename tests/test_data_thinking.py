"""SFT where templates think: what is learned is what the model will be asked to write, from the place of the asking."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream, evaluation_documents
from forge_hpc.data.render import DocumentRenderer
from forge_hpc.data.source import load_eval_examples
from forge_hpc.data.types import Document

# What Qwen3's own template does: thinking is kept, or an empty thought put, after the last question alone; a call of a
# tool is no new question; without thinking the generation prompt brings the empty thought.
QWEN3 = """
{%- set ns = namespace(asked=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.asked = messages.index(m) %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- set words, thought = m.content, m.reasoning_content or '' %}
{%- if m.role == 'assistant' and '</think>' in words %}
  {%- set thought = words.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
  {%- set words = words.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or thought) %}
  {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif %}
{{- words }}
{%- for call in m.tool_calls or [] %}{{ '\\n<tool_call>' + call.name + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
# As the distilled R1 models: the thought is opened where an answer is asked for, and taken out of every answer.
R1 = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\n1 and 1\n</think>\n\n"


def tokenizer(template: str = QWEN3) -> Any:
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def chats(**options: Any) -> DataConfig:
    return DataConfig(**({"prompt_field": "messages", "target_field": None} | options))


def chat(*words: str) -> list[dict[str, Any]]:
    """Questions and answers in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(words)]


def asked_and_learned(documents: list[Document], tok: Any) -> list[list[tuple[str, str]]]:
    """For each document, each learned run of tokens after what stands before it."""
    found = []
    for document in documents:
        runs, start = [], 0
        ids, mask = document.token_ids.tolist(), document.loss_mask.tolist()
        while True in mask[start:]:
            begin = mask.index(True, start)
            end = mask.index(False, begin) if False in mask[begin:] else len(mask)
            runs.append((tok.decode(ids[start:begin]), tok.decode(ids[begin:end])))
            start = end
        found.append(runs)
    return found


def rendered(messages: list[dict[str, Any]], data: DataConfig, template: str = QWEN3) -> list[list[tuple[str, str]]]:
    tok = tokenizer(template)
    return asked_and_learned(DocumentRenderer(tok, data)({"messages": messages}), tok)


ASK, NEXT = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\n2+2?<|im_end|>\n"


@pytest.mark.parametrize(
    ("answer", "options", "asked", "learned"),
    [
        ("2", {}, ASK, EMPTY + "2<|im_end|>"),
        ("2", {"chat_template_args": {"enable_thinking": False}}, ASK + EMPTY, "2<|im_end|>"),
        (THOUGHT + "2", {}, ASK, THOUGHT + "2<|im_end|>"),
        ("<think>1 and 1</think>2", {}, ASK, THOUGHT + "2<|im_end|>"),
    ],
    ids=["empty thought", "without thinking", "thought", "thought in a row"],
)
def test_what_follows_the_generation_prompt_is_learned(
    answer: str, options: dict[str, Any], asked: str, learned: str
) -> None:
    assert rendered(chat("1+1?", answer), chats(**options)) == [[(asked, learned)]]


def test_the_generation_prompt_and_what_is_learned_are_the_tokens_of_generation() -> None:
    """Token by token what a generator is given, and what it has to write."""
    tok, data = tokenizer(), chats()
    [document] = DocumentRenderer(tok, data)({"messages": chat("1+1?", THOUGHT + "2")})
    prompt = tok.apply_chat_template(chat("1+1?"), add_generation_prompt=True, return_dict=True)["input_ids"]
    assert document.token_ids[: len(prompt)].tolist() == prompt
    assert document.loss_mask.tolist() == [False] * len(prompt) + [True] * (
        len(document.loss_mask) - len(prompt) - 1
    ) + [
        False  # the line break after the end of the turn
    ]


def test_turns_that_the_template_renders_otherwise_later_are_documents_of_their_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    first, second = rendered(chat("1+1?", THOUGHT + "2", "2+2?", "<think>\n2 and 2\n</think>\n\n4"), chats())
    assert first == [(ASK, THOUGHT + "2<|im_end|>")]
    assert second == [
        (ASK + "2<|im_end|>\n" + NEXT + "<|im_start|>assistant\n", "<think>\n2 and 2\n</think>\n\n4<|im_end|>")
    ]
    assert "each is a document of its own" in caplog.text


def test_a_template_that_renders_all_turns_alike_makes_one_document() -> None:
    assert rendered(chat("1+1?", "2", "2+2?", "4"), chats(), PLAIN) == [
        [(ASK, "2<|im_end|>"), ("\n" + NEXT + "<|im_start|>assistant\n", "4<|im_end|>")]
    ]


def test_thinking_and_calls_beside_the_content_are_learned_where_the_template_renders_them() -> None:
    thinks = {"role": "assistant", "content": "2", "reasoning_content": "1 and 1"}
    assert rendered([*chat("1+1?"), thinks], chats()) == [[(ASK, THOUGHT + "2<|im_end|>")]]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert rendered([*chat("1+1?"), calls], chats()) == [[(ASK, EMPTY + "\n<tool_call>add</tool_call><|im_end|>")]]
    with pytest.raises(UserError, match="holds reasoning_content beside role and content, and the chat templ"):
        rendered([*chat("1+1?"), thinks], chats(), PLAIN)


def test_a_completion_is_learned_and_the_turns_of_its_prompt_are_not() -> None:
    example = {"prompt": chat("1+1?", "2", "2+2?"), "completion": [{"role": "assistant", "content": "4"}]}
    data = DataConfig(prompt_field="prompt", target_field="completion", system_prompt="Add.")
    tok = tokenizer()
    [[(asked, learned)]] = asked_and_learned(DocumentRenderer(tok, data)(example), tok)
    assert asked.startswith("<|im_start|>system\nAdd.") and asked.endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert learned == EMPTY + "4<|im_end|>"
    blocks = tokenizer(
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    [[(_, learned)]] = asked_and_learned(DocumentRenderer(blocks, data)(example), blocks)
    assert learned == "4<|im_end|>"


@pytest.mark.parametrize(
    ("template", "answer", "options", "message", "hint"),
    [
        (
            QWEN3,
            THOUGHT + "2",
            {"chat_template_args": {"enable_thinking": False}},
            "asks for .* with",
            "enable_thinking",
        ),
        (R1, THOUGHT + "2", {}, "asks for the assistant's turn with '<think>", "two fields"),
        (R1.partition("{% if add")[0], THOUGHT + "2", {}, "leaves out the thinking as it is written", "two fields"),
    ],
    ids=["thinking switched off", "thought opened by the prompt", "thinking stripped"],
)
def test_what_a_template_makes_impossible_is_said_with_what_to_do(
    template: str, answer: str, options: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UserError, match=f"line 3: the chat template {message}") as error:
        DocumentRenderer(tokenizer(template), chats(**options))({"messages": chat("1+1?", answer)}, "line 3")
    assert hint in (error.value.hint or "")


def test_a_target_that_thinks_goes_on_where_the_prompt_has_opened_the_thought() -> None:
    data = DataConfig()
    for template, asked, learned in [
        (R1, "<user>1+1?<assistant><think>\n", "1 and 1\n</think>\n\n2<eos>"),
        (QWEN3, ASK, THOUGHT + "2<eos>"),
    ]:
        tok = tokenizer(template)
        documents = DocumentRenderer(tok, data)({"question": "1+1?", "answer": THOUGHT + "2"})
        assert asked_and_learned(documents, tok) == [[(asked, learned)]]
    data = DataConfig(chat_template_args={"enable_thinking": False})
    with pytest.raises(UserError, match="the chat template has closed the thinking before it"):
        DocumentRenderer(tokenizer(), data)({"question": "1+1?", "answer": THOUGHT + "2"})


def write_chats(path: Path, count: int) -> str:
    lines = ({"messages": chat(f"{i}?", "a" * i, "more?", "b" * i, "end?", "c" * i)} for i in range(1, count + 1))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_goes_on_within_the_documents_of_one_chat(streaming: bool, tmp_path: Path) -> None:
    cfg = Config(data=chats(path=write_chats(tmp_path / "a.jsonl", 5), streaming=streaming, shuffle_buffer=2))
    cfg.trainer.training.seq_len = 101  # the last documents of the longest chats fit no row

    def opened() -> DocumentStream:
        return DocumentStream(open_sources(cfg), tokenizer(), cfg)

    whole = [document.token_ids.tolist() for document in opened().take(40)]
    assert len({tuple(ids) for ids in whole}) in range(10, 15)
    for stop in range(1, 16):
        one = opened()
        one.take(stop)
        other = opened().load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert other.state_dict() == one.state_dict()
        assert [document.token_ids.tolist() for document in other.take(40 - stop)] == whole[stop:]
        one.take(40 - stop)
        assert (other.position, other.num_too_long) == (one.position, one.num_too_long)


def test_held_out_chats_are_as_many_documents_as_asked_for(tmp_path: Path) -> None:
    cfg = Config(data=chats(eval_path=write_chats(tmp_path / "a.jsonl", 3)))
    documents = evaluation_documents(load_eval_examples(cfg.data, 0), tokenizer(), cfg, 5)
    assert len(documents) == 5
    assert [tokenizer().decode(d.token_ids[d.loss_mask]) for d in documents[:4]] == [
        f"{EMPTY}{text}<|im_end|>" for text in ("a", "b", "c", "aa")
    ]
