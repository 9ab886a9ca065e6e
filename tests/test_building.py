"""Programs that others build on the scripts, by import or by copying their parts."""

import asyncio
import csv
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

import local_api
import pytest
import requests
from conftest import (
    API_KEY,
    GROUP,
    HANG_SECONDS,
    SCRIPTS,
    SINGLE,
    TOP,
    load,
    read_results,
)
from local_api import (
    Fault,
    Json,
    LocalApi,
    Proceed,
    after,
    close,
    problem,
    reset,
    status,
    web,
)

MODULE = {SINGLE: "async_polling_example", GROUP: "async_group_example"}

# Programs, run as a user runs them


class Workshop:
    """A folder in which a user writes a program."""

    def __init__(self, folder: Path, api: LocalApi) -> None:
        self.folder = folder
        self.api = api
        self.environment = api.environment

    def start(
        self, program: str, script: str = SINGLE, is_copied: bool = False
    ) -> subprocess.Popen[str]:
        """Start a program beside a copy of a script, or with a copy of its parts in it."""
        if is_copied:
            parts = (TOP / script).read_text("utf-8").partition("# --- The screen")[0]
            imports = re.findall(rf"^from {MODULE[script]} import .*\n", program, re.M)
            program = program.replace(imports[0], parts)
        else:
            shutil.copy(TOP / script, self.folder)
        (self.folder / "my_program.py").write_text(program, "utf-8")
        return self.start_python("my_program.py")

    def start_python(self, *arguments: str) -> subprocess.Popen[str]:
        """Start Python in the folder."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("INFERENCE_")
        }
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**inherited, **self.environment, "PYTHONUTF8": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, program: str, script: str = SINGLE, is_copied: bool = False) -> list[str]:
        """Run a program to its good end; return the lines that it has printed."""
        return finish(self.start(program, script, is_copied))


def finish(process: subprocess.Popen[str]) -> list[str]:
    """Wait for the good end of a program; return the lines that it has printed."""
    try:
        stdout, stderr = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, stderr
    assert not stderr
    return stdout.splitlines()


@pytest.fixture
def workshop(tmp_path: Path, api: LocalApi) -> Workshop:
    return Workshop(tmp_path, api)


CLASSIFIER = """
import csv
from concurrent.futures import ThreadPoolExecutor

from async_polling_example import Client, Results, new_record, poll_all, submit_all

with open("tickets.csv", newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))


def record_of(row):
    record = new_record(row["ticket"], row["text"])
    prompt = f"Is this {row['language']} ticket about a bill, a bug or something else?"
    record.request["messages"].insert(0, {"role": "system", "content": prompt})
    record.request["temperature"] = float(row["temperature"])
    return record


client = Client()
results = Results("answers/of today/tickets.db")
records = results.load() or [record_of(row) for row in rows]
with ThreadPoolExecutor(3) as pool:
    for record in submit_all(client, pool, records, results.save):
        print("submitted", record.custom_id)
    for record in poll_all(client, pool, records, results.save, interval_seconds=0.05):
        print("final", record.custom_id)
answers = {record.custom_id: record for record in records}
with open("sorted.csv", "w", newline="", encoding="utf-8") as file:
    for row in rows:
        answer = answers[row["ticket"]]
        csv.writer(file).writerow([row["ticket"], answer.outcome, answer.response])
"""
TICKETS = [
    {"ticket": "A/17 ü", "text": "Why?", "language": "English", "temperature": "0"},
    {
        "ticket": "0042",
        "text": 'Say "東京",\nand more',
        "language": "Japanese",
        "temperature": "1",
    },
    {
        "ticket": "a" * 200,
        "text": "'; DROP TABLE --",
        "language": "SQL",
        "temperature": "0.5",
    },
    *(
        {
            "ticket": f"t{number}",
            "text": f"{number}?",
            "language": "any",
            "temperature": "0",
        }
        for number in range(9)
    ),
]


@pytest.mark.parametrize("is_copied", [False, True], ids=["imported", "copied"])
def test_rows_of_a_table_are_classified(workshop: Workshop, is_copied: bool) -> None:
    with (workshop.folder / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TICKETS[0])
        writer.writeheader()
        writer.writerows(TICKETS)
    printed = workshop.run(CLASSIFIER, is_copied=is_copied)
    custom_ids = [row["ticket"] for row in TICKETS]
    for word in ("submitted", "final"):
        assert Counter(f"{word} {each}" for each in custom_ids) <= Counter(printed)
    with (workshop.folder / "sorted.csv").open(newline="", encoding="utf-8") as file:
        answers = list(csv.reader(file))
    assert answers == [
        [row["ticket"], "Success", f"You asked: {row['text']}"] for row in TICKETS
    ]
    sent = {
        generation.custom_id: generation for generation in workshop.api.generations.values()
    }
    assert len(workshop.api.generations) == len(TICKETS)
    for row in TICKETS:
        request = sent[row["ticket"]].request
        assert row["language"] in request["messages"][0]["content"]
        assert request["temperature"] == float(row["temperature"])
    kept = read_results(workshop.folder / "answers/of today/tickets.db")
    assert [row["custom_id"] for row in kept] == custom_ids
    calls = len(workshop.api.calls)
    assert workshop.run(CLASSIFIER, is_copied=is_copied) == []
    assert len(workshop.api.calls) == calls


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("is_copied", [False, True], ids=["imported", "copied"])
def test_the_program_in_the_docstring_is_whole(
    script: str, is_copied: bool, workshop: Workshop
) -> None:
    _, _, lines = (load(script).__doc__ or "").partition("\n    client = Client()\n")
    program = textwrap.dedent(f"    client = Client()\n{lines}")
    names = "Client, Results, new_record, poll_all, submit_all"
    if script == SINGLE:
        names = f"MAX_CONCURRENT_POLLS, {names}"
    program = f"from {MODULE[script]} import {names}\n{program}"
    if not is_copied:
        program = f"from concurrent.futures import ThreadPoolExecutor\n{program}"
    submitted, final = workshop.run(program, script, is_copied)
    if script == SINGLE:
        assert submitted == "my-id Pending None"
    else:
        assert submitted in workshop.api.groups
    assert final == "my-id Success 2 + 2 equals 4."
    calls = len(workshop.api.calls)
    assert workshop.run(program, script, is_copied) == []
    assert len(workshop.api.calls) == calls


GROUPS = """
from concurrent.futures import ThreadPoolExecutor

from async_group_example import Client, Results, new_record, poll_all, submit_all

client = Client()
results = Results("groups.db")
records = results.load() or [new_record(f"row-{n}", f"What is {n}?") for n in range(230)]
results.save(records)
with ThreadPoolExecutor(1) as pool:
    for start in range(0, len(records), 50):
        for submitted in submit_all(client, pool, records[start : start + 50], results.save):
            print("submitted", len(submitted))
    for final in poll_all(client, pool, records, results.save, interval_seconds=0.05):
        print("final", len(final))
for record in records:
    assert record.response == f"You asked: {record.question}", record
