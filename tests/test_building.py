"""Programs built upon the parts of the scripts, in this process or in one of their own."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from sqlite3 import Error
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from aiohttp import web
from conftest import SCRIPTS, SINGLE, Example, Gate, Striker, calls, custom_ids, faulty, load
from local_api import Fault, Json, LocalApi, after, body, close, status


@pytest.fixture(params=SCRIPTS)
def parts(request: pytest.FixtureRequest, api: LocalApi) -> Any:
    """The parts of each script, as a program imports them."""
    return load(request.param)


def results_of(parts: Any, *texts: str, path: str | Path = ":memory:") -> Any:
    """Return results with a request for each text."""
    results = parts.Results(path)
    results.add(parts.new_record(f"q{number}", text) for number, text in enumerate(texts))
    return results


def outcomes(results: Any) -> Counter[str]:
    return Counter(record.outcome for record in results.records.values())


def is_group(parts: Any) -> bool:
    return hasattr(parts.Client, "submit_group")


def callback(parts: Any, function: Any) -> Json:
    """Return a function that takes a list of records as on_record or on_group."""
    if is_group(parts):
        return {"on_group": function}
    return {"on_record": lambda record: function([record])}


class Stop(threading.Event):
    """A stop event; is_waited_for is set when a wait of more than a minute begins."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if timeout and timeout > 60:
            self.is_waited_for.set()
        return super().wait(timeout)


PROGRAM = """
from MODULE import Client, Results, new_record, poll_all, submit_all

client = Client()
results = Results("program.db")
results.add(new_record(f"q{n}", f"This is text {n} of 20.\\n" * 20) for n in range(20))
submit_all(client, results)
poll_all(client, results, interval_seconds=0.05)
for record in results.records.values():
    print(record.custom_id, record.outcome, record.answer, sep="|")
"""
# The calls at which the program is killed, in one start after another: the method, how many
# of it there have been, and whether the last is carried out first
KILLS = [("POST", 2, True), ("POST", 1, False), ("GET", 1, True), ("GET", 2, False)]


def test_a_program_goes_on_after_kills(example: Example) -> None:
    example.group_by(2)
    program = PROGRAM.replace("MODULE", Path(example.script).stem)
    example.script = "program.py"
    (example.folder / "program.py").write_text(program)
    for kill in KILLS:
        example.api.choose_fault = striker = Striker(9, *kill)
        striker.process = process = example.start()
        assert example.finish(process).code == -9, kill
    example.api.choose_fault = lambda request, body: None
    run = example.run()  # which sees that nothing was made twice
    rows = [line.split("|") for line in run.stdout.splitlines()]
    assert [row[0] for row in rows] == [f"q{n}" for n in range(20)]
    for n, (_, outcome, answer) in enumerate(rows):
        assert outcome == "Unknown" or answer.startswith(f"This is text {n} of 20.")
    assert 1 <= run.stdout.count("|Unknown|") <= 10  # what was under way at two kills


def test_requests_that_come_one_by_one(parts: Any, api: LocalApi) -> None:
    api.seconds = (0.05, 0.2)
    client, results = parts.Client(), parts.Results(":memory:")
    for number in range(5):
        results.add([parts.new_record(f"q{number}", "What is 2 + 2?")])
        parts.submit_all(client, results)
        pending = len(results.with_outcome("Pending"))
        polls = calls(api, "GET")
        parts.poll_all(client, results, interval_seconds=300, max_attempts=1)
        assert calls(api, "GET") <= polls + pending
    while results.with_outcome("Pending"):
        parts.poll_all(client, results, interval_seconds=0.05, max_attempts=2)
    assert {record.answer for record in results.records.values()} == {"2 + 2 equals 4."}
    assert len(api.generations) == 5


def test_two_accounts_have_a_key_and_a_pause_each(parts: Any, api: LocalApi) -> None:
    client = parts.Client()
    api.choose_fault = lambda *_: status(429, Retry_After="60")
    with pytest.raises(parts.NotAccepted):
        client.call("POST", "/any", {})
    with LocalApi() as other:
        other_client = parts.Client("key-of-two", other.url)
        with pytest.raises(parts.LockedOut, match="this key is not valid"):
            parts.submit_all(other_client, results_of(parts, "Why?"))
        assert other.headers_seen[0]["Authorization"] == "Bearer key-of-two"
    assert client.pause_seconds() > other_client.pause_seconds() == 0


