"""The answer to one request: sampled, recorded in its episode, and told as OpenAI's clients read it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from forge_hpc.config import Config
from forge_hpc.data.tool_calls import BadToolCall, ToolFormat
from forge_hpc.data.types import Completion, Turn
from forge_hpc.endpoint.conversations import Sampled
from forge_hpc.endpoint.episode import EndpointEpisode
from forge_hpc.endpoint.requests import POLICY, ChatRequest, Model, Refused, Request
from forge_hpc.endpoint.sampler import Sampler
from forge_hpc.endpoint.text import TextStream, cut

_LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclass
class Serving:
    """What all answers of an endpoint share."""

    config: Config
    tokenizer: Any
    sampler: Sampler
    tools: ToolFormat | None
    max_tokens: int
    """Of a conversation, responses included."""
    model: Model = POLICY
    cache: str = field(default_factory=lambda: secrets.token_hex(8))
    """Requests of one prompt share a prefix cache by this name, and the prompt's position."""
    counts: Counter[str] = field(default_factory=Counter)
    """By metric, since they were asked for last."""
    _texts: dict[int, str] = field(default_factory=dict)

    def text_of(self, token_id: int) -> str:
        """Of a token by itself, decoded once."""
        if (text := self._texts.get(token_id)) is None:
            text = self._texts[token_id] = self.tokenizer.decode([token_id])
        return text