"""


@pytest.mark.parametrize("is_copied", [False, True], ids=["imported", "copied"])
def test_230_requests_are_submitted_in_groups_and_polled_together(
    workshop: Workshop, is_copied: bool
) -> None:
    failed: list[str] = []

    def fail_the_first_poll(request: web.Request, body: Json) -> Fault | None:
        if request.method == "GET" and not failed:
            failed.append(request.path)
            return status(500)
        return None

    workshop.api.choose_fault = fail_the_first_poll
    printed = workshop.run(GROUPS, GROUP, is_copied)
    assert printed[:5] == ["submitted 50"] * 4 + ["submitted 30"]
    sizes = [int(line.removeprefix("final ")) for line in printed[5:]]
    assert sizes in ([180, 50], [200, 30])
    assert workshop.api.made_again() == 0
    assert len(workshop.api.generations) == 230
    polls = [path for method, path in workshop.api.calls if method == "GET"]
    assert len(polls) == 6  # of five groups, and again of the one whose poll failed
    assert polls[5] == failed[0]
    assert len(workshop.api.connections) == 1


SERVICE = """
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

from async_polling_example import Client, Results, new_record, poll_all, submit_all

client = Client()
results = Results("service.db")
pool = ThreadPoolExecutor(6)
answers = {}


def work(name, count):
    records = [new_record(f"{name}-{n}", f"{name} asks {n}") for n in range(count)]
    list(submit_all(client, pool, records, results.save))
    list(poll_all(client, pool, records, results.save, interval_seconds=0.05))
    answers[name] = [record.response for record in records]


jobs = {"ann": 9, "bob": 1, "cleo": 14, "dan": 0}
threads = [Thread(target=work, args=job) for job in jobs.items()]
for thread in threads:
    thread.start()
seen = set()
while any(thread.is_alive() for thread in threads):
    seen |= {record.outcome for record in results.load()}
for thread in threads:
    thread.join()
assert "Unknown" not in seen, seen
for name, count in jobs.items():
    assert answers[name] == [f"You asked: {name} asks {n}" for n in range(count)], answers
pool.shutdown()
print(Counter(record.outcome for record in results.load()))
"""


def test_jobs_of_a_service_share_a_client_a_pool_and_a_file(workshop: Workshop) -> None:
    workshop.api.seconds = (0, 0.2)
    assert workshop.run(SERVICE) == ["Counter({'Success': 24})"]
    assert workshop.api.made_again() == 0
    assert len(workshop.api.generations) == 24
    assert len(workshop.api.connections) <= 6  # a connection for each worker thread


CHATS = """
import json
from concurrent.futures import ThreadPoolExecutor

from async_polling_example import Client, Record, Results, poll_all, submit_all

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
weather = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
chat = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "Why really?"},
]
pictures = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, PICTURE]}]
requests = {
    "picture": {"messages": pictures},
    "chat": {"messages": chat},
    "tool": {"messages": chat, "tools": [weather]},
    "two": {"messages": chat, "n": 2},
    "sure": {"messages": chat, "logprobs": True},
}
records = []
for custom_id, request in requests.items():
    request |= {"model": "any", "metadata": {"custom_id": custom_id, "kind": "test"}}
    records.append(Record(custom_id, custom_id, request))
client = Client()
results = Results("chats.db")
with ThreadPoolExecutor(3) as pool:
    list(submit_all(client, pool, records, results.save))
    list(poll_all(client, pool, records, results.save))
assert results.load() == records
results.close()
"""


def test_pictures_chats_and_tools_are_answered_and_nothing_is_dropped(
    workshop: Workshop,
) -> None:
    workshop.run(CHATS)
    rows = {row["custom_id"]: row for row in read_results(workshop.folder / "chats.db")}
    assert {row["state"] for row in rows.values()} == {"Success"}
    assert rows["picture"]["response"] == "You asked: What is it?"
    assert rows["chat"]["response"] == "You asked: Why really?"
    whole = {
        each.custom_id: each.as_json()["response"]
        for each in workshop.api.generations.values()
    }
    for custom_id in ("tool", "two", "sure"):
        assert rows[custom_id]["response"] == whole[custom_id]
    [choice] = rows["tool"]["response"]["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert rows["tool"]["finish_reason"] == "tool_calls"
    assert len(rows["two"]["response"]["choices"]) == 2


ACCOUNTS = """
import os
from concurrent.futures import ThreadPoolExecutor

from async_polling_example import Client, new_record, poll_all, submit_all

clients = {}
jobs = {}
for name in ("ONE", "TWO"):
    clients[name] = Client(os.environ[f"{name}_KEY"], os.environ[f"{name}_URL"])
    jobs[name] = [new_record(f"{name}-{n}", f"What is {n}?") for n in range(4)]
saved = []
with ThreadPoolExecutor(2) as pool:  # each thread works for both accounts
    submissions = [submit_all(clients[name], pool, jobs[name], saved.extend) for name in jobs]
    for _ in zip(*submissions, strict=True):
        pass
    polls = [poll_all(clients[name], pool, jobs[name], saved.extend) for name in jobs]
    for _ in zip(*polls, strict=True):
        pass
for name, records in jobs.items():
    print(name, *[record.outcome for record in records])
"""


def take_only(api: LocalApi, key: str) -> None:
    """Make a local API the one of an account: it accepts this key and no other."""

    async def check(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        if request.headers["Authorization"] != f"Bearer {key}":
            return problem(401, "the key of somebody else")
        return await request.match_info.handler(request)

    api.choose_fault = lambda request, body: check


def test_two_accounts_are_used_at_once(workshop: Workshop) -> None:
    with LocalApi(seconds=(0, 0)) as other:
        take_only(workshop.api, "key-of-one")
        take_only(other, "key-of-two")
        workshop.environment = {
            **{name: workshop.environment[name] for name in ("NO_PROXY", "no_proxy")},
            **{"ONE_KEY": "key-of-one", "ONE_URL": workshop.api.url},
            **{"TWO_KEY": "key-of-two", "TWO_URL": other.url},
        }
        printed = workshop.run(ACCOUNTS)
        assert printed == ["ONE" + " Success" * 4, "TWO" + " Success" * 4]
        for api, name in ((workshop.api, "ONE"), (other, "TWO")):
            custom_ids = [generation.custom_id for generation in api.generations.values()]
            assert sorted(custom_ids) == [f"{name}-{number}" for number in range(4)]


UNIT_TESTS = """
import unittest
from concurrent.futures import ThreadPoolExecutor

from async_polling_example import (
    ApiError, Client, LockedOut, NotAccepted, Refused, Uncertain, new_record, poll_all, submit_all
)


class FakeClient(Client):
    def __init__(self, errors=()):
        super().__init__(api_key="any", base_url="http://localhost:1/v1")
        self.errors = dict(errors)
        self.sent = []

    def submit_generation(self, request):
        custom_id = request["metadata"]["custom_id"]
        self.sent.append(custom_id)
        if custom_id in self.errors:
            raise self.errors[custom_id]
        return f"id-of-{custom_id}"

    def fetch_generation(self, generation_id):
        message = {"role": "assistant", "content": f"answer to {generation_id}"}
        return {"state": "Success", "response": {"choices": [{"message": message}]}}


