"""Ends before the end, and coming back later: Ctrl-C, SIGTERM, kills, a full disk, --resume."""

import asyncio
import dataclasses
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
from conftest import (
    GROUP,
    HANG_SECONDS,
    SCRIPTS,
    SINGLE,
    Example,
    Run,
    faulty,
    load,
    read_results,
)
from local_api import Fault, Json, LocalApi, Proceed, status, web

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")

UNKNOWN_REASON = "the program ended while it was being sent"


class Gate:
    """Lets so many calls of a method pass, and holds the others until it is opened.

    They are held before they are carried out, or after, when only the answer is missing. arrived
    is set when count of them are held. then is a fault that they meet instead of being held.
    """

    def __init__(
        self,
        method: str,
        count: int = 1,
        passing: int = 0,
        is_carried_out: bool = False,
        then: Fault | None = None,
    ) -> None:
        self.method, self.count, self.passing = method, count, passing
        self.is_carried_out, self.then = is_carried_out, then
        self.arrived, self.opened = threading.Event(), threading.Event()

    def __call__(self, request: web.Request, body: Json) -> Fault | None:
        if request.method != self.method:
            return None
        self.passing -= 1
        return None if self.passing >= 0 else self.meet

    async def meet(self, request: web.Request, proceed: Proceed) -> web.StreamResponse:
        answer = await proceed() if self.is_carried_out else None
        self.count -= 1
        if self.count == 0:
            self.arrived.set()
        if self.then:
            return await self.then(request, proceed)
        while not self.opened.is_set():
            await asyncio.sleep(0.01)
        return answer or await proceed()


# Notes for how many calls the main thread waits. While it is still starting its worker threads, a
# Ctrl-C can hide one of them from it.
WAITING = """
    wait_unharmed = wait

    def wait(futures, *options, **more):
        Path("waiting").write_text(str(len(futures)))
        return wait_unharmed(futures, *options, **more)
"""


def start(example: Example, gate: Gate, *arguments: str) -> subprocess.Popen[str]:
    """Start it; wait until the gate holds what it is to hold, and the main thread waits for it."""
    if "wait_unharmed" not in (example.folder / example.script).read_text("utf-8"):
        add(example, WAITING)
    count = gate.count
    waiting = example.folder / "waiting"
    waiting.write_text("0")
    example.api.choose_fault = gate
    process = example.start(*arguments)
    assert gate.arrived.wait(30), process.poll()
    if example.script == GROUP and gate.method == "GET":
        return process  # it waits for the only call's result, in another way
    while int(waiting.read_text() or 0) < count:
        assert process.poll() is None
        sleep(0.01)
    return process


def interrupt(
    example: Example, gate: Gate, *arguments: str, number: int = signal.SIGINT
) -> Run:
    """Run it until something has come to the gate, press Ctrl-C, and see it end."""
    process = start(example, gate, *arguments)
    process.send_signal(number)
    run = example.finish(process)
    check_interrupted(run)
    example.api.choose_fault = lambda request, body: None
    return run


def wait_until_it_says_so(process: subprocess.Popen[str]) -> list[str]:
    """Wait for what Ctrl-C is told at once; return the arguments of its command."""
    assert process.stderr
    said = "".join(process.stderr.readline() for _ in range(4))
    assert said.startswith("\n  Stopping when the submissions under way have ended. Ctrl-C")
    [arguments] = commands(said)
    return arguments


def check_interrupted(run: Run) -> None:
    """Check what holds when one Ctrl-C has ended a run."""
    assert run.code == 130, run.stderr
    assert "SUMMARY" in run.stdout
    assert "Generation complete!" not in run.stdout
    assert "\n Not complete: " in run.stdout


def check_answers(run: Run) -> None:
    """Check that the .jsonl file has a line for each record on file, without its request."""
    for row, answer in zip(run.rows, run.answers, strict=True):
        del row["request"]
        assert row == answer


def counts(run: Run) -> dict[str, int]:
    """Return the counts of the summary."""
    _, _, after = run.stdout.partition("\n  Success Rate\n")
    rows = re.findall(r"^      (\w[\w ]*): +(\d+)$", after.partition("Metrics")[0], re.M)
    return {name: int(count) for name, count in rows}


def table(run: Run, outcome: str) -> list[str]:
    """Return the custom ids that the table has with that outcome."""
    _, _, below = run.stdout.partition("\n  Request-Response Correlation\n")
    return re.findall(rf"^  (req-\d+) +\S {outcome}", below, re.M)


def commands(shown: str) -> list[list[str]]:
    """Return the arguments of the commands that a user is shown, to go on."""
    lines = re.findall(r"^ *(uv run .* --resume .*)$", shown, re.M)
    return [shlex.split(line)[3:] for line in lines]


def paid(example: Example) -> set[str]:
    """Return the ids that were given out for money: without one its answer can't be had."""
    return set(example.api.generations if example.script == SINGLE else example.api.groups)


def on_file(run: Run) -> set[str]:
    """Return the ids that the results file has of what was given out for money."""
    key = "group_id" if "group_id" in run.rows[0] else "generation_id"
    return {row[key] for row in run.rows} - {None}


def shown_ids(shown: str) -> dict[str, str]:
    """Return the ids that the user is asked to put on file, by custom id."""
    lines = re.findall(r"^ +records\['(.+)'\]\.\w+_id = '(.+)'$", shown, re.M)
    return dict(lines)


def run_shown_python(run: Run) -> None:
    """Do what a user does who is shown ids that are not on file: run the Python, beside it."""
    block = r"^ +from \w+ import Results\n.*?results\.save\(.*?\)$"
    [code] = re.findall(block, run.stdout, re.M | re.S)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, cwd=run.folder, check=True, timeout=HANG_SECONDS)


