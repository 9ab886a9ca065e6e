# /// script
# requires-python = ">=3.10"
# dependencies = ["aiohttp"]
# ///
"""A stand-in for inference.net's Asynchronous Inference API, on this machine.

    uv run tests/local_api.py async_polling_example.py           run a script against it
    uv run tests/local_api.py --flaky async_group_example.py     break one answer in five
    uv run tests/local_api.py --rate 4 async_polling_example.py  take 4 submissions a second
    uv run tests/local_api.py --port 8000                        serve until Ctrl-C

It runs a command with INFERENCE_API_KEY and INFERENCE_BASE_URL set, and ends with the
command's exit code. A script (x.py) is run by uv run. Without a command, it prints what
to set in another terminal. There is no model: the sample questions have set answers, and
a longer text gets a made-up summary. At the end, it shows the bill on stderr. A request
was made twice if its custom id had been accepted before.

Tests of your own can import it. They need aiohttp, and tests/ on their path:

    from local_api import API_KEY, LocalApi

    with LocalApi(seconds=(0, 0)) as api:  # it serves from a thread
        ...  # use api.url and API_KEY, or the variables in api.environment
"""

import asyncio
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

from aiohttp import web

Json = dict[str, Any]
Proceed = Callable[[], Awaitable[web.StreamResponse]]
Fault = Callable[[web.Request, Proceed], Awaitable[web.StreamResponse]]
Refusal = Callable[..., web.HTTPException]

API_KEY = "local-stand-in-key-0000"
JSON = "application/json"
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
TOKEN_LETTERS = 4
NO_MODEL = "There is no model here: the local API knows only the sample questions."
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


@dataclass
class Generation:
    """A request that was accepted, and what becomes of it."""

    request: Json
    custom_id: str | None
    dispatched: datetime
    finished: datetime
    is_listed_late: bool  # its group lists it only when it is done
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16)[:21])
    was_answered: bool = False


def expect(condition: object, message: str, refuse: Refusal = web.HTTPBadRequest) -> None:
    """Refuse the call with this message, unless the condition holds."""
    if not condition:
        raise refuse(text=json.dumps({"error": {"message": message}}), content_type=JSON)


def check(chat: Any) -> None:
    """Refuse what is no chat completion request."""
    expect(isinstance(chat, dict), "a request must be a JSON object")
    expect(isinstance(chat.get("model"), str), "model must be a text")
    messages = chat.get("messages")
    expect(isinstance(messages, list) and messages, "messages must be a list, not empty")
    for message in messages:
        is_message = isinstance(message, dict) and {"role", "content"} <= message.keys()
        expect(is_message, "a message must have a role and a content")
    metadata = chat.get("metadata", {})
    expect(isinstance(metadata, dict), "metadata must be an object")
    for value in metadata.values():
        expect(isinstance(value, str), "metadata must hold texts only")
    for key in TOKEN_LIMITS:
        limit = chat.get(key, 1)
        expect(type(limit) is int and limit > 0, f"{key} must be a whole number above 0")


def question_of(chat: Json) -> str:
    """Return the text of the user's last message, without its pictures."""
    asked = [message["content"] for message in chat["messages"] if message["role"] == "user"]
    content = asked[-1] if asked else ""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if "text" in part)
    return str(content).strip()


def answer_to(question: str) -> str:
    """Return the answer to a sample question, or the made-up summary of a text."""
    if len(question) <= 200 and "\n" not in question:
        return ANSWERS.get(question, NO_MODEL)
    # A first line or paragraph that ends with a colon is an instruction, not the text.
    text = re.sub(r"\A(.+\n){0,3}?.*:[ \t]*\n", "", question)
    count = len(text.split())
    text = re.sub(r"(?<=\w)\s*\n\s*\n", ". ", text)  # a title ends as a sentence does
    # "Dr." does not end a sentence, and more than 200 letters are no summary.
    found = re.findall(r".{20,200}?\w{3}[.!?](?=\s|$)|.{1,200}", " ".join(text.split()))
    ending = "" if found[0].endswith((".", "!", "?")) else " ..."
    return f"{found[0]}{ending} In all, the text has {count} words."


