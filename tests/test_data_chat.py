"""Chats: as prompts, and as documents whose loss covers the assistant's turns and their ends alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig, SourceConfig
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream, PromptStream
from forge_hpc.data.render import DocumentRenderer, PromptRenderer, learned_ends
from forge_hpc.data.source import load_examples
from forge_hpc.data.types import Document

CHAT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "assistant?"},
    {"role": "assistant", "content": "A 2."},
]

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
TURN_END = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }} \n<|end|>\n{% endfor %}"
BLOCKS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}<|end|>{% endfor %}"
)
# As Qwen3 does without thinking: a closed thought before the last answer alone, and where an answer is asked for.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think></think>{% endif %}"
)
SECRET = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | lower }}<|end|>{% endfor %}"


def tokenizer(template: str) -> Any:
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def chats(**options: Any) -> DataConfig:
    return DataConfig(prompt_field="messages", target_field=None, **options)


def split(documents: list[Document], tokenizer: Any) -> tuple[str, list[str]]:
    """The text of an example's only document, and the runs of it that are learned."""
    [document] = documents
    learned: list[list[int]] = [[]]
    for token, trained in zip(document.token_ids.tolist(), document.loss_mask, strict=True):
        if trained:
            learned[-1].append(token)
        elif learned[-1]:
            learned.append([])
    return tokenizer.decode(document.token_ids), [tokenizer.decode(run) for run in learned if run]


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (BLOCKS, ["2<|end|>", "A 2.<|end|>"]),
        (TURN_END, ["2 \n<|end|>", "A 2. \n<|end|>"]),
        (PLAIN, ["2", "A 2.<eos>"]),
    ],
    ids=["generation blocks", "turn ends", "no turn ends"],
)
def test_the_assistants_turns_and_their_ends_are_learned(template: str, learned: list[str]) -> None:
    tok = tokenizer(template)
    document = DocumentRenderer(tok, chats(system_prompt="Be brief."))({"messages": CHAT})
    text, ours = split(document, tok)
    system = {"role": "system", "content": "Be brief."}
    assert text.removesuffix("<eos>") == tok.apply_chat_template([system, *CHAT], tokenize=False)
    assert ours == learned


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (BLOCKS, ["<|end|>"]),
        (BLOCKS.replace("{% endgeneration %}", "<|end|>\n{% endgeneration %}", 1), ["<|end|>"]),
        (TURN_END, ["<|end|>"]),
        (THINKING, ["<|end|>"]),
        (PLAIN, ["<eos>"]),
        ("{{ raise_exception('never') }}", []),
    ],
    ids=["generation blocks", "white space after it", "turn ends", "thinking", "no turn ends", "refused"],
)
def test_the_ends_that_are_learned_are_known(template: str, ends: list[str]) -> None:
    tok = tokenizer(template)
    config = Config(data=chats(path="chats.jsonl"))
    assert tok.convert_ids_to_tokens(learned_ends(tok, config)) == ends
    config.data.sources = [SourceConfig(path="a.jsonl"), SourceConfig(path="b.jsonl", target_field="answer")]
    assert set(tok.convert_ids_to_tokens(learned_ends(tok, config))) == {*ends, "<eos>"}


def test_a_systems_message_of_the_chat_itself_is_kept() -> None:
    tok = tokenizer(PLAIN)
    chat = [{"role": "system", "content": "Mine."}, *CHAT]
    document = DocumentRenderer(tok, chats(system_prompt="Yours."))({"messages": chat})
    assert split(document, tok)[0].startswith("<|system|>Mine.<|user|>1+1?")


def test_words_of_the_template_in_what_is_said_do_not_mislead() -> None:
    tok = tokenizer(TURN_END)
    chat = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "assistant"}]
    _, learned = split(DocumentRenderer(tok, chats())({"messages": chat}), tok)
    assert learned == ["assistant \n<|end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (PLAIN, CHAT[:1], "no turn of the assistant"),
        (SECRET, CHAT, "does not render the assistant's turns as they are written"),
        (BLOCKS, [CHAT[0], {"role": "assistant", "content": ""}], "marks no token"),
        (PLAIN, [CHAT[0], CHAT[1] | {"reasoning_content": "Hm."}], "holds reasoning_content beside"),
        (PLAIN, [{"role": "user"}], "is not {role: text, content: text}"),
        (PLAIN, "1+1?", "must hold messages"),
        (PLAIN, [], "neither a string nor a list of messages"),
    ],
)
def test_a_chat_with_nothing_to_learn_is_named(template: str, messages: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"chats.jsonl, line 7: .*{message}") as error:
        DocumentRenderer(tokenizer(template), chats())({"messages": messages}, "chats.jsonl, line 7")
    assert error.value.hint


def test_a_chat_is_a_prompt_and_its_target_the_answer() -> None:
    tok = tokenizer(THINKING)
    data = DataConfig(prompt_field="messages")
    example = {"messages": CHAT[:3], "answer": "A 2.", "level": 3}
    prompt = PromptRenderer(tok, data)(example, 5)
    assert prompt.text == "<|user|>1+1?<|end|><|assistant|>2<|end|><|user|>assistant?<|end|>" + (
        "<|assistant|><think></think>"
    )
    assert (prompt.position, prompt.target, prompt.fields) == (5, "A 2.", {"level": 3})
    assert split(DocumentRenderer(tok, data)(example), tok)[1] == ["A 2.<eos>"]


def test_a_prompt_that_ends_with_the_answer_is_refused() -> None:
    with pytest.raises(UserError, match="ends with the assistant's turn"):
        PromptRenderer(tokenizer(PLAIN), chats())({"messages": CHAT}, 0)


def test_chats_without_a_chat_template_are_refused() -> None:
    with pytest.raises(UserError, match="messages need a chat template"):
        PromptRenderer(char_tokenizer(), chats(chat_template=False))({"messages": CHAT[:1]}, 0)
    with pytest.raises(UserError, match="has no chat template"):
        DocumentRenderer(char_tokenizer(), chats())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_chats_flow_from_a_file_to_documents_and_prompts(
    tmp_path: Path, suffix: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / f"chats.{suffix}"
    rows = [{"messages": CHAT, "question": CHAT[:3], "answer": "x" * i} for i in range(3)]
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    tok = tokenizer(TURN_END)
    cfg = Config(data=chats(path=str(file), streaming=streaming, shuffle=False))
    document = next(DocumentStream(open_sources(cfg), tok, cfg))
    assert split([document], tok)[1] == ["2 \n<|end|>", "A 2. \n<|end|>"]
    cfg = Config(data=DataConfig(path=str(file), streaming=streaming, shuffle=False, system_prompt="Be brief."))
    prompts = PromptStream(open_sources(cfg), tok, cfg).take(3)
    assert [prompt.target for prompt in prompts] == ["", "x", "xx"]
    assert all(prompt.text.startswith("<|system|>Be brief. \n<|end|>\n<|user|>1+1?") for prompt in prompts)


def test_a_bad_message_in_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"messages": [{"role": "user", "text": "x"}]}\n')
    with pytest.raises(UserError, match=r"chats\.jsonl, line 2: a message in 'messages' is not"):
        load_examples(chats(path=str(file)), "train", 0)
