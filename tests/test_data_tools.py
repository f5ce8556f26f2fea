"""Tools in the data: schemas through the chat template, calls as what is learned, and what is wrong with either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.data.bad import BadExample
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream
from forge_hpc.data.render import DocumentRenderer, PromptRenderer
from forge_hpc.data.source import load_examples
from forge_hpc.data.tool_calls import MISTRAL, BadToolCall, ToolCall, tool_format

SCHEMA = {"name": "add", "description": "a plus b", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}}
TOOLS = [{"type": "function", "function": SCHEMA}]
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1, "b": 22}}}
CHAT = [
    {"role": "user", "content": "1+22?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "23"},
    {"role": "assistant", "content": "23."},
]
# As those of the families write them: Qwen2.5's and Hermes' calls, and Llama 3's, whose turns hold nothing else.
HERMES = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    '{% if m.tool_calls %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BLOCKS = HERMES.replace("{{ m.content }}", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}").replace(
    "<|end|>{% endfor %}{% if add",
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}{% if add",
)
NO_TOOLS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


def tokenizer(template: str) -> Any:
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def chats(**options: Any) -> DataConfig:
    return DataConfig(prompt_field="messages", target_field=None, **options)


def learned(template: str, example: dict[str, Any], data: DataConfig | None = None) -> tuple[str, list[str]]:
    """The text of an example's only document, and the runs of it that are learned."""
    own = tokenizer(template)
    [document] = DocumentRenderer(own, data or chats())(example)
    runs: list[list[int]] = [[]]
    for token, trained in zip(document.token_ids.tolist(), document.loss_mask, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return own.decode(document.token_ids), [own.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 22}}</tool_call>'),
        (BLOCKS, '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 22}}</tool_call>'),
        (LLAMA, '{"name": "add", "parameters": {"a": 1, "b": 22}}'),
    ],
    ids=["hermes", "blocks", "llama3"],
)
def test_calls_and_answers_are_learned_and_schemas_and_results_are_not(template: str, call: str):
    text, runs = learned(template, {"messages": CHAT, "tools": TOOLS})
    assert runs == [f"{call}<|end|>", "23.<|end|>"]
    assert text.startswith("<|system|>") and text.index('"a plus b"') < text.index("1+22?")
    assert "<|tool|>23<|end|>" in text


@pytest.mark.parametrize(
    "tools", [json.dumps(TOOLS), [SCHEMA], [{"function": SCHEMA | {"strict": None}}]], ids=["text", "bare", "nulls"]
)
def test_tools_and_calls_are_the_same_in_every_way_of_writing_them(tools: Any):
    text = {**CALL, "function": {"name": "add", "arguments": '{"a":1,"b":22}'}}
    chat = [CHAT[0], CHAT[1] | {"tool_calls": [text]}, *CHAT[2:]]
    assert learned(HERMES, {"messages": chat, "tools": tools}) == learned(HERMES, {"messages": CHAT, "tools": TOOLS})


def test_examples_without_tools_and_fields_of_another_name_have_none():
    plain = [CHAT[0], CHAT[3]]
    for example in ({"messages": plain}, {"messages": plain, "tools": None}, {"messages": plain, "tools": []}):
        assert learned(HERMES, example) == ("<|user|>1+22?<|end|><|assistant|>23.<|end|>", ["23.<|end|>"])
    assert learned(NO_TOOLS, {"messages": plain, "tools": TOOLS}, chats(tools_field=None))[1] == ["23.<|end|>"]
    assert learned(HERMES, {"messages": plain, "own": TOOLS}, chats(tools_field="own"))[0].startswith("<|system|>")


def test_a_prompt_of_a_policy_is_told_its_tools_too():
    render = PromptRenderer(tokenizer(HERMES), DataConfig())
    prompt = render({"question": "1+22?", "answer": "23", "tools": TOOLS}, 0)
    assert prompt.text.startswith("<|system|>") and prompt.text.endswith("<|user|>1+22?<|end|><|assistant|>")


def test_a_chat_template_that_takes_no_tools_ends_the_run_with_what_to_do():
    with pytest.raises(UserError, match=r"the example has tools .* takes none") as refused:
        learned(NO_TOOLS, {"messages": [CHAT[0], CHAT[3]], "tools": TOOLS})
    assert not isinstance(refused.value, BadExample) and "data.tools_field=null" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "[{"}, "the field 'tools' is no JSON"),
        ({"tools": {"name": "add"}}, "is no list of tools"),
        ({"tools": ["add"]}, "a tool in 'tools' has no name"),
        ({"messages": [CHAT[0], CHAT[1] | {"tool_calls": ["add"]}]}, "a tool call in 'messages' is no object"),
        (
            {"messages": [CHAT[0], CHAT[1] | {"tool_calls": [{"function": {"name": "add", "arguments": "{1"}}]}]},
            "the arguments of a tool call in 'messages' are no JSON",
        ),
        (
            {"messages": [CHAT[0], CHAT[1] | {"tool_calls": [{"function": {"name": "add", "arguments": "1"}}]}]},
            "the arguments of a tool call in 'messages' are no object",
        ),
    ],
)
def test_a_call_or_a_tool_that_does_not_parse_is_a_bad_example(change: dict[str, Any], message: str):
    with pytest.raises(BadExample, match=f"line 7: .*{message}"):
        DocumentRenderer(tokenizer(HERMES), chats())({"messages": CHAT, "tools": TOOLS} | change, "line 7")


def test_tools_are_read_from_files_and_a_bad_call_is_refused_with_its_line(tmp_path: Path):
    import datasets

    example = {"messages": CHAT, "tools": TOOLS}
    rows = [{name: json.dumps(value) for name, value in example.items()}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chats.parquet")
    [found] = load_examples(chats(path=str(tmp_path / "chats.parquet")), "train", 0)
    assert learned(HERMES, found) == learned(HERMES, example)  # type: ignore[arg-type]
    bad = CHAT[1] | {"tool_calls": [{"function": {"name": "add", "arguments": "{1"}}]}
    for name, line in (("call", {"messages": [CHAT[0], bad]}), ("tool", example | {"tools": [1]})):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in (example, line)))
        config = Config(data=chats(path=str(file)))
        with pytest.raises(BadExample, match=rf"{name}.jsonl, line 2: .*a tool"):
            DocumentStream(open_sources(config), tokenizer(HERMES), config)


def test_mistrals_calls_are_read_in_both_of_its_ways():
    assert tool_format("{{ tools }}[TOOL_CALLS]") is MISTRAL
    two = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "x"}, {"name": "sub", "arguments": {}}]'
    assert MISTRAL.read(two) == ("", [ToolCall("add", '{"a": 1}'), ToolCall("sub", "{}")])
    named = 'I add.[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]sub{"b": "é"}'
    assert MISTRAL.read(named) == ("I add.", [ToolCall("add", '{"a": 1}'), ToolCall("sub", '{"b": "é"}')])
    assert MISTRAL.read("no call") == ("no call", [])
    for bad in ("[TOOL_CALLS]", "[TOOL_CALLS][{", '[TOOL_CALLS]add[ARGS]{"a"}', "[TOOL_CALLS]add[ARGS][1]"):
        with pytest.raises(BadToolCall):
            MISTRAL.read(bad)
