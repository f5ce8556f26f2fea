"""What a client asks for, checked: honoured, ignored as harmless, or refused with the reason.

A parameter that changes what tokens are drawn from is honoured where the trainer can follow it, and refused where it
cannot: the tokens would be trained under probabilities that they never had. Names are those of OpenAI's API reference
(https://platform.openai.com/docs/api-reference); a few of vLLM's are known too.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

MODEL = "policy"
"""The name of the model; harnesses are to ask for it."""
MAX_CHOICES = 128
_HARMLESS = {
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": None,
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "top_k": None,
    "top_logprobs": (0,),
}
"""Parameters with the values that change nothing; any other is refused. None: the run's own value."""
_IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "store",
    "stream_options",
    "user",
}
_SHARED = {"model", "max_tokens", "n", "seed", "stop", "stream", "temperature", "top_p", "logprobs", "return_token_ids"}
_CHAT = {"messages", "tools", "tool_choice", "max_completion_tokens"}
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Model:
    """Whom an address speaks for, in what it says to clients."""

    name: str = MODEL
    what: str = "the policy that is trained"
    limit: str = "rollout.max_prompt_tokens + rollout.max_response_tokens"
    """What bounds a conversation."""
    why_not: str = "the trainer would train on other probabilities than those that tokens were drawn from"
    """Why other parameters are refused."""


POLICY = Model()


class Refused(Exception):
    """A request that is not answered: an HTTP status, OpenAI's error code, the parameter, and what to do."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = {401: "authentication_error", 404: "not_found_error"}.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """What both kinds of requests say."""

    max_tokens: int | None
    n: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """A stream ends with the counts of its tokens."""
    temperature: float | None
    """None: the run's."""
    top_p: float | None
    logprobs: bool
    return_token_ids: bool
    """As vLLM's: the answer holds the ids of prompt and response."""


@dataclass(frozen=True)
class ChatRequest(Request):
    """``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    """As chat templates take them: texts, and arguments of tool calls as objects."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    calls_tools: bool = True
    one_call: bool = False
    """No more than the first call of a response is handed out."""

    @classmethod
    def read(cls, body: Mapping[str, Any], own: Mapping[str, Any], model: Model = POLICY) -> Self:
        """Of the JSON body of a request to a model; ``own`` is its sampling (``top_k``, ``min_p``). Raises Refused."""
        common = _common(body, own, _SHARED | _CHAT, body.get("max_completion_tokens"), model)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused("messages must be a list with at least one message", param="messages")
        tools = body.get("tools") or []
        if not isinstance(tools, list) or not all(isinstance(t, dict) and t.get("type") == "function" for t in tools):
            raise Refused("tools must be a list of functions", param="tools")
        choice = body.get("tool_choice") or "auto"
        if choice not in ("auto", "none"):
            raise Refused(
                "tool_choice can be auto or none: a call that is forced is none of the model's", param="tool_choice"
            )
        logprobs = body.get("logprobs") or False
        return cls(
            **common,
            logprobs=bool(logprobs),
            messages=[_message(message, place) for place, message in enumerate(messages)],
            tools=[] if choice == "none" else tools,
            calls_tools=bool(tools) and choice == "auto",
            one_call=body.get("parallel_tool_calls") is False,
        )


@dataclass(frozen=True)
class CompletionRequest(Request):
    """``/v1/completions``: one prompt, as text or as token ids."""

    prompt: str | list[int] = ""

    @classmethod
    def read(cls, body: Mapping[str, Any], own: Mapping[str, Any], model: Model = POLICY) -> Self:
        """As ``ChatRequest.read``. Raises Refused."""
        common = _common(body, own, _SHARED | {"prompt"}, None, model)
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            [prompt] = prompt
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and prompt and all(isinstance(item, int) and item >= 0 for item in prompt)
        ):
            raise Refused("prompt must be one text or one list of token ids", param="prompt")
        logprobs = body.get("logprobs")
        if logprobs not in (None, False, 0, 1, True):
            raise Refused("logprobs can be 0 or 1: those of the tokens that were sampled", param="logprobs")
        return cls(**common, logprobs=logprobs is not None and logprobs is not False, prompt=prompt)


def _common(
    body: Mapping[str, Any], own: Mapping[str, Any], known: set[str], max_completion_tokens: Any, model: Model
) -> dict[str, Any]:
    if (asked := body.get("model")) != model.name:
        raise Refused(
            f"there is no model {asked!r:.100} here: ask for {model.name!r}, {model.what}",
            404,
            "model_not_found",
            "model",
        )
    for name, value in body.items():
        if value is None or name in known or name in _IGNORED:
            continue
        if name not in _HARMLESS:
            raise Refused(f"{name} is not known here, and might change what is sampled: leave it out", param=name)
        harmless = _HARMLESS[name]
        if value not in (harmless if harmless is not None else (own[name],)):
            raise Refused(f"{name}={json.dumps(value):.100} is refused: {model.why_not}", param=name)
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise Refused("stop must be a text or a list of texts", param="stop")
    options = body.get("stream_options") or {}
    return {
        "max_tokens": _number(body, "max_tokens" if max_completion_tokens is None else "max_completion_tokens", int, 1),
        "n": _number(body, "n", int, 1, MAX_CHOICES) or 1,
        "seed": _number(body, "seed", int),
        "stop": tuple(stop),
        "stream": bool(body.get("stream")),
        "include_usage": bool(isinstance(options, dict) and options.get("include_usage")),
        "temperature": _number(body, "temperature", float, 0, 2),
        "top_p": _number(body, "top_p", float, 0, 1),
        "return_token_ids": bool(body.get("return_token_ids")),
    }


def _number(body: Mapping[str, Any], name: str, kind: type, low: float | None = None, high: float | None = None) -> Any:
    value = body.get(name)
    if value is None:
        return None
    wanted = int if kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise Refused(f"{name} must be a number", param=name)
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise Refused(f"{name}={value} is out of range", param=name)
    return kind(value)


def _message(message: Any, place: int) -> dict[str, Any]:
    """A message as chat templates take it. Raises Refused."""
    where = f"messages[{place}]"
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise Refused(f"{where} has no role of {', '.join(_ROLES)}", param="messages")
    role = "system" if message["role"] == "developer" else message["role"]
    result: dict[str, Any] = {"role": role, "content": _text(message.get("content"), where)}
    if calls := message.get("tool_calls"):
        result["tool_calls"] = [_tool_call(call, where) for call in calls]
    for name in ("tool_call_id", "name"):
        if isinstance(message.get(name), str):
            result[name] = message[name]
    return result


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise Refused(f"{where}: the content must be text", param="messages")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(f"{where}: a tool call has no function with a name", param="messages")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # else it is text of the client's own, which the template writes
            arguments = json.loads(arguments)
    return {
        "id": call.get("id", ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
