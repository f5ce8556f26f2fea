"""The endpoint: an HTTP server in the controller that speaks OpenAI's API, for the agents of a run.

    agent ──/v1/chat/completions──► Endpoint ──turns──► generators ──► response ──► agent
                                        └──► Conversations of its episode ──► documents

Each episode has a key of its own, which is the API key of its requests or a part of their path. What is sampled under
it belongs to the episode; who has no key is refused, and counted. Without configuration only this host reaches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from forge_hpc.config import Config, UserError
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.tool_calls import tool_format
from forge_hpc.data.types import Prompt
from forge_hpc.endpoint.answer import Answer, Serving
from forge_hpc.endpoint.episode import EndpointEpisode
from forge_hpc.endpoint.render import ChatRenderer
from forge_hpc.endpoint.requests import POLICY, ChatRequest, CompletionRequest, Model, Refused
from forge_hpc.endpoint.sampler import Sampler
from forge_hpc.wire.tls import Certificates

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 64 << 20
COUNTS = (
    "endpoint/requests",
    "endpoint/refused",
    "endpoint/strangers",
    "endpoint/hung_up",
    "endpoint/bad_tool_calls",
    "endpoint/untrained_tokens",
)


class Endpoint:
    """Serves from ``start`` to ``close``.

    Example:
        endpoint = await Endpoint(config, tokenizer, GeneratorSampler(generators)).start()
        with endpoint.open(prompt, 0) as episode:
            ...  # an agent asks endpoint.base_url, with episode.key
            episode.conversations.branches(0)
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        sampler: Sampler,
        warn: Callable[[str], None] = logger.warning,
        tls: ssl.SSLContext | None = None,
        ca: Path | None = None,
        model: Model = POLICY,
    ) -> None:
        """``tls`` is what it serves with where it is not on loopback, and ``ca`` what a client verifies that with;
        ``model`` is whom it speaks for."""
        self._config, self._tokenizer, self._warn = config, tokenizer, warn
        self._renderer = ChatRenderer(tokenizer, config.data)
        tools = tool_format(tokenizer.chat_template if self._renderer.has_template else None)
        most = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        self._serving = Serving(config, tokenizer, sampler, tools, most, model)
        self._secret = secrets.token_bytes(32)
        self._episodes: dict[str, EndpointEpisode] = {}
        self._warned: set[str] = set()
        self._runner: web.AppRunner | None = None
        self._tls = tls
        self.ca = ca
        self.base_url = ""
        """For clients: up to the version, ``http://127.0.0.1:4711/v1``."""

    # ---- for the run

    async def start(self) -> Endpoint:
        """Listen on a port that the kernel picks. Raises UserError where the address cannot be had."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        for prefix in ("", "/episode/{key}"):
            app.router.add_post(f"{prefix}/v1/chat/completions", self._answering(self._chat))
            app.router.add_post(f"{prefix}/v1/completions", self._answering(self._complete))
            app.router.add_get(f"{prefix}/v1/models", self._answering(self._models))
        app.router.add_route("*", "/{rest:.*}", self._answering(self._nothing))
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        host = self._config.environment.endpoint_host
        try:
            await web.TCPSite(self._runner, host, 0, ssl_context=self._tls).start()
        except OSError as error:
            await self._runner.cleanup()
            raise UserError(
                f"the endpoint for agents cannot listen on environment.endpoint_host={host}: {error.strerror or error}",
                "name an address of the first node, or leave it out: 127.0.0.1",
            ) from None
        port = self._runner.addresses[0][1]
        is_any = host in ("0.0.0.0", "::")
        name = socket.gethostname() if is_any else f"[{host}]" if ":" in host else host
        self.base_url = f"{'https' if self._tls is not None else 'http'}://{name}:{port}/v1"
        return self

    async def close(self) -> None:
        """End all requests, and listen no more."""
        for episode in self._episodes.values():
            episode.close()
        if self._runner is not None:
            await self._runner.cleanup()

    @contextlib.contextmanager
    def open(
        self, prompt: Prompt, sample_index: int, sampling: SamplingConfig | None = None, seed: int | None = None
    ) -> Iterator[EndpointEpisode]:
        """An episode, whose key holds until the end of the body. With ``sampling`` (an evaluation's) requests
        cannot say how they are sampled."""
        name = secrets.token_urlsafe(9)
        episode = EndpointEpisode(
            f"{name}.{self._signature(name)}",
            prompt,
            sample_index,
            sampling or self._config.rollout.sampling,
            self._config.seed if seed is None else seed,
            sampling is None,
        )
        self._episodes[name] = episode
        try:
            yield episode
        finally:
            del self._episodes[name]
            episode.close()

    def metrics(self) -> dict[str, float]:
        """What has happened since the last call."""
        counts, self._serving.counts = self._serving.counts, Counter()
        return {key: float(counts[key]) for key in COUNTS}

    # ---- requests

    def _signature(self, name: str) -> str:
        return hmac.new(self._secret, name.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def _episode(self, request: web.Request) -> EndpointEpisode:
        """Of the key in the path or in the header. Raises Refused."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        key = request.match_info.get("key") or (token.strip() if scheme.lower() == "bearer" else "")
        name, _, signature = key.partition(".")
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), self._signature(name).encode()):
            self._serving.counts["endpoint/strangers"] += 1
            raise Refused(
                "no key of an episode: the API key that the agent was given belongs here", 401, "invalid_api_key"
            )
        if (episode := self._episodes.get(name)) is None:
            raise Refused("the episode of this key has ended", 403, "episode_ended")
        return episode

    def _answering(
        self, answer: Callable[[web.Request, EndpointEpisode], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            episode = None
            try:
                episode = self._episode(request)
                self._serving.counts["endpoint/requests"] += 1
                with episode.request():
                    return await answer(request, episode)
            except Refused as refusal:
                if episode is not None:
                    self._serving.counts["endpoint/refused"] += 1
                    self._warn_once(
                        f"refused {refusal.code or refusal.param}",
                        f"a request to {self._serving.model.name} was refused: {refusal}",
                    )
                return web.json_response(refusal.body(), status=refusal.status)
            except (ConnectionResetError, asyncio.CancelledError) as error:
                if episode is not None and not episode.is_closed:
                    self._serving.counts["endpoint/hung_up"] += 1
                if isinstance(error, asyncio.CancelledError):
                    raise
                if request.transport is not None:
                    request.transport.close()
                return web.Response(status=499)  # which nobody reads
            except Exception as error:
                if episode is None or isinstance(error, web.HTTPException):
                    raise
                if not episode.failure.done():
                    episode.failure.set_result(error)
                logger.exception("a request of prompt %d failed", episode.prompt.position)
                message = {"message": "the run has failed", "type": "server_error", "param": None, "code": None}
                return web.json_response({"error": message}, status=500)

        return handle

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(message)

    async def _nothing(self, request: web.Request, episode: EndpointEpisode) -> web.StreamResponse:
        raise Refused(f"there is no {request.method} {request.path.replace(episode.key, 'KEY')} here", 404)

    async def _models(self, request: web.Request, episode: EndpointEpisode) -> web.StreamResponse:
        model = {
            "id": self._serving.model.name,
            "object": "model",
            "created": 0,
            "owned_by": "forge_hpc",
            "max_model_len": self._serving.max_tokens,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def _body(self, request: web.Request) -> dict[str, Any]:
        try:
            body = await request.json()
        except (ValueError, web.HTTPRequestEntityTooLarge) as error:
            raise Refused(f"the body is no JSON that can be read: {error}") from None
        if not isinstance(body, dict):
            raise Refused("the body must be an object")
        return body

    async def _chat(self, request: web.Request, episode: EndpointEpisode) -> web.StreamResponse:
        asked = ChatRequest.read(await self._body(request), _own(episode.sampling), self._serving.model)
        parent, num = episode.conversations.find_chat(asked.messages, asked.tools)
        if parent is None:
            context, num_own = self._renderer.opening(asked.messages, asked.tools), 0
        else:
            before = parent.context + parent.completion.token_ids
            rest = asked.messages[num:]
            context, num_own = before + self._renderer.following(rest, asked.tools, before[-1]), len(before)
        said = [{"role": m["role"], "content": _shown(m)} for m in asked.messages[num:]] if parent is not None else []
        return await Answer(self._serving, request, episode, asked, context, parent, num_own, said).send()

    async def _complete(self, request: web.Request, episode: EndpointEpisode) -> web.StreamResponse:
        asked = CompletionRequest.read(await self._body(request), _own(episode.sampling), self._serving.model)
        parent, num = episode.conversations.find_text(asked.prompt)
        rest = asked.prompt[num:]
        if parent is not None:
            before = parent.context + parent.completion.token_ids
            more = rest if isinstance(rest, list) else self._renderer.more_text(rest) if rest else []
            context, num_own = before + more, len(before)
        else:
            context, num_own = rest if isinstance(rest, list) else self._renderer.text(rest), 0
        shown = rest if isinstance(rest, str) else self._tokenizer.decode(rest)
        said = [{"role": "user", "content": shown}] if parent is not None and shown else []
        return await Answer(self._serving, request, episode, asked, context, parent, num_own, said).send()


def _own(sampling: SamplingConfig) -> dict[str, Any]:
    return {"top_k": sampling.top_k, "min_p": sampling.min_p}


def _shown(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps([call["function"] for call in calls]) if calls else "")


def tls_context(host: str) -> tuple[ssl.SSLContext, Path] | tuple[None, None]:
    """What to serve with on an address, and what clients verify that with: the job's certificate, on loopback nothing.

    Raises UserError where there is none.
    """
    if is_loopback(host):
        return None, None
    if (certificates := Certificates.from_environment()) is None:
        raise UserError(
            f"environment.endpoint_host={host}: the job has no certificates here", "leave it out: 127.0.0.1"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificates.cert, certificates.key)
    return context, certificates.ca


def is_loopback(host: str) -> bool:
    """Whether only this host reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
