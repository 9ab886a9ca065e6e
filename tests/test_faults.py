"""What the API and the network do wrong, and what becomes of submissions and polls.

Most tests are tables of faults. Where a script is run, its end is checked for more than the table
says: no traceback, no key, every line of the answers is JSON, nothing was made and paid for twice.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import (
    API_KEY,
    GROUP,
    HANG_SECONDS,
    SCRIPTS,
    SINGLE,
    Example,
    Run,
    faulty,
    in_turn,
    load,
    one_each,
    read_results,
)
from local_api import (
    Fault,
    Flaky,
    Json,
    LocalApi,
    Proceed,
    after,
    answer_slowly,
    body,
    close,
    cut,
    cut_redirect,
    drip,
    drip_with_length,
    garble,
    overstate,
    reset,
    stall,
    status,
    web,
)

MODULES = {script: load(script) for script in SCRIPTS}

DEEP = b'{"response": ' + b"[" * 1000 + b"]" * 1000 + b"}"  # which a newer Python can read
DEEPER = b"[" * 100_000
HUGE = b'{"state": "Success", "response": {"usage": {"total_tokens": ' + b"9" * 5000 + b"}}}"


def raw(answer: bytes, stalls: bool = False) -> Fault:
    """Carry the request out, and send these bytes. BODY in them is the body of the proper answer.

    Then the connection is closed, or stalls.
    """

    async def fault(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        assert isinstance(request.transport, asyncio.Transport)
        content = (await proceed()).body  # type: ignore[attr-defined]
        length = b"%x" % len(content)
        request.transport.write(answer.replace(b"LENGTH", length).replace(b"BODY", content))
        return await (stall if stalls else close)(request, proceed)

    return fault


# An answer that doesn't say what became of the request
NO_ANSWER = {
    "408": status(408),
    "500": status(500),
    "502 with HTML": body(b"<html><h1>Bad Gateway</h1></html>", "text/html", 502),
    "503 with no Retry-After": status(503),
    "503 with Retry-After": status(503, Retry_After="1"),
    "503 with a nonsense Retry-After": status(503, Retry_After="soon"),
    "599": status(599),
    "reset": reset,
    "closed": close,
    "cut": cut,
    "garbled": garble,
    "stalled": stall,
    "dripping": drip,
    "dripping with Content-Length": drip_with_length,
    "200 with HTML": body(b"<html>Please log in</html>", "text/html"),
    "200 with nothing": body(b""),
    "200 with a list": body(b"[]"),
    "200 with a text": body(b'"Success"'),
    "200 with null": body(b"null"),
    "200 with an empty object": body(b"{}"),
    "200 with broken JSON": body(b'{"id": "abc", "state": "Suc'),
    "200 nested too deep": body(DEEPER),
    "200 with a number too long": body(HUGE),
    "200 with bytes that are no text": body(b"\xff\xfe\xfd\x80{}"),
    "200 with odd types": body(b'{"id": 7, "state": 1, "groupId": [], "generations": {}}'),
    "200 with an id that is a path": body(b'{"id": "../x", "groupId": "../x"}'),
    "200 with an empty id": body(b'{"id": "", "groupId": ""}'),
    "204": body(b"", code=204),
}
# The text of the error that this makes has the word for a certificate which can't be verified.
CERTIFICATE_TEXT = raw(b"CERTIFICATE_VERIFY_FAILED\r\n\r\n")
REFUSALS = {
    "302 to another host": status(302, Location="http://127.0.0.1:1/elsewhere"),
    "304": status(304),
    "400": status(400, "max_tokens is too large"),
    "404": status(404, "no such thing"),
    "409": status(409),
    "422": status(422),
}
BUSY = {
    "429": status(429),
    "429 with Retry-After in seconds": status(429, Retry_After="1"),
    "429 with Retry-After as a date": status(
        429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"
    ),
    "429 with a nonsense Retry-After": status(429, Retry_After="99999999 eggs"),
    "429 with a negative Retry-After": status(429, Retry_After="-5"),
    "429 with an impossible date": status(429, Retry_After="Wed, 99 Oct 99999 07:28:00 GMT"),
}
LOCK_OUTS = {
    "401": status(401, "this key is not valid"),
    "402": status(402, "no credit"),
    "403": status(403, "this key may not"),
    "429 for an hour": status(429, "come back later", Retry_After="3600"),
}
POLL_FAULTS = (
    NO_ANSWER
    | REFUSALS
    | BUSY
    | {
        "307 that is cut": cut_redirect,
        "402": status(402),
        "403": status(403),
        "200 nested a thousand deep": body(DEEP),
        "200 with a state that is null": body(b'{"state": null, "generations": null}'),
        "200 with a state nobody knows": body(b'{"state": "Paused", "generations": []}'),
        "200 with members that are none": body(
            b'{"state": "?", "generations": [1, null, "x", [], {}, {"state": 3}]}'
        ),
    }
)
# The answer has arrived, though the connection says that there is more to come.
WHOLE_ANSWERS = {
    "closed early": overstate,
    "stalled": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nBODY", stalls=True),
    "closed a terabyte early": raw(
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\nBODY"
    ),
    "chunked and closed": raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nLENGTH\r\nBODY\r\n"
    ),
    "chunked and stalled": raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nLENGTH\r\nBODY\r\n",
        stalls=True,
    ),
}


def cases(table: dict[str, Fault], *names: str) -> list[object]:
    """Make a case of each row of a table, or of these rows."""
    return [pytest.param(table[name], id=name) for name in names or table]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy comes between this process and the local API."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def new_client(module: types.ModuleType, api: LocalApi) -> Any:
    """Return a client for the local API that waits no longer than a second."""
    return module.Client(api_key=API_KEY, base_url=api.url, timeout_seconds=1)


def forget(records: list[Any]) -> None:
    """Save nothing."""


def submit(client: Any, custom_id: str) -> str:
    """Submit one request, in the group script as a group of one; return the id in the answer."""
    request = MODULES[SINGLE].new_record(custom_id, "What is 2 + 2?").request
    if hasattr(client, "submit_group"):
        return client.submit_group([request])
    return client.submit_generation(request)


def fetch(client: Any, given_id: str) -> Any:
    """Poll the generation, in the group script the group, that has this id."""
    if hasattr(client, "fetch_group"):
        return client.fetch_group(given_id)
    return client.fetch_generation(given_id)


def submit_each(
    script: str, api: LocalApi, faults: list[Fault], times: float = float("inf")
) -> list[tuple[list[Any], str, list[str]]]:
    """Submit two requests for each fault, as a program of its own would, all at the same time.

    times is how often a submission meets its fault. Return for each fault the records at the end,
    the class of the exception at the end ("" if none), and the states that were saved.
    """
    module = MODULES[script]
    one_at_a_time = [1] if script == SINGLE else []
    seen: Counter[str] = Counter()

    def choose(request: web.Request, sent: Json) -> Fault | None:
        if request.method != "POST":
            return None
        [first, *_] = sent.get("requests", [sent])
        custom_id = first["metadata"]["custom_id"]
        seen[custom_id] += 1
        return faults[int(custom_id.split("-")[0])] if seen[custom_id] <= times else None

    def run_program(number: int) -> tuple[list[Any], str, list[str]]:
        records = [module.new_record(f"{number}-{name}", "What is 2 + 2?") for name in "ab"]
        client = new_client(module, api)
        saved: list[str] = []
        ending = ""

        def save(rows: list[Any]) -> None:
            saved.extend(row.state for row in rows)

        with ThreadPoolExecutor(1) as pool:
            try:
                list(module.submit_all(client, pool, records, save, *one_at_a_time))
            except module.ApiError as error:
                ending = type(error).__name__
        return records, ending, saved

    api.choose_fault = choose
    pool = ThreadPoolExecutor(len(faults))
    futures = [pool.submit(run_program, number) for number in range(len(faults))]
    pool.shutdown(wait=False)  # a call that hangs ends with the local API
    programs = [future.result(HANG_SECONDS) for future in futures]
    made = Counter(generation.custom_id for generation in api.generations.values())
    assert set(made.values()) <= {1}
    for records, _, _ in programs:
        assert all(API_KEY not in str(record.error) for record in records)
    return programs


def check_resume_command(run: Run, *arguments: str) -> None:
    """Check that the command which goes on with this run is shown."""
    ending = "".join(f" {argument}" for argument in arguments)
    command = rf'--resume "\S*{re.escape(run.results.name)}"{ending}$'
    assert re.search(command, run.stdout, re.M)


def mend(example: Example) -> None:
    """Let the API answer properly from now on."""
    example.api.choose_fault = lambda request, sent: None


def count_polls(api: LocalApi) -> int:
    """Count the polls that have reached the API."""
    return sum(method == "GET" for method, _ in api.calls)


# Polls


def test_a_poll_that_fails_is_made_again(single: Example) -> None:
    faults = list(POLL_FAULTS.values())
    single.edit(NUM_REQUESTS=len(faults), MAX_CONCURRENT_POLLS=20)
    single.api.choose_fault = one_each(single.api, faults, polls=True, times=1)
    run = single.run()
    states = dict(zip(POLL_FAULTS, run.states.values(), strict=True))
    assert states == dict.fromkeys(POLL_FAULTS, "Success")
    assert run.code == 0


def test_polls_of_a_group_that_fail_are_made_again_and_leave_what_can_be_resumed(
    group: Example,
) -> None:
    faults = list(POLL_FAULTS.values())
    group.edit(MAX_POLL_ATTEMPTS=len(faults))
    group.api.choose_fault = in_turn(faults)
    run = group.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Queued"}
    assert count_polls(group.api) == len(faults)  # none of them has ended the polling
    assert "Not complete: 4 pending" in run.stdout
    check_resume_command(run)
    group.api.choose_fault = in_turn(faults[:3])
    resumed = group.run("--resume")
    assert resumed.code == 0, resumed.stdout
    assert "[  4] |███" in resumed.stdout


def test_polls_that_always_fail_leave_what_can_be_resumed(single: Example) -> None:
    faults = list(POLL_FAULTS.values())
    single.edit(NUM_REQUESTS=len(faults), MAX_CONCURRENT_POLLS=20, MAX_POLL_ATTEMPTS=2)
    single.api.choose_fault = one_each(single.api, faults, polls=True)
    run = single.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Queued", "Paused", "?"}  # none of these is final
    assert "Failed:         0" in run.stdout
    assert f"Pending:     {len(faults):>4}" in run.stdout
    check_resume_command(run)
    for reason in (
        "HTTP 500: out of order",
        "HTTP 502: <html><h1>Bad Gateway</h1></html>",
        "timed out",
        "not the state of",
    ):
        assert reason in run.stdout
    mend(single)
    resumed = single.run("--resume")
    assert resumed.code == 0, resumed.stdout
    assert set(resumed.states.values()) == {"Success"}
    assert len(single.api.generations) == len(faults)


@pytest.mark.parametrize("fault", cases(POLL_FAULTS, "reset", "404", "403"))
def test_a_group_that_can_not_be_polled_is_left_to_be_resumed(
    group: Example, fault: Fault
) -> None:
    group.edit(MAX_POLL_ATTEMPTS=2)
    group.api.choose_fault = faulty(fault, polls=True)
    run = group.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Queued"}
    assert "Not complete: 4 pending" in run.stdout
    check_resume_command(run)


def test_a_wrong_key_ends_polling_at_once(example: Example) -> None:
    example.edit(MAX_POLL_ATTEMPTS=10_000, POLL_INTERVAL_SECONDS=0.01)
    example.api.choose_fault = faulty(status(401, "this key is not valid"), polls=True)
    run = example.run()
    assert run.code == 1
    assert "HTTP 401: this key is not valid" in run.stdout
    assert "INFERENCE_API_KEY" in run.stdout
    assert "Pending:        4" in run.stdout
    assert count_polls(example.api) <= 5
    mend(example)
    assert example.run("--resume").code == 0


def test_a_generation_that_is_forbidden_holds_up_no_other(single: Example) -> None:
    def forbid(request: web.Request, sent: Json) -> Fault | None:
        generation = single.api.generations.get(request.path.rpartition("/")[2])
        if generation and generation.custom_id == "req-007":
            return status(403, "this one is not yours")
        return None

    single.edit(NUM_REQUESTS=40, MAX_POLL_ATTEMPTS=2)
    single.api.choose_fault = forbid
    for arguments in ([], ["--resume"]):
        run = single.run(*arguments)
        assert run.code == 1
        assert run.states.pop("req-007") == "Queued"
        others = {state for custom_id, state in run.states.items() if custom_id != "req-007"}
        assert others == {"Success"}
        assert "HTTP 403: this one is not yours" in run.stdout
        check_resume_command(run)
    mend(single)
    assert single.run("--resume").code == 0


# Submissions that may have been accepted


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("is_accepted", [True, False], ids=["accepted", "not accepted"])
def test_no_submission_that_may_be_accepted_is_sent_again(
    script: str, api: LocalApi, is_accepted: bool
) -> None:
    faults = dict(NO_ANSWER)
    if is_accepted:
        faults = {name: after(fault) for name, fault in NO_ANSWER.items()}
        faults["a certificate in the text"] = CERTIFICATE_TEXT
    programs = submit_each(script, api, list(faults.values()))
    states = [[record.state for record in records] for records, _, _ in programs]
    assert dict(zip(faults, states, strict=True)) == dict.fromkeys(faults, ["Unknown"] * 2)
    for records, ending, saved in programs:
        assert all(record.error for record in records)
        assert ending == ("" if script == SINGLE else "Uncertain")
        first = ["Not sent"] * 2 if script == SINGLE else []  # a group is saved as it is sent
        assert saved[: len(first)] == first
        assert sorted(saved[len(first) :]) == ["Submitting"] * 2 + ["Unknown"] * 2
    assert len(api.calls) == len(faults) * (2 if script == SINGLE else 1)
    assert len(api.generations) == (2 * len(faults) if is_accepted else 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_redirect_that_is_cut_is_not_sent_again(script: str, api: LocalApi) -> None:
    [[records, _, _]] = submit_each(script, api, [cut_redirect])
    # requests reads the rest of a redirect by itself: how that fails depends on its version.
    assert {record.state for record in records} <= {"Failed", "Unknown"}
    assert len(api.calls) == (2 if script == SINGLE else 1)


def test_submissions_that_may_be_accepted_are_shown_as_unknown(single: Example) -> None:
    faults = [after(NO_ANSWER[name]) for name in ("408", "reset", "stalled", "200 with HTML")]
    single.api.choose_fault = one_each(single.api, faults, polls=False)
    run = single.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Unknown"}
    assert "Unknown:        4" in run.stdout
    assert "Not complete: 4 unknown" in run.stdout
    assert "dashboard" in run.stdout
    assert len(single.api.calls) == 4
    mend(single)
    again = single.run("--resume", f"results/{run.results.name}", "--submit")
    assert set(again.states.values()) == {"Unknown"}
    assert len(single.api.calls) == 4


@pytest.mark.parametrize("fault", cases(NO_ANSWER, "503 with Retry-After", "dripping"))
def test_a_group_that_may_be_accepted_is_shown_as_unknown(
    group: Example, fault: Fault
) -> None:
    group.api.choose_fault = faulty(after(fault), polls=False)
    run = group.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Unknown"}
    assert "Unknown:        4" in run.stdout
    assert "dashboard" in run.stdout
    assert len(group.api.calls) == 1


def test_an_outage_leaves_most_requests_not_sent(single: Example) -> None:
    submissions: list[web.Request] = []

    def fail(request: web.Request, sent: Json) -> Fault | None:
        if request.method == "POST":
            submissions.append(request)
        return (
            status(503, "down")
            if len(submissions) >= 20 and request.method == "POST"
            else None
        )

    single.edit(NUM_REQUESTS=300, MAX_CONCURRENT_POLLS=5)
    single.api.choose_fault = fail
    run = single.run()
    assert run.code == 1
    counts = Counter(run.states.values())
    assert counts["Success"] == 19
    # Five in a row and four more that are under way then. Before them come few: up to four for
    # each of the four at most that were under way, and were accepted, when the first one failed.
    assert 5 <= counts["Unknown"] <= 25
    assert counts["Not sent"] == 300 - 19 - counts["Unknown"]
    text = " ".join(run.stdout.split())
    assert "5 uncertain in a row: HTTP 503: down" in text
    check_resume_command(run, "--submit")
    mend(single)
    again = single.run("--resume", f"results/{run.results.name}", "--submit")
    assert Counter(again.states.values()) == {
        "Success": 300 - counts["Unknown"],
        "Unknown": counts["Unknown"],
    }


OUTAGE = "Uncertain: 5 uncertain in a row: HTTP 500: out of order"
# The answers to ten submissions, one after another, and what they come to.
# u: uncertain; r: refused; b: busy once, and then accepted; .: accepted
IN_A_ROW = {
    "uuuuu.....": (OUTAGE, {"Unknown": 5, "Not sent": 5}),
    "..uuuuu...": (OUTAGE, {"Queued": 2, "Unknown": 5, "Not sent": 3}),
    "uuuu.uuuu.": ("", {"Unknown": 8, "Queued": 2}),
    "uuuuruuuu.": ("", {"Unknown": 8, "Failed": 1, "Queued": 1}),
    "uuuubuuuu.": ("", {"Unknown": 8, "Queued": 2}),
}


@pytest.mark.parametrize("answers", IN_A_ROW)
def test_five_uncertain_submissions_in_a_row_are_the_last(
    api: LocalApi, answers: str
) -> None:
    module = MODULES[SINGLE]
    records = [module.new_record(f"req-{number}", "Where?") for number in range(10)]
    faults = {"u": status(500), "r": status(400), "b": status(429)}
    busy: set[str] = set()

    def choose(request: web.Request, sent: Json) -> Fault | None:
        custom_id = sent["metadata"]["custom_id"]
        answer = answers[int(custom_id.removeprefix("req-"))]
        if answer == "b" and custom_id in busy:
            return None
        busy.add(custom_id)
        return faults.get(answer)

    api.choose_fault = choose
    client = new_client(module, api)
    ending = ""
    with ThreadPoolExecutor(1) as pool:
        try:
            list(module.submit_all(client, pool, records, forget, max_concurrent=1))
        except module.ApiError as error:
            ending = f"{type(error).__name__}: {error}"
    expected_ending, states = IN_A_ROW[answers]
    assert ending == expected_ending
    assert Counter(record.state for record in records) == states


# Submissions that were not accepted


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_surely_was_not_accepted_is_sent_again(script: str, api: LocalApi) -> None:
    for records, ending, saved in submit_each(script, api, list(BUSY.values()), times=1):
        assert [record.state for record in records] == ["Queued"] * 2
        assert [record.error for record in records] == [None] * 2
        assert ending == ""
        not_sent = 4 if script == SINGLE else 2  # a group is saved as it is sent
        assert Counter(saved) == {"Not sent": not_sent, "Submitting": 4, "Queued": 2}
        assert saved[-1] == "Queued"
    assert len(api.calls) == 2 * len(BUSY) * (2 if script == SINGLE else 1)
    assert len(api.generations) == 2 * len(BUSY)


def test_a_submission_that_surely_was_not_accepted_is_sent_again(
    example: Example,
) -> None:
    example.api.choose_fault = faulty(status(429, Retry_After="1"), polls=False, times=1)
    run = example.run()
    assert run.code == 0, run.stdout
    assert len(example.api.generations) == 4
    assert example.submissions == (8 if example.script == SINGLE else 2)


def check_not_sent(run: Run, reason: str) -> None:
    """Check that nothing was sent, why, and that the command which sends it is shown."""
    assert run.code == 1
    assert set(run.states.values()) == {"Not sent"}
    assert reason in run.final["req-001"]["error"]
    assert reason in run.stdout
    assert f"Not sent:    {len(run.states):>4}" in run.stdout
    assert f"Not complete: {len(run.states)} not sent" in run.stdout
    check_resume_command(run, "--submit")


def check_sent_later(example: Example, run: Run) -> None:
    """Check that all that run did not send can be sent once the API answers properly."""
    mend(example)
    sent = example.run("--resume", f"results/{run.results.name}", "--submit")
    assert sent.code == 0, sent.stdout
    assert set(sent.states.values()) == {"Success"}
    assert len(example.api.generations) == len(run.states)


def test_a_submission_is_tried_five_times_in_all(example: Example) -> None:
    example.edit(NUM_REQUESTS=2)
    example.replace("random.uniform(0, 2**attempt // 2)", "random.uniform(0, 0.1)")
    example.api.choose_fault = faulty(status(429, "no room", Retry_After="0"), polls=False)
    run = example.run()
    check_not_sent(run, "HTTP 429: no room")
    assert "5 attempts: HTTP 429: no room" in " ".join(run.stdout.split())
    # The others stop where the first one gives up.
    assert 5 <= len(example.api.calls) <= (10 if example.script == SINGLE else 5)
    check_sent_later(example, run)


def test_a_run_ends_soon_where_the_api_is_down(example: Example) -> None:
    example.edit(NUM_REQUESTS=50, MAX_SUBMIT_ATTEMPTS=2)
    environment = example.environment
    example.environment = environment | {"INFERENCE_BASE_URL": "http://127.0.0.1:9/v1"}
    run = example.run()
    check_not_sent(run, "ConnectionError at 127.0.0.1:9")
    tried = sum(row["error"] is not None for row in run.rows)
    assert 1 <= tried <= (9 if example.script == SINGLE else 50)
    example.environment = environment
    check_sent_later(example, run)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_refusal_fails_what_it_refuses(script: str, api: LocalApi) -> None:
    for records, ending, saved in submit_each(script, api, list(REFUSALS.values())):
        assert [record.state for record in records] == ["Failed"] * 2
        assert all(record.error for record in records)
        assert ending == ""
        first = {"Not sent": 2} if script == SINGLE else {}  # a group is saved as it is sent
        assert Counter(saved) == first | {"Submitting": 2, "Failed": 2}
    assert len(api.calls) == len(REFUSALS) * (2 if script == SINGLE else 1)


def test_a_refused_submission_fails_alone(example: Example) -> None:
    example.api.choose_fault = faulty(
        status(400, "too many tokens"), polls=False, only="req-002"
    )
    run = example.run()
    is_single = example.script == SINGLE
    assert run.code == 1
    assert run.final["req-002"]["generation_id"] is None
    assert run.final["req-002"]["error"] == "HTTP 400: too many tokens"
    assert "HTTP 400: too many tokens" in run.stdout
    assert example.submissions == (4 if is_single else 1)
    assert Counter(run.states.values()) == (
        {"Failed": 1, "Success": 3} if is_single else {"Failed": 4}
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_error_names_the_setting_that_may_be_wrong(script: str, api: LocalApi) -> None:
    module = MODULES[script]
    lost = module.Client(API_KEY, api.url.removesuffix("/v1"), 1)
    with pytest.raises(module.Refused, match=r"^HTTP 404: .*INFERENCE_BASE_URL"):
        submit(lost, "req-001")
    with pytest.raises(module.Refused) as caught:
        fetch(new_client(module, api), "not-there-yet")
    assert str(caught.value).startswith("HTTP 404: ")
    assert "INFERENCE_BASE_URL" not in str(caught.value)
    stranger = module.Client("another-key", api.url, 1)
    for call in (submit, fetch):
        with pytest.raises(module.LockedOut, match=r"^HTTP 401: .*INFERENCE_API_KEY"):
            call(stranger, "req-001")


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_lock_out_leaves_what_it_locks_out_not_sent(script: str, api: LocalApi) -> None:
    for records, ending, saved in submit_each(script, api, list(LOCK_OUTS.values())):
        assert [record.state for record in records] == ["Not sent"] * 2
        assert records[0].error
        assert ending == "LockedOut"
        assert saved[-1] == "Not sent"
    assert len(api.calls) == len(LOCK_OUTS)


@pytest.mark.parametrize("fault", cases(LOCK_OUTS, "401", "429 for an hour"))
def test_a_locked_out_submission_is_the_last(example: Example, fault: Fault) -> None:
    example.edit(NUM_REQUESTS=20)
    if example.script == SINGLE:
        example.edit(MAX_CONCURRENT_POLLS=2)
    example.api.choose_fault = faulty(fault, polls=False)
    run = example.run()
    check_not_sent(run, "HTTP 4")
    assert len(example.api.calls) <= 2
    check_sent_later(example, run)


def test_what_was_accepted_before_a_lock_out_is_polled(single: Example) -> None:
    single.edit(NUM_REQUESTS=9, MAX_CONCURRENT_POLLS=1)
    single.api.choose_fault = faulty(status(402, "no credit"), polls=False, only="req-004")
    run = single.run()
    assert run.code == 1
    assert Counter(run.states.values()) == {"Success": 3, "Not sent": 6}
    assert "no credit" in run.final["req-004"]["error"]
    assert single.submissions == 4
    check_sent_later(single, run)


# Retry-After


@pytest.mark.parametrize(
    ("script", "code", "polls", "only"),
    [
        pytest.param(SINGLE, 429, True, None, id="429 to a poll"),
        pytest.param(SINGLE, 503, True, None, id="503 to a poll"),
        pytest.param(SINGLE, 429, False, "req-1", id="429 to a submission"),
        pytest.param(SINGLE, 503, False, "req-1", id="503 to a submission"),
        pytest.param(SINGLE, 503, False, "req-3", id="503 to the last submission"),
        pytest.param(GROUP, 429, False, None, id="429 to a group"),
        pytest.param(GROUP, 503, True, None, id="503 to a poll of a group"),
    ],
)
def test_a_retry_after_holds_back_every_call(
    api: LocalApi, script: str, code: int, polls: bool, only: str | None
) -> None:
    module = MODULES[script]
    choose = faulty(status(code, Retry_After="2"), polls=polls, times=1, only=only)
    told: list[float] = []
    waited: list[float] = []

    def choose_once(request: web.Request, sent: Json) -> Fault | None:
        waited.extend(time.monotonic() - moment for moment in told)
        fault = None if told else choose(request, sent)
        if fault:
            told.append(time.monotonic())
        return fault

    api.choose_fault = choose_once
    client = new_client(module, api)
    records = [module.new_record(f"req-{number}", "Where?") for number in (1, 2, 3)]
    with ThreadPoolExecutor(1) as pool:
        limit = {"max_concurrent": 1} if script == SINGLE else {}
        list(module.submit_all(client, pool, records, forget, **limit))
        list(module.poll_all(client, pool, records, forget, interval_seconds=0.01, **limit))
    states = Counter(record.state for record in records)
    is_uncertain = code == 503 and not polls
    assert states == ({"Success": 2, "Unknown": 1} if is_uncertain else {"Success": 3})
    assert waited
    # Not a limit on how long it takes: nothing at all may come before the time is up.
    assert min(waited) >= 2


# Ids, and answers that arrive oddly


def answer_with_id(given_id: object) -> Fault:
    """Do the work, and answer with this id."""
    return after(body(json.dumps({"id": given_id, "groupId": given_id}).encode()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_id_that_can_not_be_polled_is_taken(script: str, api: LocalApi) -> None:
    ids = ["gen.abc", 12345, "../x", "", None, ["gen"]]
    programs = submit_each(script, api, [answer_with_id(given_id) for given_id in ids])
    for given_id, (records, _, _) in zip(ids, programs, strict=True):
        assert [record.outcome for record in records] == ["Unknown"] * 2
        assert all(repr(given_id) in record.error for record in records)
    assert len(api.calls) == len(ids) * (2 if script == SINGLE else 1)


def test_an_id_that_can_not_be_polled_is_shown(example: Example) -> None:
    example.api.choose_fault = faulty(answer_with_id("gen.abc"), polls=False)
    run = example.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Unknown"}
    assert "'gen.abc'" in run.final["req-001"]["error"]
    assert "'gen.abc'" in run.stdout
    assert example.submissions == len(example.api.calls)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", cases(WHOLE_ANSWERS))
def test_an_answer_that_has_arrived_counts(script: str, api: LocalApi, fault: Fault) -> None:
    client = new_client(MODULES[script], api)
    api.choose_fault = lambda request, sent: fault
    given_id = submit(client, "req-001")
    [generation] = api.groups[given_id] if script == GROUP else [api.generations[given_id]]
    assert generation.custom_id == "req-001"
    answer = fetch(client, given_id)
    [shown] = answer if script == GROUP else [answer]
    assert shown["id"] == generation.id
    assert shown["state"] == "Success"


def test_answers_that_have_arrived_are_all_that_a_run_needs(example: Example) -> None:
    example.api.choose_fault = lambda request, sent: overstate
    assert example.run().code == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_answer_that_comes_late_is_taken(script: str, api: LocalApi) -> None:
    api.choose_fault = lambda request, sent: answer_slowly
    assert submit(new_client(MODULES[script], api), "req-001") in [
        *api.groups,
        *api.generations,
    ]


# Connections


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("max_idle_seconds", "connections"),
    [
        pytest.param(1000, 1, id="in use"),
        pytest.param(-1, 4, id="idle"),  # any connection was idle for longer than that
    ],
)
def test_a_connection_that_was_idle_for_long_is_closed(
    script: str,
    api: LocalApi,
    monkeypatch: pytest.MonkeyPatch,
    max_idle_seconds: float,
    connections: int,
) -> None:
    module = MODULES[script]
    monkeypatch.setattr(module, "MAX_IDLE_SECONDS", max_idle_seconds)
    client = new_client(module, api)
    for custom_id in ("req-001", "req-002"):
        fetch(client, submit(client, custom_id))
    assert len(api.calls) == 4
    assert len(api.connections) == connections


def run_program(example: Example, program: str) -> subprocess.CompletedProcess:
    """Run a program that imports the script, which lies beside it."""
    path = example.folder / "program.py"
    path.write_text(program, "utf-8")
    return subprocess.run(
        [sys.executable, path.name],
        cwd=example.folder,
        env={**os.environ, **example.environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="forks, or looks into /proc")

FORK = """
import json, os, signal
from pathlib import Path
from async_polling_example import Client, Results, new_record

