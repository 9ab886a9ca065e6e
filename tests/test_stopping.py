"""How a run ends, and how it goes on: signals, kills, --resume, --retry, full disks, stdout."""

import contextlib
import os
import random
import re
import shlex
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
from conftest import SCRIPTS, Example, Gate, Run, Striker, calls, faulty, load, start_at
from local_api import ANSWERS, status

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def read_until(word: str, process: subprocess.Popen[str], stream: str = "stdout") -> None:
    """Read what the script prints until a line has this word."""
    assert any(word in line for line in getattr(process, stream)), f"no line has {word!r}"


def stop(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal, and return when the script says that it has got it."""
    process.send_signal(number)
    read_until("Stopping", process, "stderr")


def given_out(example: Example) -> set[str]:
    """Return the ids that the API has given out: without one its answers can't be had."""
    return set(example.api.groups if example.is_group else example.api.generations)


def check_files(example: Example, run: Run) -> None:
    """Check that no id is lost, and that the .jsonl file has what the results file has."""
    ids = {each.get("group_id", each["generation_id"]) for each in run.records.values()}
    assert ids - {None} == given_out(example)
    if run.code >= 0:  # it has ended by itself
        assert list(run.outcomes) == list(run.records)


def check_stopped(example: Example, run: Run) -> None:
    """Check a run that a signal has ended."""
    assert run.code == 130, run.stdout
    assert re.search("SUMMARY.*\n Not complete: ", run.stdout, re.S)
    assert re.search(rf"uv run .* --resume .*{run.path.name}", run.stdout)
    assert "MAX_POLL_ATTEMPTS" not in run.stdout
    check_files(example, run)


def test_ctrl_c_ends_a_wait_at_once(example: Example) -> None:
    example.edit(POLL_INTERVAL_SECONDS=99)
    example.api.seconds = (99, 99)
    gate = Gate("GET")
    process = start_at(gate, example)
    gate.opened.set()  # so the first round of polls is over soon
    stop(process, SIGINT)
    run = example.finish(process)
    assert set(run.outcomes.values()) == {"Pending"}
    check_stopped(example, run)


@pytest.mark.parametrize(("method", "number"), [("POST", SIGINT), ("GET", SIGTERM)])
def test_calls_under_way_end_first(example: Example, method: str, number: int) -> None:
    example.edit(NUM_REQUESTS=20, REQUEST_TIMEOUT_SECONDS=60)
    example.group_by(5)  # as many as the other one has workers
    gate = Gate(method, 1 if example.is_group else 5)
    process = start_at(gate, example)
    stop(process, number)
    gate.opened.set()
    run = example.finish(process)
    counts = Counter(run.outcomes.values())
    assert counts["Not sent" if method == "POST" else "Pending"] > 10
    assert counts["Pending" if method == "POST" else "Success"] >= 5
    check_stopped(example, run)
    example.api.choose_fault = lambda request, body: None
    assert example.run("--resume", str(run.path)).code == 0
    assert len(example.api.generations) == 20


def test_ctrl_c_during_the_summary_changes_only_the_exit_code(example: Example) -> None:
    path = put_on_file(example, *["Success"] * 1000)
    example.edit(MAX_ROWS=1000)  # more than a pipe takes
    process = example.start("--resume", str(path))
    assert process.stdout
    while "SUMMARY" not in process.stdout.readline():
        pass
    stop(process, SIGINT)
    run = example.finish(process)
    assert run.code == 130
    assert "\n Generation complete!\n" in run.stdout


@pytest.mark.parametrize(("method", "second"), [("POST", SIGTERM), ("GET", SIGINT)])
def test_a_second_signal_ends_a_stall(example: Example, method: str, second: int) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    process = start_at(Gate(method, 1 if example.is_group else 4), example)
    stop(process, SIGINT)
    process.send_signal(second)
    run = example.finish(process)
    assert run.code == -second
    state = "Unknown" if method == "POST" else "Queued"
    assert {each["state"] for each in run.records.values()} == {state}
    check_files(example, run)
    assert not run.path.with_suffix(".jsonl").exists()


def test_a_broken_stderr_costs_no_id(example: Example) -> None:
    gate = Gate("POST")
    process = start_at(gate, example)
    assert process.stderr
    process.stderr.close()
    process.send_signal(SIGINT)
    gate.opened.set()
    run = example.finish(process)
    assert run.code == 130
    assert "Unknown" not in run.outcomes.values()


def test_kills_lose_nothing_and_pay_nothing_twice(example: Example) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(1_000_000))
    print(f"To see nearly the same again: SEED={seed}")
    dice = random.Random(seed)
    example.edit(NUM_REQUESTS=24)
    example.api.delay_seconds = 0.003
    example.group_by(4)
    arguments: list[str] = []
    kills = 0
    for _ in range(8):
        number = dice.choice([9, 9, SIGINT, SIGTERM])
        striker = Striker(number, "POST GET", dice.randint(1, 9), dice.random() < 0.5)
        example.api.choose_fault = striker
        process = example.start(*arguments)
        read_until("Configuration", process)  # now a signal is no mistake any more
        striker.process = process
        run = example.finish(process)
        assert run.code in (0, 1, 130, -number), run.stderr
        kills += run.code == -9
        if run.path.with_suffix(".jsonl").exists():  # it is whole, or not there
            assert len(run.answers) == 24
        arguments = ["--resume", str(run.path)]
    example.api.choose_fault = lambda request, body: None
    run = example.run(*arguments)  # which sees, as every run, that nothing was made twice
    outcomes = Counter(run.outcomes.values())
    assert outcomes["Success"] + outcomes["Unknown"] == 24
    assert outcomes["Unknown"] <= 5 * kills  # what was under way
    for row in run.answers:
        assert row["state"] == "Unknown" or row["answer"] == ANSWERS[row["question"]]


