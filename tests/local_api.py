# /// script
# requires-python = ">=3.10"
# dependencies = ["aiohttp"]
# ///
"""A stand-in for inference.net's Asynchronous API, on this machine.

    uv run tests/local_api.py async_polling_example.py
    uv run tests/local_api.py --flaky async_group_example.py
    uv run tests/local_api.py --port 8000

With a command, it runs the command, with an environment that leads it here,
and ends with its exit code. A script (x.py) is run with uv run. Without a
command, it serves until Ctrl-C.

There is no model. The sample questions have set answers. Any other question
comes back as the answer. JSON and tool calls hold made-up values.

At the end, it shows the bill on stderr: how many requests it accepted, how
many of them it answered, and how many were made twice, which means that the
same custom id had been accepted before.

Tests of your own can import it. They need aiohttp, and tests/ on their path:

    from local_api import API_KEY, LocalApi

    with LocalApi(seconds=(0, 0)) as api:  # it serves from a thread
        ...  # use api.url and API_KEY, or the variables in api.environment
"""

import argparse
import asyncio
import contextlib
import errno
import json
import logging
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
import time
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
HIGHEST_PORT = 65535
MAX_GROUP_SIZE = 50
MAX_CHOICES = 10
TOKEN_LENGTH = 4  # characters
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
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
    "frequency_penalty",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "metadata",
    "model",
    "n",
    "presence_penalty",
    "response_format",
    "seed",
    "stop",
    "stream",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "webhook_id",
}
ROLES = ["system", "developer", "user", "assistant", "tool"]


# The check of a request


class BadRequestError(Exception):
    """What the service would answer with 400 and this message."""


def expect(condition: bool, message: str) -> None:
    """Refuse the request with this message, unless the condition holds."""
    if not condition:
        raise BadRequestError(message)


async def read_json(request: web.Request) -> Any:
    """Return the body of a request, which must be JSON."""
    try:
        return await request.json()
    except (ValueError, RecursionError):
        raise BadRequestError("the body must be JSON") from None


def check_keys(given: Json, known: set[str]) -> None:
    """Refuse a request that has a key which is not known."""
    unknown = sorted(given.keys() - known)
    expect(not unknown, f"unknown keys: {', '.join(unknown)}")


def check_chat(chat: Any, position: int) -> None:
    """Check a chat completion request; position is its place in the group."""
    expect(isinstance(chat, dict), f"requests[{position}] must be an object")
    check_keys(chat, CHAT_KEYS)
    model = chat.get("model")
    expect(isinstance(model, str) and model != "", "model must be a text")
    messages = chat.get("messages")
    is_list = isinstance(messages, list) and messages != []
    expect(is_list, "messages must be a list that is not empty")
    for message in messages:
        check_message(message)
    metadata = chat.get("metadata", {})
    expect(isinstance(metadata, dict), "metadata must hold texts")
    for value in metadata.values():
        expect(isinstance(value, str), "metadata must hold texts")
    check_numbers(chat)
    check_tools(chat.get("tools", []))
    check_format(chat.get("response_format", {"type": "text"}))