def outcomes(client, expected=None, count=3):
    records = [new_record(f"q{number}", "Why?") for number in range(count)]
    with ThreadPoolExecutor(1) as pool:
        try:
            list(submit_all(client, pool, records, list, max_concurrent=1))
        except ApiError as error:
            assert type(error) is expected, error
        else:
            assert expected is None
        list(poll_all(client, pool, records, list))
    return [(record.outcome, record.response, record.error) for record in records]


def success(custom_id):
    return ("Success", f"answer to id-of-{custom_id}", None)


class Test(unittest.TestCase):
    def test_success(self):
        self.assertEqual(outcomes(FakeClient()), [success(f"q{n}") for n in range(3)])

    def test_refused(self):
        client = FakeClient({"q1": Refused("too long")})
        expected = [success("q0"), ("Failed", None, "too long"), success("q2")]
        self.assertEqual(outcomes(client), expected)

    def test_uncertain(self):
        client = FakeClient({"q1": Uncertain("a timeout")})
        expected = [success("q0"), ("Unknown", None, "a timeout"), success("q2")]
        self.assertEqual(outcomes(client), expected)

    def test_uncertain_in_a_row(self):
        client = FakeClient({f"q{n}": Uncertain("a timeout") for n in range(9)})
        found = outcomes(client, Uncertain, 9)
        self.assertEqual([outcome for outcome, _, _ in found], ["Unknown"] * 5 + ["Not sent"] * 4)

    def test_locked_out(self):
        client = FakeClient({"q1": LockedOut("no credit")})
        expected = [success("q0"), ("Not sent", None, "no credit"), ("Not sent", None, None)]
        self.assertEqual(outcomes(client, LockedOut), expected)
        self.assertEqual(client.sent, ["q0", "q1"])

    def test_not_accepted(self):
        client = FakeClient({"q1": NotAccepted("busy")})
        client.wait = lambda seconds, stop: not stop.is_set()
        expected = [success("q0"), ("Not sent", None, "busy"), ("Not sent", None, None)]
        self.assertEqual(outcomes(client, NotAccepted), expected)
        self.assertEqual(client.sent, ["q0"] + ["q1"] * 5)


unittest.main()
"""


def test_unit_tests_have_a_client_of_their_own_and_no_key(workshop: Workshop) -> None:
    workshop.environment = {}
    process = workshop.start(UNIT_TESTS)
    _, stderr = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, stderr
    assert "Ran 6 tests" in stderr
    assert not workshop.api.calls


# Killed, interrupted, forked

JOBS = {
    SINGLE: """
from concurrent.futures import ThreadPoolExecutor

from async_polling_example import Client, Results, new_record, poll_all, submit_all

client = Client()
results = Results("job.db")
records = results.load() or [new_record(f"row-{n}", f"What is {n}?") for n in range(20)]
with ThreadPoolExecutor(2) as pool:
    for record in submit_all(client, pool, records, results.save, max_concurrent=2):
        pass
    for record in poll_all(client, pool, records, results.save, 0.05, max_concurrent=2):
        pass
for record in records:
    print(record.outcome)
""",
    GROUP: """
from concurrent.futures import ThreadPoolExecutor

from async_group_example import Client, Results, new_record, poll_all, submit_all

client = Client()
results = Results("job.db")
records = results.load() or [new_record(f"row-{n}", f"What is {n}?") for n in range(20)]
results.save(records)
with ThreadPoolExecutor(1) as pool:
    for start in range(0, len(records), 4):
        for submitted in submit_all(client, pool, records[start : start + 4], results.save):
            pass
    for final in poll_all(client, pool, records, results.save, 0.05):
        pass
for record in records:
    print(record.outcome)
""",
}


class Killer:
    """Kills a program when one of its calls has come to the API, which may carry it out or not."""

    def __init__(self, method: str, calls_to_come: int, is_carried_out: bool) -> None:
        self.method = method
        self.calls_to_come = calls_to_come
        self.is_carried_out = is_carried_out
        self.has_started = threading.Event()
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, request: web.Request, body: Json) -> Fault | None:
        self.calls_to_come -= request.method == self.method
        return self.kill if self.calls_to_come == 0 else None

    async def kill(self, request: web.Request, proceed: Proceed) -> web.StreamResponse:
        """Kill the program."""
        assert self.has_started.wait(HANG_SECONDS)
        assert self.process
        if self.is_carried_out:
            await proceed()
        self.process.kill()
        self.process.wait()
        return await close(request, proceed)


# The submissions (POST) and polls (GET) that kill the program, each after another start of it:
# which one, and whether it is carried out.
KILLS = {
    SINGLE: [
        *(("POST", 6, True), ("POST", 1, False), ("POST", 3, True)),
        *(("GET", 4, True), ("GET", 1, False), ("GET", 3, True)),
    ],
    GROUP: [
        *(("POST", 2, True), ("POST", 1, False)),
        *(("GET", 1, True), ("GET", 2, True), ("GET", 1, False)),
    ],
}
AT_A_TIME = {SINGLE: 2, GROUP: 4}  # how many requests the jobs submit


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_is_killed_goes_on_and_pays_nothing_twice(
    script: str, workshop: Workshop
) -> None:
    api = workshop.api
    for kill in KILLS[script]:
        killer = Killer(*kill)
        api.choose_fault = killer
        killer.process = workshop.start(JOBS[script], script)
        killer.has_started.set()
        _, stderr = killer.process.communicate(timeout=HANG_SECONDS)
        assert killer.process.returncode < 0, stderr
    api.choose_fault = lambda request, body: None
    printed = workshop.run(JOBS[script], script)
    assert api.made_again() == 0
    rows = read_results(workshop.folder / "job.db")
    assert [row["custom_id"] for row in rows] == [f"row-{number}" for number in range(20)]
    assert printed == [row["state"] for row in rows]
    for row in rows:
        if row["state"] == "Success":
            assert row["response"] == f"You asked: {row['question']}"
            assert api.generations[row["generation_id"]].custom_id == row["custom_id"]
        else:
            assert row["state"] == "Unknown"
            assert row["error"] == "the program ended while it was being sent"
    submissions_killed = sum(method == "POST" for method, *_ in KILLS[script])
    assert printed.count("Unknown") <= submissions_killed * AT_A_TIME[script]
    calls = len(api.calls)
    assert workshop.run(JOBS[script], script) == printed
    assert len(api.calls) == calls


INTERRUPTED = """
import os
import signal
from concurrent.futures import ThreadPoolExecutor

from async_polling_example import Client, Results, new_record, poll_all, submit_all