def response_to(generation: Generation) -> Json:
    """Return the chat completion that answers a request."""
    chat = generation.request
    question = question_of(chat)
    text = answer_to(question)
    if "json" in str(chat.get("response_format")):  # json_object or json_schema
        text = json.dumps({"answer": text}, ensure_ascii=False)
    limits = [TOKEN_LETTERS * chat[key] for key in TOKEN_LIMITS if key in chat]
    content = text[: min(limits, default=None)]
    choice: Json = {"index": 0, "message": {"role": "assistant", "content": content}}
    choice["finish_reason"] = "stop" if content == text else "length"
    if chat.get("tools") and chat["messages"][-1]["role"] != "tool":
        function = {"name": chat["tools"][0]["function"]["name"], "arguments": "{}"}
        call = {"id": f"call_{generation.id}", "type": "function", "function": function}
        choice["message"] |= {"content": None, "tool_calls": [call]}
        choice["finish_reason"] = "tool_calls"
    usage = {"prompt_tokens": math.ceil(len(question) / TOKEN_LETTERS)}
    usage["completion_tokens"] = math.ceil(len(content) / TOKEN_LETTERS)
    usage["total_tokens"] = sum(usage.values())
    created = int(generation.finished.timestamp())
    completion = {"id": generation.id, "object": "chat.completion", "created": created}
    return completion | {"model": chat["model"], "choices": [choice], "usage": usage}