def put_on_file(example: Example, name: str, states: list[str]) -> Path:
    """Put a results file there, with a request in each of these states, accepted by the API."""
    module = load(example.script, example.folder)
    path = example.folder / "results" / name
    results = module.Results(path)
    records = []
    for number, state in enumerate(states, start=1):
        records.append(module.new_record(f"req-{number:03}", "What do bees make?"))
        records[-1].state = state
    members = []
    for record in records:
        if record.state in ("Queued", "Success"):
            generation = example.api.accept(record.request)
            record.generation_id = generation.id
            example.api.generations[generation.id] = generation
            members.append(generation)
    if example.script == GROUP:
        group_id = secrets.token_urlsafe(16)[:21]
        example.api.groups[group_id] = members
        for record in records:
            if record.generation_id:
                record.group_id = group_id
    results.save(records)
    results.close()
    example.api.new_runs += 1
    return path


def add(example: Example, code: str) -> None:
    """Add code to the end of the script, before it is run."""
    last = '\nif __name__ == "__main__":\n'
    example.replace(last, f"{textwrap.dedent(code)}\n{last}")


# Ctrl-C and SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_being_submitted_is_awaited(example: Example, number: int) -> None:
    example.edit(NUM_REQUESTS=20, REQUEST_TIMEOUT_SECONDS=60)
    under_way = 5 if example.script == SINGLE else 1
    gate = Gate("POST", count=under_way)
    process = start(example, gate)
    process.send_signal(number)
    wait_until_it_says_so(process)  # at once: what is being submitted is still held
    gate.opened.set()
    run = example.finish(process)
    check_interrupted(run)
    check_answers(run)
    assert run.stderr == ""  # and nothing more
    accepted = 5 if example.script == SINGLE else 20
    assert Counter(run.states.values()) == Counter(
        {"Queued": accepted, "Not sent": 20 - accepted}
    )
    assert len(example.api.generations) == accepted
    assert on_file(run) == paid(example)
    name = f"results/{run.results.name}"
    both = [["--resume", name], ["--resume", name, "--submit"]]
    assert commands(run.stdout) == (both if example.script == SINGLE else both[:1])
    resumed = example.run("--resume")
    assert Counter(resumed.states.values())["Success"] == accepted
    assert counts(resumed)["Total"] == 20
    assert len(example.api.generations) == accepted
    complete = example.run("--resume", name, "--submit")
    assert complete.code == 0
    assert set(complete.states.values()) == {"Success"}
    assert len(example.api.generations) == 20


def test_a_submission_that_stalls_is_awaited_until_its_timeout(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=2)
    run = interrupt(example, Gate("POST", count=4 if example.script == SINGLE else 1))
    assert set(run.states.values()) == {"Unknown"}
    assert {"imed out" in row["error"] for row in run.rows} == {True}
    assert table(run, "Unknown") == list(run.states)
    assert "\n Not complete: 4 unknown\n" in run.stdout
    check_answers(run)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_at_once(single: Example, second: int) -> None:
    single.edit(NUM_REQUESTS=10, MAX_CONCURRENT_POLLS=3, REQUEST_TIMEOUT_SECONDS=3600)
    process = start(single, Gate("POST", count=3, passing=2))
    process.send_signal(signal.SIGINT)
    resume = wait_until_it_says_so(process)
    process.send_signal(second)
    run = single.finish(process)
    assert run.code == -second  # as the system ends a program: 130 or 143 to a shell
    assert "SUMMARY" not in run.stdout
    assert Counter(run.states.values()) == {"Queued": 2, "Submitting": 3, "Not sent": 5}
    assert resume == ["--resume", f"results/{run.results.name}"]  # for just this file
    submit = [*resume, "--submit"]
    single.api.choose_fault = lambda request, body: None
    resumed = single.run(*resume)
    assert Counter(resumed.states.values()) == {"Success": 2, "Unknown": 3, "Not sent": 5}
    submitted = single.run(*submit)
    assert Counter(submitted.states.values()) == {"Success": 7, "Unknown": 3}
    assert len(single.api.generations) == 7


def test_a_second_ctrl_c_ends_the_submission_of_a_group(group: Example) -> None:
    group.edit(REQUEST_TIMEOUT_SECONDS=3600)
    path = put_on_file(group, "partly.db", ["Queued", "Not sent", "Not sent"])
    process = start(
        group, Gate("POST", is_carried_out=True), "--resume", str(path), "--submit"
    )
    process.send_signal(signal.SIGTERM)
    resume = wait_until_it_says_so(process)
    process.send_signal(signal.SIGINT)
    run = group.finish(process)
    assert run.code == -signal.SIGINT
    assert "SUMMARY" not in run.stdout
    assert list(run.states.values()) == ["Queued", "Submitting", "Submitting"]
    assert resume == ["--resume", str(path)]
    group.api.choose_fault = lambda request, body: None
    resumed = group.run(*resume, "--submit")
    assert list(resumed.states.values()) == ["Success", "Unknown", "Unknown"]
    assert {row["error"] for row in resumed.rows} == {None, UNKNOWN_REASON}
    assert group.submissions == 1


INTERRUPTED = """
    class Interrupted(ThreadPoolExecutor):
        def submit(self, function, client, record, save, stop):  # as Ctrl-C can come
            if IS_SAVED:
                save(record if isinstance(record, list) else [record])
            raise KeyboardInterrupt


    ThreadPoolExecutor = Interrupted
"""