signal.signal(signal.SIGINT, signal.default_int_handler)
client = Client()
results = Results("session.db")
records = [new_record(f"row-{n}", f"What is {n}?") for n in range(40)]
pool = ThreadPoolExecutor(5)
try:
    for number, record in enumerate(submit_all(client, pool, records, results.save)):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
assert {record.outcome for record in records} == {"Pending", "Not sent"}, records
assert results.load() == records
print(sum(record.outcome == "Pending" for record in records))
list(submit_all(client, pool, records, results.save))
list(poll_all(client, pool, records, results.save, interval_seconds=0.05))
print(*{record.outcome for record in records})
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process of its own")
def test_ctrl_c_loses_no_id_and_what_was_not_sent_can_be_submitted_at_once(
    workshop: Workshop,
) -> None:
    interrupted, accepted, outcome = workshop.run(INTERRUPTED)
    assert interrupted == "interrupted"
    assert 4 <= int(accepted) <= 9
    assert outcome == "Success"
    assert len(workshop.api.generations) == 40
    assert workshop.api.made_again() == 0


FORKING = """
import os

from async_polling_example import Client, Results, build_request

client = Client()
results = Results("parent.db")
client.submit_generation(build_request("parent", "Why?"))
children = []
for number in range(6):
    child = os.fork()
    if child == 0:
        for repetition in range(5):
            custom_id = f"child-{number}-{repetition}"
            generation_id = client.submit_generation(build_request(custom_id, "Why?"))
            generation = client.fetch_generation(generation_id)
            assert generation["request"]["metadata"]["custom_id"] == custom_id, generation
        try:
            results.save([])
        except OSError as error:
            os._exit("another process" not in str(error))
        os._exit(2)
    children.append(child)
for child in children:
    _, exit_status = os.waitpid(child, 0)
    print(exit_status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_process_has_connections_of_its_own(workshop: Workshop) -> None:
    assert workshop.run(FORKING) == ["0"] * 6
    assert len(workshop.api.generations) == 31
    assert len(workshop.api.connections) == 7


# The parts, one by one


class Kit:
    """The parts of a script as a program has them, and a client that leads to the local API."""

    def __init__(self, script: str, api: LocalApi, folder: Path) -> None:
        self.script = script
        self.api = api
        self.module = load(script)
        self.client = self.module.Client(API_KEY, api.url, timeout_seconds=HANG_SECONDS)
        self.results = self.module.Results(folder / "kit.db")
        self.pool = ThreadPoolExecutor(5)

    def records(self, count: int, name: str = "my") -> list[Any]:
        """Return new records."""
        return [
            self.module.new_record(f"{name}-{number}", f"What is {number}?")
            for number in range(count)
        ]

    def submit(self, records: list[Any], save: Any = None, client: Any = None) -> list[Any]:
        """Submit records; return those that were yielded."""
        found: list[Any] = []
        arguments = (client or self.client, self.pool, records, save or self.results.save)
        for submitted in self.module.submit_all(*arguments):
            found += [submitted] if self.script == SINGLE else submitted
        return found

    def poll(self, records: list[Any], save: Any = None, **options: Any) -> list[Any]:
        """Poll records; return those that were yielded."""
        found: list[Any] = []
        arguments = (self.client, self.pool, records, save or self.results.save)
        for final in self.module.poll_all(
            *arguments, **{"interval_seconds": 0.01, **options}
        ):
            found += [final] if self.script == SINGLE else final
        return found

    def calls(self, method: str) -> int:
        """Return how many submissions (POST) or polls (GET) have come to the API."""
        return sum(each == method for each, _ in self.api.calls)


def make_kit(
    script: str, api: LocalApi, folder: Path, patch: pytest.MonkeyPatch
) -> Iterator[Kit]:
    """Make a kit, in an environment without a key, and put it away."""
    for name, value in api.environment.items():
        if name.startswith("INFERENCE_"):
            patch.delenv(name, raising=False)
        else:
            patch.setenv(name, value)
    kit = Kit(script, api, folder)
    yield kit
    kit.pool.shutdown()
    kit.results.close()


@pytest.fixture(params=SCRIPTS)
def kit(
    request: pytest.FixtureRequest,
    api: LocalApi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Kit]:
    """Each of the two scripts."""
    yield from make_kit(request.param, api, tmp_path, monkeypatch)


@pytest.fixture
def single_kit(
    api: LocalApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kit]:
    yield from make_kit(SINGLE, api, tmp_path, monkeypatch)


@pytest.fixture
def group_kit(
    api: LocalApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kit]:
    yield from make_kit(GROUP, api, tmp_path, monkeypatch)


class Hold:
    """Holds calls at the API until they are released; tells when so many have arrived."""

    def __init__(self, method: str, count: int) -> None:
        self.method = method
        self.count = count
        self.arrived = threading.Event()
        self.released = threading.Event()

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()

    def __call__(self, request: web.Request, body: Json) -> Fault | None:
        return self.hold if request.method == self.method else None

    async def hold(self, request: web.Request, proceed: Proceed) -> web.StreamResponse:
        """Hold a call."""
        self.count -= 1
        if self.count == 0:
            self.arrived.set()
        await asyncio.to_thread(self.released.wait, HANG_SECONDS)
        return await proceed()


class OurError(Exception):
    """What goes wrong in a program of one's own."""


# Leaving the loop


def leave_by_break(iterator: Iterator[Any]) -> None:
    for _ in iterator:
        break


def leave_by_error(iterator: Iterator[Any]) -> None:
    with suppress(OurError):
        for number, _ in enumerate(iterator):
            if number == 1:
                raise OurError


def leave_by_next(iterator: Iterator[Any]) -> None:
    next(iterator)


LEAVINGS = [leave_by_break, leave_by_error, leave_by_next]


@pytest.mark.parametrize("leave", LEAVINGS)
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "unnamed"])
def test_whoever_leaves_the_loop_stops_the_sending_and_can_go_on_at_once(
    single_kit: Kit, leave: Callable[[Iterator[Any]], None], is_named: bool
) -> None:
    kit = single_kit
    records = kit.records(60)
    arguments = (kit.client, kit.pool, records, kit.results.save)
    if is_named:
        iterator = kit.module.submit_all(*arguments)
        leave(iterator)
    else:
        leave(kit.module.submit_all(*arguments))
    kit.pool.shutdown()  # waits for what is under way
    sent = kit.calls("POST")
    assert sent <= kit.module.MAX_CONCURRENT_POLLS + 1
    assert sum(record.outcome == "Pending" for record in records) == sent
    assert Counter(record.outcome for record in kit.results.load()) == {
        "Pending": sent,
        "Not sent": 60 - sent,
    }
    kit.pool = ThreadPoolExecutor(5)
    kit.submit(records)
    assert {record.outcome for record in records} == {"Pending"}
    assert len(kit.api.generations) == 60
    assert kit.api.made_again() == 0