@dataclass(eq=False)
class LocalApi:
    """The stand-in; as a context manager, it serves from a thread of its own."""

    seconds: tuple[float, float] = (0.5, 3)  # how long a generation takes, at least and most
    delay_seconds: float = 0  # added to each call
    connect_seconds: float = 0  # added to the first call of a connection
    port: int = 0  # 0 is any free port
    rate: float | None = None  # submissions a second; what is more gets 429
    burst: float = 1  # how many of them can come at once
    retry_after: str | None = "1"  # the header of a 429; None is no header

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.environment = {"INFERENCE_API_KEY": API_KEY, "INFERENCE_BASE_URL": self.url}
        self.environment |= dict.fromkeys(["NO_PROXY", "no_proxy"], "127.0.0.1,localhost")
        self.is_ending = threading.Event()
        self.tokens = self.burst  # how many submissions can come now
        self.filled = time.monotonic()
        self.generations: dict[str, Generation] = {}
        self.groups: dict[str, list[Generation]] = {}
        self.calls: list[tuple[str, str]] = []  # the method and the path of each
        self.connections: set[Any] = set()
        self.headers_seen: list[dict[str, str]] = []
        self.choose_fault: Callable[[web.Request, Json], Fault | None] = lambda *_: None
        self.alter: Callable[[Json], Any] = lambda generation: generation
        self.alter_list: Callable[[list[Any]], Any] = lambda generations: generations

    def made_again(self) -> int:
        """Return how many requests had a custom id that had been accepted before."""
        custom_ids = [each.custom_id for each in self.generations.values() if each.custom_id]
        return len(custom_ids) - len(set(custom_ids))

    def unanswered(self) -> int:
        """Return how many generations no client has seen done."""
        return sum(not each.was_answered for each in self.generations.values())

    def bill(self) -> str:
        """Return what was accepted, answered, and made twice."""
        made, lost, twice = len(self.generations), self.unanswered(), self.made_again()
        made_twice = f"{twice} made twice" if twice else "none twice"
        return f"{made} accepted, {made - lost} answered, {made_twice}"

    def accept(self, request: Any, position: int = 0) -> Generation:
        """Return the generation for a request at this position of its group."""
        check(request)
        custom_id = request.get("metadata", {}).get("custom_id")
        now = datetime.now(timezone.utc)
        duration = timedelta(seconds=random.uniform(*self.seconds))
        is_late = position % 2 == 1
        return Generation(request, custom_id, now + duration * 0.4, now + duration, is_late)

    def accept_group(self, group: Any) -> list[Generation]:
        """Return the generations for the requests of a group."""
        is_group = isinstance(group, dict) and group.keys() <= {"requests", "webhook_id"}
        expect(is_group, "a group must have no keys but requests and webhook_id")
        requests = group.get("requests")
        is_right = isinstance(requests, list) and 1 <= len(requests) <= 50
        expect(is_right, "requests must be a list of 1 to 50 requests")
        return [self.accept(request, position) for position, request in enumerate(requests)]

    def show(self, generation: Generation) -> Any:
        """Return a generation as a client sees it now."""
        times = (generation.dispatched, generation.finished)
        dispatched, finished = (f"{each:%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z" for each in times)
        now = datetime.now(timezone.utc)
        shown: Json = {"id": generation.id, "state": "Queued", "request": generation.request}
        shown |= dict.fromkeys(["stateMessage", "response", "dispatchedAt", "finishedAt"])
        if now >= generation.dispatched:
            shown |= {"state": "In Progress", "dispatchedAt": dispatched}
        if now >= generation.finished:
            generation.was_answered = True
            shown |= {"state": "Success", "finishedAt": finished}
            shown["response"] = response_to(generation)
        return self.alter(shown)

    def show_group(self, members: list[Generation]) -> Any:
        """Return a group's list: in random order, and some are missing until they are done."""
        now = datetime.now(timezone.utc)
        listed = [each for each in members if now >= each.finished or not each.is_listed_late]
        random.shuffle(listed)
        return self.alter_list([self.show(each) for each in listed])

    def answer(self, method: str, path: str, body: Any) -> Any:
        """Return the answer to a call."""
        match [method, *path.removeprefix("/v1/").split("/")]:
            case ["POST", "async", "chat", "completions"]:
                generation = self.accept(body)
                self.generations[generation.id] = generation
                return {"id": generation.id}
            case ["POST", "async", "group", "chat", "completions"]:
                members = self.accept_group(body)
                self.generations |= {each.id: each for each in members}
                group_id = secrets.token_urlsafe(16)[:21]
                self.groups[group_id] = members
                return {"groupId": group_id, "groupSize": len(members)}
            case ["GET", "generation", key] if key in self.generations:
                return self.show(self.generations[key])
            case ["GET", "async", "group", key, "generations"] if key in self.groups:
                return {"generations": self.show_group(self.groups[key])}
        return expect(False, "there is nothing here", web.HTTPNotFound)

    def take_token(self) -> None:
        """Take a token for a submission out of the bucket; refuse it if there is none."""
        if self.rate is None:
            return
        now = time.monotonic()
        self.tokens = min(self.burst, self.tokens + (now - self.filled) * self.rate)
        self.filled = now
        headers = {"Retry-After": self.retry_after} if self.retry_after else {}
        refuse = partial(web.HTTPTooManyRequests, headers=headers)
        expect(self.tokens >= 1, "too many submissions", refuse)
        self.tokens -= 1

    async def serve_one(self, request: web.Request) -> web.StreamResponse:
        """Note a call, let it take its time, and answer it, perhaps with a fault."""
        is_new = request.transport not in self.connections
        self.connections.add(request.transport)
        self.calls.append((request.method, request.path))
        self.headers_seen.append(dict(request.headers))
        await asyncio.sleep(self.delay_seconds + (self.connect_seconds if is_new else 0))
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError):
            body = None
        except ConnectionError:  # the client was killed while it sent
            return web.Response()

        async def proceed() -> web.StreamResponse:
            is_known = request.headers.get("Authorization") == f"Bearer {API_KEY}"
            expect(is_known, "this key is not valid", web.HTTPUnauthorized)
            if request.method == "POST":
                self.take_token()
            return web.json_response(self.answer(request.method, request.path, body))

        fault = self.choose_fault(request, body if isinstance(body, dict) else {})
        return await (fault(request, proceed) if fault else proceed())

    async def serve(self) -> None:
        """Serve until the context manager ends."""
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self.serve_one)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.SockSite(runner, self.listener).start()
        await asyncio.to_thread(self.is_ending.wait)
        await runner.cleanup()

    def __enter__(self) -> "LocalApi":
        self.thread = threading.Thread(target=asyncio.run, args=[self.serve()])
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_ending.set()
        self.thread.join()


