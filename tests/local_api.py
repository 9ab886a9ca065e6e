# /// script
# requires-python = ">=3.10"
# dependencies = ["aiohttp"]
# ///
"""A stand-in for inference.net's Asynchronous API on this machine, to run the examples against.

    uv run tests/local_api.py async_polling_example.py
    uv run tests/local_api.py --flaky async_group_example.py

Given a command it runs it, with the environment that leads it here, and ends with its exit
code; a script (x.py) is run with uv run. Without one it serves until Ctrl-C. No model answers:
the sample questions have set answers, any other question is echoed. At the end it presents the
bill on stderr: what it accepted, what of that was answered, and what it was made to make twice.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from aiohttp import web

Json = dict[str, Any]
Proceed = Callable[[], Awaitable[web.StreamResponse]]
Fault = Callable[[web.Request, Proceed], Awaitable[web.StreamResponse]]

API_KEY = "local-stand-in-key-0000"
MAX_GROUP_SIZE = 50
ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is 2 + 2?": "2 + 2 equals 4.",
    "Name one planet in our solar system.": "Mars is a planet in our solar system.",
    "What color is the sky on a clear day?": "On a clear day the sky is blue.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "What is the chemical symbol for water?": "The chemical symbol for water is H2O.",
    "Which ocean is the largest?": "The Pacific Ocean is the largest.",
    "How many days are in a leap year?": "A leap year has 366 days.",
    "What do bees make?": "Bees make honey.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
}
CHAT_KEYS = {
    *("model", "messages", "max_tokens", "metadata", "temperature", "top_p", "n", "stop", "seed"),
    *("frequency_penalty", "presence_penalty", "response_format", "tools", "tool_choice"),
    *("logprobs", "top_logprobs", "stream", "max_completion_tokens", "webhook_id"),
}


class BadRequestError(Exception):
    """What the service would answer with 400 and this message."""


@dataclass
class Generation:
    """A request that was accepted, and when it is dispatched and finished."""

    request: Json
    dispatched: datetime
    finished: datetime
    is_listed_late: bool
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16)[:21])
    was_answered: bool = False

    @property
    def custom_id(self) -> str | None:
        """The id that the client gave the request."""
        return (self.request.get("metadata") or {}).get("custom_id")

    def as_json(self) -> Json:
        """The generation as the API would show it now."""
        now = datetime.now(timezone.utc)
        question = self.request["messages"][-1]["content"]
        answer = ANSWERS.get(question, f"You asked: {question}")
        usage = {"prompt_tokens": 8 + len(question) // 4, "completion_tokens": len(answer) // 4}
        usage["total_tokens"] = sum(usage.values())
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer},
            "finish_reason": "stop",
        }
        is_done, is_running = now >= self.finished, now >= self.dispatched
        return {
            "id": self.id,
            "state": "Success" if is_done else "In Progress" if is_running else "Queued",
            "stateMessage": None,
            "request": self.request,
            "response": {"choices": [choice], "usage": usage} if is_done else None,
            "dispatchedAt": show_time(self.dispatched) if is_running else None,
            "finishedAt": show_time(self.finished) if is_done else None,
        }


def show_time(moment: datetime) -> str:
    """Return a time as the API writes it."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """Return an error as the API words it."""
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


class LocalApi:
    """The stand-in: its state, its endpoints, and what tests and --flaky make it do wrong.

    As a context manager it serves from a thread of its own. seconds is how long a generation
    takes, at least and at most. delay_seconds is added to every exchange, and
    connect_seconds to the first one of a connection.
    """

    def __init__(
        self,
        seconds: tuple[float, float] = (1, 4),
        tls: ssl.SSLContext | None = None,
        delay_seconds: float = 0,
        connect_seconds: float = 0,
    ) -> None:
        self.seconds = seconds
        self.tls = tls
        self.delay_seconds = delay_seconds
        self.connect_seconds = connect_seconds
        self.generations: dict[str, Generation] = {}
        self.groups: dict[str, list[Generation]] = {}
        self.exchanges: list[tuple[str, str]] = []
        self.connections: set[Any] = set()
        self.headers_seen: list[dict[str, str]] = []
        self.choose_fault: Callable[[web.Request, Json], Fault | None] = lambda request, body: None
        self.alter: Callable[[Json], Any] = lambda generation: generation
        self.alter_list: Callable[[list[Any]], Any] = lambda generations: generations
        self.new_runs = 0  # counted by the tests: how often a custom id may be made anew
        self.port = 0

    @property
    def url(self) -> str:
        """What INFERENCE_BASE_URL is to be."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/v1"

    @property
    def environment(self) -> dict[str, str]:
        """What leads a script here."""
        return {
            "INFERENCE_BASE_URL": self.url,
            "INFERENCE_API_KEY": API_KEY,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def made_again(self) -> int:
        """How many generations were made for a custom id that had one already."""
        made = Counter(generation.custom_id for generation in self.generations.values())
        return sum(count - 1 for count in made.values())

    def bill(self) -> str:
        """What was accepted, answered, and made twice."""
        answered = sum(generation.was_answered for generation in self.generations.values())
        return (
            f"accepted {len(self.generations)} generations, answered {answered}, "
            f"made {self.made_again()} twice for the same custom id"
        )

    # Endpoints

    def accept(self, request: Any, position: int = 0) -> Generation:
        """Check a chat completion request and take it."""
        if not isinstance(request, dict):
            raise BadRequestError(f"requests[{position}] must be an object")
        unknown = request.keys() - CHAT_KEYS
        if unknown:
            raise BadRequestError(f"unknown keys: {', '.join(sorted(unknown))}")
        messages, metadata = request.get("messages"), request.get("metadata", {})
        if not isinstance(request.get("model"), str) or not request["model"]:
            raise BadRequestError("model must be a text")
        if not isinstance(messages, list) or not messages:
            raise BadRequestError("messages must be a list that is not empty")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise BadRequestError("a message must have a role and a content")
        if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
            raise BadRequestError("metadata must hold texts")
        if not isinstance(request.get("max_tokens", 1), int) or request.get("max_tokens", 1) < 1:
            raise BadRequestError("max_tokens must be a whole number above 0")
        seconds = random.uniform(*self.seconds)
        now = datetime.now(timezone.utc)
        return Generation(
            request,
            dispatched=now + timedelta(seconds=seconds * 0.4),
            finished=now + timedelta(seconds=seconds),
            is_listed_late=position % 2 == 1,
        )

    async def submit(self, request: web.Request) -> web.Response:
        """POST /v1/async/chat/completions."""
        generation = self.accept(await request.json())
        self.generations[generation.id] = generation
        return web.json_response({"id": generation.id})

    async def submit_group(self, request: web.Request) -> web.Response:
        """POST /v1/async/group/chat/completions."""
        body = await request.json()
        unknown = body.keys() - {"requests", "webhook_id"}
        if unknown:
            raise BadRequestError(f"unknown keys: {', '.join(sorted(unknown))}")
        requests = body.get("requests")
        if not isinstance(requests, list) or not 1 <= len(requests) <= MAX_GROUP_SIZE:
            raise BadRequestError(f"requests must hold 1 to {MAX_GROUP_SIZE} requests")
        members = [self.accept(member, position) for position, member in enumerate(requests)]
        self.generations |= {generation.id: generation for generation in members}
        group_id = secrets.token_urlsafe(16)[:21]
        self.groups[group_id] = members
        return web.json_response({"groupId": group_id, "groupSize": len(members)})

    def show(self, generation: Generation) -> Any:
        """Return a generation as it is now, or as a test alters it."""
        shown = generation.as_json()
        generation.was_answered |= shown["state"] in ("Success", "Failed")
        return self.alter(shown)

    async def fetch(self, request: web.Request) -> web.Response:
        """GET /v1/generation/{id}."""
        generation = self.generations.get(request.match_info["id"])
        if generation is None:
            return problem(404, "no such generation")
        return web.json_response(self.show(generation))

    async def fetch_group(self, request: web.Request) -> web.Response:
        """GET /v1/async/group/{id}/generations."""
        members = self.groups.get(request.match_info["id"])
        if members is None:
            return problem(404, "no such group")
        now = datetime.now(timezone.utc)
        listed = [each for each in members if now >= each.finished or not each.is_listed_late]
        shown = [self.show(generation) for generation in random.sample(listed, len(listed))]
        return web.json_response({"generations": self.alter_list(shown)})

    # Serving

    @web.middleware
    async def serve_one(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Answer one request: its delay, its fault, its key, its endpoint."""
        is_new = request.transport is not None and request.transport not in self.connections
        self.connections.add(request.transport)
        self.exchanges.append((request.method, request.path))
        self.headers_seen.append(dict(request.headers))
        await asyncio.sleep(self.delay_seconds + (self.connect_seconds if is_new else 0))
        body = await request.json() if request.method == "POST" else {}

        async def proceed() -> web.StreamResponse:
            if request.headers.get("Authorization") != f"Bearer {API_KEY}":
                return problem(401, "this key is not valid")
            try:
                return await handler(request)
            except BadRequestError as error:
                return problem(400, str(error))

        fault = self.choose_fault(request, body)
        return await fault(request, proceed) if fault else await proceed()

    async def start(self) -> web.AppRunner:
        """Start to serve on a free port of the loopback interface."""
        app = web.Application(middlewares=[self.serve_one], client_max_size=2**26)
        app.router.add_post("/v1/async/chat/completions", self.submit)
        app.router.add_post("/v1/async/group/chat/completions", self.submit_group)
        app.router.add_get("/v1/generation/{id}", self.fetch)
        app.router.add_get("/v1/async/group/{id}/generations", self.fetch_group)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self.tls)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    def __enter__(self) -> "LocalApi":
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.runner = asyncio.run_coroutine_threadsafe(self.start(), self.loop).result()
        return self

    async def stop(self) -> None:
        """End what is being served, stalled answers included."""
        await self.runner.cleanup()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


# Faults: what may come in place of a proper answer


def status(code: int, message: str = "out of order", **headers: str) -> Fault:
    """Answer with an HTTP status and headers (Retry_After is Retry-After), nothing carried out."""

    async def fault(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        return problem(code, message, {name.replace("_", "-"): headers[name] for name in headers})

    return fault


def body(content: bytes, content_type: str = "application/json", code: int = 200) -> Fault:
    """Answer with these bytes, nothing carried out."""

    async def fault(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        return web.Response(body=content, status=code, content_type=content_type)

    return fault


def after(fault: Fault) -> Fault:
    """Carry the request out, and then do as fault does: the answer is lost, the work is not."""

    async def carried_out(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        await proceed()
        return await fault(request, proceed)

    return carried_out


async def reset(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Reset the connection."""
    transport = request.transport
    assert transport is not None
    connection: socket.socket = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    return web.Response()


async def close(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Close the connection without an answer."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def cut(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Begin an answer, and close the connection half way."""
    answer = web.StreamResponse(headers={"Content-Length": "1000"})
    await answer.prepare(request)
    await answer.write(b'{"id": "')
    return await close(request, proceed)


async def cut_redirect(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Begin a redirect, and close the connection half way."""
    headers = {"Location": "/v1/elsewhere", "Content-Length": "1000"}
    answer = web.StreamResponse(status=307, headers=headers)
    await answer.prepare(request)
    await answer.write(b"moved")
    return await close(request, proceed)


async def hint(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Answer with 103 Early Hints, and properly when the next request may have been sent."""
    assert isinstance(request.transport, asyncio.Transport)
    answer = await proceed()
    request.transport.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
    await asyncio.sleep(0.3)
    return answer


async def stall(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Take the request, and never answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def drip(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Answer a space at a time, so that no read ever times out."""
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(b" ")
        await asyncio.sleep(0.1)


async def drip_with_length(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Answer a space at a time, and announce how many there will be."""
    answer = web.StreamResponse(headers={"Content-Length": "100000"})
    await answer.prepare(request)
    while True:
        await answer.write(b" ")
        await asyncio.sleep(0.1)


async def drip_header(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Begin a header, and go on with it a letter at a time."""
    assert isinstance(request.transport, asyncio.Transport)
    request.transport.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not request.transport.is_closing():
        request.transport.write(b"x")
        await asyncio.sleep(0.1)
    raise AssertionError


async def answer_slowly(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Answer properly, with a header that takes 2.5 s, a letter at a time."""
    assert isinstance(request.transport, asyncio.Transport)
    content = (await proceed()).body  # type: ignore[attr-defined]
    request.transport.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    for _ in range(25):
        request.transport.write(b"x")
        await asyncio.sleep(0.1)
    request.transport.write(b"\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
    return await close(request, proceed)


async def overstate(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Answer properly, but announce more bytes than there are."""
    assert isinstance(request.transport, asyncio.Transport)
    content = (await proceed()).body  # type: ignore[attr-defined]
    header = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(content) + 10)
    request.transport.write(header + content)
    return await close(request, proceed)


async def garble(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Answer with what is no HTTP."""
    assert isinstance(request.transport, asyncio.Transport)
    request.transport.write(b"\x16\x03\x01\x00\xff\r\n\r\n" * 10)
    return await close(request, proceed)


class Flaky:
    """A fair share of faults: for submissions only such as surely did no harm."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()

    def __call__(self, request: web.Request, body: Json) -> Fault | None:
        """Choose a fault, or none; a submission that has met two is left in peace."""
        slow_down = status(429, "slow down", Retry_After="1")
        if request.method == "GET":
            busy = status(503, "busy", Retry_After="1")
            return random.choice([None, None, None, slow_down, busy, reset, cut, status(500)])
        self.tries[json.dumps(body)] += 1
        return random.choice([None, slow_down]) if self.tries[json.dumps(body)] <= 2 else None


# The command line


def run(command: list[str], environment: dict[str, str]) -> int:
    """Run the command here, and return its exit code; signals are left to it."""
    if command[0].endswith(".py"):
        command = ["uv", "run", *command]
    child = subprocess.Popen(command, env={**os.environ, **environment})
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the child as well
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    return code if code >= 0 else 128 - code


def main() -> int:
    """Serve, and run the command if there is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flaky", action="store_true", help="answer badly, a fair share of times")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run against it")
    options = parser.parse_args()
    name = options.command[0] if options.command else None
    if name and not name.endswith(".py") and not shutil.which(name):
        parser.exit(127, f"{parser.prog}: command not found: {name}\n")
    with LocalApi() as api:
        if options.flaky:
            api.choose_fault = Flaky()
        print(
            f"This is a local stand-in for the inference.net API, at {api.url}: "
            "it has no model and costs nothing.",
            file=sys.stderr,
        )
        if options.command:
            code = run(options.command, api.environment)
        else:
            for name, value in api.environment.items():
                print(f"export {name}={value}")
            code = 0
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        print(f"The local stand-in {api.bill()}.", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
