"""What breaks, and what the scripts make of it: one row a case, both scripts wherever it applies.

Every run is checked for more than its row says: it ends, shows no traceback and no key, leaves
a results file of which every line is JSON, and has nothing made, and paid for, twice.
"""

import asyncio
import json
import re
import time
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import local_api
import pytest
from conftest import API_KEY, GROUP, SCRIPTS, SINGLE, Example, Run, faulty, in_turn, load, one_each
from local_api import (
    Flaky,
    LocalApi,
    after,
    answer_slowly,
    body,
    close,
    cut,
    cut_redirect,
    drip,
    drip_header,
    drip_with_length,
    garble,
    hint,
    overstate,
    reset,
    stall,
    status,
)

DEEP = b'{"response": ' + b"[" * 1000 + b"]" * 1000 + b"}"  # which a newer Python can read
DEEPER = b"[" * 100_000
HUGE = b'{"state": "Success", "response": {"usage": {"total_tokens": ' + b"9" * 5000 + b"}}}"

NO_ANSWER = {
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
    "103 and then an answer": hint,
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
REFUSALS = {
    "302 to another host": status(302, Location="http://127.0.0.1:1/elsewhere"),
    "304": status(304),
    "307 that is cut": cut_redirect,
    "400": status(400, "max_tokens is too large"),
    "404": status(404, "no such thing"),
    "409": status(409),
    "422": status(422),
}
BUSY = {
    "429": status(429),
    "429 with Retry-After in seconds": status(429, Retry_After="1"),
    "429 with Retry-After as a date": status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "429 with a nonsense Retry-After": status(429, Retry_After="99999999 eggs"),
    "429 with a negative Retry-After": status(429, Retry_After="-5"),
    "429 with an impossible date": status(429, Retry_After="Wed, 99 Oct 99999 07:28:00 GMT"),
}
POLL_FAULTS = (
    NO_ANSWER
    | REFUSALS
    | BUSY
    | {
        "402": status(402),
        "200 nested a thousand deep": body(DEEP),
        "200 with a state that is null": body(b'{"state": null, "generations": null}'),
        "200 with a state nobody knows": body(b'{"state": "Paused", "generations": []}'),
        "200 with members that are none": body(
            b'{"state": "?", "generations": [1, null, "x", [], {}, {"state": 3}]}'
        ),
    }
)
LOCK_OUTS = {
    "401": status(401, "this key is not valid"),
    "403": status(403, "this key may not"),
}


def cases(table: dict[str, local_api.Fault]) -> list[object]:
    """Make a row of a table a case of its own."""
    return [pytest.param(fault, id=name) for name, fault in table.items()]


def some(table: dict[str, local_api.Fault], *names: str) -> list[object]:
    """Make these rows of a table cases of their own."""
    return cases({name: table[name] for name in names})


@pytest.fixture
def environment(api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead this process to the local API."""
    for name, value in api.environment.items():
        monkeypatch.setenv(name, value)


def submit_each(
    script: str, api: LocalApi, faults: list[local_api.Fault], times: float = float("inf")
) -> list[tuple[list[Any], str, list[str]]]:
    """Submit two requests for each fault, which they meet in submit_all, all at the same time.

    Each fault is met by an import of the script of its own. Return for each the records at the
    end, the class of the exception at the end ("" if none), and the states that were saved.
    """
    seen: Counter[str] = Counter()

    def choose(request: local_api.web.Request, sent: local_api.Json) -> local_api.Fault | None:
        if request.method != "POST":
            return None
        [first, *_] = sent.get("requests", [sent])
        custom_id = first["metadata"]["custom_id"]
        seen[custom_id] += 1
        return faults[int(custom_id.split("-")[0])] if seen[custom_id] <= times else None

    def submit(number: int) -> tuple[list[Any], str, list[str]]:
        module, saved, ending = modules[number], [], ""
        records = [module.Record(f"{number}-{name}", "What is 2 + 2?") for name in "ab"]

        def save(rows: list[Any]) -> None:
            saved.extend(row.state for row in rows)

        try:
            with ThreadPoolExecutor(1) as pool:
                list(module.submit_all(pool, records, save))
        except module.ApiError as error:
            ending = type(error).__name__
        return records, ending, saved

    modules = [load(script, REQUEST_TIMEOUT_SECONDS=1) for _ in faults]
    api.choose_fault = choose
    with ThreadPoolExecutor(len(faults)) as pool:
        results = list(pool.map(submit, range(len(faults))))
    made = Counter(generation.custom_id for generation in api.generations.values())
    assert set(made.values()) <= {1}
    for records, _, _ in results:
        assert all(API_KEY not in str(record.error) for record in records)
    return results


def check_resume_command(run: Run, *arguments: str) -> None:
    """Check that the command which goes on with this run is shown."""
    ending = "".join(f" {argument}" for argument in arguments)
    assert re.search(rf"--resume \S*{re.escape(run.results.name)}{ending}$", run.stdout, re.M)


def mend(example: Example) -> None:
    """Let the API answer properly from now on."""
    example.api.choose_fault = lambda request, sent: None


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
    polls = [method for method, _ in group.api.calls if method == "GET"]
    assert len(polls) == len(faults)  # none of them has ended the polling
    assert "Not complete: 4 pending" in run.stdout
    check_resume_command(run)
    group.api.choose_fault = in_turn(faults[:3])
    resumed = group.run("--resume")
    assert resumed.code == 0, resumed.stdout
    assert "[  1] |░" in resumed.stdout
    assert "[  4] |███" in resumed.stdout


def test_polls_that_always_fail_leave_what_can_be_resumed(single: Example) -> None:
    faults = [*POLL_FAULTS.values(), status(404)]
    single.edit(NUM_REQUESTS=len(faults), MAX_CONCURRENT_POLLS=20, MAX_POLL_ATTEMPTS=2)
    single.api.choose_fault = one_each(single.api, faults, polls=True)
    run = single.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Queued"}
    assert "Failed:         0" in run.stdout
    assert f"Pending:     {len(faults):>4}" in run.stdout
    check_resume_command(run)
    for reason in (
        "HTTP 500: out of order",
        "HTTP 502: Bad Gateway",
        "Timeout",
        "not the state of",
    ):
        assert reason in run.stdout
    mend(single)
    resumed = single.run("--resume")
    assert resumed.code == 0, resumed.stdout
    assert set(resumed.states.values()) == {"Success"}
    assert len(single.api.generations) == len(faults)


@pytest.mark.parametrize(
    "fault",
    some(
        POLL_FAULTS,
        *("500", "reset", "stalled", "garbled", "404", "429 with Retry-After in seconds", "402"),
        "200 with a state that is null",
    ),
)
def test_a_group_that_can_not_be_polled_is_left_to_be_resumed(
    group: Example, fault: local_api.Fault
) -> None:
    group.edit(MAX_POLL_ATTEMPTS=2)
    group.api.choose_fault = faulty(fault, polls=True)
    run = group.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Queued"}
    assert "Not complete: 4 pending" in run.stdout
    check_resume_command(run)


@pytest.mark.parametrize("fault", cases(LOCK_OUTS))
def test_a_lock_out_ends_polling_at_once(example: Example, fault: local_api.Fault) -> None:
    example.edit(MAX_POLL_ATTEMPTS=10_000, POLL_INTERVAL_SECONDS=0.01)
    example.api.choose_fault = faulty(fault, polls=True)
    run = example.run()
    assert run.code == 1
    assert "HTTP 40" in run.stdout
    assert "INFERENCE_API_KEY" in run.stdout
    assert "Pending:        4" in run.stdout
    assert len(example.api.calls) - example.submissions <= 5
    mend(example)
    assert example.run("--resume").code == 0


def lost(fault: local_api.Fault) -> local_api.Fault:
    """Have the work done, and its answer lost in this way."""
    return fault if fault is hint else after(fault)  # hint has the work done already


@pytest.mark.parametrize("is_accepted", [True, False], ids=["accepted", "not accepted"])
def test_no_submission_that_may_be_accepted_is_sent_again(
    single: Example, is_accepted: bool
) -> None:
    faults = [lost(fault) if is_accepted else fault for fault in NO_ANSWER.values()]
    single.edit(NUM_REQUESTS=len(faults), MAX_CONCURRENT_POLLS=20)
    single.api.choose_fault = one_each(single.api, faults, polls=False)
    run = single.run()
    states = dict(zip(NO_ANSWER, run.states.values(), strict=True))
    assert states == dict.fromkeys(NO_ANSWER, "Unknown")
    assert run.code == 1
    assert f"Unknown:     {len(faults):>4}" in run.stdout
    assert "dashboard" in run.stdout
    assert len(single.api.calls) == len(faults)


@pytest.mark.usefixtures("environment")
def test_no_group_that_may_be_accepted_is_sent_again(api: LocalApi) -> None:
    results = submit_each(GROUP, api, [lost(fault) for fault in NO_ANSWER.values()])
    found = dict(zip(NO_ANSWER, results, strict=True))
    states = {name: [record.state for record in records] for name, (records, _, _) in found.items()}
    assert states == dict.fromkeys(NO_ANSWER, ["Unknown"] * 2)
    for records, ending, saved in results:
        assert all(record.error for record in records)
        assert ending == ""
        assert saved == ["Submitting"] * 2 + ["Unknown"] * 2
    assert len(api.calls) == len(NO_ANSWER)
    assert len(api.generations) == 2 * len(NO_ANSWER)


@pytest.mark.parametrize(
    "fault",
    some(
        NO_ANSWER,
        *("500", "503 with Retry-After", "reset", "stalled", "dripping", "103 and then an answer"),
        "200 with an id that is a path",
    ),
)
def test_a_group_that_may_be_accepted_is_not_sent_again(
    group: Example, fault: local_api.Fault
) -> None:
    group.api.choose_fault = faulty(lost(fault), polls=False)
    run = group.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Unknown"}
    assert "Unknown:        4" in run.stdout
    assert len(group.api.calls) == 1


def test_each_submission_that_surely_was_not_accepted_is_sent_again(single: Example) -> None:
    faults = list(BUSY.values())
    single.edit(NUM_REQUESTS=len(faults), MAX_CONCURRENT_POLLS=20)
    single.api.choose_fault = one_each(single.api, faults, polls=False, times=2)
    run = single.run()
    assert run.code == 0, run.stdout
    assert len(single.api.generations) == len(faults)
    assert single.submissions == 3 * len(faults)


@pytest.mark.usefixtures("environment")
def test_a_group_that_surely_was_not_accepted_is_sent_again(api: LocalApi) -> None:
    for records, ending, saved in submit_each(GROUP, api, list(BUSY.values()), times=2):
        assert [record.state for record in records] == ["Queued"] * 2
        assert ending == ""
        failed = ["Submitting"] * 2 + ["Not sent"] * 2
        assert saved == [*failed, *failed, *["Submitting"] * 2, *["Queued"] * 2]
    assert len(api.calls) == 3 * len(BUSY)
    assert len(api.generations) == 2 * len(BUSY)


@pytest.mark.parametrize("fault", some(BUSY, "429", "429 with Retry-After in seconds"))
def test_a_submission_that_surely_was_not_accepted_is_sent_again(
    example: Example, fault: local_api.Fault
) -> None:
    example.api.choose_fault = faulty(fault, polls=False, times=2)
    run = example.run()
    assert run.code == 0, run.stdout
    assert len(example.api.generations) == 4
    assert example.submissions == (12 if example.script == SINGLE else 3)


def check_not_sent(run: Run, reason: str) -> None:
    """Check that nothing was sent, why, and that the command which sends it is shown."""
    assert run.code == 1
    assert set(run.states.values()) == {"Not sent"}
    assert reason in run.final["req-001"]["error"]
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
    example.api.choose_fault = faulty(status(429, "no room", Retry_After="0"), polls=False)
    run = example.run()
    check_not_sent(run, "HTTP 429: no room")
    # The others stop where the first one gives up.
    assert 5 <= len(example.api.calls) <= (10 if example.script == SINGLE else 5)
    check_sent_later(example, run)


def test_a_run_ends_soon_where_the_api_is_down(example: Example) -> None:
    example.edit(NUM_REQUESTS=50, MAX_SUBMIT_ATTEMPTS=2)
    environment = example.environment
    example.environment = environment | {"INFERENCE_BASE_URL": "http://127.0.0.1:9/v1"}
    run = example.run()
    check_not_sent(run, "ConnectionError at 127.0.0.1:9: ")
    assert 2 <= run.sent <= (10 if example.script == SINGLE else 100)  # a row for each request
    example.environment = environment
    check_sent_later(example, run)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_refusal_fails_what_it_refuses(script: str, api: LocalApi) -> None:
    results = submit_each(script, api, list(REFUSALS.values()))
    for records, ending, saved in results:
        assert [record.state for record in records] == ["Failed"] * 2
        assert all(record.error for record in records)
        assert ending == ""
        assert sorted(saved) == ["Failed"] * 2 + ["Submitting"] * 2
    assert len(api.calls) == len(REFUSALS) * (2 if script == SINGLE else 1)


@pytest.mark.parametrize("fault", some(REFUSALS, "302 to another host", "307 that is cut", "400"))
def test_a_refused_submission_fails_alone(example: Example, fault: local_api.Fault) -> None:
    example.api.choose_fault = faulty(fault, polls=False, only="req-002")
    run = example.run()
    is_single = example.script == SINGLE
    assert run.code == 1
    assert run.states["req-002"] == "Failed"
    assert run.final["req-002"]["generation_id"] is None
    assert example.submissions == (4 if is_single else 1)
    assert Counter(run.states.values()) == (
        {"Failed": 1, "Success": 3} if is_single else {"Failed": 4}
    )


def test_a_refusal_is_shown_in_the_servers_words(example: Example) -> None:
    example.api.choose_fault = faulty(status(400, "too many tokens"), polls=False, only="req-002")
    run = example.run()
    row = r"^  req-002    ✗ Failed .*\n             HTTP 400: too many tokens$"
    assert re.search(row, run.stdout, re.M)
    assert run.final["req-002"]["error"] == "HTTP 400: too many tokens"


@pytest.mark.parametrize(
    "fault",
    cases(
        LOCK_OUTS
        | {
            "402": status(402, "no credit"),
            "429 for an hour": status(429, "come back later", Retry_After="3600"),
        }
    ),
)
def test_a_locked_out_submission_is_the_last(example: Example, fault: local_api.Fault) -> None:
    example.edit(NUM_REQUESTS=20)
    if example.script == SINGLE:
        example.edit(MAX_CONCURRENT_POLLS=2)
    example.api.choose_fault = faulty(fault, polls=False)
    run = example.run()
    check_not_sent(run, "HTTP 4")
    assert len(example.api.calls) <= 2
    names_the_key = "INFERENCE_API_KEY" in run.final["req-001"]["error"]
    assert names_the_key == (fault in LOCK_OUTS.values())
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


@pytest.mark.parametrize(
    ("code", "polls", "only", "states"),
    [
        pytest.param(429, True, None, {"Success": 4}, id="429 to a poll"),
        pytest.param(503, True, None, {"Success": 4}, id="503 to a poll"),
        pytest.param(429, False, "req-001", {"Success": 4}, id="429 to a submission"),
        pytest.param(503, False, "req-001", {"Unknown": 1, "Success": 3}, id="503 to a submission"),
        pytest.param(
            503, False, "req-004", {"Unknown": 1, "Success": 3}, id="503 to the last submission"
        ),
    ],
)
def test_a_retry_after_holds_back_every_exchange(
    single: Example, code: int, polls: bool, only: str | None, states: dict[str, int]
) -> None:
    single.edit(MAX_CONCURRENT_POLLS=1)
    choose = faulty(status(code, Retry_After="2"), polls=polls, times=1, only=only)
    told: list[float] = []
    waited: list[float] = []

    def choose_once(request: local_api.web.Request, sent: local_api.Json) -> local_api.Fault | None:
        waited.extend(time.monotonic() - at for at in told)
        fault = None if told else choose(request, sent)
        told.extend([time.monotonic()] if fault else [])
        return fault

    single.api.choose_fault = choose_once
    run = single.run()
    assert Counter(run.states.values()) == states
    assert waited
    # Not a limit on how long it takes: nothing at all may come before the time is up.
    assert min(waited) >= 2


def answer_with_id(given_id: object) -> local_api.Fault:
    """Do the work, and answer with this id."""
    return after(body(json.dumps({"id": given_id, "groupId": given_id}).encode()))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_id_that_can_not_be_polled_is_taken(script: str, api: LocalApi) -> None:
    ids = ["gen.abc", 12345, "../x", "", None, ["gen"]]
    results = submit_each(script, api, [answer_with_id(each) for each in ids])
    for given_id, (records, _, _) in zip(ids, results, strict=True):
        assert [record.outcome for record in records] == ["Unknown"] * 2
        assert all(repr(given_id) in record.error for record in records)
    assert len(api.calls) == len(ids) * (2 if script == SINGLE else 1)


@pytest.mark.parametrize("fault_id", ["gen.abc", 12345])
def test_an_id_that_can_not_be_polled_is_told(example: Example, fault_id: object) -> None:
    example.api.choose_fault = faulty(answer_with_id(fault_id), polls=False)
    run = example.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Unknown"}
    assert repr(fault_id) in run.final["req-001"]["error"]
    assert repr(fault_id) in run.stdout
    assert example.submissions == len(example.api.calls)


def test_no_answer_is_taken_for_the_next_one_after_a_103(single: Example) -> None:
    single.edit(MAX_CONCURRENT_POLLS=1)
    single.api.choose_fault = faulty(hint, polls=False, only="req-001")
    run = single.run()
    assert Counter(run.states.values()) == {"Unknown": 1, "Success": 3}
    for custom_id, row in run.final.items():
        if row["generation_id"]:
            assert single.api.generations[row["generation_id"]].custom_id == custom_id


@pytest.mark.parametrize("polls", [True, False], ids=["polling", "submitting"])
def test_an_answer_that_comes_late_is_taken(example: Example, polls: bool) -> None:
    example.api.choose_fault = faulty(answer_slowly, polls=polls, times=1)
    run = example.run()
    assert run.code == 0, run.stdout
    assert set(run.states.values()) == {"Success"}


def test_an_answer_that_is_whole_counts_though_more_was_announced(example: Example) -> None:
    example.api.choose_fault = lambda request, sent: overstate
    assert example.run().code == 0


def test_a_wait_for_the_next_poll_is_not_taken_for_a_stuck_worker(example: Example) -> None:
    limit = "limit_seconds = 30 * REQUEST_TIMEOUT_SECONDS + 20"
    example.replace(limit, "limit_seconds = 2 * REQUEST_TIMEOUT_SECONDS")
    example.edit(POLL_INTERVAL_SECONDS=3.5)
    example.api.choose_fault = faulty(status(404), polls=True, times=1)
    assert example.run().code == 0


@pytest.mark.parametrize("polls", [True, False], ids=["polling", "submitting"])
def test_a_header_that_drips_for_ever_is_not_waited_for(example: Example, polls: bool) -> None:
    limit = "limit_seconds = 30 * REQUEST_TIMEOUT_SECONDS + 20"
    example.replace(limit, "limit_seconds = 2 * REQUEST_TIMEOUT_SECONDS")
    chosen: list[str] = []

    def choose_one(request: local_api.web.Request, sent: local_api.Json) -> local_api.Fault | None:
        """Choose what the first request in the first poll or submission concerns, from then on."""
        if (request.method == "GET") != polls:
            return None
        chosen.append(request.path + json.dumps(sent))
        return after(drip_header) if chosen[-1] == chosen[0] else None

    example.api.choose_fault = choose_one
    run = example.run()
    assert run.code == 1
    stuck, well = ("Queued", "Success") if polls else ("Submitting", "Queued")
    states = Counter(run.states.values())
    assert states == ({stuck: 1, well: 3} if example.script == SINGLE else {stuck: 4})
    mend(example)
    again = example.run("--resume", f"results/{run.results.name}")
    assert again.code == (0 if polls else 1)
    assert set(again.states.values()) <= {"Success", "Submitting"}
    assert len(example.api.generations) == 4


def test_flaky_has_only_such_submissions_sent_again_as_did_no_harm() -> None:
    flaky, request = Flaky(), types.SimpleNamespace(method="POST")
    faults = [flaky(request, {"number": number % 50}) for number in range(200)]
    chosen = [fault for fault in faults if fault]
    assert chosen
    assert {asyncio.run(fault(request, None)).status for fault in chosen} == {429}


ECHOES = {
    "in an error": status(400, f"bad key {API_KEY}!"),
    "in a long error": status(400, "x" * 990 + API_KEY),
    "in what is no JSON": body(b"x" * 178 + API_KEY.encode(), "text/plain"),
    "in plain text": body(f"Bearer {API_KEY}".encode(), "text/plain", 400),
    "in HTML": body(f"<p>Bearer {API_KEY}</p>".encode(), "text/html", 403),
    "in an id": body(json.dumps({"id": f"a.{API_KEY}", "groupId": f"a.{API_KEY}"}).encode()),
    "in a lock-out": status(401, f"{API_KEY} is not valid"),
}


CALLS: dict[str, tuple[str, str, object]] = {
    SINGLE: ("submit_generation", "fetch_generation", {"model": "any"}),
    GROUP: ("submit_group", "fetch_group", [{"model": "any"}]),
}


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", cases(ECHOES))
def test_no_error_has_an_echoed_key(script: str, api: LocalApi, fault: local_api.Fault) -> None:
    module = load(script)
    submit, fetch, sent = CALLS[script]
    api.choose_fault = lambda request, sent: fault
    for call, argument in ((submit, sent), (fetch, "an-id")):
        with module.Session() as session, pytest.raises(module.ApiError) as caught:
            getattr(module, call)(session, argument, 5)
        for each in (str(caught.value), repr(caught.value)):
            assert API_KEY not in each
            assert API_KEY[:20] not in each


@pytest.mark.parametrize("polls", [True, False], ids=["polling", "submitting"])
@pytest.mark.parametrize("fault", some(ECHOES, "in a long error", "in an id", "in a lock-out"))
def test_an_echoed_key_is_not_shown(example: Example, fault: local_api.Fault, polls: bool) -> None:
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