@pytest.mark.parametrize("is_poll", [False, True], ids=["submissions", "polls"])
def test_a_retry_after_pauses_all_jobs(parts: Any, api: LocalApi, is_poll: bool) -> None:
    """While one job waits for 3 seconds, another one is told to wait for 60."""
    client, results = parts.Client(), results_of(parts, "Why?")
    now = 0.0
    called_at: list[float] = []
    faults = iter([status(429, Retry_After="3"), status(429, Retry_After="60")])

    def choose(request: web.Request, body: Json) -> Fault | None:
        called_at.append(now)
        return next(faults, None)

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal now
            if timeout == 3:
                with pytest.raises(parts.NotAccepted):
                    client.call("POST", "/as-another-job", {})
            now += max(timeout or 0, 0)
            return False

    parts.monotonic = lambda: now
    parts.random = SimpleNamespace(uniform=lambda low, high: low)
    if is_poll:
        parts.submit_all(client, results)
    api.choose_fault = choose
    parts.submit_all(client, results, stop=Clock())
    parts.poll_all(client, results, stop=Clock(), interval_seconds=0)
    assert called_at[:3] == [0, 0, 60]
    assert outcomes(results) == {"Success": 1}


def test_a_record_can_have_any_request(parts: Any, api: LocalApi) -> None:
    messages = [{"role": "system", "content": "Be short."}]
    request = {"model": "mine", "messages": messages, "temperature": 0.5}
    request["metadata"] = {"custom_id": "row 1"}
    results = parts.Results(":memory:")
    results.add([parts.Record("row 1", "", request)])
    parts.submit_all(parts.Client(), results)
    assert [each.request for each in api.generations.values()] == [request]


# What stop ends: the fault that makes a job wait, and whether it meets polls
WAITS = {
    "a backoff": (status(429), False),
    "a Retry-After at a submission": (status(429, Retry_After="99"), False),
    "a Retry-After at a poll": (status(429, Retry_After="99"), True),
    "an interval": (status(404), True),
}


@pytest.mark.parametrize("name", WAITS)
def test_stop_ends_a_wait_at_once(parts: Any, api: LocalApi, name: str) -> None:
    fault, is_poll = WAITS[name]
    backoff = 99 if name == "a backoff" else 0
    parts.random = SimpleNamespace(uniform=lambda low, high: high and backoff)
    client, results, stop = parts.Client(), results_of(parts, "Why?", "How?"), Stop()
    if is_poll:
        parts.submit_all(client, results)
    api.choose_fault = faulty(fault, is_poll)
    options = {"interval_seconds": 99} if is_poll else {}
    work = parts.poll_all if is_poll else parts.submit_all
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, client, results, stop=stop, **options)
        assert stop.is_waited_for.wait(30)
        stop.set()
        future.result(timeout=30)
    assert outcomes(results) == {"Pending" if is_poll else "Not sent": 2}


def test_polling_ends_without_a_last_wait(parts: Any, api: LocalApi) -> None:
    client, results, stop = parts.Client(), results_of(parts, "Why?"), Stop()
    waits: list[float] = []
    stop.wait = waits.append  # type: ignore[assignment]
    parts.submit_all(client, results)
    api.choose_fault = faulty(status(404), polls=True, times=1)
    parts.poll_all(client, results, stop=stop, interval_seconds=300, max_attempts=1)
    assert outcomes(results) == {"Pending": 1}
    parts.poll_all(client, results, stop=stop, interval_seconds=300)
    assert outcomes(results) == {"Success": 1}
    assert max(waits, default=0) <= 0


def test_four_threads_submit_the_same_results_once(parts: Any, api: LocalApi) -> None:
    parts.MAX_GROUP_SIZE = 5
    client, results = parts.Client(), results_of(parts, *["Why?"] * 40)
    seen: list[str] = []
    note = callback(parts, lambda records: seen.extend(each.custom_id for each in records))
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(parts.submit_all, client, results, **note) for _ in range(4)]
    assert [future.result() for future in work] == [None] * 4  # none has an error
    assert outcomes(results) == {"Pending": 40}
    assert sorted(seen) == sorted(results.records)  # each by the thread that has sent it
    assert (len(api.generations), api.made_again()) == (40, 0)


def test_no_thread_comes_between_a_look_and_its_save(parts: Any, api: LocalApi) -> None:
    results = results_of(parts, "Why?")

    def watch(records: Any, **changes: Any) -> None:
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(results.lock.acquire, blocking=False).result(), changes
        save(records, **changes)

    save, results.save = results.save, watch
    parts.submit_all(parts.Client(), results)
    assert outcomes(results) == {"Pending": 1}


def test_what_another_thread_has_taken_is_left_to_it(parts: Any, api: LocalApi) -> None:
    client, results, stop = parts.Client(), results_of(parts, "Why?"), Stop()
    stop.wait = lambda _: bool(parts.submit_all(client, results))  # type: ignore[assignment]
    parts.submit_all(client, results, **callback(parts, pytest.fail), stop=stop)
    assert (len(api.generations), api.made_again()) == (1, 0)