def put_on_file(example: Example, *states: str, script: str | None = None) -> Path:
    """Make a results file with a request for each state: an outcome, or "cut-off"."""
    module = load(script or example.script)
    path: Path = example.folder / "results" / "mine.db"
    path.parent.mkdir()
    records = []
    for number, state in enumerate(states, start=1):
        record = module.new_record(f"req-{number:03}", "What do bees make?")
        records.append(record)
        record.state = {"cut-off": "Success", "Pending": "In Progress"}.get(state, state)
        if state in ("Success", "cut-off", "Pending"):
            generation = example.api.accept(record.request)
            example.api.generations[generation.id] = generation
            record.generation_id = generation.id
            if example.is_group:
                example.api.groups.setdefault("a-group", []).append(generation)
                record.group_id = "a-group"
            message = {"content": f"an answer to {record.custom_id}"}
            reason = "stop" if state == "Success" else "length"
            record.response = {"choices": [{"message": message, "finish_reason": reason}]}
    with module.Results(path) as results:
        results.add(records)
    return path


def test_resume_does_and_measures_what_is_left(example: Example) -> None:
    path = put_on_file(example, "Pending", *["Success"] * 300, "Not sent", "Unknown")
    example.edit(MODEL_ID="of-today")
    example.api.delay_seconds = 0.2
    run = example.run("--resume", str(path.with_suffix(".jsonl")))
    assert Counter(run.outcomes.values()) == {"Success": 302, "Unknown": 1}
    assert (run.code, calls(example.api, "POST")) == (1, 1)
    assert "Model: inference-net/load-test\n" in run.stdout  # that of its requests
    seconds, rate = re.findall(r"(?:wall-clock time|Throughput): +([\d.]+)", run.stdout)
    assert round(float(seconds) * float(rate)) == 2  # only what this run has answered


def test_a_second_process_at_a_file_in_use_is_refused(single: Example) -> None:
    gate = Gate("GET")
    first = start_at(gate, single)
    [path] = single.folder.glob("results/*.db")
    second = single.run("--resume", str(path))
    assert (second.code, second.stdout) == (2, "")
    assert re.search(rf"{path.name}.* in use", second.stderr)
    gate.opened.set()
    assert single.finish(first).code == 0


