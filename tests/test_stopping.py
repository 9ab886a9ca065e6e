"""Ends before the end, and coming back later: Ctrl-C, kills, a full disk, --resume."""

import asyncio
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import GROUP, SINGLE, TOP, Example, Run, faulty
from local_api import Fault, Json, Proceed, after, stall, status, web

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


PROMISE = "up to 2 s for ids on their way; Ctrl-C again ends now"


class Gate:
    """Notices when something arrives at the API, and holds it there until it is opened."""

    def __init__(
        self, method: str, count: int = 1, then: Fault | None = None, before: Fault | None = None
    ) -> None:
        self.method, self.count, self.then, self.before = method, count, then, before
        self.arrived = threading.Event()

    def __call__(self, request: web.Request, body: Json) -> Fault | None:
        if request.method != self.method:
            return None
        self.count -= 1
        if self.count == 0:
            self.arrived.set()
        return self.then if self.count <= 0 else self.before


def interrupt(example: Example, gate: Gate, *arguments: str) -> Run:
    """Run it until something has come to the gate, and press Ctrl-C."""
    example.api.choose_fault = gate
    process = example.start(*arguments)
    assert gate.arrived.wait(30)
    process.send_signal(signal.SIGINT)
    run = example.finish(process)
    assert run.code == 130, run.stderr
    assert run.stderr == ""
    assert run.stdout.count(f"\n  Stopping: {PROMISE}\n") == 1
    assert "SUMMARY" in run.stdout
    assert "Generation complete!" not in run.stdout
    example.api.choose_fault = lambda request, body: None
    return run


def counts(run: Run) -> dict[str, int]:
    """Return the counts of the summary."""
    _, _, after = run.stdout.partition("\n  Success Rate\n")
    rows = re.findall(r"^      (\w[\w ]*): +(\d+)$", after.partition("Metrics")[0], re.M)
    return {name: int(count) for name, count in rows}


def not_on_file(run: Run) -> set[str]:
    """Return the ids that the user is asked to keep."""
    return set(re.findall(r"^  Keep this id, which .* does not have: (.*)$", run.stdout, re.M))


def table(run: Run, outcome: str) -> dict[str, str]:
    """Return the requests that the table has with that outcome, each with its reason."""
    _, _, below = run.stdout.partition("\n  Request-Response Correlation\n")
    return dict(re.findall(rf"^  (req-\d+) +\S {outcome}.*\n(?: {{13}}(.*)\n)?", below, re.M))


