"""The local API on its own: its command line, what it accepts, and what it answers."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import local_api
import pytest
import requests
from conftest import API_KEY, HANG_SECONDS, SCRIPTS, TOP, Example
from local_api import Json, LocalApi

LOCAL_API = [sys.executable, str(TOP / "tests" / "local_api.py")]


def execute(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the local API to its end, and check that each line of its own fits a terminal."""
    done = subprocess.run(
        [*LOCAL_API, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=HANG_SECONDS,
        check=False,
        **options,
    )
    assert "Traceback" not in done.stderr, done.stderr
    own_lines = (done.stderr if arguments[-1] != "--help" else done.stdout).splitlines()
    assert max(map(len, own_lines), default=0) <= 80, own_lines
    return done


# The command line


@pytest.mark.parametrize("flags", [[], ["--flaky"]], ids=["steady", "flaky"])
def test_it_runs_a_command_and_presents_the_bill(single: Example, flags: list[str]) -> None:
    single.edit(NUM_REQUESTS=10, MAX_POLL_ATTEMPTS=120, POLL_INTERVAL_SECONDS=0.2)
    done = execute(*flags, sys.executable, single.script, cwd=single.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Successful:    10" in done.stdout
    first, second, bill = done.stderr.splitlines()
    assert re.fullmatch(r".* stand-in .* http://127\.0\.0\.1:\d+/v1\.", first)
    assert "costs nothing" in second
    assert bill == "The local API: 10 accepted, 10 answered, none twice."


# Sends the same request twice, and asks for the first one's answer.
TWICE = """
import os, requests

chat = {"model": "any", "messages": [{"role": "user", "content": "Why?"}]}
chat["metadata"] = {"custom_id": "req-001"}
url = os.environ["INFERENCE_BASE_URL"]
headers = {"Authorization": "Bearer " + os.environ["INFERENCE_API_KEY"]}
for _ in range(2):
    answer = requests.post(url + "/async/chat/completions", json=chat, headers=headers)
state = None
while state != "Success":
    answered = requests.get(f"{url}/generation/{answer.json()['id']}", headers=headers)
    state = answered.json()["state"]
raise SystemExit(7)
"""


def test_the_bill_says_what_was_made_twice_and_what_is_lost() -> None:
    done = execute(sys.executable, "-c", TWICE)
    assert done.returncode == 7
    bill = done.stderr.splitlines()[2:]
    assert bill == [
        "The local API: 2 accepted, 1 answered, 1 made twice.",
        "Not answered: 1. They are gone now: the local API keeps nothing.",
        "A --resume command that a script has printed for them cannot work any more.",
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that end a process")
def test_a_command_that_a_signal_ended_gives_the_code_that_a_shell_gives() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert execute(sys.executable, "-c", code).returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(os.name == "nt", reason="Windows runs no text as a program")
def test_a_script_is_run_with_uv(tmp_path: Path) -> None:
    uv = tmp_path / "uv"
    uv.write_text(f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:])\n")
    uv.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = execute("script.py", "--resume", "x.db", env=environment)
    assert done.stdout == "run script.py --resume x.db\n"


# Arguments that are wrong, the exit code, and what is said.
WRONG = {
    "a command that is not found": (
        ["no-such-command"],
        127,
        "command not found: no-such-command",
    ),
    "a port that is too high": (["--port", "65536"], 2, "'65536' is not a port, 0 to 65535"),
    "a port below 0": (["--port", "-1"], 2, "port"),
    "a port that is no number": (["--port", "http"], 2, "'http' is not a port, 0 to 65535"),
    "no port": (["--port"], 2, "expected one argument"),
    "an option that is unknown": (["--slow"], 2, ""),
}


@pytest.mark.parametrize(("arguments", "code", "said"), WRONG.values(), ids=WRONG)
def test_arguments_that_are_wrong(arguments: list[str], code: int, said: str) -> None:
    done = execute(*arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert not done.stdout


def test_a_port_that_is_in_use_is_said_to_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = execute("--port", str(port), sys.executable, "-c", "raise SystemExit(7)")
    assert done.returncode == 2
    expected = f"local_api.py: port {port} cannot be used: something else is using it\n"
    assert done.stderr == expected


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process of its own")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_a_command_it_serves_on_its_port_until_it_is_stopped(number: int) -> None:
    port = free_port()
    process = subprocess.Popen(
        [*LOCAL_API, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(4)]
    exports = [shlex.split(line) for line in lines]
    assert {word for word, _ in exports} == {"export"}
    environment = dict(assignment.split("=", 1) for _, assignment in exports)
    assert environment["INFERENCE_BASE_URL"] == f"http://127.0.0.1:{port}/v1"
    headers = {"Authorization": f"Bearer {environment['INFERENCE_API_KEY']}"}
    url = f"{environment['INFERENCE_BASE_URL']}/async/chat/completions"
    with requests.Session() as session:
        session.trust_env = False
        assert session.post(url, json=CHAT, headers=headers, timeout=HANG_SECONDS).ok
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0
    assert not stdout
    assert "1 accepted, 0 answered, none twice" in stderr
    assert "Not answered: 1." in stderr
    assert max(map(len, stderr.splitlines())) <= 80


def test_the_help_fits_a_terminal_and_names_each_option() -> None:
    done = execute("--help", env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    for word in ("--flaky", "--port N", "command", *SCRIPTS):
        assert word in done.stdout


def test_it_can_be_imported_for_tests_as_it_says() -> None:
    _, _, text = (local_api.__doc__ or "").partition("    from local_api import")
    lines = [line[4:] for line in f"    from local_api import{text}".splitlines()]
    code = "\n".join(lines).strip()
    assert len([line for line in code.splitlines() if line]) <= 4
    assert code.count("...  #") == 1
    use = "print(api.url, API_KEY, api.environment['INFERENCE_API_KEY'])"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("...  #", f"{use}  #")],
        env={**os.environ, "PYTHONPATH": str(TOP / "tests")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/v1 ({API_KEY}) \1\n", done.stdout), (
        done.stderr
    )


# Requests

CHAT: Json = {"model": "any", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
SINGLE_PATH, GROUP_PATH = "/async/chat/completions", "/async/group/chat/completions"


class Caller:
    """Calls the local API directly."""

    def __init__(self, api: LocalApi) -> None:
        self.api = api
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy
        self.session.headers["Authorization"] = f"Bearer {API_KEY}"

    def submit(self, request: Any) -> requests.Response:
        """Submit a request, or a group."""
        path = GROUP_PATH if "requests" in request else SINGLE_PATH
        return self.session.post(self.api.url + path, json=request, timeout=HANG_SECONDS)

    def ask(self, **changes: Any) -> Json:
        """Submit a request that differs in this, and return its response."""
        answer = self.submit(CHAT | changes)
        assert answer.status_code == 200, answer.text
        url = f"{self.api.url}/generation/{answer.json()['id']}"
        generation = self.session.get(url, timeout=HANG_SECONDS).json()
        assert generation["state"] == "Success"
        response: Json = generation["response"]
        return response


@pytest.fixture
def caller(api: LocalApi) -> Caller:
    return Caller(api)


def said(content: Any, role: str = "user") -> Json:
    """Return a request with this as its only message."""
    return CHAT | {"messages": [{"role": role, "content": content}]}


def with_parameters(schema: Any) -> Json:
    """Return a tool with these parameters."""
    return {"type": "function", "function": {"name": "weather", "parameters": schema}}


def schema_format(schema: Any) -> Json:
    """Return a response_format with a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "any", "schema": schema}}


REFUSED: list[tuple[Any, str]] = [
    (CHAT | {"metadata": {"number": 1}}, "metadata"),
    (CHAT | {"metadata": []}, "metadata"),
    (CHAT | {"messages": []}, "messages"),
    (CHAT | {"messages": ["Why?"]}, "message"),
    (CHAT | {"model": ""}, "model"),
    (CHAT | {"surprise": 1}, "surprise"),
    (said("Why?", role="boss"), "role"),
    (said(None), "content"),
    (said([]), "content"),
    (said(["Why?"]), "part"),
    (said([{"type": "text"}]), "text"),
    (said([{"type": "image_url", "image_url": "x.png"}]), "url"),
    (said([{"type": "sound"}]), "type"),
    (CHAT | {"max_tokens": 0}, "max_tokens"),
    (CHAT | {"max_tokens": "100"}, "max_tokens"),
    (CHAT | {"max_completion_tokens": True}, "max_completion_tokens"),
    (CHAT | {"n": 11}, "n must be"),
    (CHAT | {"logprobs": 1}, "logprobs"),
    (CHAT | {"tools": {}}, "tools"),
    (CHAT | {"tools": [{"type": "function"}]}, "function"),
    (CHAT | {"tools": [{"type": "function", "function": {}}]}, "name"),
    (CHAT | {"tools": [with_parameters([])]}, "schema"),
    (CHAT | {"response_format": "json"}, "response_format"),
    (CHAT | {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT | {"response_format": {"type": "json_schema"}}, "json_schema"),
    (CHAT | {"response_format": schema_format({"enum": []})}, "enum"),
    ({"requests": [CHAT] * 51}, "1 to 50"),
    ({"requests": []}, "1 to 50"),
    ({"requests": CHAT}, "1 to 50"),
    ({"requests": [CHAT], "model": "any"}, "model"),
    ({"requests": [CHAT, CHAT | {"messages": None}]}, "messages"),
]


def test_it_refuses_what_the_service_refuses(caller: Caller) -> None:
    for request, word in REFUSED:
        answer = caller.submit(request)
        assert answer.status_code == 400, request
        assert word in answer.json()["error"]["message"]
    caller.session.headers["Authorization"] = "Bearer another-key"
    for request in (CHAT, {"requests": [CHAT]}):
        assert caller.submit(request).status_code == 401
    assert not caller.api.generations


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
TEXT_CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
ACCEPTED = [
    said([{"type": "text", "text": "What is it?"}, PICTURE]),
    said([PICTURE]),
    CHAT | {"metadata": {"custom_id": "req-001", "row": "7"}, "temperature": 0.5, "seed": 1},
    CHAT | {"response_format": {"type": "text"}, "stop": ["\n"], "tool_choice": "auto"},
    CHAT
    | {"messages": [*CHAT["messages"], {"role": "assistant", "tool_calls": [TEXT_CALL]}]},
    {"requests": [CHAT] * 50, "webhook_id": "hook"},
]


def test_it_accepts_what_the_service_accepts(caller: Caller) -> None:
    for request in ACCEPTED:
        answer = caller.submit(request)
        assert answer.status_code == 200, answer.text
    assert len(caller.api.generations) == 5 + 50


# Answers


def text_of(response: Json) -> str:
    """Return the text of the only choice."""
    [choice] = response["choices"]
    text: str = choice["message"]["content"]
    return text


def test_questions_are_answered_or_come_back(caller: Caller) -> None:
    answers = {
        "What is 2 + 2?": "2 + 2 equals 4.",
        "Why?": "You asked: Why?",
        "": "You asked: ",
    }
    for question, answer in answers.items():
        assert text_of(caller.ask(**said(question))) == answer
    parts = [{"type": "text", "text": "What"}, PICTURE, {"type": "text", "text": "is it?"}]
    assert text_of(caller.ask(**said(parts))) == "You asked: What is it?"
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "Why?"},
    ]
    assert text_of(caller.ask(messages=chat)) == "2 + 2 equals 4."


LONG = "You asked: " + "x" * 89  # 25 tokens of four characters
CUTS = [
    ({}, LONG, "stop"),
    ({"max_tokens": 25}, LONG, "stop"),
    ({"max_tokens": 24}, LONG[:96], "length"),
    ({"max_completion_tokens": 1}, LONG[:4], "length"),
    ({"max_tokens": 100, "max_completion_tokens": 2}, LONG[:8], "length"),
]


def test_an_answer_that_is_longer_than_max_tokens_is_cut_off(caller: Caller) -> None:
    for limits, text, reason in CUTS:
        response = caller.ask(**said("x" * 89), **limits)
        assert text_of(response) == text
        assert response["choices"][0]["finish_reason"] == reason
        usage = response["usage"]
        assert usage["completion_tokens"] == len(text) // 4
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


SCHEMA = {
    "type": "object",
    "properties": {
        "topic": {"enum": ["bill", "bug"]},
        "city": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "is_urgent": {"type": "boolean"},
        "words": {"type": "array", "items": {"type": "string"}},
        "note": {"type": ["null", "string"]},
        "kind": {"const": "ticket"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "inner": {"type": "object", "properties": {"x": {"type": "number"}}},
    },
    "required": ["topic", "city", "more"],
}
SAMPLE = {
    "topic": "bill",
    "city": "text",
    "count": 1,
    "share": 1.5,
    "is_urgent": True,
    "words": ["text"],
    "note": None,
    "kind": "ticket",
    "either": 1,
    "inner": {"x": 1.5},
    "more": "text",
}


def test_a_response_format_gets_json(caller: Caller) -> None:
    formats: list[tuple[Json, Any]] = [
        ({"type": "json_object"}, {"answer": "2 + 2 equals 4."}),
        (schema_format(SCHEMA), SAMPLE),
        ({"type": "json_schema", "json_schema": {"name": "any"}}, {}),
    ]
    for response_format, value in formats:
        response = caller.ask(response_format=response_format)
        assert json.loads(text_of(response)) == value
        assert response["choices"][0]["finish_reason"] == "stop"
    cut_off = caller.ask(response_format=formats[1][0], max_tokens=5)
    assert cut_off["choices"][0]["finish_reason"] == "length"


def test_tools_get_a_tool_call_until_they_have_been_called(caller: Caller) -> None:
    tools = [with_parameters(SCHEMA), with_parameters({})]
    [choice] = caller.ask(tools=tools)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    [call] = message["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == SAMPLE
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Sunny"}
    messages = [*CHAT["messages"], message, result]
    assert text_of(caller.ask(tools=tools, messages=messages)) == "2 + 2 equals 4."
    assert text_of(caller.ask(tools=tools, tool_choice="none")) == "2 + 2 equals 4."
    without_parameters = {"type": "function", "function": {"name": "now"}}
    [choice] = caller.ask(tools=[without_parameters])["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == "{}"


def test_several_choices_and_log_probabilities(caller: Caller) -> None:
    response = caller.ask(n=3, logprobs=True)
    assert [choice["index"] for choice in response["choices"]] == [0, 1, 2]
    for choice in response["choices"]:
        tokens = [token["token"] for token in choice["logprobs"]["content"]]
        assert "".join(tokens) == choice["message"]["content"] == "2 + 2 equals 4."
    assert response["usage"]["completion_tokens"] == 3 * 4


def test_a_group_is_listed_when_it_is_done_and_in_any_order(caller: Caller) -> None:
    names = [f"req-{number:03}" for number in range(50)]
    requests_of_group = [CHAT | {"metadata": {"custom_id": name}} for name in names]
    answer = caller.submit({"requests": requests_of_group}).json()
    assert answer["groupSize"] == 50
    url = f"{caller.api.url}/async/group/{answer['groupId']}/generations"
    listed = caller.session.get(url, timeout=HANG_SECONDS).json()["generations"]
    custom_ids = [generation["request"]["metadata"]["custom_id"] for generation in listed]
    assert sorted(custom_ids) == names
    assert custom_ids != names
    for missing in ("generation/no-such-id", "async/group/no-such-id/generations"):
        answer = caller.session.get(f"{caller.api.url}/{missing}", timeout=HANG_SECONDS)
        assert answer.status_code == 404


def test_a_generation_is_queued_then_in_progress_then_done() -> None:
    with LocalApi(seconds=(HANG_SECONDS, HANG_SECONDS)) as api:
        caller = Caller(api)
        generation_id = caller.submit(CHAT).json()["id"]
        generation = api.generations[generation_id]
        url = f"{api.url}/generation/{generation_id}"
        steps: list[tuple[str, Callable[[], None]]] = [
            ("Queued", lambda: None),
            ("In Progress", lambda: set_time(generation, "dispatched")),
            ("Success", lambda: set_time(generation, "finished")),
        ]
        for state, reach in steps:
            reach()
            shown = caller.session.get(url, timeout=HANG_SECONDS).json()
            assert shown["id"] == generation_id
            assert shown["state"] == state
            assert shown["request"] == CHAT
            assert (shown["dispatchedAt"] is None) == (state == "Queued")
            assert (shown["finishedAt"] is None) == (state != "Success")
            assert (shown["response"] is None) == (state != "Success")
            assert api.unanswered() == (0 if state == "Success" else 1)


def set_time(generation: local_api.Generation, name: str) -> None:
    """Make a generation reach a time of its life now."""
    setattr(generation, name, datetime.now(timezone.utc))