class Answer:
    """One request, from its tokens to what the client reads."""

    def __init__(
        self,
        serving: Serving,
        request: web.Request,
        episode: EndpointEpisode,
        asked: Request,
        context: list[int],
        parent: Sampled | None,
        num_own: int,
        said: list[dict[str, Any]],
    ) -> None:
        self._serving, self._request, self._episode, self._asked = serving, request, episode, asked
        self._context, self._parent, self._num_own, self._said = context, parent, num_own, said
        self._chat = asked if isinstance(asked, ChatRequest) else None
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._turns = self._make_turns()
        sampling = episode.sampling
        wanted: dict[str, Any] = {}
        if episode.obeys and asked.temperature is not None:  # vLLM takes what is below 0.01 for 0.01
            wanted["temperature"] = max(asked.temperature, 0.01) if asked.temperature else 0.0
        if episode.obeys and asked.top_p is not None:
            wanted["top_p"] = max(asked.top_p, 0.01)
        self._sampling = replace(sampling, **wanted, stop=[*sampling.stop, *asked.stop])
        self._is_trained = all(getattr(sampling, name) == value for name, value in wanted.items())
        self._seed = episode.seed
        if asked.seed is not None:
            self._seed = int.from_bytes(
                hashlib.blake2b(f"{episode.seed}/{asked.seed}".encode(), digest_size=7).digest()
            )

    def _make_turns(self) -> list[Turn]:
        """A turn for each choice. Raises Refused where there is no room, or there have been enough."""
        asked, episode, config = self._asked, self._episode, self._serving.config
        most, limits = self._serving.max_tokens, config.environment
        if asked.max_tokens is not None and asked.max_tokens > most:
            raise Refused(
                f"max_tokens={asked.max_tokens} is more than the {most} tokens of {self._serving.model.limit}",
                code="context_length_exceeded",
                param="max_tokens",
            )
        room = most - len(self._context)
        if room < 1:
            episode.limit = "tokens"
            raise Refused(
                f"the conversation has {len(self._context)} tokens and leaves no room for a response: there are {most} "
                f"({self._serving.model.limit})",
                code="context_length_exceeded",
                param="messages" if self._chat else "prompt",
            )
        if not self._context:
            raise Refused("the prompt is empty", param="prompt")
        if episode.num_turns + asked.n > limits.max_turns:
            episode.limit = "turns"
            raise Refused(
                f"the episode has had its environment.max_turns={limits.max_turns} responses", 403, "max_turns"
            )
        max_tokens = min(room, asked.max_tokens or room, limits.max_turn_tokens or room)
        # A client that names a seed gets the same for the same request.
        first = episode.num_turns if asked.seed is None else 0
        episode.num_turns += asked.n
        place, num_routed = (episode.prompt.position, episode.sample_index), max(0, self._num_own - 1)
        return [Turn(*place, first + i, self._context, max_tokens, num_routed) for i in range(asked.n)]

    async def send(self) -> web.StreamResponse:
        share = f"{self._serving.cache}-{self._episode.prompt.position}"
        if self._asked.stream:
            return await self._send_stream(share)
        answers = await self._serving.sampler.respond(self._turns, self._sampling, self._seed, share, self._id)
        completions = [self._checked(answer) for answer in answers]
        choices = [self._choice(index, completion) for index, completion in enumerate(completions)]
        added = [sampled for _, sampled in choices]
        body = self._head(completions[0]) | {
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [choice for choice, _ in choices],
            "usage": self._usage(completions),
        }
        if self._asked.return_token_ids:
            body["prompt_token_ids"] = self._context
        response = web.json_response(body)
        with self._removed_if_lost(added):
            await response.prepare(self._request)
            await response.write_eof()
        return response

    @contextlib.contextmanager
    def _removed_if_lost(self, added: list[Sampled]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for sampled in added:
                self._episode.conversations.remove(sampled)
            raise

    def _checked(self, answer: Completion | ValueError) -> Completion:
        if isinstance(answer, ValueError):
            raise Refused(str(answer))
        if not answer.token_ids:
            raise Refused("the generator gave an empty response")
        return answer

    def _head(self, completion: Completion | None) -> dict[str, Any]:
        head: dict[str, Any] = {"id": self._id, "created": self._created, "model": self._serving.model.name}
        if completion is not None:
            head["system_fingerprint"] = f"{self._serving.model.name}-{completion.policy_versions[1]}"
        return head

    def _usage(self, completions: Sequence[Completion]) -> dict[str, int]:
        num_prompt, num = len(self._context), sum(completion.num_tokens for completion in completions)
        return {"prompt_tokens": num_prompt, "completion_tokens": num, "total_tokens": num_prompt + num}

    def _choice(self, index: int, completion: Completion) -> tuple[dict[str, Any], Sampled]:
        """The choice as the client gets it, which is recorded."""
        text = cut(completion.text, self._asked.stop)
        sampled = Sampled(self._context, completion, self._parent, self._num_own, self._is_trained)
        finish = completion.finish_reason
        conversations = self._episode.conversations
        conversations.add(sampled)
        sampled.said = [*self._said, {"role": "assistant", "content": completion.text}]
        if not self._is_trained:
            self._serving.counts["endpoint/untrained_tokens"] += completion.num_tokens
        choice: dict[str, Any] = {"index": index}
        if self._chat is not None:
            content, calls = self._read_calls(text)
            message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
            if calls:
                message["tool_calls"] = calls
                finish = "tool_calls"
            kept = [
                {"function": {"name": c["function"]["name"], "arguments": json.loads(c["function"]["arguments"])}}
                for c in calls
            ]
            conversations.answers_chat(
                sampled,
                self._chat.messages,
                self._chat.tools,
                {"role": "assistant", "content": content, **({"tool_calls": kept} if kept else {})},
            )
            choice["message"] = message
            choice["logprobs"] = self._chat_logprobs(completion) if self._asked.logprobs else None
        else:
            prompt = getattr(self._asked, "prompt", "")
            if isinstance(prompt, str):
                conversations.answers_text(sampled, prompt, text)
            choice["text"] = text
            choice["logprobs"] = self._text_logprobs(completion) if self._asked.logprobs else None
        if self._asked.return_token_ids:
            choice["token_ids"] = completion.token_ids
        choice["finish_reason"] = finish
        return choice, sampled

    def _read_calls(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """What a response says, and its tool calls. One that does not parse stays text."""
        assert self._chat is not None
        tools = self._serving.tools
        if not self._chat.calls_tools or tools is None:
            return text, []
        try:
            content, calls = tools.read(text)
        except BadToolCall:
            self._serving.counts["endpoint/bad_tool_calls"] += 1
            return text, []
        calls = calls[:1] if self._chat.one_call else calls
        return content, [
            {
                "id": f"call_{secrets.token_hex(8)}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]

    def _pieces(self, completion: Completion) -> Iterator[tuple[str, float]]:
        for token_id, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            yield self._serving.text_of(token_id), logprob if math.isfinite(logprob) else _LEAST_LOGPROB

    def _chat_logprobs(self, completion: Completion) -> dict[str, Any]:
        return {
            "content": [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in self._pieces(completion)
            ],
            "refusal": None,
        }

    def _text_logprobs(self, completion: Completion) -> dict[str, Any]:
        tokens, logprobs = zip(*self._pieces(completion), strict=True)
        offsets, place = [], 0
        for token in tokens:
            offsets.append(place)
            place += len(token)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}

    # ---- streams

    async def _send_stream(self, share: str) -> web.StreamResponse:
        """Server-sent events: a piece of text at a time, a tool call in one, and at last the reason."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        added: list[Sampled] = []
        completions: list[Completion] = []
        with self._removed_if_lost(added), _first_error(response):
            async with asyncio.TaskGroup() as tasks:
                events: asyncio.Queue[tuple[dict[str, Any], Any] | None] = asyncio.Queue()
                choices = [
                    tasks.create_task(self._stream_choice(index, turn, share, events, added, completions))
                    for index, turn in enumerate(self._turns)
                ]
                num_left = len(choices)
                for choice in choices:
                    choice.add_done_callback(lambda _: events.put_nowait(None))
                while num_left:
                    if (event := await events.get()) is None:
                        num_left -= 1
                        continue
                    await self._write(response, *event)
            if self._asked.include_usage:
                await self._write(response, {}, None, self._usage(completions))
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
        return response

    async def _write(
        self,
        response: web.StreamResponse,
        choice: dict[str, Any],
        completion: Completion | None,
        usage: dict[str, int] | None = None,
    ) -> None:
        if not response.prepared:
            await response.prepare(self._request)
        body = self._head(completion) | {
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "choices": [choice] if choice else [],
        }
        if usage is not None:
            body["usage"] = usage
        await response.write(f"data: {json.dumps(body)}\n\n".encode())

    async def _stream_choice(
        self,
        index: int,
        turn: Turn,
        share: str,
        events: asyncio.Queue[Any],
        added: list[Sampled],
        completions: list[Completion],
    ) -> None:
        serving, tools = self._serving, self._serving.tools if self._chat and self._chat.calls_tools else None
        markers = [*self._asked.stop, *([tools.begin] if tools and not tools.at_start else [])]
        text = TextStream(serving.tokenizer, markers, [tools.begin] if tools and tools.at_start else [])
        token_ids: list[int] = []
        stream: AsyncIterator[Any] = serving.sampler.stream(
            turn, self._sampling, self._seed, share, f"{self._id}-{index}"
        )
        async for item in stream:
            completion = None if isinstance(item, tuple) else self._checked(item)
            if self._chat and not token_ids:
                events.put_nowait((self._delta(index, {"role": "assistant", "content": ""}), None))
            if completion is None:
                token_ids.append(item[0])
                if piece := text.add(item[0]):
                    events.put_nowait((self._piece(index, piece), None))
                continue
            if completion.token_ids[: len(token_ids)] != token_ids:
                raise ConnectionResetError("another generator has answered anew, with other tokens than were streamed")
            choice, sampled = self._choice(index, completion)
            added.append(sampled)
            completions.append(completion)
            said = choice["message"]["content"] or "" if self._chat else choice["text"]
            if rest := text.rest(said):
                events.put_nowait((self._piece(index, rest), completion))
            if self._chat and (calls := choice["message"].get("tool_calls")):
                calls = [{"index": place, **call} for place, call in enumerate(calls)]
                events.put_nowait((self._delta(index, {"tool_calls": calls}), completion))
            last = self._piece(index, "") if not self._chat else self._delta(index, {})
            last |= {"finish_reason": choice["finish_reason"], "logprobs": choice["logprobs"]}
            if "token_ids" in choice:
                last["token_ids"] = choice["token_ids"]
            events.put_nowait((last, completion))

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}

    def _piece(self, index: int, text: str) -> dict[str, Any]:
        if self._chat:
            return self._delta(index, {"content": text})
        return {"index": index, "text": text, "finish_reason": None, "logprobs": None}


@contextlib.contextmanager
def _first_error(response: web.StreamResponse) -> Iterator[None]:
    """Of several tasks. Once a stream has begun no other answer can be given: it breaks off."""
    try:
        yield
    except BaseExceptionGroup as errors:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, Refused) and response.prepared:
            raise ConnectionResetError(str(error)) from None
        raise error from None