client = Client(timeout_seconds=10)
results = Results("kept.db")
results.save([new_record("before", "Where?")])


def submit_ten(name):
    ids = {}
    for number in range(10):
        record = new_record(f"{name}-{number}", "Where?")
        ids[record.custom_id] = client.submit_generation(record.request)
        client.fetch_generation(ids[record.custom_id])
    Path(f"{name}.json").write_text(json.dumps(ids))


submit_ten("parent")
children = []
for name in ("first", "second"):
    child = os.fork()
    if child == 0:
        submit_ten(name)
        try:
            results.save([new_record(name, "Where?")])
            os._exit(1)
        except OSError as error:
            print(error, flush=True)
        os._exit(0)  # as multiprocessing ends a child
    children.append(child)
submit_ten("parent-again")
for child in children:
    assert os.waitpid(child, 0)[1] == 0
results.save([new_record("after", "Where?")])
os.kill(os.getpid(), signal.SIGKILL)  # what was saved is on file
"""


@linux_only
def test_a_fork_has_connections_of_its_own_and_no_results(single: Example) -> None:
    program = run_program(single, FORK)
    assert program.returncode == -9, program.stderr
    assert program.stdout.count("kept.db was opened by another process") == 2
    names = ("parent", "first", "second", "parent-again")
    for name in names:
        ids = json.loads((single.folder / f"{name}.json").read_text())
        given = {
            single.api.generations[ids[custom_id]].custom_id: custom_id for custom_id in ids
        }
        assert given == {custom_id: custom_id for custom_id in ids}
    assert len(single.api.generations) == 10 * len(names)
    assert len(single.api.connections) == 3  # the parent's, and one for each child
    saved = [row["custom_id"] for row in read_results(single.folder / "kept.db")]
    assert saved == ["before", "after"]


POOLS = """
import os
from concurrent.futures import ThreadPoolExecutor
from async_polling_example import Client, new_record, poll_all, submit_all