# --- Faults: what may come in place of a proper answer


def body(content: bytes, content_type: str = JSON, code: int = 200, **headers: str) -> Fault:
    """Answer with these bytes, and with headers; Retry_After is the header Retry-After."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named["Content-Type"] = content_type

    async def fault(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        return web.Response(body=content, status=code, headers=named)

    return fault


def status(code: int, message: str = "out of order", **headers: str) -> Fault:
    """Answer with an error as the API words it."""
    return body(json.dumps({"error": {"message": message}}).encode(), code=code, **headers)


def after(fault: Fault) -> Fault:
    """Do as fault does once the request is carried out; a refusal is shown as it is."""

    async def carried_out(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        await proceed()
        return await fault(request, proceed)

    return carried_out


async def close(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Close the connection without an answer."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def reset(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Reset the connection."""
    connection = request.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return await close(request, proceed)


async def cut(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Begin an answer, and close the connection half way."""
    answer = web.StreamResponse(headers={"Content-Length": "1000"})
    await answer.prepare(request)
    await answer.write(b'{"id": "')
    return await close(request, proceed)


async def stall(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Take the request, and never answer."""
    await asyncio.Event().wait()
    return web.Response()


def flaky(request: web.Request, body: Json) -> Fault | None:
    """Break one answer in five; submissions only with 429, which surely does no harm."""
    faults = [status(429, "slow down"), status(429, "slow down", Retry_After="1")]
    if request.method == "GET":
        faults += [status(503, "busy", Retry_After="1"), status(500), reset, cut]
    return random.choice(faults) if random.random() < 0.2 else None


# --- The command line: stdout is left to the command, and to what is copied

say = partial(print, sep="\n", file=sys.stderr, flush=True)


def run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command, and return its exit code as a shell does."""
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the command, too
    child = subprocess.Popen(command, env={**os.environ, **environment})
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    return code if code >= 0 else 128 - code


def wait(environment: dict[str, str]) -> int:
    """Show what to set in another terminal, and wait for Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    exports = [f"export {name}={value}" for name, value in environment.items()]
    settings = [f'$env:{name} = "{value}"' for name, value in environment.items()]
    try:
        say("Copy these lines into another terminal:")
        print(*exports, sep="\n", flush=True)
        say("Or these, if it is PowerShell:", *settings, "Ctrl-C ends the local API.")
        while True:
            time.sleep(3600)  # on Windows, Ctrl-C would not end the wait for an Event
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending already
        return 0


def main() -> int:
    """Serve, and run the command if there is one; return the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--flaky", action="store_true", help="break about one answer in five")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="serve on port N")
    parser.add_argument("--rate", type=int, metavar="N", help="take N submissions a second")
    parser.add_argument("command", nargs=REMAINDER, help="what to run against the local API")
    options = parser.parse_args()
    command = options.command
    if command and command[0].endswith(".py"):
        command = ["uv", "run", *command]
    if command and not shutil.which(command[0]):
        parser.exit(127, f"{parser.prog}: command not found: {command[0]}\n")
    try:
        api = LocalApi(port=options.port, rate=options.rate, burst=options.rate or 1)
    except (OSError, OverflowError):
        parser.exit(2, f"{parser.prog}: port {options.port} is in use, or not allowed.\n")
    if options.flaky:
        api.choose_fault = flaky
    with api:
        say(f"A local stand-in for the inference.net API, at {api.url}.")
        say("It has no model and costs nothing.")
        code = run(command, api.environment) if command else wait(api.environment)
    say(f"The local API: {api.bill()}.")
    if lost := api.unanswered():
        say(f"Not answered: {lost}. They are lost: --resume cannot find them now.")
    return code


if __name__ == "__main__":
    sys.exit(main())