def execute(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("what", ["nothing", "a text", "earlier", "the other's", "read-only"])
def test_what_cannot_be_resumed_is_named_and_kept(example: Example, what: str) -> None:
    path = example.folder / "my run.db"
    if what == "a text":
        path.write_text("custom_id,state\n" * 500)
    elif what == "earlier":
        execute(path, "CREATE TABLE single_requests (custom_id, request, record)")
    elif what == "the other's":
        [other] = set(SCRIPTS) - {example.script}
        put_on_file(example, "Not sent", script=other).rename(path)
    elif what == "read-only":
        put_on_file(example, "Not sent").rename(path)
        Path(f"{path}-wal").mkdir()  # where SQLite writes first
    before = contents(example.folder)
    assert "my run.db" in example.refuse("--resume", "my run.db")
    assert contents(example.folder) == before


@pytest.mark.parametrize("arguments", [["--resume", ""], ["--retry", "failed"]])
def test_without_a_file_nothing_begins(single: Example, arguments: list[str]) -> None:
    run = single.run(*arguments)
    assert (run.code, run.stdout) == (2, "")
    assert "--resume" in run.stderr
    assert not (single.folder / "results").exists()
    assert not single.api.calls


@pytest.mark.parametrize(("kind", "row"), [("failed", 0), ("unknown", 1), ("cut-off", 2)])
def test_retry_asks_anew(example: Example, kind: str, row: int) -> None:
    # What is Pending has a part of its answer, with the finish_reason 'length'.
    path = put_on_file(example, "Failed", "Unknown", "cut-off", "Pending", "Success")
    example.edit(MAX_TOKENS=777)
    example.may_be_made = 2
    earlier = set(example.api.generations)
    run = example.run("--resume", str(path), "--retry", kind)
    [asked] = [each for id, each in example.api.generations.items() if id not in earlier]
    assert asked.custom_id == run.answers[row]["custom_id"]
    assert asked.request["max_tokens"] == 777
    outcomes = ["Failed", "Unknown", "Success", "Success", "Success"]
    outcomes[row] = "Success"
    assert list(run.outcomes.values()) == outcomes
    assert run.answers[row]["answer"] == "Bees make honey."
    assert run.answers[4]["answer"] == "an answer to req-005"


def test_an_answer_that_was_cut_off_stays_until_there_is_a_new_one(example: Example) -> None:
    path = put_on_file(example, "cut-off")
    example.may_be_made = 2
    example.api.choose_fault = faulty(status(402), polls=False)
    run = example.run("--resume", str(path), "--retry", "cut-off")
    assert [row["answer"] for row in run.answers] == ["an answer to req-001"]


def test_when_the_polls_are_used_up_the_command_shown_goes_on(example: Example) -> None:
    example.edit(MAX_POLL_ATTEMPTS=2, RESULTS_DIR="it's a folder; with spaces")
    example.api.choose_fault = faulty(status(404), polls=True)
    run = example.run()
    assert run.code == 1
    assert "MAX_POLL_ATTEMPTS" in run.stdout
    [command] = re.findall(r"^ *(uv run .*)$", run.stdout, re.M)
    example.api.choose_fault = lambda request, body: None
    command = command.replace("uv run", shlex.quote(sys.executable))
    done = subprocess.run(command, shell=True, cwd=example.folder, env=os.environ)
    assert done.returncode == 0
    assert len(example.api.generations) == 4


@pytest.mark.parametrize("is_sent", [False, True])
def test_a_full_disk_costs_no_id(example: Example, is_sent: bool) -> None:
    """Whether it is full at the save before the submission, or at the one after it."""
    path = put_on_file(example, *["Not sent"] * 4)
    key = "group_id" if example.is_group else "generation_id"
    execute(
        path,
        f"CREATE TRIGGER disk BEFORE UPDATE ON {load(example.script).TABLE} "
        f"WHEN (json_extract(new.record, '$.{key}') IS NOT NULL) = {is_sent} "
        "BEGIN SELECT RAISE(ABORT, 'the disk is full'); END",
    )
    run = example.run("--resume", str(path))
    assert run.code == 1
    assert "the disk is full" in run.stdout
    states = {each["state"] for each in run.records.values()}
    assert states <= ({"Unknown", "Not sent"} if is_sent else {"Not sent"})
    assert bool(given_out(example)) == is_sent
    assert ("Not complete: 4 not sent" in run.stdout) != is_sent
    assert all(each in run.stdout + run.stderr for each in given_out(example))


def test_answers_that_cannot_be_written_are_a_fault(example: Example) -> None:
    path = put_on_file(example, "Success")
    path.with_suffix(".tmp").mkdir()  # where the .jsonl is written first
    run = example.run("--resume", str(path))
    assert run.code == 1
    assert "Not complete" in run.stdout


@pytest.mark.parametrize(("lines", "method"), [(1, "POST"), (12, "GET")])
def test_a_reader_goes_away_quietly(example: Example, lines: int, method: str) -> None:
    gate = Gate(method)  # so that not all is printed before
    process = start_at(gate, example)
    assert process.stdout
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    gate.opened.set()
    run = example.finish(process)
    assert run.code == 1
    check_files(example, run)


def test_an_output_that_is_ascii_is_no_fault(single: Example) -> None:
    single.environment["PYTHONIOENCODING"] = "ascii"
    assert single.run().code == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_an_output_that_is_full_is_a_fault_and_all_is_on_file(single: Example) -> None:
    with open("/dev/full", "w") as full:
        run = single.run(stdout=full)
    assert run.code == 1
    check_files(single, run)