def check_message(message: Any) -> None:
    """Check one of the messages of a request."""
    expect(isinstance(message, dict), "a message must be an object")
    role = message.get("role")
    expect(role in ROLES, f"a message's role must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return  # the message is a call of a tool, which has no text
    if isinstance(content, str):
        return
    is_list = isinstance(content, list) and content != []
    expect(is_list, "a message's content must be a text or a list of parts")
    for part in content:
        check_part(part)


def check_part(part: Any) -> None:
    """Check one part of a message's content."""
    expect(isinstance(part, dict), "a part of a content must be an object")
    kind = part.get("type")
    if kind == "text":
        expect(isinstance(part.get("text"), str), "a text part must have a text")
    elif kind == "image_url":
        image = part.get("image_url")
        has_url = isinstance(image, dict) and isinstance(image.get("url"), str)
        expect(has_url, "an image_url part must have an image_url with a url")
    else:
        raise BadRequestError("a part's type must be text or image_url")


def check_numbers(chat: Json) -> None:
    """Check the numbers that decide what an answer looks like."""
    for key in TOKEN_LIMITS:
        is_right = is_whole(chat.get(key, 1)) and chat.get(key, 1) >= 1
        expect(is_right, f"{key} must be a whole number above 0")
    count = chat.get("n", 1)
    is_right = is_whole(count) and 1 <= count <= MAX_CHOICES
    expect(is_right, f"n must be a whole number from 1 to {MAX_CHOICES}")
    expect(isinstance(chat.get("logprobs", False), bool), "logprobs must be true or false")


def is_whole(value: Any) -> bool:
    """Tell whether it is a whole number; to Python, true and false are numbers too."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_tools(tools: Any) -> None:
    """Check the tools that the model may call."""
    expect(isinstance(tools, list), "tools must be a list")
    for tool in tools:
        is_object = isinstance(tool, dict) and isinstance(tool.get("function"), dict)
        expect(is_object, "a tool must be an object with a function")
        expect(tool.get("type") == "function", "a tool's type must be function")
        name = tool["function"].get("name")
        expect(isinstance(name, str) and name != "", "a tool's function must have a name")
        sample_value(parameters_of(tool))  # refuses what is no schema


def check_format(wanted: Any) -> None:
    """Check the format that the answer is to have."""
    expect(isinstance(wanted, dict), "response_format must be an object")
    kind = wanted.get("type")
    is_known = kind in ("text", "json_object", "json_schema")
    expect(is_known, "response_format.type must be text, json_object or json_schema")
    if kind == "json_schema":
        is_object = isinstance(wanted.get("json_schema"), dict)
        expect(is_object, "response_format.json_schema must be an object")
        sample_value(schema_of(wanted))  # refuses what is no schema


# The answer to a request


def schema_of(wanted: Json) -> Any:
    """Return the schema in a response_format; without one, any object will do."""
    return wanted["json_schema"].get("schema", {"type": "object"})


def parameters_of(tool: Json) -> Any:
    """Return the schema of a tool's parameters; without one, there are none."""
    return tool["function"].get("parameters", {"type": "object"})


def sample_value(schema: Any) -> Any:
    """Return a small value of the type that a JSON schema declares."""
    expect(isinstance(schema, dict), "a JSON schema must be an object")
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return first_of(schema, "enum")
    if "anyOf" in schema:
        return sample_value(first_of(schema, "anyOf"))
    kind = schema.get("type")
    if isinstance(kind, list):  # several types are allowed, as in ["string", "null"]
        kind = first_of(schema, "type")
    if kind == "object" or "properties" in schema:
        return sample_object(schema)
    if kind == "array":
        return [sample_value(schema["items"])] if "items" in schema else []
    if kind == "integer":
        return 1
    if kind == "number":
        return 1.5
    if kind == "boolean":
        return True
    if kind == "null":
        return None
    return "text"


def first_of(schema: Json, key: str) -> Any:
    """Return the first thing in a list that a JSON schema has."""
    values = schema[key]
    is_list = isinstance(values, list) and values != []
    expect(is_list, f"a JSON schema's {key} must be a list that is not empty")
    return values[0]


def sample_object(schema: Json) -> Json:
    """Return a small object with the properties that a JSON schema names."""
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    expect(isinstance(properties, dict), "a JSON schema's properties must be an object")
    expect(isinstance(required, list), "a JSON schema's required must be a list")
    value = {name: sample_value(properties[name]) for name in properties}
    for name in required:
        expect(isinstance(name, str), "a JSON schema's required must hold texts")
        value.setdefault(name, "text")
    return value


def question_of(chat: Json) -> str:
    """Return the text of the user's last message, or of the last one of all."""
    messages = chat["messages"]
    asked = [message for message in messages if message["role"] == "user"]
    last = asked[-1] if asked else messages[-1]
    content = last.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def answer_of(chat: Json) -> str:
    """Return the answer to a request, in the format that it asks for."""
    question = question_of(chat)
    answer = ANSWERS.get(question, f"You asked: {question}")
    wanted = chat.get("response_format", {"type": "text"})
    if wanted["type"] == "json_object":
        return json.dumps({"answer": answer}, ensure_ascii=False)
    if wanted["type"] == "json_schema":
        return json.dumps(sample_value(schema_of(wanted)), ensure_ascii=False)
    return answer


def tool_to_call(chat: Json) -> Json | None:
    """Return the tool that the model calls, which is the first, or None."""
    tools = chat.get("tools", [])
    if not tools or chat.get("tool_choice") == "none":
        return None
    if chat["messages"][-1]["role"] == "tool":
        return None  # it has just been called; another call would never lead to an end
    return tools[0]


def response_to(chat: Json, generation_id: str) -> Json:
    """Return the chat completion that answers a request."""
    tool = tool_to_call(chat)
    if tool is None:
        text = answer_of(chat)
    else:
        text = json.dumps(sample_value(parameters_of(tool)), ensure_ascii=False)
    tokens = split(text)
    limits = [chat[key] for key in TOKEN_LIMITS if key in chat]
    kept = tokens[: min(limits, default=len(tokens))]
    choices = []
    for index in range(chat.get("n", 1)):
        if tool is None:
            choice = text_choice(index, kept)
        else:
            choice = call_choice(index, kept, tool, generation_id)
        if len(kept) < len(tokens):
            choice["finish_reason"] = "length"
        if chat.get("logprobs"):
            choice["logprobs"] = logprobs_of(choice["message"]["content"] or "")
        choices.append(choice)
    return {"choices": choices, "usage": usage_of(chat, len(kept) * len(choices))}


def split(text: str) -> list[str]:
    """Return the tokens of a text; four characters are one, and so is what is left."""
    return [text[start : start + TOKEN_LENGTH] for start in range(0, len(text), TOKEN_LENGTH)]


def text_choice(index: int, tokens: list[str]) -> Json:
    """Return a choice that is a text."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": "".join(tokens)},
        "finish_reason": "stop",
    }


def call_choice(index: int, tokens: list[str], tool: Json, generation_id: str) -> Json:
    """Return a choice that is a tool call; the tokens are those of its arguments."""
    call = {
        "id": f"call_{generation_id}_{index}",
        "type": "function",
        "function": {"name": tool["function"]["name"], "arguments": "".join(tokens)},
    }
    return {
        "index": index,
        "message": {"role": "assistant", "content": None, "tool_calls": [call]},
        "finish_reason": "tool_calls",
    }


def logprobs_of(content: str) -> Json:
    """Return how likely each token of a content was; here, all are alike."""
    return {"content": [{"token": token, "logprob": -0.1} for token in split(content)]}


def usage_of(chat: Json, completion_tokens: int) -> Json:
    """Return what a request and its answer are billed for."""
    prompt_tokens = 8 + len(question_of(chat)) // TOKEN_LENGTH
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


# The API


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
        return self.request.get("metadata", {}).get("custom_id")

    def as_json(self) -> Json:
        """The generation as the API would show it now."""
        now = datetime.now(timezone.utc)
        shown = {
            "id": self.id,
            "state": "Queued",
            "stateMessage": None,
            "request": self.request,
            "response": None,
            "dispatchedAt": None,
            "finishedAt": None,
        }
        if now >= self.dispatched:
            shown["state"] = "In Progress"
            shown["dispatchedAt"] = show_time(self.dispatched)
        if now >= self.finished:
            shown["state"] = "Success"
            shown["response"] = response_to(self.request, self.id)
            shown["finishedAt"] = show_time(self.finished)
        return shown


def show_time(moment: datetime) -> str:
    """Return a time as the API writes it."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """Return an error as the API words it."""
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


class PortError(OSError):
    """The port cannot be served on, and why."""


class LocalApi:
    """The stand-in: its state, its endpoints, and what it is made to do wrong.

    As a context manager, it serves from a thread of its own. seconds is how long
    a generation takes, at least and at most. delay_seconds is added to every
    call, and connect_seconds to the first one of a connection. port 0 is any
    free port.
    """

    def __init__(
        self,
        seconds: tuple[float, float] = (1, 4),
        tls: ssl.SSLContext | None = None,
        delay_seconds: float = 0,
        connect_seconds: float = 0,
        port: int = 0,
    ) -> None:
        self.seconds = seconds
        self.tls = tls
        self.delay_seconds = delay_seconds
        self.connect_seconds = connect_seconds
        self.port = port
        self.generations: dict[str, Generation] = {}
        self.groups: dict[str, list[Generation]] = {}
        self.calls: list[tuple[str, str]] = []  # the method and the path of each
        self.connections: set[Any] = set()
        self.headers_seen: list[dict[str, str]] = []
        self.choose_fault: Callable[[web.Request, Json], Fault | None] = (
            lambda request, body: None
        )
        self.alter: Callable[[Json], Any] = lambda generation: generation
        self.alter_list: Callable[[list[Any]], Any] = lambda generations: generations
        self.new_runs = 0  # counted by the tests: how often a custom id may be made anew

    @property
    def url(self) -> str:
        """What INFERENCE_BASE_URL is to be."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}/v1"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead a script here."""
        return {
            "INFERENCE_BASE_URL": self.url,
            "INFERENCE_API_KEY": API_KEY,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def made_again(self) -> int:
        """How many generations were made for a custom id that had one already."""
        custom_ids = [generation.custom_id for generation in self.generations.values()]
        made = Counter(each for each in custom_ids if each is not None)
        return sum(count - 1 for count in made.values())

    def unanswered(self) -> int:
        """How many generations no client has seen done."""
        return sum(not generation.was_answered for generation in self.generations.values())

    def bill(self) -> str:
        """What was accepted, answered, and made twice."""
        accepted = len(self.generations)
        answered = accepted - self.unanswered()
        twice = self.made_again()
        made_twice = f"{twice} made twice" if twice else "none twice"
        return f"{accepted} accepted, {answered} answered, {made_twice}"

    # Endpoints

    def accept(self, request: Any, position: int = 0) -> Generation:
        """Check a chat completion request and take it."""
        check_chat(request, position)
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
        generation = self.accept(await read_json(request))
        self.generations[generation.id] = generation
        return web.json_response({"id": generation.id})

    async def submit_group(self, request: web.Request) -> web.Response:
        """POST /v1/async/group/chat/completions."""
        body = await read_json(request)
        expect(isinstance(body, dict), "the body must be an object")
        check_keys(body, {"requests", "webhook_id"})
        requests = body.get("requests")
        is_right = isinstance(requests, list) and 1 <= len(requests) <= MAX_GROUP_SIZE
        expect(is_right, f"requests must hold 1 to {MAX_GROUP_SIZE} requests")
        members = [self.accept(member, position) for position, member in enumerate(requests)]
        for generation in members:
            self.generations[generation.id] = generation
        group_id = secrets.token_urlsafe(16)[:21]
        self.groups[group_id] = members
        return web.json_response({"groupId": group_id, "groupSize": len(members)})

    def show(self, generation: Generation) -> Any:
        """Return a generation as it is now, or as a test alters it."""
        shown = generation.as_json()
        if shown["state"] == "Success":
            generation.was_answered = True
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
        random.shuffle(listed)  # the service promises no order
        shown = [self.show(generation) for generation in listed]
        return web.json_response({"generations": self.alter_list(shown)})

    # Serving

    @web.middleware
    async def serve_one(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Answer one call: its delay, its fault, its key, its endpoint."""
        is_new = request.transport is not None and request.transport not in self.connections
        self.connections.add(request.transport)
        self.calls.append((request.method, request.path))
        self.headers_seen.append(dict(request.headers))
        await asyncio.sleep(self.delay_seconds + (self.connect_seconds if is_new else 0))
        body = {}
        if request.method == "POST":
            with contextlib.suppress(BadRequestError):  # the endpoint will say it
                body = await read_json(request)

        async def proceed() -> web.StreamResponse:
            if request.headers.get("Authorization") != f"Bearer {API_KEY}":
                return problem(401, "this key is not valid")
            try:
                return await handler(request)
            except BadRequestError as error:
                return problem(400, str(error))

        fault = self.choose_fault(request, body)
        if fault is not None:
            return await fault(request, proceed)
        return await proceed()

    async def start(self) -> web.AppRunner:
        """Start to serve on the port of the loopback interface."""
        # A client that is killed while it sends is no error of this API's.
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
        app = web.Application(middlewares=[self.serve_one], client_max_size=2**26)
        app.router.add_post("/v1/async/chat/completions", self.submit)
        app.router.add_post("/v1/async/group/chat/completions", self.submit_group)
        app.router.add_get("/v1/generation/{id}", self.fetch)
        app.router.add_get("/v1/async/group/{id}/generations", self.fetch_group)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=self.tls)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise PortError(f"port {self.port} cannot be used: {explain(error)}") from error
        self.port = runner.addresses[0][1]
        return runner

    def __enter__(self) -> "LocalApi":
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        try:
            self.runner = asyncio.run_coroutine_threadsafe(self.start(), self.loop).result()
        except PortError:
            self.end_thread()
            raise
        return self

    async def stop(self) -> None:
        """End what is being served, stalled answers included."""
        await self.runner.cleanup()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def end_thread(self) -> None:
        """End the thread that serves."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.stop(), self.loop).result()
        self.end_thread()


def explain(error: OSError) -> str:
    """Return in a few words why a port cannot be used."""
    if error.errno == errno.EADDRINUSE:
        return "something else is using it"
    return os.strerror(error.errno or 0)


# Faults: what may come in place of a proper answer


def status(code: int, message: str = "out of order", **headers: str) -> Fault:
    """Answer with an HTTP status and headers (Retry_After is Retry-After), nothing carried out."""

    async def fault(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        return problem(
            code, message, {name.replace("_", "-"): headers[name] for name in headers}
        )

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


def port_number(text: str) -> int:
    """Read the number of a port from the command line."""
    if not text.isascii() or not text.isdigit() or int(text) > HIGHEST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to {HIGHEST_PORT}")
    return int(text)


def say(text: str) -> None:
    """Tell the user something; stdout is left to the command and to what is copied."""
    print(text, file=sys.stderr, flush=True)


def run(command: list[str], environment: dict[str, str]) -> int:
    """Run the command here, and return its exit code; signals are left to it."""
    child = subprocess.Popen(command, env={**os.environ, **environment})
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the child as well
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    return code if code >= 0 else 128 - code


def serve(environment: dict[str, str]) -> None:
    """Show what to copy into another terminal, and serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        for name, value in environment.items():
            print(f"export {name}={value}", flush=True)
        say("Copy the export lines into another terminal. Ctrl-C here ends the local API.")
        while True:
            time.sleep(3600)  # unlike an Event, Ctrl-C ends it on Windows too
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it is ending: a second one changes nothing


def show_bill(api: LocalApi) -> None:
    """Tell the user what was accepted and answered, and what is lost now."""
    say(f"The local API: {api.bill()}.")
    if api.unanswered():
        say(
            f"Not answered: {api.unanswered()}. They are gone now: the local API keeps nothing."
        )
        say("A --resume command that a script has printed for them cannot work any more.")


def main() -> int:
    """Serve, and run the command if there is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--flaky", action="store_true", help="answer badly, a fair share of times"
    )
    parser.add_argument(
        "--port",
        type=port_number,
        default=0,
        metavar="N",
        help="the port to serve on; 0, the default, is any free one",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run against it")
    options = parser.parse_args()
    command = options.command
    if command and command[0].endswith(".py"):
        command = ["uv", "run", *command]
    if command and not shutil.which(command[0]):
        parser.exit(127, f"{parser.prog}: command not found: {command[0]}\n")
    code = 0
    try:
        with LocalApi(port=options.port) as api:
            if options.flaky:
                api.choose_fault = Flaky()
            say(f"A local stand-in for the inference.net API, at {api.url}.")
            say("It has no model and costs nothing.")
            if command:
                code = run(command, api.environment)
            else:
                serve(api.environment)
            show_bill(api)
    except PortError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