@pytest.mark.parametrize("leave", LEAVINGS)
def test_what_is_submitted_again_while_the_first_is_under_way_is_paid_for_once(
    single_kit: Kit, leave: Callable[[Iterator[Any]], None]
) -> None:
    kit = single_kit
    records = kit.records(20)
    first = kit.module.submit_all(kit.client, kit.pool, records, kit.results.save)
    leave(first)
    kit.submit(records)
    list(first)  # it had been left in the middle
    kit.pool.shutdown()
    assert len(kit.api.generations) == 20
    assert kit.api.made_again() == 0
    assert {record.outcome for record in records} == {"Pending"}


def test_jobs_with_the_same_records_pay_for_them_once(kit: Kit) -> None:
    records = kit.records(20)
    is_saving, may_save = threading.Event(), threading.Event()

    def save(saved: list[Any]) -> None:
        is_saving.set()
        assert may_save.wait(HANG_SECONDS)

    with ThreadPoolExecutor(1) as jobs:
        slow_job = jobs.submit(kit.submit, records, save)
        assert is_saving.wait(HANG_SECONDS)
        kit.submit(records, list)  # while the slow one has not sent anything yet
        may_save.set()
        slow_job.result()
    assert len(kit.api.generations) == 20
    assert kit.api.made_again() == 0
    assert {record.outcome for record in records} == {"Pending"}


def test_what_waits_to_be_sent_again_is_not_sent_by_somebody_else(
    single_kit: Kit,
) -> None:
    kit = single_kit
    records = kit.records(2)
    busy = iter([status(429)])

    def choose(request: web.Request, body: Json) -> Fault | None:
        is_second = body["metadata"]["custom_id"] == records[1].custom_id
        return next(busy, None) if is_second else None

    is_waiting, may_go_on = threading.Event(), threading.Event()
    wait = kit.client.wait

    def wait_longer(seconds: float, stop: threading.Event) -> bool:
        if seconds > 0:  # between two attempts
            is_waiting.set()
            assert may_go_on.wait(HANG_SECONDS)
        found: bool = wait(0, stop)
        return found

    kit.api.choose_fault = choose
    kit.client.wait = wait_longer
    iterator = kit.module.submit_all(kit.client, kit.pool, records, kit.results.save)
    next(iterator)
    assert is_waiting.wait(HANG_SECONDS)
    kit.submit(records)
    may_go_on.set()
    list(iterator)
    assert len(kit.api.generations) == 2
    assert kit.api.made_again() == 0


# What is raised, and what is kept then