def test_ctrl_c_in_a_submission_that_stalls(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    run = interrupt(example, Gate("POST", 4 if example.script == SINGLE else 1, stall, stall))
    assert set(run.states.values()) == {"Submitting"}
    assert list(table(run, "Unknown").values()) == ["interrupted"] * 4
    assert "\n Not complete: 4 unknown\n" in run.stdout


def test_a_run_of_1200_that_is_interrupted_is_told_in_few_lines(single: Example) -> None:
    single.edit(NUM_REQUESTS=1200, REQUEST_TIMEOUT_SECONDS=3600)
    run = interrupt(single, Gate("POST", 105, then=stall))
    assert sum(counts(run).values()) == 2 * 1200
    assert len(run.stdout.partition("SUMMARY")[2].splitlines()) < 250
    name = f"results/{run.results.name}"
    assert f"\n  ... and 1150 more in {name}\n" in run.stdout
    assert len(table(run, "Pending")) == 50  # the first 50 that have no answer
    assert counts(run)["Not sent"] > 1000


def test_ctrl_c_keeps_the_ids_that_arrive_after_it(example: Example) -> None:
    example.edit(NUM_REQUESTS=20, REQUEST_TIMEOUT_SECONDS=3600)
    example.api.delay_seconds = 1
    process = example.start()
    while not example.api.calls:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    run = example.finish(process)
    assert run.code == 130
    states = Counter(run.states.values())
    if example.script == SINGLE:
        assert states["Queued"] >= 1
        assert states["Queued"] + states["Not sent"] == 20
    else:
        assert states == {"Queued": 20}
    assert len(example.api.generations) == states["Queued"]
    example.api.delay_seconds = 0
    resumed = example.run("--resume")
    assert Counter(resumed.states.values())["Success"] == states["Queued"]
    assert len(example.api.generations) == states["Queued"]
    assert counts(resumed)["Total"] == 20
    complete = example.run("--resume", str(run.results), "--submit")
    assert complete.code == 0
    assert set(complete.states.values()) == {"Success"}
    assert len(example.api.generations) == 20


def test_ctrl_c_during_a_long_retry_after(example: Example) -> None:
    run = interrupt(example, Gate("POST", then=status(429, Retry_After="100")))
    assert set(run.states.values()) == {"Not sent"}
    assert len(example.api.generations) == 0


def test_ctrl_c_between_polls(example: Example) -> None:
    example.edit(POLL_INTERVAL_SECONDS=3600)
    example.api.seconds = (10, 10)
    run = interrupt(example, Gate("GET"))
    assert set(run.states.values()) == {"Queued"}
    example.edit(POLL_INTERVAL_SECONDS=0.05)
    for generation in example.api.generations.values():
        generation.dispatched = generation.finished = datetime.now(timezone.utc)
    assert example.run("--resume").code == 0


def test_ctrl_c_in_a_poll_that_stalls(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    run = interrupt(example, Gate("GET", then=stall))
    assert "--resume" in run.stdout
    assert example.run("--resume").code == 0


def test_ctrl_c_while_resuming(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    interrupt(example, Gate("GET", then=stall))
    interrupt(example, Gate("GET", then=stall), "--resume")
    assert example.run("--resume").code == 0


def test_a_second_ctrl_c_ends_at_once(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    gate = Gate("POST", 4 if example.script == SINGLE else 1, stall, stall)
    example.api.choose_fault = gate
    process = example.start()
    assert gate.arrived.wait(30)
    process.send_signal(signal.SIGINT)
    assert process.stdout
    shown = ""
    while PROMISE not in shown:  # is told before any wait
        shown += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    run = example.finish(process)
    assert run.code == 130
    assert "SUMMARY" not in run.stdout
    assert set(run.states.values()) == {"Submitting"}
    assert run.stderr.startswith("\n")  # the cursor stood behind ^C
    assert run.stderr.endswith("\n")
    assert f"results/{run.results.name}" in run.stderr


KILLS = [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]


@pytest.mark.parametrize("number", KILLS)
def test_a_kill_in_a_submission_leaves_it_unknown(single: Example, number: int) -> None:
    single.edit(NUM_REQUESTS=10, MAX_CONCURRENT_POLLS=1, REQUEST_TIMEOUT_SECONDS=3600)
    gate = Gate("POST", count=4, then=after(stall))
    single.api.choose_fault = gate
    process = single.start()
    assert gate.arrived.wait(30)
    process.send_signal(number)
    run = single.finish(process)
    assert run.code == -number
    states = ["Queued"] * 3 + ["Submitting"] + ["Not sent"] * 6
    assert list(run.states.values()) == states
    single.api.choose_fault = lambda request, body: None
    resumed = single.run("--resume")
    assert resumed.code == 1
    assert counts(resumed) == {"Successful": 3, "Failed": 0, "Unknown": 1, "Not sent": 6} | {
        "Total": 10
    }
    assert "\n Not complete: 1 unknown, 6 not sent\n" in resumed.stdout
    assert len(table(resumed, "Not sent")) == 6
    assert len(single.api.generations) == 4
    [command] = re.findall(r"--resume .* --submit", resumed.stdout)
    submitted = single.run(*shlex.split(command))
    assert submitted.code == 1
    assert "\n Not complete: 1 unknown\n" in submitted.stdout
    assert Counter(submitted.states.values()) == {"Success": 9, "Submitting": 1}
    assert len(single.api.generations) == 10


@pytest.mark.parametrize("number", KILLS)
def test_a_kill_while_polling_loses_nothing(example: Example, number: int) -> None:
    gate = Gate("GET", count=3, then=stall)
    if example.script == GROUP:
        gate.count = 1
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    example.api.choose_fault = gate
    process = example.start()
    assert gate.arrived.wait(30)
    process.send_signal(number)
    run = example.finish(process)
    assert run.code == -number
    assert {row["generation_id"] or row["group_id"] for row in run.final.values()} == paid(example)
    example.api.choose_fault = lambda request, body: None
    assert example.run("--resume").code == 0
    assert len(example.api.generations) == 4


def paid(example: Example) -> set[str]:
    """Return the ids that were given out for money: without one its answer can't be had."""
    return set(example.api.generations if example.script == SINGLE else example.api.groups)


def test_a_kill_of_a_group_in_its_submission_leaves_all_of_it_unknown(group: Example) -> None:
    group.edit(REQUEST_TIMEOUT_SECONDS=3600)
    gate = Gate("POST", then=after(stall))
    group.api.choose_fault = gate
    process = group.start()
    assert gate.arrived.wait(30)
    process.kill()
    run = group.finish(process)
    assert set(run.states.values()) == {"Submitting"}
    before = run.results.read_bytes()
    for more in ([], ["--submit"]):
        resumed = group.run("--resume", str(run.results), *more)
        assert resumed.code == 1
        assert "Unknown:        4" in resumed.stdout
        assert run.results.read_bytes() == before
    assert len(group.api.calls) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a pipe is set as on Linux")
def test_a_screen_that_nobody_reads_holds_back_no_id(single: Example) -> None:
    import fcntl

    single.edit(NUM_REQUESTS=100)
    outside, inside = os.pipe()
    fcntl.fcntl(inside, fcntl.F_SETPIPE_SZ, 4096)  # less than what the submissions print
    process = single.start(stdout=inside)
    os.close(inside)
    kept: set[str] = set()
    while len(kept) < 100:
        assert process.poll() is None
        for path in single.folder.glob("results/*.jsonl"):
            whole_lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
            kept = {json.loads(line)["generation_id"] for line in whole_lines} - {None}
    assert {method for method, _ in single.api.calls} == {"POST"}  # it is held up
    process.send_signal(signal.SIGTERM)
    assert single.finish(process).code == -signal.SIGTERM
    os.close(outside)
    assert kept == paid(single)
    assert single.run("--resume").code == 0


def pending_run(example: Example) -> Path:
    """Return the results file of a run that has everything still to come."""
    example.edit(MAX_POLL_ATTEMPTS=1)
    example.api.choose_fault = faulty(status(404), polls=True)
    run = example.run()
    example.api.choose_fault = lambda request, body: None
    assert set(run.states.values()) == {"Queued"}
    return run.results


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], int]] = {  # what is done, lines told of
    "torn at once": (lambda rows: rows + b"{", 0),
    "torn in a text": (lambda rows: rows + b'{"custom_id": "req-001", "qu', 0),
    "torn in a character": (lambda rows: rows + b'{"custom_id": "\xe2\x82', 0),
    "a last line that is no row": (lambda rows: rows + b"null", 0),
    "no last line break": (lambda rows: rows[:-1], 0),
    "Windows line breaks": (lambda rows: rows.replace(b"\n", b"\r\n"), 0),
    "blank lines": (lambda rows: rows.replace(b"\n", b"\n\n \n"), 0),
    "a bad byte": (lambda rows: rows.replace(b"What", b"Wh\xfft", 1), 1),
    "another's lines": (lambda rows: b'{"a": 1}\n[]\nhello\n1\n' + rows, 4),
    "half a row": (lambda rows: rows[:100] + b"\n" + rows, 1),
    "nested too deep": (lambda rows: b"[" * 100_000 + b"\n" + rows, 1),
    "another's lines, and torn": (lambda rows: b"hello\n" + rows + b'{"custom_id', 1),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_damage_puts_no_id_out_of_reach(
    example: Example, damage: Callable[[bytes], bytes], told: int
) -> None:
    path = example.folder / "damaged.jsonl"
    before = damage(pending_run(example).read_bytes())
    path.write_bytes(before)
    run = example.run("--resume", str(path))
    assert run.code == 0, run.stderr
    assert len(run.stderr.splitlines()) == (1 if told else 0)
    assert not told or (f"{told} line" in run.stderr and path.name in run.stderr)
    assert counts(run)["Successful"] == 4
    end = before.rindex(b"\n") + 1
    assert path.read_bytes()[:end] == before[:end]  # nothing but a torn line is gone
    added = path.read_bytes()[end:].splitlines()
    states = [json.loads(line)["state"] for line in added]
    assert states == ["Queued"] * (len(states) - 4) + ["Success"] * 4
    assert len(example.api.generations) == 4


def test_the_command_that_is_shown_resumes(example: Example) -> None:
    example.edit(RESULTS_DIR="it's a folder; with $HOME")
    example.edit(MAX_POLL_ATTEMPTS=1)
    example.api.choose_fault = faulty(status(404), polls=True)
    shown = example.run()
    [command] = re.findall(r"^ *(uv run .* --resume .*)$", shown.stdout, re.M)
    example.api.choose_fault = lambda request, body: None
    words = shlex.split(command)
    assert words[:3] == ["uv", "run", example.script]
    assert example.run(*words[3:]).code == 0
    as_the_shell_reads_it = subprocess.run(
        ["sh", "-c", f'printf "%s\\n" {command}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert as_the_shell_reads_it == words


def test_with_nothing_pending_nothing_is_sent(example: Example) -> None:
    run = example.run()
    before = run.results.read_bytes()
    sent = len(example.api.calls)
    resumed = example.run("--resume", str(run.results))
    assert resumed.code == 0
    assert "Successful:     4" in resumed.stdout
    assert re.search(r"^      Throughput: +0\.00 req/s$", resumed.stdout, re.M)
    assert len(example.api.calls) == sent
    assert run.results.read_bytes() == before
    none = example.run("--resume")
    assert none.code == 2
    assert "nothing to resume in results" in none.stderr


def test_resume_takes_the_newest_with_something_pending(example: Example) -> None:
    older, newer = pending_run(example), pending_run(example)
    finished = example.run()
    (finished.results.parent / "async-zzz.jsonl").write_text("not ours")
    finished.results.with_name(f"{newer.stem}x.jsonl").write_text("not ours")
    assert example.run("--resume").code == 0
    states = {json.loads(line)["state"] for line in newer.read_text().splitlines()}
    assert "Success" in states
    assert "Success" not in older.read_text()


OTHER_FILES: dict[str, Any] = {
    "empty": b"",
    "blank": b"\n\n",
    "only a torn line": b'{"custom_id": "req-001"',
    "binary": bytes(range(256)) * 10,
    "text": b"hello\nworld\n",
    "other JSON Lines": b'{"a": 1}\n{"a": 2}\n',
    "a JSON list": b"[]\n",
    "numbers": b"1\n2\n",
    "nested too deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_no_other_file_is_resumed(example: Example, content: bytes) -> None:
    path = example.folder / "other.jsonl"
    path.write_bytes(content)
    for more in ([], ["--submit"]):
        run = example.run("--resume", "other.jsonl", *more)
        assert run.code == 2
        assert "nothing to resume in other.jsonl" in run.stderr
        assert len(run.stderr.splitlines()) == 1
        assert path.read_bytes() == content
    assert not example.api.calls


def test_a_missing_file_is_said_to_be_missing(example: Example) -> None:
    run = example.run("--resume", "nope.jsonl")
    assert run.code == 2
    assert "No such file" in run.stderr
    assert "nope.jsonl" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not (example.folder / "nope.jsonl").exists()


@pytest.mark.parametrize("arguments", [["--submit"], ["--resume", "--submit"]])
def test_submit_needs_the_name_of_a_file(example: Example, arguments: list[str]) -> None:
    pending_run(example)
    sent = len(example.api.calls)
    run = example.run(*arguments)
    assert run.code == 2
    assert "--submit needs --resume FILE" in run.stderr
    assert run.stdout == ""
    assert len(example.api.calls) == sent


def test_nothing_is_submitted_from_a_file_with_damaged_lines(example: Example) -> None:
    example.api.choose_fault = faulty(status(402, "no credit"), polls=False)
    path = example.run().results
    path.write_bytes(path.read_bytes() + b"a row that may have said: sent\n")
    sent = len(example.api.calls)
    run = example.run("--resume", str(path), "--submit")
    assert run.code == 2
    assert "might pay twice" in run.stderr
    assert len(example.api.calls) == sent
    path.write_bytes(path.read_bytes().rpartition(b"a row")[0])
    example.api.choose_fault = lambda request, body: None
    assert example.run("--resume", str(path), "--submit").code == 0


def test_the_other_scripts_file_and_a_folder_are_not_resumed(
    single: Example, tmp_path: Path
) -> None:
    (tmp_path / "group").mkdir()
    group = Example("async_group_example.py", tmp_path / "group", single.api)
    ours = pending_run(group)
    before = ours.read_bytes()
    for path in (ours, ours.parent):
        assert single.run("--resume", str(path)).code == 2
    theirs = pending_run(single)
    assert group.run("--resume", str(theirs)).code == 2
    assert ours.read_bytes() == before


def test_two_processes_do_not_overwrite_each_others_rows(single: Example) -> None:
    single.edit(NUM_REQUESTS=40, MAX_CONCURRENT_POLLS=20, MAX_POLL_ATTEMPTS=1000)
    single.api.seconds = (3600, 3600)
    both = []
    for arguments in ([], ["--resume"]):
        both.append(single.start(*arguments))
        while "Polling for Results" not in both[-1].stdout.readline():
            assert both[-1].poll() is None
    for generation in single.api.generations.values():  # all are done at once
        generation.dispatched = generation.finished = datetime.now(timezone.utc)
    runs = [single.finish(process) for process in both]
    assert [run.code for run in runs] == [0, 0]
    states = Counter(row["state"] for row in runs[0].rows)
    assert states == {"Not sent": 40, "Submitting": 40, "Queued": 40, "Success": 80}


def test_threads_do_not_tear_each_others_rows(tmp_path: Path) -> None:
    module = runpy.run_path(str(TOP / SINGLE))
    path = tmp_path / "rows.jsonl"
    records = [module["Record"](f"req-{n}", "long " * 1000) for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda record: module["append_rows"](path, [record]), records))
    kept, others = module["read_results"](path)
    assert others == []
    assert sorted(kept, key=str) == sorted(records, key=str)


@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_disk_that_is_full_from_the_start(example: Example, size: int) -> None:
    example.edit(NUM_REQUESTS=20)
    run = example.run(file_limit=size)
    assert run.code == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert run.results.read_bytes() == b""
    assert not example.api.calls


@pytest.mark.parametrize("share", [0.05, 0.35, 0.6, 0.9, 0.99])
def test_a_disk_that_fills_up(single: Example, share: float) -> None:
    single.edit(NUM_REQUESTS=20)
    rows = single.run().rows
    start = sum(len(json.dumps(row)) + 1 for row in rows[:20])
    before = set(single.api.generations)
    run = single.run(file_limit=start + int(share * (len(rows_text(rows)) - start)))
    assert run.code == 1
    assert "\n  Stopping: " in run.stdout
    assert "SUMMARY" in run.stdout
    assert counts(run)["Total"] == 20
    assert "Generation complete!" not in run.stdout
    accepted = set(single.api.generations) - before
    sent = {row["custom_id"] for row in run.rows if row["state"] == "Submitting"}
    assert {single.api.generations[each].custom_id for each in accepted} <= sent
    kept = {row["generation_id"] for row in run.rows} - {None}
    assert not_on_file(run) == accepted - kept
    pending = [row for row in run.final.values() if row["state"] == "Queued"]
    assert not pending or f"--resume results/{run.results.name}\n" in run.stdout
    made = len(single.api.generations)
    resumed = single.run("--resume", f"results/{run.results.name}")
    assert counts(resumed)["Total"] == 20
    assert len(single.api.generations) == made
    single.api.new_runs += 1
    submitted = single.run("--resume", f"results/{run.results.name}", "--submit")
    assert Counter(submitted.states.values())["Success"] == 20 - len(accepted - kept)
    assert len(single.api.generations) == len(before) + 20


def rows_text(rows: list[Json]) -> str:
    """Return rows as the results file has them."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_disk_that_is_full_while_polling_hides_no_command(example: Example) -> None:
    rows = example.run().rows
    submitted = [row for row in rows if row["state"] != "Success"]
    run = example.run(file_limit=len(rows_text(submitted)) + 10)
    assert run.code == 1
    assert "could not be recorded" not in run.stdout
    [command] = re.findall(r" (--resume .*)$", run.stdout, re.M)
    assert example.run(*shlex.split(command)).code == 0


def test_ids_that_are_not_on_file_are_listed_uncut(single: Example) -> None:
    single.edit(NUM_REQUESTS=60, MAX_CONCURRENT_POLLS=60)
    rows = single.run().rows
    single.api.generations.clear()
    single.api.calls.clear()

    async def wait_for_all(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        while len(single.api.calls) < 60:
            await asyncio.sleep(0.01)
        return await proceed()

    single.api.choose_fault = lambda request, body: wait_for_all
    size = len(rows_text([row for row in rows if row["state"] in ("Not sent", "Submitting")]))
    run = single.run(file_limit=size)
    assert run.code == 1
    assert not_on_file(run) == set(single.api.generations)
    assert len(single.api.generations) == 60


def test_ids_are_shown_when_the_results_folder_is_deleted(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    gate = Gate("GET", then=stall)
    example.api.choose_fault = gate
    process = example.start()
    assert gate.arrived.wait(30)
    shutil.rmtree(example.folder / "results")
    process.send_signal(signal.SIGINT)
    run = example.finish(process)
    assert run.code == 130
    assert not_on_file(run) == paid(example)


def test_a_full_disk_of_a_group(group: Example) -> None:
    # Room for the rows of the submission, and for no more.
    rows = [row for row in group.run().rows if row["state"] in ("Not sent", "Submitting")]
    run = group.run(file_limit=len(rows_text(rows)) + 100)
    assert run.code == 1
    assert set(run.states.values()) == {"Submitting"}
    group_id = list(group.api.groups)[-1]
    assert re.search(rf"^  .*: {group_id}$", run.stdout.partition("SUMMARY")[2], re.M)


def test_a_disk_that_is_full_at_the_last_answer(example: Example) -> None:
    size = example.run().results.stat().st_size
    run = example.run(file_limit=size - 10)
    assert run.code == 1
    assert "complete!" not in run.stdout
    assert example.run("--resume", str(run.results)).code == 0


def test_an_output_that_is_closed(example: Example) -> None:
    environment = {**os.environ, **example.environment}
    command = ["sh", "-c", f"{shlex.quote(sys.executable)} {example.script} >&-"]
    done = subprocess.run(
        command, cwd=example.folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("lines", [1, 12, 16, 25])
def test_a_reader_that_goes_away_ends_it_quietly(example: Example, lines: int) -> None:
    closed = threading.Event()  # only then are the polls answered, so that more is printed

    async def wait(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        while not closed.is_set():
            await asyncio.sleep(0.01)
        return await proceed()

    example.edit(NUM_REQUESTS=30)
    example.api.choose_fault = lambda request, body: wait if request.method == "GET" else None
    process = example.start()
    assert process.stdout
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    closed.set()
    run = example.finish(process)
    assert run.code == 1
    accepted = {generation.custom_id for generation in example.api.generations.values()}
    kept = {row["custom_id"] for row in run.rows if row["generation_id"] or row.get("group_id")}
    assert kept == accepted
    assert len(run.stderr.strip().splitlines()) <= 1
    if "Queued" in run.states.values():
        [arguments] = re.findall(r"uv run \S+ (--resume .*)$", run.stderr, re.M)
        example.run(*shlex.split(arguments))
        assert "Queued" not in run.states.values()
        assert len(example.api.generations) == len(accepted)


def test_a_reader_that_goes_away_when_all_is_done_is_told_nothing(example: Example) -> None:
    process = example.start()
    assert process.stdout
    while "SUMMARY" not in process.stdout.readline():
        pass
    process.stdout.close()
    process.stdout = None
    run = example.finish(process)
    assert set(run.states.values()) == {"Success"}
    assert run.stderr.strip() == ""


def test_an_output_that_is_full(example: Example) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        run = example.run(stdout=full)
    assert run.code == 1
    assert "No space left" in run.stderr
    assert not example.api.generations