@pytest.mark.parametrize("is_saved", [False, True], ids=["before", "after"])
def test_what_ctrl_c_meets_as_it_is_given_to_the_pool_is_as_the_file_has_it(
    example: Example, is_saved: bool
) -> None:
    add(example, INTERRUPTED.replace("IS_SAVED", str(is_saved)))
    run = example.run()
    assert run.code == 130
    given = 1 if example.script == SINGLE else 4
    expected = Counter({"Unknown": given if is_saved else 0, "Not sent": 4})
    expected["Not sent"] -= expected["Unknown"]
    assert Counter(run.states.values()) == expected
    for row in run.rows:
        assert row["error"] == (UNKNOWN_REASON if row["state"] == "Unknown" else None)
    assert counts(run)["Not sent" if expected["Not sent"] else "Unknown"]
    assert "ubmitting," not in run.stdout.partition("SUMMARY")[2]
    check_answers(run)
    assert not example.api.calls


def test_ctrl_c_during_a_long_retry_after(example: Example) -> None:
    come_later = status(429, Retry_After="100")
    if example.script == SINGLE:
        example.edit(MAX_CONCURRENT_POLLS=1)
    run = interrupt(example, Gate("POST", then=come_later))
    assert set(run.states.values()) == {"Not sent"}
    assert len(example.api.generations) == 0


