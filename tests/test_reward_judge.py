"""The language-model judge, against a real HTTP server that speaks the chat API, in good and in bad days."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.rewards import RewardError, RewardPool
from forge_hpc.rewards.judge import read_score

KEY = "sk-very-secret-key"
Reply = tuple[int, dict[str, str], bytes]


def says(text: str | None) -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def fails(status: int, body: str = '{"error": {"message": "no"}}') -> Reply:
    return status, {"Content-Type": "application/json", "retry-after-ms": "1"}, body.encode()


class Server:
    """Counts its requests and answers each as ``reply`` says; the one that checks the judge gets `Score: 1`."""

    def __init__(self, port: int = 0) -> None:
        self.is_well = True
        """Whether it answers the request that looks whether it is there."""
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: says("Score: 0.5")
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append({**body, "path": self.path})
                    server.keys.add(self.headers["Authorization"])
                checks = body["messages"][0]["content"].startswith("Reply with the line")
                status, headers, data = says("Score: 1") if checks and server.is_well else server.reply(body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that gave up
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started = Server()
    yield started
    started.stop()


def judge(server: Server, timeout_s: float | None = None, **args: Any) -> RewardConfig:
    return RewardConfig("llm_judge", timeout_s=timeout_s, args={"model": "judge", "base_url": server.url, **args})


def ask(reward: RewardConfig, num_calls: int = 1, before: Callable[[], None] = lambda: None) -> list[Any]:
    """What as many calls at once give; `before` runs after the start."""

    async def main() -> list[Any]:
        async with asyncio.timeout(60), RewardPool(Config(reward=[reward])) as pool:
            before()
            prompt, completion = (
                Prompt(0, "2+2=", [1], "4", {"topic": "sums"}),
                Completion(0, "It is 4.", [1], [0], "", (0, 0)),
            )
            results = await asyncio.gather(
                *(pool.score(prompt, completion) for _ in range(num_calls)), return_exceptions=True
            )
            return [result[0] if isinstance(result, tuple) else result for result in results]

    return asyncio.run(main())


def failure(reward: RewardConfig, **options: Any) -> RewardError:
    [error] = ask(reward, **options)
    assert isinstance(error, RewardError), error
    return error


def test_the_judges_score_is_the_reward(server: Server):
    server.reply = lambda body: says("It is right.\nScore: 7")
    template = "{topic}: {prompt} {target} {response} {{}}"
    assert ask(judge(server, max_score=10, template=template, options={"max_tokens": 9})) == [0.7]
    check, request = server.requests
    assert request["messages"] == [{"role": "user", "content": "sums: 2+2= 4 It is 4. {}"}]
    assert (request["model"], request["max_tokens"], request["path"]) == ("judge", 9, "/v1/chat/completions")
    assert check["model"] == "judge"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 0.25", 0.25),
        ("Score: 0 at first, but no.\n**Score:** 1", 1.0),
        ('{"score": 0.5}', 0.5),
        ("score = .5", 0.5),
        (" 1 ", 1.0),
        ("Score: 1.5", None),
        ("Score: -0.5", None),
        ("Score: nan", None),
        ("A fine answer, 1 of 2.", None),
        ("", None),
    ],
)
def test_a_score_is_read_or_refused(reply: str, score: float | None):
    if score is None:
        with pytest.raises(ValueError, match="score"):
            read_score(reply)
    else:
        assert read_score(reply) == score


def test_64_requests_are_open_at_once_and_no_more(server: Server):
    """Each answer waits until 64 requests have come: fewer at once would never end."""
    open_now, most, lock, full = 0, 0, threading.Lock(), threading.Barrier(64, timeout=30)

    def reply(body: dict[str, Any]) -> Reply:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        full.wait()
        with lock:
            open_now -= 1
        return says("Score: 1")

    server.reply = reply
    assert ask(judge(server), num_calls=128) == [1.0] * 128
    assert most == 64


def test_a_judge_that_is_down_is_told_at_the_start(server: Server):
    server.stop()
    with pytest.raises(UserError, match=r"127.0.0.1:.* does not answer for the model 'judge'.*Connection error"):
        ask(judge(server, max_retries=0))


def test_a_judge_that_stays_away_fails_its_calls_and_is_named(server: Server):
    errors = ask(judge(server, max_retries=1, patience_s=1.0), num_calls=5, before=server.stop)
    assert all(isinstance(error, RewardError) and error.kind == "raised" for error in errors)
    for error in errors:
        assert re.search(rf"the judge at {server.url}: .*Connection error.*; it has been away for \d+ s", str(error))


@pytest.mark.parametrize("how", ["refused", "5xx", "silent"])
def test_a_judge_that_comes_back_is_waited_for(server: Server, capfd: pytest.CaptureFixture[str], how: str):
    """Many calls at once, more than may be open: none is lost, and one warning is given."""
    port, free, restarted = server.http.server_port, threading.Event(), []

    def go_down() -> None:
        if how == "refused":
            server.stop()
        else:
            server.is_well = False
            server.reply = lambda body: (free.wait(60) and None) or fails(503)

    def come_back() -> None:
        if how == "refused":
            restarted.append(Server(port))
        else:
            server.reply, server.is_well = (lambda body: says("Score: 0.5")), True
            free.set()

    if how == "5xx":
        free.set()
    timer = threading.Timer(3.0, come_back)

    def before() -> None:
        go_down()
        timer.start()

    try:
        reward = judge(server, max_retries=0, request_timeout_s=1.0)
        reward.concurrency = 4
        assert ask(reward, num_calls=12, before=before) == [0.5] * 12
    finally:
        timer.join()
        free.set()
        for other in restarted:
            other.stop()
    said = capfd.readouterr().err
    assert said.count("calls wait for it, for up to 600 s") == 1
    assert said.count(f"the judge at {server.url} is back") == 1


def test_a_request_that_the_judge_cannot_take_costs_its_call_alone(server: Server):
    server.reply = lambda body: fails(500)
    error = failure(judge(server, max_retries=1))
    assert error.kind == "raised" and "InternalServerError" in str(error) and "away" not in str(error)
    assert len(server.requests) == 1 + 2 + 1  # the check, two tries, and whether it is there


def test_a_slow_judge_times_out(server: Server):
    free = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        free.wait(60)
        return says("Score: 1")

    server.reply = reply
    try:
        assert failure(judge(server, request_timeout_s=0.5, max_retries=0)).kind == "timeout"
        error = failure(judge(server, timeout_s=0.5))
        assert error.kind == "timeout" and "took longer than 0.5 s" in str(error)
    finally:
        free.set()


def test_rate_limits_and_broken_servers_are_tried_again(server: Server):
    statuses = [429, 500]
    server.reply = lambda body: fails(statuses.pop()) if statuses else says("Score: 1")
    assert ask(judge(server, max_retries=2)) == [1.0]
    assert len(server.requests) == 4  # the check, two failures and the answer


def test_what_is_no_score_is_an_error(server: Server):
    replies = {
        "InternalServerError": fails(500),
        "RateLimitError": fails(429),
        "JSONDecodeError": fails(200, "no json"),
        "no chat completion: ChatCompletion(": fails(200, '{"choices": []}'),
        "the judge gave no score: 'I would rather not.'": says("I would rather not."),
        "the judge gave no score: ''": says(None),
    }
    waiting = list(replies.values())
    server.reply = lambda body: waiting.pop()
    errors = ask(judge(server, max_retries=0), num_calls=len(replies))
    assert all(isinstance(error, RewardError) and error.kind == "raised" for error in errors)
    for words in replies:
        assert any(words in str(error) for error in errors), (words, errors)


def test_the_key_comes_from_the_environment_and_is_never_told(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.reply = lambda body: fails(401, json.dumps({"error": {"message": f"Bearer {KEY} is not known here"}}))
    with caplog.at_level(logging.DEBUG):
        error = failure(judge(server, api_key_env="JUDGE_KEY"))
    assert server.keys == {f"Bearer {KEY}"}
    assert "Bearer *** is not known here" in str(error)
    assert KEY not in caplog.text and KEY not in "".join(capfd.readouterr())


def test_a_judge_is_made_only_where_its_arguments_can_be_right(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    for args, words in (
        ({"api_key_env": "JUDGE_KEY"}, "JUDGE_KEY is not set"),
        ({"base_url": "http://me:pass@host/v1"}, "base_url holds a password"),
        ({"template": "{prompt"}, "template"),
    ):
        with pytest.raises(UserError, match=words) as error:
            ask(judge(server, **args))
        assert error.value.hint and "pass@" not in error.value.message
