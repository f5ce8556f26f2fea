"""What an environment says, as tokens: made once, from its text alone, and put behind the tokens that are there.

Text that the policy wrote is never encoded: its tokens stay as they were sampled, also where decoding and encoding them
would give others. So the tokens that are trained are those that were generated, in the context they had.

With a chat template, what stands between a response and the next one is rendered once, with placeholders:

    <|im_end|>\\n<|im_start|>user\\n  OBSERVATION  <|im_end|>\\n<|im_start|>assistant\\n
    └─────────── before ───────────┘               └───────────────── after ───────────┘

The three parts are encoded each by itself, the observation with its special tokens as plain text: no environment can
close its own turn or open another. ``before`` begins with the token that ends the policy's turn; where the policy
sampled that token itself, it is not repeated. Without a chat template (``data.chat_template`` false) the observation
stands between two line breaks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import DataConfig
from forge_hpc.data.template import TemplateRefused, render_chat, takes_tools
from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Opening, Step

_RESPONSE, _OBSERVATION = "PLACE-OF-THE-RESPONSE", "PLACE-OF-THE-OBSERVATION"


class ConversationRenderer:
    """Tokens of openings and observations for one tokenizer.

    Raises UserError where the chat template has no place for what is to be rendered.
    """

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._frames: dict[str, tuple[list[int], list[int]]] = {}
        self._frame("user")

    def opening(self, prompt: Prompt, opening: Opening) -> Prompt:
        """The prompt with what the environment begins with in place of its own text."""
        tools: list[dict[str, Any]] = []
        if isinstance(opening, dict):
            tools = opening["tools"]
            opening = prompt.question if opening.get("messages") is None else opening["messages"]
            assert not isinstance(opening, dict)
        if opening is None:
            return prompt
        if tools and not self._data.chat_template:
            raise UserError("the environment has tools, and data.chat_template is false", "set data.chat_template=true")
        if self._data.chat_template:
            messages = [{"role": "user", "content": opening}] if isinstance(opening, str) else list(opening)
            if self._data.system_prompt is not None and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self._data.system_prompt})
            text = self._render(messages, tools)
        elif isinstance(opening, str):
            text = opening
        else:
            raise UserError(
                "the environment opens with chat messages, and data.chat_template is false",
                "set data.chat_template=true, or let reset() return text",
            )
        token_ids = self._tokenizer.encode(text, add_special_tokens=not self._data.chat_template)
        return dataclasses.replace(prompt, text=text, token_ids=token_ids)

    def observation(self, step: Step, last_token: int) -> list[int]:
        """What follows a response whose last token is ``last_token``, up to where the next response begins."""
        before, after = self._frame(step.role)
        if before and before[0] == last_token:
            before = before[1:]
        return before + self._encode(step.observation, split_special_tokens=True) + after

    def _frame(self, role: str) -> tuple[list[int], list[int]]:
        """The tokens before and after an observation of a role."""
        if not self._data.chat_template:
            return (self._encode("\n"),) * 2
        if role not in self._frames:
            messages = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": _RESPONSE},
                {"role": role, "content": _OBSERVATION},
            ]
            _, found, rest = self._render(messages).partition(_RESPONSE)
            before, found_too, after = rest.partition(_OBSERVATION)
            if not found or not found_too:
                raise UserError(
                    f"the chat template leaves out a response that a message of role {role!r} follows",
                    "another chat template is needed for several turns, or data.chat_template=false",
                )
            self._frames[role] = self._encode(before), self._encode(after)
        return self._frames[role]

    def _render(self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None = None) -> str:
        options = {"tools": tools} if tools else {}
        try:
            if tools and not takes_tools(self._tokenizer, self._data, messages, tools):
                raise UserError(
                    "the environment has tools, and the model's chat template takes none",
                    "take a model whose template does, or an environment that writes its tools into its opening",
                )
            return render_chat(self._tokenizer, self._data, messages, add_generation_prompt=True, **options)
        except TemplateRefused as error:
            raise UserError(
                str(error), "an environment may say Step(role='user') where the template has no 'tool'"
            ) from None

    def _encode(self, text: str, **options: Any) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, **options)