def test_a_poll_is_not_awaited(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    run = interrupt(example, Gate("GET"))
    check_answers(run)
    assert commands(run.stderr) == [["--resume", f"results/{run.results.name}"]]
    assert commands(run.stdout) == [["--resume", f"results/{run.results.name}"]]
    interrupt(example, Gate("GET"), "--resume", number=signal.SIGTERM)
    example.edit(POLL_INTERVAL_SECONDS=3600)
    between_polls = interrupt(example, Gate("GET", then=status(404)), "--resume")
    assert set(between_polls.states.values()) == {"Queued"}
    assert example.run("--resume").code == 0


def test_the_results_file_is_whole_when_ctrl_c_has_ended_a_run(example: Example) -> None:
    # A user moves the .db file elsewhere, and knows of no other.
    run = interrupt(example, Gate("GET"))
    (example.folder / "elsewhere").mkdir()
    moved = run.results.rename(example.folder / "elsewhere" / "moved.db")
    assert [row["state"] for row in read_results(moved)] == ["Queued"] * 4
    assert example.run("--resume", str(moved)).code == 0


def test_a_run_of_1200_that_is_interrupted_is_told_in_few_lines(single: Example) -> None:
    single.edit(NUM_REQUESTS=1200, REQUEST_TIMEOUT_SECONDS=60)
    gate = Gate("POST", count=5, passing=100)
    process = start(single, gate)
    process.send_signal(signal.SIGINT)
    wait_until_it_says_so(process)
    gate.opened.set()
    run = single.finish(process)
    check_interrupted(run)
    check_answers(run)
    assert Counter(run.states.values()) == {"Queued": 105, "Not sent": 1095}
    assert counts(run)["Pending"] == 105
    assert counts(run)["Not sent"] == 1095
    assert counts(run)["Total"] == 1200
    assert len(run.stdout.partition("SUMMARY")[2].splitlines()) < 150
    answers = run.results.with_suffix(".jsonl").name
    assert f"\n  ... and 1150 more in results/{answers}\n" in run.stdout
    assert len(table(run, "")) == 50  # the first 50 that have no answer


def test_ctrl_c_while_a_run_is_opened(example: Example) -> None:
    os.mkfifo(example.folder / "questions")
    example.replace(
        "    questions = {}\n", '    questions = {}\n    open("questions").read()\n'
    )
    process = example.start()
    with open(example.folder / "questions", "w"):  # it has begun to read
        process.send_signal(signal.SIGINT)
        run = example.finish(process)
    assert run.code == 130
    assert run.stdout + run.stderr == ""
    assert not example.api.calls


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a pipe is set as on Linux")
def test_a_screen_that_nobody_reads_holds_back_no_id(single: Example) -> None:
    import fcntl

    single.edit(NUM_REQUESTS=100)
    outside, inside = os.pipe()
    fcntl.fcntl(inside, fcntl.F_SETPIPE_SZ, 4096)  # less than what the submissions print
    gate = Gate("POST", passing=30)
    single.api.choose_fault = gate
    process = single.start(stdout=inside)
    os.close(inside)
    assert gate.arrived.wait(30), process.poll()
    gate.opened.set()
    process.send_signal(signal.SIGTERM)
    folder = single.folder / "results"
    while not list(folder.glob("*.jsonl")):  # then the summary is to be printed
        assert process.poll() is None
        sleep(0.01)
    process.send_signal(signal.SIGTERM)
    run = single.finish(process)
    os.close(outside)
    assert run.code == -signal.SIGTERM
    assert on_file(run) == paid(single)
    assert commands(run.stderr) == [["--resume", f"results/{run.results.name}"]]
    assert single.run("--resume", str(run.results), "--submit").code == 0
    assert len(single.api.generations) == 100


# Kills


KILL = """
    import itertools
    number_of_saves = itertools.count(1)
    save_unharmed = Results.save

    def save(self, records):
        number = next(number_of_saves)
        moment = os.environ.get("KILL_AT")
        if moment == f"before save {number}":
            os.kill(os.getpid(), signal.SIGKILL)
        save_unharmed(self, records)
        if moment == f"after save {number}":
            os.kill(os.getpid(), signal.SIGKILL)

    Results.save = save
"""


@dataclasses.dataclass
class Step:
    """A start of the script on the file that the last step has left, and where it is killed.

    That is when a gate holds what it is to hold, or before or after a save, by its number in this
    process: when the file of a new run is filled, when submit_all begins (not that of a group),
    before and after each submission, after each answer.
    """

    when: str
    states: dict[str, int]  # what the file has then
    gate: Gate | None = None
    save: str = ""
    is_submitting: bool = True
    workers: int = 1
    is_after_a_look: bool = False  # at the dashboard, by the user


def batches() -> dict[str, tuple[str, list[Step]]]:
    """Return batches, each with its script and its steps; the last one ends by itself."""
    one_by_one = [
        Step(
            "three have arrived, and none is carried out",
            {"Submitting": 3, "Not sent": 9},
            Gate("POST", count=3),
            workers=3,
        ),
        Step(
            "two are answered, and three carried out and not answered",
            {"Unknown": 3, "Queued": 2, "Submitting": 3, "Not sent": 4},
            Gate("POST", count=3, passing=2, is_carried_out=True),
            workers=3,
        ),
        Step(
            "one is about to be sent",
            {"Unknown": 6, "Queued": 2, "Not sent": 4},
            save="before save 2",
        ),
        Step(
            "one is about to be sent, and that is on file",
            {"Unknown": 6, "Queued": 2, "Submitting": 1, "Not sent": 3},
            save="after save 2",
        ),
        Step(
            "an id has arrived, and is not on file",
            {"Unknown": 7, "Queued": 2, "Submitting": 1, "Not sent": 2},
            save="before save 3",
        ),
        Step(
            "an id has arrived, and is on file",
            {"Unknown": 8, "Queued": 3, "Not sent": 1},
            save="after save 3",
        ),
        Step(
            "the second poll has arrived",
            {"Unknown": 8, "Queued": 2, "Not sent": 1, "Success": 1},
            Gate("GET", passing=1),
            is_submitting=False,
        ),
        Step(
            "an answer has arrived, and is not on file",
            {"Unknown": 8, "Queued": 2, "Not sent": 1, "Success": 1},
            save="before save 1",
            is_submitting=False,
        ),
        Step("never", {"Unknown": 8, "Success": 4}),
        Step("never", {"Success": 12}, is_after_a_look=True),
    ]
    as_a_group = [
        Step("it is about to be sent", {"Not sent": 12}, save="before save 2"),
        Step(
            "it has been told to come later, and that is on file",
            {"Not sent": 12},
            Gate("POST", then=status(429)),
            save="after save 2",
        ),
        Step("it has arrived, and is not carried out", {"Submitting": 12}, Gate("POST")),
        Step("never", {"Unknown": 12}),
        Step(
            "it is carried out, and not answered",
            {"Submitting": 12},
            Gate("POST", is_carried_out=True),
            is_after_a_look=True,
        ),
        Step("never", {"Unknown": 12}),
        Step("a poll has arrived", {"Queued": 12}, Gate("GET"), is_after_a_look=True),
        Step(
            "the answers have arrived, and are not on file",
            {"Queued": 12},
            save="before save 1",
        ),
        Step("never", {"Success": 12}),
    ]
    a_group_whose_id_arrives = [
        Step(
            "its id has arrived, and is not on file",
            {"Submitting": 12},
            save="before save 3",
        ),
        Step("never", {"Unknown": 12}),
        Step("never", {"Success": 12}, is_after_a_look=True),
    ]
    a_group_whose_id_is_on_file = [
        Step("its id is on file", {"Queued": 12}, save="after save 3"),
        Step("never", {"Success": 12}),
    ]
    return {
        "one by one": (SINGLE, one_by_one),
        "as a group": (GROUP, as_a_group),
        "a group whose id arrives": (GROUP, a_group_whose_id_arrives),
        "a group whose id is on file": (GROUP, a_group_whose_id_is_on_file),
    }


@pytest.mark.parametrize("name", batches())
def test_a_batch_that_is_killed_again_and_again_is_answered_and_paid_for_once(
    tmp_path: Path, api: LocalApi, name: str
) -> None:
    script, steps = batches()[name]
    example = Example(script, tmp_path, api)
    example.edit(NUM_REQUESTS=12, REQUEST_TIMEOUT_SECONDS=3600)
    add(example, KILL)
    arguments: list[str] = []
    for step in steps:
        if step.is_after_a_look:
            look_at_the_dashboard(example, Path(example.folder, arguments[1]))
        if script == SINGLE:
            example.edit(MAX_CONCURRENT_POLLS=step.workers)
        api.choose_fault = step.gate or (lambda request, body: None)
        example.environment = api.environment | {"KILL_AT": step.save}
        if arguments and step.is_submitting:
            arguments.append("--submit")
        process = example.start(*arguments)
        if step.gate and not step.save:
            assert step.gate.arrived.wait(30), step
            process.kill()
        run = example.finish(process)  # which sees that nothing was made twice
        assert (run.code == -signal.SIGKILL) == (step.when != "never"), (step, run)
        assert Counter(run.states.values()) == step.states, step
        made = {generation.custom_id for generation in api.generations.values()}
        for row in run.rows:
            if row["state"] == "Unknown":
                assert row["error"] == UNKNOWN_REASON
            if row["state"] in ("Queued", "Success"):
                assert row["custom_id"] in made
                assert {row["generation_id"], row.get("group_id")} & paid(example)
        arguments = ["--resume", f"results/{run.results.name}"]
    assert run.code == 0
    assert len(api.generations) == 12
    check_answers(run)


def look_at_the_dashboard(example: Example, path: Path) -> None:
    """Do what a user does about Unknown: note the ids that the API has given; free the others."""
    results = load(example.script, example.folder).Results(path)
    records = results.load()
    for record in records:
        if record.outcome != "Unknown":
            continue
        record.state = "Not sent"
        for generation in example.api.generations.values():
            if generation.custom_id == record.custom_id:
                record.state = "Queued"
                record.generation_id = generation.id
                if example.script == GROUP:
                    [record.group_id] = example.api.groups
    results.save(records)
    results.close()


def test_a_terminal_that_is_closed_loses_nothing(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    process = start(example, Gate("GET"))
    process.send_signal(signal.SIGHUP)
    run = example.finish(process)
    assert run.code == -signal.SIGHUP
    assert on_file(run) == paid(example)
    example.api.choose_fault = lambda request, body: None
    assert example.run("--resume").code == 0
    assert len(example.api.generations) == 4


# Coming back later


def test_polls_that_are_used_up(example: Example) -> None:
    example.edit(MAX_POLL_ATTEMPTS=1, POLL_INTERVAL_SECONDS=90)
    example.api.choose_fault = faulty(status(404), polls=True)
    run = example.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Queued"}
    told = " ".join(run.stdout.partition("Request-Response")[2].split())
    reason = r"polls are used up: 1 of .*, in 0:01:30\. .* raise MAX_POLL_ATTEMPTS\."
    assert re.search(reason, told)
    assert "\n Not complete: 4 pending\n" in run.stdout
    check_answers(run)


def test_the_command_that_is_shown_resumes(example: Example) -> None:
    example.edit(RESULTS_DIR="it's a folder; with spaces")
    example.edit(MAX_POLL_ATTEMPTS=1)
    example.api.choose_fault = faulty(status(404), polls=True)
    shown = example.run().stdout
    example.api.choose_fault = lambda request, body: None
    [line] = re.findall(r"^ *(uv run .* --resume .*)$", shown, re.M)
    words = shlex.split(line)
    assert words[:3] == ["uv", "run", example.script]
    as_the_shell_reads_it = subprocess.run(
        ["sh", "-c", f'printf "%s\\n" {line}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert as_the_shell_reads_it == words
    assert example.run(*words[3:]).code == 0


@pytest.mark.parametrize("suffix", [".db", ".jsonl"])
def test_resume_takes_either_name(example: Example, suffix: str) -> None:
    path = put_on_file(example, "mine.db", ["Queued", "Success", "Not sent"])
    resumed = example.run("--resume", str(path.with_suffix(suffix)))
    assert resumed.code == 1
    assert list(resumed.states.values()) == ["Success", "Success", "Not sent"]
    assert re.search(r"^      Throughput: +-$", resumed.stdout, re.M)  # nothing was measured
    check_answers(resumed)


def test_with_nothing_pending_nothing_is_sent(example: Example) -> None:
    path = put_on_file(example, "done.db", ["Success"] * 4)
    resumed = example.run("--resume", str(path))
    assert resumed.code == 0
    assert counts(resumed) == {"Successful": 4, "Failed": 0, "Total": 4}
    assert re.search(r"^      Throughput: +-$", resumed.stdout, re.M)
    none = example.run("--resume")
    assert none.code == 2
    assert none.stdout == ""
    assert none.stderr == f"{example.script}: nothing is pending in results\n"
    assert not example.api.calls


def test_resume_takes_the_newest_with_something_pending(example: Example) -> None:
    prefix = "async-polling" if example.script == SINGLE else "async-group"
    pending, later = (
        f"{prefix}-20260102-000000-000000.db",
        f"{prefix}-20260103-000000-000000.db",
    )
    oldest = put_on_file(example, f"{prefix}-20260101-000000-000000.db", ["Queued"])
    put_on_file(example, pending, ["Queued", "Not sent"])
    put_on_file(example, later, ["Not sent", "Unknown"])
    put_on_file(example, f"{prefix}-20260104-000000-000000.db", ["Success"])
    put_on_file(example, "async-zzz-20260105-000000-000000.db", ["Queued"])  # of another name
    run = example.run("--resume")
    assert run.code == 1
    assert f"Resuming: results/{pending}\n" in run.stdout
    states = [row["state"] for row in read_results(example.folder / "results" / pending)]
    assert states == ["Success", "Not sent"]
    assert [row["state"] for row in read_results(oldest)] == ["Queued"]
    told = run.stdout.splitlines()[0]
    assert told.startswith(
        f"results/{later} is newer, with requests that were not sent: --resume "
    )
    assert run.stderr == ""


def test_the_file_of_an_earlier_version_is_refused(example: Example) -> None:
    path = example.folder / "old.jsonl"
    row = {
        "custom_id": "req-001",
        "question": "Why?",
        "generation_id": "abc",
        "state": "Queued",
    }
    path.write_text(json.dumps(row) + "\n")
    before = path.read_bytes()
    for more in ([], ["--submit"]):
        run = example.run("--resume", "old.jsonl", *more)
        assert run.code == 2
        assert run.stdout == ""
        [told] = run.stderr.splitlines()
        assert "an earlier version's .jsonl can't be resumed" in told
    assert path.read_bytes() == before
    assert [each.name for each in example.folder.glob("old*")] == ["old.jsonl"]


@pytest.mark.parametrize("name", ["nope.jsonl", "nope.db", "a folder"])
def test_a_missing_file_is_said_to_be_missing(example: Example, name: str) -> None:
    (example.folder / "a folder").mkdir()
    before = sorted(example.folder.iterdir())
    run = example.run("--resume", name)
    assert run.code == 2
    [told] = run.stderr.splitlines()
    assert f"there is no {name.partition('.')[0]}" in told
    assert sorted(example.folder.iterdir()) == before


OTHER_FILES: dict[str, bytes] = {
    "text": b"hello\nworld\n" * 100,
    "a short text": b"hello\n",
    "JSON Lines": b'{"custom_id": "req-001", "state": "Queued"}\n' * 100,
    "binary": bytes(range(256)) * 100,
    "half of SQLite's first line": b"SQLite format",
    "SQLite's first line and nothing right": b"SQLite format 3\0" + b"\xff" * 4096,
}


def test_what_is_no_sqlite_file_is_refused(example: Example) -> None:
    module = load(example.script, example.folder)
    path = example.folder / "other.db"
    for content in OTHER_FILES.values():
        path.write_bytes(content)
        with pytest.raises(OSError, match=re.escape(str(path))):
            module.Results(path)
        assert path.read_bytes() == content
        assert [each.name for each in example.folder.glob("other*")] == ["other.db"]
    for more in ([], ["--submit"]):
        run = example.run("--resume", "other.db", *more)
        assert run.code == 2
        assert run.stdout == ""
        [told] = run.stderr.splitlines()
        assert "other.db" in told
        assert path.read_bytes() == content
    assert not example.api.calls


def test_the_other_scripts_file_is_refused(example: Example, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    [name] = set(SCRIPTS) - {example.script}
    other = Example(name, tmp_path / "other", example.api)
    path = put_on_file(other, "theirs.db", ["Queued", "Not sent"])
    for more in ([], ["--submit"]):
        run = example.run("--resume", str(path), *more)
        assert run.code == 2
        assert run.stdout == ""
        [told] = run.stderr.splitlines()
        assert f"no request of {example.script} in {path}" in told
    assert not example.api.calls
    assert other.run("--resume", str(path), "--submit").code == 0


def test_submit_needs_the_name_of_a_file(example: Example) -> None:
    put_on_file(example, "mine.db", ["Queued", "Not sent"])
    for arguments in (["--submit"], ["--resume", "--submit"]):
        run = example.run(*arguments)
        assert run.code == 2
        assert "--submit needs --resume FILE" in run.stderr
        assert run.stdout == ""
    assert not example.api.calls


def test_a_second_process_at_a_file_in_use_is_refused(example: Example) -> None:
    example.edit(NUM_REQUESTS=8, REQUEST_TIMEOUT_SECONDS=3600)
    gate = Gate("POST")
    first = start(example, gate)
    [path] = example.folder.glob("results/*.db")
    sent = len(example.api.calls)
    name = f"results/{path.name}"
    for arguments in (["--resume", name], ["--resume", name, "--submit"], ["--resume"]):
        second = example.run(*arguments)
        assert second.code == 2
        assert second.stdout == ""
        [told] = second.stderr.splitlines()
        assert name in told
        assert "in use" in told
    if example.script == GROUP:
        assert len(example.api.calls) == sent
    gate.opened.set()
    assert example.finish(first).code == 0
    assert len(example.api.generations) == 8


def test_threads_can_save_at_the_same_time(tmp_path: Path) -> None:
    for script in SCRIPTS:
        module = load(script)
        results = module.Results(tmp_path / f"{script}.db")
        records = [
            module.new_record(f"req-{number}", "long " * 1000) for number in range(200)
        ]
        results.save(records)
        for record in records:
            record.state = "Success"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda record, results=results: results.save([record]), records))
        assert results.load() == records
        results.close()
        assert module.Results(results.path).load() == records


# A full disk, and files that are gone


def watch_file(example: Example) -> dict[str, list[int]]:
    """Note how large SQLite's file is whenever a call arrives, by method."""
    sizes: dict[str, list[int]] = {"POST": [], "GET": []}

    def choose(request: web.Request, body: Json) -> None:
        [path] = example.folder.glob("results/*-wal")
        sizes[request.method].append(path.stat().st_size)

    example.api.choose_fault = choose
    example.run()
    example.api.choose_fault = lambda request, body: None
    return sizes


def start_with_room_for(example: Example, size: int) -> subprocess.Popen[str]:
    """Start it; none of its files can be larger than size. So Python must write no bytecode."""
    example.environment = example.api.environment | {"PYTHONDONTWRITEBYTECODE": "1"}
    process = example.start(file_limit=size)
    example.environment = example.api.environment
    return process


@pytest.mark.parametrize("size", [0, 4000, 16_000, 24_000])
def test_a_disk_that_is_full_from_the_start(example: Example, size: int) -> None:
    example.edit(NUM_REQUESTS=20)
    run = example.finish(start_with_room_for(example, size))
    assert not example.api.calls
    if run.code == 2:
        assert run.stdout == ""
        [told] = run.stderr.splitlines()
        assert f"results/{run.results.name}" in told
    else:  # the file could be opened
        assert run.code == 1
        assert counts(run)["Not sent"] == 20
        assert f"results/{run.results.name}: " in run.stdout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_disk_that_fills_up(single: Example, share: float) -> None:
    single.edit(NUM_REQUESTS=20)
    sizes = watch_file(single)
    before = paid(single)
    start, end = min(sizes["POST"]), max(sizes["GET"])
    run = single.finish(start_with_room_for(single, start + int(share * (end - start))))
    check_full_disk(single, run, before)


def test_ids_that_are_not_on_file_are_shown_with_the_python_for_them(
    example: Example,
) -> None:
    example.edit(NUM_REQUESTS=5, REQUEST_TIMEOUT_SECONDS=60)
    under_way = 5 if example.script == SINGLE else 1
    gate = Gate("POST", count=under_way, is_carried_out=True)
    process = start(example, gate)
    folder = example.folder / "results"
    shutil.copytree(folder, example.folder / "before")
    replace_the_folder_by_a_file(next(folder.glob("*.db")))
    gate.opened.set()
    run = example.finish(process)
    assert run.code == 1
    assert "complete!" not in run.stdout
    lost = shown_ids(run.stdout)
    assert set(lost.values()) == paid(example)
    assert len(lost) == 5
    # What the disk has when it can be written again: everything but the ids
    folder.unlink()
    (example.folder / "before").rename(folder)
    run_shown_python(run)
    example.api.choose_fault = lambda request, body: None
    [path] = folder.glob("*.db")
    resumed = example.run("--resume", str(path), "--submit")
    assert resumed.code == 0
    assert set(resumed.states.values()) == {"Success"}
    assert len(example.api.generations) == 5


def check_full_disk(example: Example, run: Run, before: set[str]) -> None:
    """Check a run that a full disk has ended, and that all is well afterwards.

    before are the generation ids of an earlier run.
    """
    made = len(example.api.generations)
    total = len(run.rows)
    assert run.code == 1
    assert counts(run)["Total"] == total
    assert "complete!" not in run.stdout
    assert f"results/{run.results.name}: " in run.stdout  # what could not be written
    accepted = paid(example) - before
    lost = shown_ids(run.stdout)
    assert accepted - on_file(run) <= set(lost.values()) <= accepted | before
    for custom_id, each in lost.items():
        members = example.api.groups.get(each) or [example.api.generations[each]]
        assert custom_id in {member.custom_id for member in members}
    if lost:
        run_shown_python(run)
    assert on_file(run) == accepted
    example.api.choose_fault = lambda request, body: None
    resumed = example.run("--resume", f"results/{run.results.name}")
    assert len(example.api.generations) == made
    assert counts(resumed)["Successful"] == made - len(before)
    submitted = example.run("--resume", f"results/{run.results.name}", "--submit")
    assert submitted.code == 0
    assert set(submitted.states.values()) == {"Success"}
    assert len(example.api.generations) == total + len(before)


@pytest.mark.parametrize("which", [0, -1])
def test_a_disk_that_is_full_while_polling(example: Example, which: int) -> None:
    if example.script == SINGLE:
        example.edit(MAX_CONCURRENT_POLLS=1)
    size = watch_file(example)["GET"][which]
    run = example.finish(start_with_room_for(example, size + 100))
    assert run.code == 1
    assert "complete!" not in run.stdout
    assert "\n Not complete: " in run.stdout
    assert f"results/{run.results.name}: " in run.stdout
    assert set(shown_ids(run.stdout).values()) <= paid(example)
    answered = 1 if example.script == SINGLE and which == 0 else 4
    assert Counter(row["state"] for row in run.answers)["Success"] == answered
    resume = ["--resume", f"results/{run.results.name}"]
    assert commands(run.stdout) == ([resume] if answered < 4 else [])
    assert example.run(*resume).code == 0
    assert len(example.api.generations) == 8


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_the_folder_by_a_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_text("no folder")


# What is done to the results file during a run, and whether it can be written again at the end
LOSSES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "deleted": (lambda path: path.unlink(), True),
    "deleted with its folder": (lambda path: shutil.rmtree(path.parent), True),
    "made unreadable": (lambda path: path.chmod(0), True),
    "replaced by a folder": (replace_by_a_folder, False),
    "its folder replaced by a file": (replace_the_folder_by_a_file, False),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_file_that_is_lost_while_polling_costs_no_answer(
    example: Example, loss: str
) -> None:
    lose, can_be_written = LOSSES[loss]
    example.edit(REQUEST_TIMEOUT_SECONDS=60)
    gate = Gate("GET")
    process = start(example, gate)
    [path] = example.folder.glob("results/*.db")
    lose(path)
    gate.opened.set()
    run = example.finish(process)
    if can_be_written:
        assert run.code == 0
        assert "\n Generation complete!\n" in run.stdout
        path.chmod(0o600)
        assert set(run.states.values()) == {"Success"}
        check_answers(run)
        return
    assert run.code == 1
    assert "complete!" not in run.stdout
    if path.is_dir():
        lines = path.with_suffix(".jsonl").read_text("utf-8").splitlines()
        answers = [json.loads(line) for line in lines]
        assert {answer["state"] for answer in answers} == {"Success"}
        assert len({answer["response"] for answer in answers}) == 4
        assert f"can't open results/{path.name}" in run.stdout
    else:
        assert set(shown_ids(run.stdout).values()) == paid(example)


def test_answers_that_cannot_be_written_out_are_on_file(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=60)
    gate = Gate("GET")
    process = start(example, gate)
    [path] = example.folder.glob("results/*.db")
    path.with_suffix(".jsonl").mkdir()
    gate.opened.set()
    run = example.finish(process)
    assert run.code == 1
    assert "complete!" not in run.stdout
    assert "Is a directory: 'results/" in run.stdout
    assert set(run.states.values()) == {"Success"}
    path.with_suffix(".jsonl").rmdir()
    assert example.run("--resume", str(path)).code == 0
    check_answers(run)


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_ctrl_c_puts_all_on_file_again_that_was_deleted(
    example: Example, method: str
) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=60)
    gate = Gate(method, count=4 if example.script == SINGLE else 1)
    process = start(example, gate)
    shutil.rmtree(example.folder / "results")
    process.send_signal(signal.SIGINT)
    if method == "POST":
        wait_until_it_says_so(process)
        gate.opened.set()
    run = example.finish(process)
    check_interrupted(run)
    check_answers(run)
    assert on_file(run) == paid(example)
    assert shown_ids(run.stdout) == {}
    example.api.choose_fault = lambda request, body: None
    assert example.run("--resume", str(run.results), "--submit").code == 0
    assert len(example.api.generations) == 4


def start_in_shell(example: Example, line: str) -> subprocess.Popen[str]:
    """Start the script as the last word of a line of the shell's."""
    example.api.new_runs += 1
    return subprocess.Popen(
        ["sh", "-c", line.format(f"{shlex.quote(sys.executable)} {example.script}")],
        cwd=example.folder,
        env={**os.environ, **example.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_more_workers_than_file_descriptors_lose_no_id(single: Example) -> None:
    import resource  # not on Windows

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, most), most))  # for the local API
    single.edit(NUM_REQUESTS=300, MAX_CONCURRENT_POLLS=300, MAX_SUBMIT_ATTEMPTS=2)
    single.edit(REQUEST_TIMEOUT_SECONDS=60)
    gate = Gate("POST")
    single.api.choose_fault = gate
    process = start_in_shell(single, "ulimit -n 256; exec {}")
    assert process.stdout
    while "Too many open files" not in process.stdout.readline():  # all others are under way
        assert process.poll() is None
    gate.opened.set()
    run = single.finish(process)
    assert run.code == 1
    assert len(paid(single)) > 200
    assert on_file(run) | set(shown_ids(run.stdout).values()) == paid(single)
    single.edit(MAX_CONCURRENT_POLLS=20)
    submitted = single.run("--resume", str(run.results), "--submit")
    assert submitted.code == 0
    assert len(single.api.generations) == 300


# Exceptions that nobody foresaw

NO_THREAD = """
    start_thread = Thread.start

    def start(thread):
        if threading.active_count() >= MOST:
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    threading.Thread.start = start
"""


def add_to_submissions(example: Example, code: str) -> None:
    """Add code to the loop that shows the submissions."""
    path = example.folder / example.script
    text = path.read_text("utf-8")
    *_, loop = re.finditer(r"^( +)for \w+ in submit_all\(.*\):\n", text, re.M)
    text = f"{text[: loop.end()]}{loop[1]}    {code}\n{text[loop.end() :]}"
    path.write_text(text, "utf-8")


def end_with_traceback(example: Example, error: str) -> Run:
    """Run it to an end with a traceback; before it stand the summary and the command."""
    process = example.start(stderr=subprocess.STDOUT)
    try:
        shown, _ = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    run = Run(process.returncode, shown, "", example.folder)
    summary, _, traceback = shown.partition("Traceback")
    assert run.code == 1
    assert "SUMMARY" in summary
    assert "\n Not complete: " in summary
    assert error in traceback
    assert commands(summary)
    assert not commands(traceback)
    return run


def test_a_mistake_in_the_loop_that_shows_submissions(example: Example) -> None:
    example.edit(NUM_REQUESTS=20)
    add_to_submissions(example, "raise RuntimeError('nobody foresaw this')")
    run = end_with_traceback(example, "nobody foresaw this")
    check_answers(run)
    assert on_file(run) == paid(example)
    assert set(run.states.values()) <= {"Queued", "Not sent"}
    sent = len(example.api.generations)
    assert sent == 20 if example.script == GROUP else 1 <= sent <= 5


def test_a_mistake_while_polling(example: Example) -> None:
    method = "fetch_generation" if example.script == SINGLE else "fetch_group"
    add(example, f"del Client.{method}")
    run = end_with_traceback(example, "AttributeError")
    check_answers(run)
    assert on_file(run) == paid(example)
    assert set(run.states.values()) == {"Queued"}


def test_threads_that_cannot_be_started(example: Example) -> None:
    # There are the main thread and the screen's, and in the single script three of five workers.
    most = 5 if example.script == SINGLE else 2
    example.edit(NUM_REQUESTS=20)
    add(example, NO_THREAD.replace("MOST", str(most)))
    run = end_with_traceback(example, "can't start new thread")
    states = Counter(run.states.values())
    assert len(paid(example) - on_file(run)) <= states["Unknown"]
    if example.script == SINGLE:
        assert states["Unknown"] <= 1  # the one that no thread was found for
        assert states["Not sent"] >= 16
    else:
        assert states == {"Not sent": 20}
    add(example, "threading.Thread.start = start_thread")
    submitted = example.run("--resume", str(run.results), "--submit")
    assert Counter(submitted.states.values())["Success"] == 20 - states["Unknown"]


def test_a_mistake_in_build_request_for_one_row_sends_nothing(example: Example) -> None:
    example.replace('"model": MODEL_ID,', '"model": {"req-001": MODEL_ID}[custom_id],')
    process = example.start()
    shown, told = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode != 0
    assert shown == ""
    assert "req-002" in told
    assert not example.api.calls


# An output that is closed


@pytest.mark.parametrize("lines", [1, 12, 16, 25])
def test_a_reader_that_goes_away_ends_it_quietly(example: Example, lines: int) -> None:
    example.edit(NUM_REQUESTS=30, REQUEST_TIMEOUT_SECONDS=60)
    gate = Gate("GET")  # only then are the polls answered, so that more is printed
    example.api.choose_fault = gate
    process = example.start()
    assert process.stdout
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    gate.opened.set()
    run = example.finish(process)
    assert run.code == 1
    assert on_file(run) == paid(example)
    assert len(run.answers) == 30
    assert not re.search("Error|Broken", run.stderr)
    made = len(example.api.generations)
    states = set(run.states.values())
    name = f"results/{run.results.name}"
    shown = commands(run.stderr)
    assert (["--resume", name] in shown) == ("Queued" in states)
    assert (["--resume", name, "--submit"] in shown) == ("Not sent" in states)
    if "Queued" in states:
        resumed = example.run("--resume", name)
        assert Counter(resumed.states.values())["Success"] == made
        assert len(example.api.generations) == made


def test_a_reader_that_goes_away_when_all_is_done_is_told_nothing(
    example: Example,
) -> None:
    process = example.start()
    assert process.stdout
    for line in process.stdout:
        if "SUMMARY" in line:
            break
    process.stdout.close()
    process.stdout = None
    run = example.finish(process)
    assert set(run.states.values()) == {"Success"}
    assert run.stderr.strip() == ""


def test_ids_that_neither_the_file_nor_the_output_takes_are_told(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=60)
    gate = Gate("POST", count=4 if example.script == SINGLE else 1, is_carried_out=True)
    process = start(example, gate)
    [path] = example.folder.glob("results/*.db")
    replace_the_folder_by_a_file(path)
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    gate.opened.set()
    _, told = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1
    assert set(shown_ids(told).values()) == paid(example)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_an_output_that_is_full(example: Example) -> None:
    with open("/dev/full", "w") as full:
        run = example.run(stdout=full)
    assert run.code == 1
    assert commands(run.stderr) == [["--resume", f"results/{run.results.name}", "--submit"]]
    assert not example.api.generations
