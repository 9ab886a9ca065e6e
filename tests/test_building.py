"""Programs built upon the parts of the scripts, in this process or in one of their own."""

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sqlite3 import Error
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SCRIPTS, TOP, WAITS, Example, Gate, Striker, custom_ids, faulty, load
from local_api import API_KEY, Fault, Json, LocalApi, Proceed, after, close, status, web

SINGLE, GROUP = SCRIPTS


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
    """A stop event; is_waited_for is set when a wait for it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if timeout and timeout > 0:
            self.is_waited_for.set()
        return super().wait(timeout)


# Whole programs

PROGRAM = """
from pathlib import Path

from MODULE import Client, Results, new_record, poll_all, submit_all

client = Client()
results = Results("program.db")
results.add(new_record(path.name, path.read_text()) for path in sorted(Path("texts").iterdir()))
submit_all(client, results)
poll_all(client, results, interval_seconds=0.05)
for record in results.records.values():
    print(record.custom_id, record.outcome, record.answer, sep="|")
"""
# The calls at which the program is killed, in one start after another: the method, how many
# of it there have been, and whether the last is carried out first
KILLS = [("POST", 2, True), ("POST", 1, False), ("GET", 1, True), ("GET", 2, False)]


def test_a_batch_of_documents_goes_on_after_kills(example: Example) -> None:
    if example.script == GROUP:
        example.edit(MAX_GROUP_SIZE=2)
    (example.folder / "texts").mkdir()
    names = [f"text {number}" for number in range(10, 30)]
    for name in names:
        (example.folder / "texts" / name).write_text(f"This is {name}. It is long.\n" * 9)
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
    assert [row[0] for row in rows] == names
    for name, outcome, answer in rows:
        assert outcome == "Unknown" or answer.startswith(f"This is {name}.")
    assert 1 <= run.stdout.count("|Unknown|") <= 10  # what was under way at two kills


def test_requests_that_come_one_by_one(parts: Any, api: LocalApi) -> None:
    api.seconds = (0.05, 0.2)
    client, results = parts.Client(), parts.Results(":memory:")
    for number in range(5):
        results.add([parts.new_record(f"q{number}", "What is 2 + 2?")])
        parts.submit_all(client, results)
        pending = len(results.with_outcome("Pending"))
        polls = sum(method == "GET" for method, _ in api.calls)
        parts.poll_all(client, results, interval_seconds=300, max_attempts=1)
        assert sum(method == "GET" for method, _ in api.calls) <= polls + pending
    while results.with_outcome("Pending"):
        parts.poll_all(client, results, interval_seconds=0.05, max_attempts=2)
    assert {record.answer for record in results.records.values()} == {"2 + 2 equals 4."}
    assert len(api.generations) == 5


def test_230_requests_are_sent_in_five_groups(api: LocalApi, tmp_path: Path) -> None:
    parts = load(GROUP)
    results = results_of(parts, *["What do bees make?"] * 230, path=tmp_path / "my.db")
    sizes: list[int] = []
    parts.submit_all(parts.Client(), results, lambda group: sizes.append(len(group)))
    assert sizes == [50, 50, 50, 50, 30]
    parts.poll_all(parts.Client(), results, interval_seconds=0.05)
    assert outcomes(results) == {"Success": 230}
    assert len(api.generations) == 230


def test_two_accounts_have_a_key_and_a_pause_each(parts: Any, api: LocalApi) -> None:
    one, two = results_of(parts, "Why?"), results_of(parts, "Why?")
    with LocalApi(seconds=(0, 0)) as other:

        async def take_other_key(request: web.Request, _: Proceed) -> web.StreamResponse:
            assert request.headers["Authorization"] == "Bearer key-of-two"
            body = await request.json()
            return web.json_response(other.answer(request.method, request.path, body))

        other.choose_fault = lambda request, body: take_other_key
        client = parts.Client(API_KEY, api.url)
        client.pause(60)  # as a Retry-After makes it
        parts.submit_all(parts.Client("key-of-two", other.url), two)
        client.paused_until = 0
        parts.submit_all(client, one)
        assert outcomes(one) == outcomes(two) == {"Pending": 1}
        assert len(other.generations) == len(api.generations) == 1


def test_a_retry_after_pauses_all_jobs(parts: Any, api: LocalApi) -> None:
    stops = {name: Stop() for name in "abc"}
    told_at: list[float] = []
    arrived_at: list[float] = []

    async def come_in_1_s(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        while "b" in faults:  # b must not find the pause of a before its own call
            await asyncio.sleep(0.01)
        return await status(429, Retry_After="1")(request, proceed)

    async def come_in_2_s(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        while not stops["a"].is_waited_for.is_set():  # a waits for its one second already
            await asyncio.sleep(0.01)
        told_at.append(monotonic())
        return await status(429, Retry_After="2")(request, proceed)

    faults: dict[str, Fault] = {"a": come_in_1_s, "b": come_in_2_s}

    def choose(request: web.Request, body: Json) -> Fault | None:
        fault = faults.pop(custom_ids(body)[0], None)
        if not fault:
            arrived_at.append(monotonic())
        return fault

    def work(name: str) -> None:
        if name == "c":
            stops["b"].is_waited_for.wait(30)
        results = parts.Results(":memory:")
        results.add([parts.new_record(name, "Why?")])
        parts.submit_all(client, results, stop=stops[name])

    api.choose_fault = choose
    client = parts.Client()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, stops))
    assert len(arrived_at) == len(api.generations) == 3
    assert min(arrived_at) >= told_at[0] + 1.9


def test_rows_have_requests_of_their_own(parts: Any, api: LocalApi) -> None:
    results = parts.Results(":memory:")
    for number in range(3):
        messages = [{"role": "system", "content": "Be short."}]
        messages += [{"role": "user", "content": f"What is {number}?"}]
        request = {"model": "mine", "messages": messages, "temperature": number / 2}
        request |= {"metadata": {"custom_id": f"row {number}"}}
        results.add([parts.Record(f"row {number}", "", request)])
    parts.submit_all(parts.Client(), results)
    sent = {each.custom_id: each.request for each in api.generations.values()}
    assert sent == {key: record.request for key, record in results.records.items()}


# Stopping from another thread


@pytest.mark.parametrize("wait", WAITS)
def test_stop_ends_a_wait_at_once(parts: Any, api: LocalApi, wait: str) -> None:
    fault, is_poll = WAITS[wait]
    backoff = 99 if wait == "a backoff" else 0
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


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_stop_lets_calls_under_way_end(parts: Any, api: LocalApi, method: str) -> None:
    parts.MAX_GROUP_SIZE = 5  # as many as there are workers in the other script
    client, results, stop = parts.Client(), results_of(parts, *["Why?"] * 9), Stop()
    if method == "GET":
        parts.submit_all(client, results)
    gate = api.choose_fault = Gate(method, 1 if is_group(parts) else 5)
    work = parts.submit_all if method == "POST" else parts.poll_all
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, client, results, stop=stop)
        assert gate.arrived.wait(30)
        stop.set()
        assert not future.done()
        gate.opened.set()
        future.result(timeout=30)
    ended = (
        {"Pending": 5, "Not sent": 4} if method == "POST" else {"Success": 5, "Pending": 4}
    )
    assert outcomes(results) == ended


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


# Threads, and errors of the program's own


def test_four_threads_submit_the_same_results_once(parts: Any, api: LocalApi) -> None:
    parts.MAX_GROUP_SIZE = 5
    api.delay_seconds = 0.01
    client, results = parts.Client(), results_of(parts, *["Why?"] * 40)
    seen: list[str] = []
    note = callback(parts, lambda records: seen.extend(each.custom_id for each in records))
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(parts.submit_all, client, results, **note) for _ in range(4)]
    assert [future.result() for future in work] == [None] * 4  # none has an error
    assert outcomes(results) == {"Pending": 40}
    assert sorted(seen) == sorted(results.records)  # each by the thread that has sent it
    assert (len(api.generations), api.made_again()) == (40, 0)


def test_an_error_of_on_record_loses_no_id(parts: Any, api: LocalApi, tmp_path: Path) -> None:
    results = results_of(parts, *["Why?"] * 9, path=tmp_path / "my.db")
    gate = Gate("POST")
    first = iter([None])
    api.choose_fault = lambda request, body: next(first, gate(request, body))

    def fail(records: list[Any]) -> None:
        gate.opened.set()
        raise RuntimeError("my own mistake")

    with pytest.raises(RuntimeError, match="my own mistake"):
        parts.submit_all(parts.Client(), results, **callback(parts, fail))
    results.close()
    kept = parts.Results(tmp_path / "my.db")
    is_group = hasattr(parts, "MAX_GROUP_SIZE")
    ids = {
        each.group_id if is_group else each.generation_id for each in kept.records.values()
    }
    assert ids - {None} == set(api.groups if is_group else api.generations)
    assert outcomes(kept).keys() <= {"Pending", "Not sent"}


def test_an_error_of_on_record_awaits_no_poll(api: LocalApi) -> None:
    parts = load(SINGLE)
    results = results_of(parts, "Why?", "How?")
    client = parts.Client(timeout_seconds=3600)
    parts.submit_all(client, results)
    gate = Gate("GET")
    first = iter([None])
    api.choose_fault = lambda request, body: next(first, gate(request, body))
    with pytest.raises(ZeroDivisionError):
        parts.poll_all(client, results, lambda record: 1 / 0)
    assert outcomes(results) == {"Success": 1, "Pending": 1}
    gate.opened.set()


def test_requests_are_found_while_others_are_added(parts: Any) -> None:
    results = parts.Results(":memory:")
    batches = [[parts.Record(f"{n} {m}", "", {}) for m in range(50)] for n in range(40)]
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(lambda: [results.add(batch) for batch in batches])
        found = []
        while not adding.done():
            found.append(len(results.with_outcome("Not sent")))
    assert found == sorted(found)
    assert len(results.with_outcome("Not sent")) == 2000


CLOSED_EARLY = """
import sqlite3
import sys
from threading import Thread