# What is met by a submission, after which nothing more is sent.
ENDS = {
    "LockedOut": status(402, "no credit"),
    "NotAccepted": status(429, "slow down"),
    "Uncertain": status(500, "out of order"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_the_submitting_is_raised_after_the_last_record(kit: Kit, end: str) -> None:
    kit.client.wait = lambda seconds, stop: not stop.is_set()
    kit.api.choose_fault = lambda request, body: ENDS[end]
    records = kit.records(8)
    yielded: list[Any] = []
    options = {"max_concurrent": 1} if kit.script == SINGLE else {}
    iterator = kit.module.submit_all(
        kit.client, kit.pool, records, kit.results.save, **options
    )
    with pytest.raises(getattr(kit.module, end)):
        yielded.extend(iterator)
    if kit.script == GROUP:
        assert yielded == [records]
        ended = 8
    else:
        ended = 5 if end == "Uncertain" else 1  # five in a row
        assert yielded == records[:ended]
    assert kit.calls("POST") == (5 if end == "NotAccepted" else len(yielded))
    outcome = "Unknown" if end == "Uncertain" else "Not sent"
    expected = [outcome] * ended + ["Not sent"] * (8 - ended)
    assert [record.outcome for record in records] == expected
    assert kit.results.load() == records
    kit.api.choose_fault = lambda request, body: None
    kit.submit(records)  # what is unknown is never sent again
    expected = [outcome.replace("Not sent", "Pending") for outcome in expected]
    assert [record.outcome for record in records] == expected


def test_a_save_that_fails_while_submitting_is_raised_and_loses_no_id(kit: Kit) -> None:
    saves = ["before it is sent", "after that"]
    if kit.script == SINGLE:
        saves = ["at the beginning", *saves]
    for successes, when in enumerate(saves):
        records = kit.records(20, when)
        calls, made = kit.calls("POST"), len(kit.api.generations)
        results_of_save = iter([None] * successes)

        def save(saved: list[Any], results_of_save: Any = results_of_save) -> None:
            if next(results_of_save, OurError) is OurError:
                raise OurError("the disk is full")
            kit.results.save(saved)

        with pytest.raises(OurError, match="the disk is full"):
            kit.submit(records, save)
        accepted = [record for record in records if record.outcome == "Pending"]
        assert len(accepted) == len(kit.api.generations) - made, when
        assert {record.outcome for record in records} <= {"Pending", "Not sent"}, when
        assert kit.calls("POST") - calls <= 5, when
        if when != "after that":  # what can't be put on file is not sent
            assert not accepted, when
        kit.submit(records)
        assert len(kit.api.generations) == made + 20, when
        assert kit.api.made_again() == 0, when


def test_an_answer_that_cannot_be_saved_is_raised_and_asked_for_again(kit: Kit) -> None:
    records = kit.records(3)
    kit.submit(records)

    def save(saved: list[Any]) -> None:
        raise OurError("the disk is full")

    with pytest.raises(OurError, match="the disk is full"):
        kit.poll(records, save)
    kit.pool.shutdown()
    again = kit.results.load()
    assert [record.outcome for record in again] == ["Pending"] * 3
    kit.pool = ThreadPoolExecutor(5)
    kit.poll(again)
    assert [record.response for record in again] == [
        f"You asked: What is {n}?" for n in range(3)
    ]


def test_a_lock_out_ends_the_polling_and_what_is_pending_stays_so(kit: Kit) -> None:
    records = kit.records(3)
    kit.submit(records)
    kit.api.choose_fault = lambda request, body: status(401, "this key has ended")
    with pytest.raises(kit.module.LockedOut, match="this key has ended"):
        kit.poll(records)
    assert [record.outcome for record in records] == ["Pending"] * 3
    kit.api.choose_fault = lambda request, body: None
    kit.poll(records)
    assert [record.outcome for record in records] == ["Success"] * 3


def test_what_nobody_foresaw_is_raised_and_leaves_nothing_being_sent(kit: Kit) -> None:
    class Client(kit.module.Client):  # type: ignore[misc, name-defined]
        def call(self, *arguments: Any) -> Json:
            raise OurError("a mistake")

    records = kit.records(2)
    with pytest.raises(OurError, match="a mistake"):
        kit.submit(records, client=Client(API_KEY, kit.api.url))
    # It may have been sent: whether it was, nobody knows.
    assert {record.outcome for record in records} <= {"Unknown", "Not sent"}


MEANINGS = {
    "Refused": "Failed",
    "LockedOut": "Not sent",
    "NotAccepted": "Not sent",
    "Uncertain": "Unknown",
}


@pytest.mark.parametrize("name", MEANINGS)
def test_an_error_of_ones_own_means_what_its_base_means(kit: Kit, name: str) -> None:
    class SpecialError(getattr(kit.module, name)):  # type: ignore[misc]
        pass

    class Client(kit.module.Client):  # type: ignore[misc, name-defined]
        def call(self, *arguments: Any) -> Json:
            raise SpecialError("a reason")

        def wait(self, seconds: float, stop: threading.Event) -> bool:
            return not stop.is_set()

    records = kit.records(1)
    with suppress(kit.module.ApiError):
        kit.submit(records, client=Client(API_KEY, kit.api.url))
    assert (records[0].outcome, records[0].error) == (MEANINGS[name], "a reason")


def test_a_pool_that_takes_no_more_leaves_the_records_not_sent(kit: Kit) -> None:
    kit.pool.shutdown()
    records = kit.records(2)
    with pytest.raises(RuntimeError, match="shutdown"):
        kit.submit(records)
    assert [record.outcome for record in records] == ["Not sent"] * 2
    kit.pool = ThreadPoolExecutor(5)
    kit.submit(records)
    assert [record.outcome for record in records] == ["Pending"] * 2


class LatePool(ThreadPoolExecutor):
    """A pool that starts no thread: it fails, as Python's does, but has taken the call."""

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Any:
        self.call = lambda: function(*arguments, **options)
        raise RuntimeError("can't start new thread")


def test_a_pool_that_fails_and_makes_the_call_later_sends_nothing(kit: Kit) -> None:
    late = kit.pool = LatePool(1)
    records = kit.records(2)
    with pytest.raises(RuntimeError, match="new thread"):
        kit.submit(records)
    late.call()
    assert kit.calls("POST") == 0
    assert [record.outcome for record in records] == ["Not sent"] * 2


# The list of records


def twice(kit: Kit) -> list[Any]:
    return kit.records(2) * 2


def same_custom_id(kit: Kit) -> list[Any]:
    return [*kit.records(2), *kit.records(1)]


def same_as_one_accepted(kit: Kit) -> list[Any]:
    records = kit.records(1)
    records[0].state = "Queued"
    return [*records, *kit.records(1)]


def without_custom_id(kit: Kit) -> list[Any]:
    records = kit.records(2)
    del records[1].request["metadata"]
    return records


def with_another_custom_id(kit: Kit) -> list[Any]:
    records = kit.records(2)
    records[1].request["metadata"]["custom_id"] = "other"
    return records


def with_an_empty_custom_id(kit: Kit) -> list[Any]:
    records = kit.records(2)
    records[1].custom_id = records[1].request["metadata"]["custom_id"] = ""
    return records


def with_a_number_as_custom_id(kit: Kit) -> list[Any]:
    records = kit.records(2)
    records[1].custom_id = records[1].request["metadata"]["custom_id"] = 7
    return records


def with_nan(kit: Kit) -> list[Any]:
    records = kit.records(2)
    records[1].request["temperature"] = float("nan")
    return records


def with_nan_as_question(kit: Kit) -> list[Any]:
    records = kit.records(2)
    records[1].question = float("nan")  # as pandas has it where a cell is empty
    return records


def with_no_json(kit: Kit) -> list[Any]:
    records = kit.records(2)
    records[1].request["temperature"] = {0.5}
    return records


WRONG = {
    twice: ValueError,
    same_custom_id: ValueError,
    same_as_one_accepted: ValueError,
    without_custom_id: ValueError,
    with_another_custom_id: ValueError,
    with_an_empty_custom_id: ValueError,
    with_a_number_as_custom_id: ValueError,
    with_nan: ValueError,
    with_nan_as_question: ValueError,
    with_no_json: TypeError,
}


@pytest.mark.parametrize("make_records", WRONG)
def test_a_list_that_cannot_be_right_is_an_error_before_anything_is_sent(
    kit: Kit, make_records: Any
) -> None:
    records = make_records(kit)
    with pytest.raises(WRONG[make_records]):
        kit.submit(records)
    assert not kit.api.calls
    assert not kit.results.load()
    assert {record.state for record in records} <= {"Not sent", "Queued"}


@pytest.mark.parametrize("custom_id", ["", 7, None])
def test_a_record_that_cannot_be_sent_cannot_be_made(kit: Kit, custom_id: Any) -> None:
    with pytest.raises(ValueError, match=f"custom id must be a text.* {custom_id!r} has"):
        kit.module.new_record(custom_id, "Why?")


def test_no_records_are_no_error(kit: Kit) -> None:
    saved: list[Any] = []
    assert kit.submit([], saved.extend) == []
    assert kit.poll([], saved.extend) == []
    kit.results.save([])
    assert not saved
    assert not kit.api.calls


def test_what_was_sent_is_not_sent_again(kit: Kit) -> None:
    accepted = kit.records(5, "accepted")
    kit.submit(accepted)
    unknown = kit.records(2, "unknown")
    for record in unknown:
        record.state = "Unknown"
    records = [*kit.records(1, "first"), *accepted, *unknown, *kit.records(2, "last")]
    yielded = kit.submit(records)
    expected = ["first-0", "last-0", "last-1"]
    assert sorted(record.custom_id for record in yielded) == expected
    made = [generation.custom_id for generation in kit.api.generations.values()]
    assert sorted(made) == sorted([*expected, *(record.custom_id for record in accepted)])
    kit.poll(records)
    assert Counter(record.outcome for record in records) == {"Success": 8, "Unknown": 2}
    calls = len(kit.api.calls)
    assert kit.submit(records) == kit.poll(records) == []
    assert len(kit.api.calls) == calls


def test_a_group_holds_fifty_that_are_not_sent(group_kit: Kit) -> None:
    accepted = group_kit.records(50, "accepted")
    group_kit.submit(accepted)
    records = [*accepted, *group_kit.records(50)]
    more = group_kit.records(1, "more")
    with pytest.raises(ValueError, match="50 requests, not 51"):
        group_kit.submit([*records, *more])
    assert group_kit.calls("POST") == 1
    group_kit.submit(records)
    assert len(group_kit.api.generations) == 100


def test_custom_ids_of_one_group_are_told_from_those_of_another(group_kit: Kit) -> None:
    first, second = group_kit.records(3), group_kit.records(3)
    for record in second:
        record.request["messages"][0]["content"] = "Another question"
    group_kit.submit(first, list)
    group_kit.submit(second, list)
    group_kit.poll([*first, *second], list)
    assert [record.response for record in first] == [
        f"You asked: What is {n}?" for n in range(3)
    ]
    assert [record.response for record in second] == ["You asked: Another question"] * 3


# Phases


def test_a_record_that_is_being_sent_is_submitting_and_not_unknown(kit: Kit) -> None:
    records = kit.records(8)
    assert {record.outcome for record in records} == {"Not sent"}
    concurrent = 5 if kit.script == SINGLE else 1
    with Hold("POST", concurrent) as hold:
        kit.api.choose_fault = hold
        thread = threading.Thread(target=kit.submit, args=(records,))
        thread.start()
        assert hold.arrived.wait(HANG_SECONDS)
        on_file = Counter(record.outcome for record in kit.results.load())
        in_memory = Counter(record.outcome for record in records)
    thread.join()
    submitting = 5 if kit.script == SINGLE else 8
    assert (
        on_file
        == in_memory
        == Counter({"Submitting": submitting, "Not sent": 8 - submitting})
    )
    assert {record.outcome for record in kit.results.load()} == {"Pending"}


def test_the_outcome_of_a_record_in_each_phase(kit: Kit) -> None:
    [record] = records = kit.records(1)
    states = iter(["Queued", "Waiting for a train", "In Progress", "Success"])
    kit.api.alter = lambda generation: generation | {"state": next(states)}
    seen = [(record.state, record.outcome)]
    kit.submit(records)
    for _ in range(5):
        seen.append((record.state, record.outcome))
        kit.poll(records, max_attempts=1)
    assert seen == [
        ("Not sent", "Not sent"),
        ("Queued", "Pending"),
        ("Queued", "Pending"),
        ("Waiting for a train", "Pending"),
        ("In Progress", "Pending"),
        ("Success", "Success"),
    ]
    assert kit.calls("GET") == 4


# What a submission meets, and what the outcome of its records is then.
OUTCOMES = [
    (status(400), "Failed"),
    (status(302), "Failed"),
    (status(403), "Not sent"),
    (status(429), "Not sent"),
    (status(503), "Unknown"),
    (after(reset), "Unknown"),
    (None, "Pending"),
]


@pytest.mark.parametrize(("fault", "outcome"), OUTCOMES)
def test_the_outcome_of_a_submission(kit: Kit, fault: Fault | None, outcome: str) -> None:
    kit.client.wait = lambda seconds, stop: not stop.is_set()
    records = kit.records(1)
    kit.api.choose_fault = lambda request, body: fault
    with suppress(kit.module.ApiError):
        kit.submit(records)
    assert [record.outcome for record in records] == [outcome]
    assert bool(records[0].error) == (fault is not None)
    assert kit.results.load() == records


def test_a_generation_that_failed_tells_why(kit: Kit) -> None:
    failed = {"state": "Failed", "response": None, "stateMessage": "overloaded"}
    kit.api.alter = lambda generation: generation | failed
    records = kit.records(1)
    kit.submit(records)
    assert kit.poll(records) == records
    assert (records[0].outcome, records[0].error) == ("Failed", "overloaded")


def test_the_polls_have_an_interval_and_an_end_of_ones_own(kit: Kit) -> None:
    records = kit.records(2)
    kit.submit(records)
    kit.api.alter = lambda generation: generation | {"state": "In Progress"}
    times: dict[str, list[float]] = {}

    def note(request: web.Request, body: Json) -> None:
        times.setdefault(request.path, []).append(monotonic())

    kit.api.choose_fault = note
    assert kit.poll(records, interval_seconds=0.2, max_attempts=3) == []
    assert [record.outcome for record in records] == ["Pending"] * 2
    assert [len(moments) for moments in times.values()] == [3] * (
        2 if kit.script == SINGLE else 1
    )
    for (
        moments
    ) in times.values():  # an interval is at least as long, however slow a machine is
        assert all(later - earlier >= 0.2 for earlier, later in pairwise(moments))
    kit.api.alter = lambda generation: generation
    assert len(kit.poll(records, max_attempts=1)) == 2


# A poll that was awaited would end with an error.
POLLING = """
import signal
from concurrent.futures import ThreadPoolExecutor

from {} import Client, Results, new_record, poll_all, submit_all

signal.signal(signal.SIGINT, signal.default_int_handler)
client = Client(timeout_seconds=5)
results = Results("polls.db")
records = [new_record("row-1", "Why?")]
pool = ThreadPoolExecutor(1)
list(submit_all(client, pool, records, results.save))
try:
    for final in poll_all(client, pool, records, results.save):
        pass
except KeyboardInterrupt:
    print("left", records[0].outcome, records[0].error, flush=True)
pool.shutdown()
print(records[0].outcome)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process of its own")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_poll_that_stalls_is_not_awaited_after_ctrl_c(
    script: str, workshop: Workshop
) -> None:
    with Hold("GET", 1) as hold:
        workshop.api.choose_fault = hold
        process = workshop.start(POLLING.format(MODULE[script]), script)
        assert process.stdout
        while not hold.arrived.wait(0.1):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "left Pending None\n"
    assert finish(process) == ["Pending"]  # what came later has changed nothing


def test_a_poll_that_stalls_is_not_awaited_when_the_loop_is_left(single_kit: Kit) -> None:
    kit = single_kit
    kit.client.timeout_seconds = 5  # a poll that was awaited would end with an error
    records = kit.records(3)
    kit.submit(records)
    with Hold("GET", 1) as hold:
        kit.api.choose_fault = lambda request, body: (
            hold(request, body) if records[2].generation_id in request.path else None
        )
        for record in kit.module.poll_all(kit.client, kit.pool, records, kit.results.save):
            assert record in records[:2]
            break
        assert (records[2].outcome, records[2].error) == ("Pending", None)
    kit.pool.shutdown()
    assert records[2].outcome == "Pending"  # what came later has changed nothing
    kit.pool = ThreadPoolExecutor(5)
    kit.api.choose_fault = lambda request, body: None
    kit.poll(records)
    assert {record.outcome for record in records} == {"Success"}


# The file of results

OPEN = """
import sys
from {} import Results

try:
    Results(sys.argv[1])
    print("opened")
except OSError as error:
    print(error)
"""


def test_a_file_that_is_open_cannot_be_opened_again(kit: Kit, workshop: Workshop) -> None:
    path = kit.results.path
    shutil.copy(TOP / kit.script, workshop.folder)
    program = OPEN.format(MODULE[kit.script])
    with pytest.raises(OSError, match=r"kit\.db.* in use"):
        kit.module.Results(path)
    [line] = finish(workshop.start_python("-c", program, str(path)))
    assert str(path) in line
    assert "in use" in line
    kit.submit(kit.records(2))  # the one that has it goes on
    kit.results.close()
    assert finish(workshop.start_python("-c", program, str(path))) == ["opened"]
    kit.results = kit.module.Results(path)
    assert len(kit.results.load()) == 2


def test_a_file_that_was_closed_takes_nothing(kit: Kit, tmp_path: Path) -> None:
    results = kit.module.Results(tmp_path / "closed.db")
    results.close()
    with pytest.raises(OSError, match=r"closed\.db"):
        results.save(kit.records(1))


def test_the_folder_of_a_file_is_made(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = kit.module.Results("relative/new/folder/x.db")
    results.save(kit.records(1))
    results.close()
    assert len(read_results(tmp_path / "relative/new/folder/x.db")) == 1


def test_records_come_back_as_they_were_in_the_order_of_their_first_save(
    kit: Kit,
) -> None:
    records = kit.records(3)
    records[0].response = {"choices": [{"message": {"tool_calls": ["Ünïcödé\n2"]}}]}
    records[1].error = "'\"; DROP TABLE"
    kit.results.save(records)
    records[1].state = "Unknown"
    kit.results.save(reversed(records))
    assert kit.results.load() == records


def test_a_save_puts_all_on_file_or_nothing(kit: Kit) -> None:
    records = kit.records(2)
    kit.results.save(records)
    for record in records:
        record.state = "Unknown"
    records[1].request = {"no JSON": {1}}
    with pytest.raises(TypeError):
        kit.results.save(records)
    assert {record.state for record in kit.results.load()} == {"Not sent"}


def test_a_program_that_forgot_to_load_is_stopped_before_it_pays_again(kit: Kit) -> None:
    records = kit.records(3)
    kit.submit(records)
    kit.poll(records)
    on_file = kit.results.load()
    with pytest.raises(OSError, match="load"):
        kit.submit(kit.records(3))
    assert len(kit.api.generations) == 3
    assert kit.results.load() == on_file


def test_a_second_copy_of_what_was_tried_before_is_stopped_before_it_pays_again(
    kit: Kit,
) -> None:
    kit.api.choose_fault = lambda request, body: status(402, "no credit")
    records = kit.records(4)
    with pytest.raises(kit.module.LockedOut):
        kit.submit(records)
    kit.api.choose_fault = lambda request, body: None
    first, second, third = [kit.results.load() for _ in range(3)]
    first[0].state = "Submitting"
    kit.results.save(first[:1])
    with pytest.raises(OSError, match="load"):
        kit.submit(second[:1])
    assert [record.outcome for record in kit.results.load()] == [
        "Submitting",
        *["Not sent"] * 3,
    ]
    first[0].state = "Not sent"
    kit.results.save(first[:1])
    kit.submit(first)
    on_file = kit.results.load()
    assert [record.outcome for record in on_file] == ["Pending"] * 4
    for use in (kit.submit, kit.results.save):
        with pytest.raises(OSError, match="load"):
            use(third)
    assert kit.results.load() == on_file
    assert len(kit.api.generations) == 4
    assert kit.api.made_again() == 0


@pytest.mark.parametrize("state", ["Failed", "Unknown"])
def test_what_is_saved_as_not_sent_is_submitted_again(kit: Kit, state: str) -> None:
    records = kit.records(3)
    for record in records:
        record.state, record.error = state, "a reason"
    kit.results.save(records)
    records = kit.results.load()
    kit.submit(records)
    assert not kit.api.calls
    for record in records:
        record.state = "Not sent"
    with pytest.raises(OSError, match="save it as Not sent first"):
        kit.submit(records)
    assert not kit.api.calls
    for record in records:
        record.state = "Not sent"
    kit.results.save(records)
    kit.submit(records)
    assert [record.outcome for record in kit.results.load()] == ["Pending"] * 3
    assert len(kit.api.generations) == 3


def test_what_was_being_sent_when_a_program_ended_is_unknown(
    kit: Kit, tmp_path: Path
) -> None:
    records = kit.records(2)
    records[0].state = "Submitting"
    path = tmp_path / "ended.db"
    results = kit.module.Results(path)
    results.save(records)
    assert [record.outcome for record in results.load()] == ["Submitting", "Not sent"]
    results.close()
    for _ in range(2):
        results = kit.module.Results(path)
        assert [record.outcome for record in results.load()] == ["Unknown", "Not sent"]
        results.close()


# The client

CHAT = {"model": "any", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}


def test_each_endpoint_has_a_method(api: LocalApi, single_kit: Kit) -> None:
    generation_id = single_kit.client.submit_generation(CHAT)
    generation = single_kit.client.fetch_generation(generation_id)
    assert generation["response"]["choices"][0]["message"]["content"] == "2 + 2 equals 4."
    group_client = load(GROUP).Client(API_KEY, api.url)
    group_id = group_client.submit_group([CHAT, CHAT])
    members = group_client.fetch_group(group_id)
    assert {member["state"] for member in members} == {"Success"}
    paths = [
        "/v1/async/chat/completions",
        f"/v1/generation/{generation_id}",
        "/v1/async/group/chat/completions",
        f"/v1/async/group/{group_id}/generations",
    ]
    assert [path for _, path in api.calls] == paths


# What a call meets, and what is raised for a submission and for a poll.
ERRORS = [
    (status(302), "Refused", "Refused"),
    (status(400), "Refused", "Refused"),
    (status(404), "Refused", "Refused"),
    (status(422), "Refused", "Refused"),
    (status(401), "LockedOut", "LockedOut"),
    (status(402), "LockedOut", "Refused"),
    (status(403), "LockedOut", "Refused"),
    (status(429), "NotAccepted", "NotAccepted"),
    (status(429, Retry_After="121"), "LockedOut", "NotAccepted"),
    (status(408), "Uncertain", "Uncertain"),
    (status(500), "Uncertain", "Uncertain"),
    (status(503, Retry_After="121"), "Uncertain", "Uncertain"),
    (reset, "Uncertain", "NotAccepted"),
    (close, "Uncertain", "NotAccepted"),
    (local_api.cut, "Uncertain", "Uncertain"),
    (local_api.garble, "Uncertain", "NotAccepted"),
    (local_api.body(b"<html>"), "Uncertain", "Uncertain"),
    (local_api.body(b"[]"), "Uncertain", "Uncertain"),
    (local_api.body(b"{}"), "Uncertain", "Uncertain"),
]


def test_a_call_that_fails_says_what_that_means(kit: Kit) -> None:
    if kit.script == SINGLE:
        submit, fetch, request = (
            kit.client.submit_generation,
            kit.client.fetch_generation,
            CHAT,
        )
    else:
        submit, fetch, request = kit.client.submit_group, kit.client.fetch_group, [CHAT]
    known_id = submit(request)
    for fault, *names in ERRORS:
        kit.api.choose_fault = lambda request, body, fault=fault: fault
        for call, argument, name in zip(
            [submit, fetch], [request, known_id], names, strict=True
        ):
            with pytest.raises(kit.module.ApiError) as caught:
                call(argument)
            assert type(caught.value) is getattr(kit.module, name), caught.value
            assert str(caught.value)
            assert API_KEY not in str(caught.value)


def test_a_client_keeps_no_session_of_a_thread_that_has_ended(kit: Kit) -> None:
    def count() -> int:
        gc.collect()
        return sum(isinstance(thing, requests.Session) for thing in gc.get_objects())

    before = count()
    for number in range(20):
        kit.pool = ThreadPoolExecutor(3)
        kit.submit(kit.records(3, f"pool-{number}"))
        kit.pool.shutdown()
    assert len(kit.api.generations) == 60
    assert len(kit.api.connections) >= 20
    assert count() == before


def test_calls_of_a_thread_share_a_connection(kit: Kit) -> None:
    kit.pool = ThreadPoolExecutor(1)
    for number in range(3):
        records = kit.records(3, f"job-{number}")
        kit.submit(records)
        kit.poll(records)
    assert len(kit.api.connections) == 1