def test_an_error_of_on_record_loses_no_id(parts: Any, api: LocalApi, tmp_path: Path) -> None:
    results = results_of(parts, *["Why?"] * 9, path=tmp_path / "my.db")
    gate = Gate("POST")
    api.choose_fault = lambda *call: None if "q0" in custom_ids(call[1]) else gate(*call)

    def fail(records: list[Any]) -> None:
        gate.opened.set()
        raise RuntimeError("my own mistake")

    with pytest.raises(RuntimeError, match="my own mistake"):
        parts.submit_all(parts.Client(), results, **callback(parts, fail))
    results.close()
    kept = parts.Results(tmp_path / "my.db")
    name, given_out = "generation_id", set(api.generations)
    if is_group(parts):
        name, given_out = "group_id", set(api.groups)
    assert {getattr(each, name) for each in kept.records.values()} - {None} == given_out
    assert outcomes(kept).keys() <= {"Pending", "Not sent"}


def test_closing_waits_for_a_save(parts: Any) -> None:
    """SQLite may crash if it is closed while a thread saves."""
    results = results_of(parts, "Why?")
    results.lock = MagicMock()
    results.close()
    assert results.lock.__enter__.call_count == 1
    with pytest.raises(Error, match="closed"):
        results.save(results.records.values())


def test_what_is_unknown_can_be_sent_again_on_purpose(parts: Any, api: LocalApi) -> None:
    client, results = parts.Client(), results_of(parts, "What is 2 + 2?")
    api.choose_fault = faulty(after(close), polls=False)
    with suppress(parts.ApiError):  # which is how it ends for a group
        parts.submit_all(client, results)
    assert outcomes(results) == {"Unknown": 1}
    api.choose_fault = lambda request, body: None
    results.save([parts.new_record("q0", "What is 2 + 2?")])
    parts.submit_all(client, results)
    parts.poll_all(client, results)
    assert results.records["q0"].answer == "2 + 2 equals 4."
    assert len(api.generations) == 2


def test_add_leaves_what_is_known_as_it_is(parts: Any, tmp_path: Path) -> None:
    results = results_of(parts, "Why?", path=tmp_path / "my.db")
    parts.submit_all(parts.Client(), results)
    parts.poll_all(parts.Client(), results)
    results.records["q0"].passed = True  # an attribute of one's own
    results.save(results.records.values())
    before = vars(results.records["q0"]).copy()
    results.add([parts.new_record("q0", "Another?"), parts.new_record("q1", "New?")])
    assert results.connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    results.close()
    kept = parts.Results(tmp_path / "my.db")
    assert vars(kept.records["q0"]) == before
    assert kept.records["q1"].question == "New?"


def test_the_reason_for_giving_up_is_that_of_what_was_sent(api: LocalApi) -> None:
    parts = load(SINGLE, MAX_IN_VAIN=1)
    results, stop = results_of(parts, "Why?", "How?"), Stop()
    other = [results.records["q1"]]  # another thread has it
    stop.wait = lambda _: results.save(other, state="Queued")  # type: ignore[assignment]
    api.choose_fault = lambda *_: status(500, "a reason")
    with pytest.raises(parts.ApiError, match="a reason"):
        parts.submit_all(parts.Client(), results, stop=stop)


@pytest.mark.parametrize("is_poll", [False, True], ids=["submissions", "polls"])
def test_what_is_saved_anew_stays(parts: Any, api: LocalApi, is_poll: bool) -> None:
    parts.MAX_GROUP_SIZE = 5
    client, results = parts.Client(), results_of(parts, *["Why?"] * 10)
    again = parts.new_record("q9", "What is 2 + 2?")
    once = iter([[again]])
    if is_poll:
        parts.submit_all(client, results)
    work = parts.poll_all if is_poll else parts.submit_all
    work(client, results, **callback(parts, lambda _: results.save(next(once, []))))
    assert results.records["q9"] is again
    assert again.outcome == ("Not sent" if is_poll else "Pending")
    assert (len(api.generations), api.made_again()) == (10, 0)


def test_what_is_saved_anew_during_its_poll_stays(parts: Any, api: LocalApi) -> None:
    client, results = parts.Client(), results_of(parts, "Why?")
    parts.submit_all(client, results)
    again = parts.new_record("q0", "What is 2 + 2?")
    api.choose_fault = lambda *_: results.save([again])
    api.alter_list = lambda shown: [*shown, {"id": "nobody-s", "state": "Failed"}]
    parts.poll_all(client, results, **callback(parts, lambda records: records[0]))
    assert results.records["q0"] is again
    assert again.outcome == "Not sent"