from MODULE import Results, new_record

record = new_record("a", "Why?" * 1000)


def save(results):
    try:
        while True:
            results.save([record])
    except sqlite3.Error:
        pass


for number in range(30):
    results = Results(f"{number}.db")
    threads = [Thread(target=save, args=[results]) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not results.records:  # until one has saved
        pass
    results.close()
    for thread in threads:
        thread.join()
"""


def test_a_file_is_closed_while_threads_save(parts: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLOSED_EARLY.replace("MODULE", parts.__name__)]
    environment = {"PYTHONPATH": str(TOP), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    results = results_of(parts, "Why?")
    results.close()
    with pytest.raises(Error, match="closed"):
        results.save(results.records.values())


# Requests that are made again, or can't be made


def test_what_is_unknown_can_be_sent_again_on_purpose(parts: Any, api: LocalApi) -> None:
    client, results = parts.Client(), results_of(parts, "What is 2 + 2?")
    api.choose_fault = faulty(after(close), polls=False)
    try:
        parts.submit_all(client, results)
    except parts.Uncertain:
        assert is_group(parts)
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
    before = vars(results.records["q0"]).copy()
    results.add([parts.new_record("q0", "Another?"), parts.new_record("q1", "New?")])
    results.close()
    kept = parts.Results(tmp_path / "my.db")
    assert vars(kept.records["q0"]) == before
    assert kept.records["q1"].question == "New?"


BAD: dict[str, Json] = {
    "two of one id": {"custom_id": "good"},
    "what is no JSON": {"request": {"messages": {1, 2}}},
    "NaN in a request": {"request": {"temperature": float("nan")}},
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
    "a request without the id": ("a", "Why?", {}),
}


@pytest.mark.parametrize("what", UNSENDABLE)
def test_new_record_refuses_what_cannot_be_sent(parts: Any, what: str) -> None:
    custom_id, question, metadata = UNSENDABLE[what]
    parts.build_request = lambda custom_id, question: {"metadata": metadata}
    with pytest.raises(ValueError, match=repr(custom_id)):
        parts.new_record(custom_id, question)


def test_a_template_that_build_request_changes_is_copied(parts: Any, api: LocalApi) -> None:
    template: Json = {"model": "any", "messages": [{"role": "user"}], "metadata": {}}

    def build_request(custom_id: str, question: str) -> Json:
        template["messages"][0]["content"] = question
        template["metadata"]["custom_id"] = custom_id
        return template

    parts.build_request = build_request
    parts.submit_all(parts.Client(), results_of(parts, "one", "two", "three"))
    sent = {each.request["messages"][0]["content"] for each in api.generations.values()}
    assert sent == {"one", "two", "three"}


def test_a_client_of_ones_own_needs_no_network(api: LocalApi) -> None:
    parts: Any = load(SINGLE)

    class Own(parts.Client):  # type: ignore[misc]
        def submit_generation(self, request: Json) -> str:
            if request["messages"][0]["content"] == "refuse":
                raise parts.Refused("too long")
            return "my-id"

        def fetch_generation(self, generation_id: str) -> Json:
            response = {"choices": [{"message": {"content": "Because."}}]}
            return {"id": generation_id, "state": "Success", "response": response}

    client, results = Own("any", "http://localhost:1"), results_of(parts, "Why?", "refuse")
    parts.submit_all(client, results)
    parts.poll_all(client, results)
    assert outcomes(results) == {"Success": 1, "Failed": 1}
    assert results.records["q0"].answer == "Because."
    assert results.records["q1"].error == "too long"
    assert not api.calls


def test_any_custom_id_and_any_letter_of_an_answer_are_kept(example: Example) -> None:
    names = ["x" * 300, "two\nlines\r\n", "東京 ñ 😀", "'; DROP TABLE --", "a/b\\c\u2028d"]
    example.define(f"def load_questions():\n    return dict.fromkeys({names!r}, 'Why?')")
    text = "one\u2028two\u0085three\x0bfour\n"

    def alter(generation: Json) -> Json:
        generation["response"]["choices"][0]["message"]["content"] = text
        return generation

    example.api.alter = alter
    run = example.run()
    assert run.code == 0
    assert {row["custom_id"]: row["answer"] for row in run.answers} == dict.fromkeys(
        names, text
    )
    assert len(run.path.with_suffix(".jsonl").read_text().splitlines()) == len(names)