client = Client()
most = 0
for number in range(20):
    records = [new_record(f"{number}-{name}", "Where?") for name in "abcde"]
    with ThreadPoolExecutor(5) as pool:
        list(submit_all(client, pool, records, lambda records: None))
        list(poll_all(client, pool, records, lambda records: None, interval_seconds=0.01))
    assert {record.state for record in records} == {"Success"}
    descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    links = [os.readlink(path) for path in descriptors if os.path.lexists(path)]
    most = max(most, sum(link.startswith("socket:") for link in links))
print(most)
"""


@linux_only
def test_the_connections_of_a_pool_are_closed_when_its_threads_have_ended(
    single: Example,
) -> None:
    program = run_program(single, POOLS)
    assert program.returncode == 0, program.stderr
    assert len(single.api.connections) >= 20  # each pool has connections of its own
    assert int(program.stdout) <= 5


# The key


ECHOES = {
    "in an error": status(400, f"bad key {API_KEY}!"),
    "in a long error": status(400, "x" * 490 + API_KEY),
    "in what is no JSON": body(b"x" * 490 + API_KEY.encode(), "text/plain"),
    "in plain text": body(f"Bearer {API_KEY}".encode(), "text/plain", 400),
    "in HTML": body(f"<p>Bearer {API_KEY}</p>".encode(), "text/html", 403),
    "in an id": body(json.dumps({"id": f"a.{API_KEY}", "groupId": f"a.{API_KEY}"}).encode()),
    "escaped in JSON": body(
        b'{"error": {"message": "%b?"}}' % API_KEY.replace("-", "\\u002d").encode(),
        "application/json",
        401,
    ),
    "in a lock-out": status(401, f"{API_KEY} is not valid"),
    "in the status line": raw(b"HTTP/1.1 401 %b is not valid\r\n\r\n" % API_KEY.encode()),
    "in what is no HTTP": raw(b"%b is not valid\r\n\r\n" % API_KEY.encode()),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", cases(ECHOES))
def test_no_error_has_an_echoed_key(script: str, api: LocalApi, fault: Fault) -> None:
    module = MODULES[script]
    client = new_client(module, api)
    api.choose_fault = lambda request, sent: fault
    for call in (submit, fetch):
        with pytest.raises(module.ApiError) as caught:
            call(client, "an-id")
        assert caught.value.args == (str(caught.value),)  # it carries nothing but its text
        assert API_KEY[:20] not in str(caught.value)


@pytest.mark.parametrize("polls", [True, False], ids=["polling", "submitting"])
@pytest.mark.parametrize("fault", cases(ECHOES, "in an id", "in a lock-out"))
def test_an_echoed_key_is_not_shown(example: Example, fault: Fault, polls: bool) -> None:
    example.edit(MAX_POLL_ATTEMPTS=2)
    example.api.choose_fault = faulty(fault, polls=polls)
    run = example.run()  # which looks for the key in all that is shown and stored
    assert run.code == 1


def test_a_key_echoed_by_a_failed_generation_is_not_shown(example: Example) -> None:
    example.api.alter = lambda generation: (
        generation | {"state": "Failed", "stateMessage": f"{API_KEY} has no credit"}
    )
    run = example.run()
    assert run.final["req-001"]["error"] == "[API key] has no credit"


# The local API


def test_flaky_has_only_such_submissions_sent_again_as_did_no_harm() -> None:
    flaky, request = Flaky(), types.SimpleNamespace(method="POST")
    faults = [flaky(request, {"number": number % 50}) for number in range(200)]
    chosen = [fault for fault in faults if fault]
    assert chosen
    assert {asyncio.run(fault(request, None)).status for fault in chosen} == {429}
