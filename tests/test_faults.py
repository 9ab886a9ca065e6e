"""What the API and the network do wrong, what becomes of the request, and what is shown.

The tables are the contents: a line for each fault, its outcome, words of the reason on screen.
All faults of a table meet in one run, where each request is named after its fault; in the group
script as groups of one. conftest checks that nothing was made twice, and the key is nowhere.
"""

import asyncio
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from conftest import SCRIPTS, Example, Run, calls, custom_ids, faulty, load
from local_api import (
    API_KEY,
    Fault,
    Json,
    LocalApi,
    Proceed,
    after,
    body,
    close,
    cut,
    stall,
    status,
)

# By what goes wrong: what the API does, the outcome, and words of the reason
Table = dict[str, tuple[Fault, str, str]]
KEY = API_KEY.encode()
HTML = "text/html"
FUTURE = "Fri, 31 Dec 2100 23:59:59 GMT"
NEVER = f"Wed, 21 Oct 2015 {'9' * 400}:28:00 GMT"
END = b"Connection: close\r\n\r\n"
CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + END + b"-5\r\n{}\r\n"
KEY_AS_STATUS = b"HTTP/1.1 400 " + KEY + b"\r\nContent-Length: 0\r\n" + END


def raw(answer: bytes) -> Fault:
    async def fault(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        assert isinstance(request.transport, asyncio.Transport)
        request.transport.write(answer)
        return await close(request, proceed)

    return fault


async def interim(request: web.Request, proceed: Proceed) -> web.StreamResponse:
    """Send an interim answer, and 0.2 s later another, which misleads whoever reads it."""
    assert isinstance(request.transport, asyncio.Transport)
    request.transport.write(b"HTTP/1.1 102 Wait\r\n\r\n")
    await asyncio.sleep(0.2)
    return web.json_response({"id": "late", "groupId": "late", "generations": [1]})


def each_is(value: Any, code: int = 200) -> Fault:
    keys = ["id", "groupId", "state", "generations"]
    return body(json.dumps(dict.fromkeys(keys, value)).encode(), code=code)


# --- Submissions

# Surely not accepted: sent again. How Retry-After is read is the same in both scripts, and the
# one with groups waits for each: it tries the first three.
TURNED_AWAY: Table = {
    "429": (status(429), "Success", ""),
    "429, Retry-After: 0": (status(429, Retry_After="0"), "Success", ""),
    "429, Retry-After: 1": (status(429, Retry_After="1"), "Success", ""),
    "429, until a date that can't be": (status(429, Retry_After=NEVER), "Success", ""),
}
# Refused, and so Failed, or perhaps accepted: Unknown. Neither is sent again. A poll that meets
# them is made again.
ANSWERS: Table = {
    "102, and an answer later": (interim, "Unknown", "HTTP 102"),
    "307 with a message": (status(307, "go", Location="/v1/x"), "Failed", "HTTP 307: go"),
    "400": (status(400, "max_tokens: too large"), "Failed", "max_tokens: too large"),
    "400 with the key": (status(400, f"<{API_KEY}>"), "Failed", "<[API key]>"),
    "400, the key as its text": (raw(KEY_AS_STATUS), "Failed", "HTTP 400"),
    "408": (status(408), "Unknown", "HTTP 408"),
    "500": (status(500), "Unknown", "HTTP 500"),
    "502, charset=undefined": (body(b"<u>", "a/b; charset=undefined", 502), "Unknown", "<u>"),
    "502 with the key": (body(b"to <%s>" % KEY, HTML, 502), "Unknown", "to <[API key]>"),
    "503, Retry-After: 1": (status(503, "busy", Retry_After="1"), "Unknown", "busy"),
    "no answer": (stall, "Unknown", "timed out"),
    "cut": (cut, "Unknown", "127.0.0.1"),
    "a chunk of -5 bytes": (raw(CHUNK), "Unknown", "127.0.0.1"),
    "no HTTP, the key at letter 470": (raw(b"x " * 205 + KEY), "Unknown", "x x"),
    "200 with HTML": (body(b"<p>Please log in", HTML), "Unknown", "Please log in"),
    "200 with a list": (body(b'["a-list"]'), "Unknown", "a-list"),
    "200, nested too deep": (body(b"[" * 100_000), "Unknown", "[[["),
    "200, a number too long": (body(b'{"id": %s}' % (b"9" * 5000)), "Unknown", "9999"),
    "200 with bytes, not text": (body(b"\xff\xfe\x80{}"), "Unknown", "HTTP 200"),
}
SUBMISSIONS: Table = ANSWERS | {
    "200 with {}": (body(b"{}"), "Unknown", "id"),
    "200, an id that is a path": (each_is("../x"), "Unknown", "../x"),
    "200, an id that is the key": (each_is(API_KEY), "Unknown", "[API key]"),
}
POLLS: Table = {
    name: (fault, "Pending", words) for name, (fault, _, words) in ANSWERS.items()
}
POLLS |= {
    "403": (status(403, "not yours"), "Pending", "not yours"),
    "429, Retry-After: 1": (status(429, "wait", Retry_After="1"), "Pending", "wait"),
    "200 with {}": (body(b"{}"), "Pending", "the reply"),
    "200 with the key": (each_is(API_KEY), "Pending", "the reply"),
}


def name_requests(example: Example, names: Any, size: int = 1) -> None:
    """Let the script send a request of each name, side by side or in groups of this size."""
    example.ask(dict.fromkeys(names, "What is 2 + 2?"))
    example.edit(REQUEST_TIMEOUT_SECONDS=2)
    example.group_by(size)
    if not example.is_group:
        example.edit(MAX_CONCURRENT_POLLS=30)


def meet(api: LocalApi, table: Table, polls: bool, times: float = 1000) -> Counter[str]:
    """Let each submission, or poll, meet the fault of its name; return how often each came."""
    met: Counter[str] = Counter()

    def choose(request: web.Request, sent: Json) -> Fault | None:
        if (request.method == "GET") != polls:
            return None
        if polls:
            *_, group_id, generation_id = request.path.split("/")
            polled = api.groups.get(group_id) or [api.generations[generation_id]]
            name = str(polled[0].custom_id)
        else:
            [name] = custom_ids(sent)
        met[name] += 1
        fault, outcome, _ = table[name]
        if met[name] > times:
            return None
        return after(fault) if outcome == "Unknown" else fault  # it was accepted, in fact

    api.choose_fault = choose
    return met


def check(run: Run, table: dict[str, tuple[Any, str, str]], found: dict[str, Json]) -> None:
    screen = " ".join(run.stdout.split())
    for content in [screen.encode(), *(path.read_bytes() for path in run.folder.glob("*/*"))]:
        assert KEY[:12] not in content
    assert "\x1b" not in screen
    wrong = {}
    for name, (_, outcome, words) in table.items():
        state, error = found[name]["state"], found[name]["error"] or ""
        is_right = words in error and words in screen and not (outcome == "Success" and error)
        if state != outcome or not is_right:
            wrong[name] = f"{state}: {error}"
    assert wrong == {}


def by_name(example: Example, run: Run) -> dict[str, Json]:
    for row in run.answers:
        generation = example.api.generations.get(row["generation_id"])
        if generation and row["question"]:
            assert generation.custom_id == row["custom_id"]
    return {row["custom_id"]: row for row in run.answers}


def go_on(example: Example, run: Run) -> Run:
    """Go on with a run when the API is well again; nothing is submitted a second time."""
    example.api.choose_fault = lambda *_: None
    example.api.alter = lambda generation: generation
    sent = calls(example.api, "POST")
    resumed = example.run("--resume", str(run.path))
    assert calls(example.api, "POST") == sent
    return resumed


def test_a_submission_that_is_turned_away_is_sent_again(example: Example) -> None:
    names = list(TURNED_AWAY)[: 3 if example.is_group else None]
    table = {name: TURNED_AWAY[name] for name in names}
    name_requests(example, table)
    example.edit(MAX_IN_VAIN=2)  # what is accepted sets the count back
    met = meet(example.api, table, polls=False, times=1)
    run = example.run()
    check(run, table, by_name(example, run))
    assert met == dict.fromkeys(table, 2)
    assert run.code == 0


def test_a_submission_that_is_refused_or_unknown_is_sent_once(single: Example) -> None:
    name_requests(single, SUBMISSIONS)
    met = meet(single.api, SUBMISSIONS, polls=False)
    single.edit(MAX_IN_VAIN=99, MAX_CONCURRENT_POLLS=60)  # all are under way at once
    run = single.run()
    check(run, SUBMISSIONS, by_name(single, run))
    assert met == dict.fromkeys(SUBMISSIONS, 1)
    assert run.code == 1


# A run ends at the first group that is Unknown. This goes on.
PROGRAM = """
from async_group_example import *

client = Client(timeout_seconds=REQUEST_TIMEOUT_SECONDS)
results = Results("results/x.db")
results.add(new_record(*each) for each in load_questions().items())
while results.with_outcome(NOT_SENT):
    with suppress(ApiError):
        submit_all(client, results, lambda group: print(group[0].error))
"""


def test_a_group_that_is_refused_or_unknown_is_sent_once(group: Example) -> None:
    name_requests(group, SUBMISSIONS)
    (group.folder / "results").mkdir()
    (group.folder / "program.py").write_text(PROGRAM)
    group.script = "program.py"
    met = meet(group.api, SUBMISSIONS, polls=False)
    run = group.run()
    check(run, SUBMISSIONS, run.records)
    assert met == dict.fromkeys(SUBMISSIONS, 1)


# --- Polls


def test_a_poll_that_fails_is_made_again(example: Example) -> None:
    rounds = 2 if not example.is_group else 1
    example.edit(MAX_POLL_ATTEMPTS=rounds)
    name_requests(example, POLLS)
    met = meet(example.api, POLLS, polls=True)
    run = example.run()
    check(run, POLLS, by_name(example, run))
    assert met == dict.fromkeys(POLLS, rounds)
    assert "MAX_POLL_ATTEMPTS" in run.stdout
    assert run.code == 1
    resumed = go_on(example, run)
    assert set(resumed.outcomes.values()) == {"Success"}
    assert resumed.code == 0


def says(content: Any, finish_reason: Any = "stop", **more: Any) -> Json:
    choice = {"message": {"content": content}, "finish_reason": finish_reason}
    return {"response": {"choices": [choice], **more}}


def fails(reason: Any) -> Json:
    return {"state": "Failed", "stateMessage": reason, "response": None}


HUGE = dict.fromkeys(["prompt_tokens", "completion_tokens", "total_tokens"], 10**399)
TWO_LINES = "One\u2028two\u0085three\x00"
HALF = {"state": "In Progress", **says("Half", "length")}
DEEP = json.loads("[" * 500 + "]" * 500)

# What a generation says in place of its proper words
GENERATIONS: dict[str, tuple[Json, str, str]] = {
    "a state that nobody knows": ({"state": "Expired"}, "Pending", "Expired"),
    "Success, no response": ({"response": None}, "Pending", "without a response"),
    "In Progress, half an answer": (HALF, "Pending", ""),
    "Failed, and why": (fails("too hot"), "Failed", "too hot"),
    "Failed, and not why": (fails(None), "Failed", "no reason"),
    "an answer of NaN": (says(float("nan")), "Success", ""),
    "an answer with the key": (says(API_KEY), "Success", ""),
    "an answer with odd line ends": (says(TWO_LINES), "Success", ""),
    "nested 500 deep": (says("Deep", more=DEEP), "Success", ""),
    "odd counts of tokens": (says("A", usage={"total_tokens": "7"}), "Success", ""),
    "counts of tokens of 400 digits": (says("A", usage=HUGE), "Success", ""),
}
METADATA = {"metadata": {"custom_id": "another's"}}
ANOTHERS: dict[str, tuple[Json, str, str]] = {  # a group lists what it likes: see LISTS
    "another generation": ({"id": "another"}, "Pending", "not this generation"),
    "another's custom id": ({"request": METADATA}, "Pending", "another request"),
}
# dispatchedAt and finishedAt of a Success, after 2026-01-31T12:00:, and the duration in ms
TIMES = {
    "one digit": ("01.0Z", "02.5Z", 1500),
    "nanoseconds": ("01.000000000Z", "02.500000999Z", 1500),
    "another offset": ("01.000+00:00", "02.500Z", 1500),
    "no offset": ("01.000000", "02.500000Z", None),
}


def test_an_odd_generation_ends_no_run_and_spoils_no_other(example: Example) -> None:
    table = GENERATIONS | (ANOTHERS if not example.is_group else {})
    for name, times in TIMES.items():
        first, last = (f"2026-01-31T12:00:{time}" for time in times[:2])
        table[name] = ({"dispatchedAt": first, "finishedAt": last}, "Success", "")
    table["no time"] = ({"dispatchedAt": None, "finishedAt": 7}, "Success", "")
    name_requests(example, table, size=50)
    example.edit(MAX_POLL_ATTEMPTS=2)
    example.api.alter = lambda shown: shown | table[custom_ids(shown["request"])[0]][0]
    run = example.run()
    rows = by_name(example, run)
    check(run, table, rows)
    durations = {name: rows[name]["duration_ms"] for name in TIMES}
    assert durations == {name: duration for name, (*_, duration) in TIMES.items()}
    assert re.search("1 pending: .*Expired", run.stdout, re.I)
    assert "cut off" not in run.stdout  # half an answer is not final
    assert run.code == 1
    assert set(go_on(example, run).outcomes.values()) <= {"Success", "Failed"}


WAITS = {"state": "Queued", "response": None}
STRAY = {"id": "stray", "state": "Success", **says("An answer")}
TWO = "Success Success"
THREE = "Success Success Success"
# What a group of two lists, given its generations a and b and the number of the poll; the
# outcomes of a, of b, and of a record that is made of what answers none of both
LISTS: dict[str, tuple[Callable[[Json, Json, int], list[Any]], str]] = {
    "one is late": (lambda a, b, poll: [a, b] if poll > 1 else [b], TWO),
    "a twice, Queued first": (lambda a, b, poll: [a | WAITS, a, b], TWO),
    "a twice, Failed first": (lambda a, b, poll: [a | fails("no"), a, b], TWO),
    "a has no id": (lambda a, b, poll: [a | {"id": None}, b], TWO),
    "a has metadata only at first": (
        lambda a, b, poll: [a | WAITS if poll == 1 else a | {"request": None}, b],
        TWO,
    ),
    "a has no metadata": (lambda a, b, poll: [a | {"request": None}, b], f"Pending {TWO}"),
    "a has no metadata when b is not final": (
        lambda a, b, poll: [a, b | WAITS] if poll == 1 else [a | {"request": None}, b],
        TWO,
    ),
    "two answers to a": (lambda a, b, poll: [a, b, a | {"id": a["id"] + "2"}], TWO),
    "an answer to nobody": (lambda a, b, poll: [STRAY, a, b], THREE),
    "an answer to another": (
        lambda a, b, poll: [STRAY | {"id": "stray2", "request": METADATA}, a, b],
        THREE,
    ),
    "an odd id": (lambda a, b, poll: [a, b, STRAY | {"id": "\ud800"}], TWO),
    "nobody's, not final": (lambda a, b, poll: [a, b, STRAY | WAITS | {"id": "s"}], TWO),
    "no generations": (lambda a, b, poll: [1, None, "x", [], {}, {"state": 3}, a, b], TWO),
}


def test_nothing_in_the_list_of_a_group_is_lost_or_mixed_up(group: Example) -> None:
    names = [f"{name}/{which}" for name in LISTS for which in "ab"]
    name_requests(group, names, size=2)
    group.edit(MAX_POLL_ATTEMPTS=4)
    polls: Counter[str] = Counter()

    def alter_list(generations: list[Json]) -> list[Any]:
        a, b = sorted(generations, key=lambda each: custom_ids(each["request"]))
        [name] = custom_ids(a["request"])
        polls[name] += 1
        return LISTS[name.removesuffix("/a")][0](a, b, polls[name])

    group.api.alter_list = alter_list
    group.api.choose_fault = faulty(status(503), polls=True, times=1)
    run = group.run()
    rows = by_name(group, run)
    found = {}
    for name in LISTS:
        group_id = rows[f"{name}/a"]["group_id"]
        members = [row for row in rows.values() if row["group_id"] == group_id]
        found[name] = " ".join(row["state"] for row in members)
    assert found == {name: outcomes for name, (_, outcomes) in LISTS.items()}
    assert rows["a has no metadata/a"]["error"] is None  # that of the first poll is forgotten
    for row in list(rows.values())[len(names) :]:
        assert (row["custom_id"], row["question"]) == (row["generation_id"], "")
        assert row["answer"]


def test_a_group_size_that_is_not_what_was_sent_is_said(group: Example) -> None:
    group.edit(MAX_POLL_ATTEMPTS=1)
    half = body(b'{"groupId": "a-group", "groupSize": 2}')
    group.api.choose_fault = faulty(half, polls=False)
    run = group.run()
    assert re.search(r"\b4\b.*\b2\b", run.stdout + run.stderr)
    assert set(run.outcomes.values()) == {"Pending"}


# --- What ends the submitting or the polling

# What every submission, or every poll, meets; whether it is one of polls; the outcomes of 20
# requests, and a pattern of the screen's words
DAY = r"(86400|863\d\d) seconds"
TEN_MINUTES = r"(600|5\d\d) seconds"
ENDS: dict[str, tuple[Fault, bool, str, str]] = {
    "401": (status(401, "who?"), False, "Not sent", r"who\?.*INFERENCE_API_KEY"),
    "403": (status(403, "not you"), False, "Not sent", "not you"),
    "429, 600": (status(429, Retry_After="600"), False, "Not sent", TEN_MINUTES),
    "429, 86400": (status(429, Retry_After="86400"), False, "Not sent", DAY),
    "429, 2100": (status(429, Retry_After=FUTURE), False, "Not sent", r"\d{4} seconds"),
    "503, 600": (status(503, Retry_After="600"), False, "Not sent, Unknown", TEN_MINUTES),
    "500": (status(500), False, "Not sent, Unknown", "HTTP 500"),
    "one id for all": (each_is("same"), False, "Not sent, Pending, Unknown", "same"),
    "polls: 401": (status(401), True, "Pending", "INFERENCE_API_KEY"),
    "polls: 429, 600": (status(429, Retry_After="600"), True, "Pending", TEN_MINUTES),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_concerns_all_requests_ends_the_run(example: Example, name: str) -> None:
    fault, polls, outcomes, words = ENDS[name]
    example.edit(NUM_REQUESTS=20, MAX_IN_VAIN=2, MAX_POLL_ATTEMPTS=3)
    example.group_by(1)
    if not example.is_group:
        example.edit(MAX_CONCURRENT_POLLS=1)
    elif name == "503, 600":  # what is Unknown ends it before the pause does
        words = "HTTP 503"
    example.api.delay_seconds = 0.02
    example.api.choose_fault = faulty(fault, polls)
    run = example.run()
    assert ", ".join(sorted(set(run.outcomes.values()))) == outcomes
    assert re.search(words, " ".join(run.stdout.split()))
    assert f'--resume "{run.path.relative_to(run.folder)}"' in run.stdout
    assert run.code == 1
    assert 1 <= calls(example.api, "GET" if polls else "POST") < 10


NETWORKS = {
    "nothing listens": ("http", "127.0.0.1:{silent}", "refused"),
    "an unknown host": ("https", "nowhere.invalid", ""),
    "TLS to a port that has none": ("https", "127.0.0.1:{port}", "SSL"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_connection_a_run_ends_soon(example: Example, name: str) -> None:
    scheme, host, words = NETWORKS[name]
    example.edit(NUM_REQUESTS=200, MAX_IN_VAIN=2)
    with socket.socket() as silent:  # has a port, and does not listen
        silent.bind(("127.0.0.1", 0))
        host = host.format(silent=silent.getsockname()[1], port=example.api.port)
        example.environment["INFERENCE_BASE_URL"] = f"{scheme}://{host}/v1"
        example.environment |= {"NO_PROXY": "*", "no_proxy": "*"}
        run = example.run()
    assert set(run.outcomes.values()) == {"Not sent"}
    [_, ending] = " ".join(run.stdout.split()).split("Request-Response Correlation")
    assert re.search(f"{host}/v1: .*{words}.*check .*address", ending)
    assert ending.count(f"no answer from {scheme}://{host}/v1: ") == 1  # though all have it
    called = [row for row in run.answers if row["error"]]
    assert 1 <= len(called) <= (10 if not example.is_group else 100)  # in 2 rounds
    assert run.code == 1


def test_an_outage_makes_unknown_only_what_is_under_way(example: Example) -> None:
    example.edit(NUM_REQUESTS=60, MAX_IN_VAIN=2, MAX_POLL_ATTEMPTS=1)
    example.group_by(2)
    is_busy = threading.Event()

    def choose(request: web.Request, sent: Json) -> None:
        if len(example.api.calls) > 10:
            is_busy.set()

    example.api.choose_fault = choose
    example.api.delay_seconds = 0.03
    process = example.start()
    assert is_busy.wait(30)
    example.api.__exit__()  # in the middle of some calls
    run = example.finish(process)
    counts = Counter(run.outcomes.values())
    assert counts.keys() <= {"Pending", "Unknown", "Not sent"}
    assert counts["Pending"] >= 5
    assert counts["Unknown"] <= 10  # a call of each worker, and one on a dead connection
    assert counts["Not sent"] >= 10
    assert run.code == 1


@pytest.mark.parametrize("retry_after", ["1", None], ids=["Retry-After: 1", "no header"])
def test_a_limit_on_the_rate_is_kept(example: Example, retry_after: str | None) -> None:
    api = example.api
    api.rate, api.burst, api.tokens, api.retry_after = 5, 5, 5, retry_after
    example.edit(NUM_REQUESTS=15, POLL_INTERVAL_SECONDS=0.2)
    example.group_by(1)
    run = example.run()
    assert set(run.outcomes.values()) == {"Success"}
    assert len(api.generations) == 15
    assert 15 < calls(api, "POST") < 15 * 5
    assert run.code == 0


# --- The key goes nowhere else

ADDRESSES = {
    "https://api.example/v1": True,
    " http://localhost:8000/v1/ ": True,
    "http://[::1]:8000/v1": True,
    "http://api.example/v1": False,
    "http://127.0.0.1.example/v1": False,
    "http://localhost:x@api.example/v1": False,
    f"https://{API_KEY}@api.example/v1": False,
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_must_be_https_or_this_machine_s(script: str, url: str) -> None:
    module = load(script)
    if ADDRESSES[url]:
        assert module.Client(API_KEY, url).base_url == url.strip().rstrip("/")
        return
    with pytest.raises(ValueError, match=r"\S") as caught:
        module.Client(API_KEY, url)
    assert API_KEY not in str(caught.value)


def test_the_key_does_not_follow_a_redirect(example: Example, tmp_path: Path) -> None:
    """It is sent with each call to the API itself, whatever .netrc says."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    example.environment["NETRC"] = str(tmp_path / "netrc")
    example.environment["INFERENCE_BASE_URL"] = example.api.url + "/ "
    example.group_by(1)
    with LocalApi() as elsewhere:
        proxy = f"http://127.0.0.1:{elsewhere.port}"
        example.environment |= {"http_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
        redirect = status(307, Location=f"{elsewhere.url}/async/chat/completions")
        example.api.choose_fault = lambda _, sent: (
            redirect if "req-001" in str(sent) else None
        )
        run = example.run()
    assert elsewhere.calls == []
    assert [*run.outcomes.values()] == ["Failed", "Success", "Success", "Success"]
    sent = {headers["Authorization"] for headers in example.api.headers_seen}
    assert sent == {f"Bearer {API_KEY}"}
