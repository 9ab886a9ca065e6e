"""Ends before the end, and coming back later: Ctrl-C, kills, a full disk, --resume."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import Example, Run, faulty
from local_api import Fault, Json, after, stall, status, web

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


class Gate:
    """Notices when something arrives at the API, and holds it there until it is opened."""

    def __init__(self, method: str, count: int = 1, then: Fault | None = None) -> None:
        self.method, self.count, self.then = method, count, then
        self.arrived = threading.Event()

    def __call__(self, request: web.Request, body: Json) -> Fault | None:
        if request.method != self.method:
            return None
        self.count -= 1
        if self.count == 0:
            self.arrived.set()
        return self.then if self.count <= 0 else None


def interrupt(example: Example, gate: Gate, *arguments: str) -> Run:
    """Run it until something has come to the gate, and press Ctrl-C."""
    example.api.choose_fault = gate
    process = example.start(*arguments)
    assert gate.arrived.wait(30)
    process.send_signal(signal.SIGINT)
    run = example.finish(process)
    assert run.code == 130, run.stderr
    assert run.stderr == ""
    assert "SUMMARY" in run.stdout
    example.api.choose_fault = lambda request, body: None
    return run


def test_ctrl_c_in_a_submission_that_stalls(example: Example) -> None:
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    run = interrupt(example, Gate("POST", then=stall))
    assert set(run.states.values()) <= {"Unknown", "Success", "Queued"}
    assert "Unknown" in run.states.values()


def test_ctrl_c_keeps_the_ids_that_arrive_after_it(example: Example) -> None:
    example.edit(NUM_REQUESTS=20, REQUEST_TIMEOUT_SECONDS=3600)
    example.api.delay_seconds = 1
    process = example.start()
    while not example.api.exchanges:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    run = example.finish(process)
    assert run.code == 130
    states = Counter(run.states.values())
    if example.script.startswith("async_polling"):
        assert states["Queued"] >= 1
        assert states["Queued"] + states["Not sent"] == 20
    else:
        assert states == {"Queued": 20}
    assert len(example.api.generations) == states["Queued"]
    example.api.delay_seconds = 0
    resumed = example.run("--resume")
    assert Counter(resumed.states.values())["Success"] == states["Queued"]
    assert len(example.api.generations) == states["Queued"]


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
    gate = Gate("POST", then=stall)
    example.api.choose_fault = gate
    process = example.start()
    assert gate.arrived.wait(30)
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
    run = example.finish(process)
    assert run.code in (130, -signal.SIGINT)
    assert {row["state"] for row in run.rows} >= {"Submitting"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_in_a_submission_leaves_it_unknown(single: Example, number: int) -> None:
    single.edit(NUM_REQUESTS=10, MAX_CONCURRENT_POLLS=1, REQUEST_TIMEOUT_SECONDS=3600)
    gate = Gate("POST", count=4, then=after(stall))
    single.api.choose_fault = gate
    process = single.start()
    assert gate.arrived.wait(30)
    process.send_signal(number)
    run = single.finish(process)
    assert run.code == -number
    assert list(run.states.values()) == ["Queued", "Queued", "Queued", "Submitting"]
    single.api.choose_fault = lambda request, body: None
    resumed = single.run("--resume")
    assert resumed.code == 1
    assert "Successful:     3" in resumed.stdout
    assert "Unknown:        1" in resumed.stdout
    assert "Total:          4" in resumed.stdout
    assert len(single.api.generations) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_while_polling_loses_nothing(example: Example, number: int) -> None:
    gate = Gate("GET", count=3, then=stall)
    if not example.script.startswith("async_polling"):
        gate.count = 1
    example.edit(REQUEST_TIMEOUT_SECONDS=3600)
    example.api.choose_fault = gate
    process = example.start()
    assert gate.arrived.wait(30)
    process.send_signal(number)
    assert example.finish(process).code == -number
    example.api.choose_fault = lambda request, body: None
    assert example.run("--resume").code == 0
    assert len(example.api.generations) == 4


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
    resumed = group.run("--resume", str(run.results))
    assert resumed.code == 1
    assert "Unknown:        4" in resumed.stdout
    assert run.results.read_bytes() == before
    assert len(group.api.exchanges) == 1


def unfinished(example: Example) -> Path:
    """Return the results file of a run that has everything still to come."""
    example.edit(MAX_POLL_ATTEMPTS=1)
    example.api.choose_fault = faulty(status(404), polls=True)
    run = example.run()
    example.api.choose_fault = lambda request, body: None
    assert set(run.states.values()) == {"Queued"}
    return run.results


@pytest.mark.parametrize("torn", [b"{", b'{"custom_id": "req-001", "qu', b"\xff\x00", b"null"])
def test_a_torn_last_line_is_cut_off(example: Example, torn: bytes) -> None:
    path = unfinished(example)
    path.write_bytes(path.read_bytes() + torn)
    run = example.run("--resume", str(path))
    assert run.code == 0
    assert set(run.states.values()) == {"Success"}


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


def test_with_nothing_unfinished_nothing_is_sent(example: Example) -> None:
    run = example.run()
    before = run.results.read_bytes()
    sent = len(example.api.exchanges)
    resumed = example.run("--resume", str(run.results))
    assert resumed.code == 0
    assert "Successful:     4" in resumed.stdout
    assert len(example.api.exchanges) == sent
    assert run.results.read_bytes() == before
    none = example.run("--resume")
    assert none.code == 2
    assert "nothing unfinished" in none.stderr


def test_resume_takes_the_newest_with_something_unfinished(example: Example) -> None:
    older, newer = unfinished(example), unfinished(example)
    finished = example.run()
    (finished.results.parent / "async-zzz.jsonl").write_text("not ours")
    finished.results.with_name(f"{newer.stem}x.jsonl").write_text("not ours")
    assert example.run("--resume").code == 0
    states = {json.loads(line)["state"] for line in newer.read_text().splitlines()}
    assert "Success" in states
    assert "Success" not in older.read_text()


OTHER_FILES: dict[str, Any] = {
    "missing": None,
    "empty": b"",
    "only a torn line": b'{"custom_id": "req-001"',
    "binary": bytes(range(256)) * 10,
    "text": b"hello\nworld\n",
    "other JSON Lines": b'{"a": 1}\n{"a": 2}\n',
    "a JSON list": b"[]\n",
    "numbers": b"1\n2\n",
    "nested too deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_no_other_file_is_resumed(example: Example, content: bytes | None) -> None:
    path = example.folder / "other.jsonl"
    if content is not None:
        path.write_bytes(content)
    run = example.run("--resume", str(path))
    assert run.code == 2
    assert "other.jsonl" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert path.exists() == (content is not None)
    assert content is None or path.read_bytes() == content
    assert not example.api.exchanges


def test_the_other_scripts_file_and_a_folder_are_not_resumed(
    single: Example, tmp_path: Path
) -> None:
    (tmp_path / "group").mkdir()
    group = Example("async_group_example.py", tmp_path / "group", single.api)
    ours = unfinished(group)
    before = ours.read_bytes()
    for path in (ours, ours.parent):
        assert single.run("--resume", str(path)).code == 2
    theirs = unfinished(single)
    assert group.run("--resume", str(theirs)).code == 2
    assert ours.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("custom_id", 1),
        ("generation_id", "../../etc"),
        ("generation_id", ""),
        ("state", None),
        ("prompt_tokens", "many"),
        ("total_tokens", 10**400),
        ("duration_ms", -1),
        ("surplus", 1),
    ],
)
def test_a_file_with_a_row_that_can_not_be_ours_is_left_alone(
    single: Example, name: str, value: Any
) -> None:
    path = unfinished(single)
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {name: value}), *rest, ""]))
    before = path.read_bytes()
    run = single.run("--resume", str(path))
    if (name, value) == ("generation_id", ""):
        assert run.code == 0
        return
    assert run.code == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [0, 100, 700, 1500, 2500])
def test_a_disk_that_fills_up(single: Example, size: int) -> None:
    single.edit(NUM_REQUESTS=20)
    run = single.run(file_limit=size)
    assert run.code == 1
    assert "Stopped: " in run.stdout
    assert "SUMMARY" in run.stdout
    recorded = {row["custom_id"] for row in run.rows}
    accepted = {generation.custom_id for generation in single.api.generations.values()}
    assert accepted <= recorded  # what can't be recorded is not sent
    for generation in single.api.generations.values():  # what is known is shown
        assert generation.id in run.stdout or f"{generation.custom_id}    ✓" in run.stdout
    if recorded:
        resumed = single.run("--resume", str(run.results))
        assert resumed.code == 1
        assert len(single.api.generations) == len(accepted)


def test_a_full_disk_of_a_group(group: Example) -> None:
    full = group.run(file_limit=0)
    assert full.code == 1
    assert not group.api.exchanges
    # Room for the rows of the submission, and for no more.
    submitted = [row for row in group.run().rows if row["state"] == "Submitting"]
    size = sum(len(json.dumps(row)) + 1 for row in submitted)
    run = group.run(file_limit=size + 100)
    assert run.code == 1
    assert set(run.states.values()) == {"Submitting"}
    assert list(group.api.groups)[-1] in run.stdout
    assert "--resume" not in run.stdout
    assert "keep the ids above" in run.stdout


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


@pytest.mark.parametrize("lines", [1, 12, 25])
def test_a_reader_that_goes_away_ends_it_quietly(example: Example, lines: int) -> None:
    example.edit(NUM_REQUESTS=30)
    process = example.start()
    assert process.stdout
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    run = example.finish(process)
    assert run.stderr == ""
    accepted = {generation.custom_id for generation in example.api.generations.values()}
    kept = {row["custom_id"] for row in run.rows if row["generation_id"] or row.get("group_id")}
    assert kept == accepted


def test_an_output_that_is_full(example: Example) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        run = example.run(stdout=full)
    assert run.code == 1
    assert "No space left" in run.stderr