def test_without_threads_nothing_is_sent_and_nothing_unknown(api: LocalApi) -> None:
    parts = load(SINGLE)
    results = results_of(parts, "Why?")
    parts.ThreadPoolExecutor = lambda _: ThreadPoolExecutor(1, initializer=lambda: 1 / 0)
    with pytest.raises(RuntimeError):
        parts.submit_all(parts.Client(), results)
    assert (outcomes(results), api.calls) == ({"Not sent": 1}, [])


def test_an_id_of_an_earlier_run_is_none(parts: Any, api: LocalApi) -> None:
    results = results_of(parts, "Why?")
    parts.submit_all(parts.Client(), results)
    [given_id] = api.groups if is_group(parts) else api.generations
    api.choose_fault = lambda *_: body(
        b'{"id": "%b", "groupId": "%b"}' % ((given_id.encode(),) * 2)
    )
    results.add([parts.new_record("new", "How?")])
    with suppress(parts.ApiError):  # which is how it ends for a group
        parts.submit_all(parts.Client(), results)
    assert results.records["new"].outcome == "Unknown"


def test_an_answer_stays_whatever_another_poll_brings(parts: Any, api: LocalApi) -> None:
    client, results = parts.Client(), results_of(parts, "Why?")
    parts.submit_all(client, results)
    record = results.records["q0"]

    def late(_: str) -> None:
        record.update({"state": "Success", "response": {"id": "mine"}})  # by another thread
        raise parts.Uncertain("a late error")

    client.fetch_generation = client.fetch_group = late
    parts.poll_all(client, results)
    record.update({"state": "In Progress"})
    assert (record.state, record.error) == ("Success", None)


BAD: dict[str, Json] = {
    "two of one id": {"custom_id": "good"},
    "an id that is no text": {"custom_id": 7},
    "what is no JSON": {"request": {"messages": {1, 2}}},
}


@pytest.mark.parametrize("what", BAD)
def test_a_batch_with_a_mistake_is_not_added(parts: Any, tmp_path: Path, what: str) -> None:
    results = parts.Results(tmp_path / "my.db")
    good = parts.new_record("good", "Why?")
    bad = parts.Record(**{"custom_id": "bad", "question": "", "request": {}} | BAD[what])
    with pytest.raises((ValueError, TypeError)):
        results.add([good, bad])
    assert results.records == {}
    results.close()
    assert parts.Results(tmp_path / "my.db").records == {}


UNSENDABLE: dict[str, tuple[object, object, Json]] = {
    "no text": ("a", None, {"custom_id": "a"}),
    "an empty id": ("", "Why?", {"custom_id": ""}),
    "an id that is a number": (7, "Why?", {"custom_id": 7}),
    "the id of another": ("a", "Why?", {"custom_id": "b"}),
}


@pytest.mark.parametrize("what", UNSENDABLE)
def test_new_record_refuses_what_cannot_be_sent(parts: Any, what: str) -> None:
    custom_id, question, metadata = UNSENDABLE[what]
    parts.build_request = lambda custom_id, question: {"metadata": metadata}
    with pytest.raises(ValueError, match=repr(custom_id)):
        parts.new_record(custom_id, question)


def test_a_template_that_build_request_changes_is_copied(parts: Any) -> None:
    template: Json = {"metadata": {}}

    def build_request(custom_id: str, question: str) -> Json:
        template["metadata"]["custom_id"] = custom_id
        return template

    parts.build_request = build_request
    records = [parts.new_record(custom_id, "Why?") for custom_id in ("one", "two")]
    assert [each.request["metadata"]["custom_id"] for each in records] == ["one", "two"]


# How many workers there are, which submissions are uncertain, how many of 12 become Unknown
IN_VAIN = [(1, [True], 5), (1, [True, False], 6), (5, [True], 5)]


@pytest.mark.parametrize(("workers", "fails", "unknown"), IN_VAIN)
def test_five_in_a_row_end_it(api: LocalApi, workers: int, fails: Any, unknown: int) -> None:
    parts = load(SINGLE, MAX_CONCURRENT_POLLS=workers)
    parts.random = SimpleNamespace(uniform=lambda low, high: low)
    results = results_of(parts, *["Why?"] * 12)
    is_failing = cycle(fails)
    api.choose_fault = lambda *_: status(500) if next(is_failing) else None
    with suppress(parts.ApiError):
        parts.submit_all(parts.Client(), results)
    assert outcomes(results)["Unknown"] == unknown
