"""What the tests share: the scripts as a user has them, run as processes against the local API."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from local_api import Fault, Json, LocalApi, Proceed, close

TOP = Path(__file__).parent.parent
SINGLE, GROUP = "async_polling_example.py", "async_group_example.py"
SCRIPTS = (SINGLE, GROUP)
HANG_SECONDS = 60


@dataclasses.dataclass
class Run:
    """What a run of a script left behind."""

    code: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def path(self) -> Path:
        """The newest results file."""
        return max((self.folder / "results").glob("*.db"))

    @property
    def answers(self) -> list[Json]:
        """The lines of the .jsonl file: each of them must be JSON as every reader has it."""
        lines = self.path.with_suffix(".jsonl").read_text("ascii").split("\n")
        assert lines.pop() == ""
        return [json.loads(line, parse_constant=pytest.fail) for line in lines]

    @property
    def records(self) -> dict[str, Json]:
        """The records on file by custom id, as they were left, even by a kill."""
        return {record["custom_id"]: record for record in read_results(self.path)}

    @property
    def outcomes(self) -> dict[str, str]:
        """The outcome of each custom id, from the .jsonl file."""
        return {row["custom_id"]: row["state"] for row in self.answers}


def read_results(path: Path) -> list[Json]:
    """Read the records of a results file without the script."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        names = [name for [name] in tables]
        if not names:  # killed while it was made
            return []
        rows = connection.execute(f"SELECT record FROM {names[0]} ORDER BY rowid")
        return [json.loads(text) for [text] in rows]


class Example:
    """A copy of one of the scripts in a folder of its own, to be edited and run there."""

    def __init__(self, script: str, folder: Path, api: LocalApi) -> None:
        self.script = script
        self.is_group = script == GROUP
        self.folder = folder
        self.api = api
        self.environment: dict[str, str | None] = dict(api.environment)
        self.may_be_made = 1  # how often a custom id may be made: after --retry, more often
        shutil.copy(TOP / script, folder / script)
        self.edit(NUM_REQUESTS=4, POLL_INTERVAL_SECONDS=0.05, MAX_POLL_ATTEMPTS=40)
        self.edit(REQUEST_TIMEOUT_SECONDS=9)

    def edit(self, **constants: Any) -> None:
        """Edit constants as a user does: the line at the top of the script."""
        path = self.folder / self.script
        lines = path.read_text("utf-8").split("\n")
        for name, value in constants.items():
            [index] = [n for n, line in enumerate(lines) if line.startswith(f"{name} = ")]
            lines[index] = f"{name} = {value!r}"
        path.write_text("\n".join(lines), "utf-8")

    def group_by(self, size: int) -> None:
        """Let the group script send groups of this size; the other one stays as it is."""
        if self.is_group:
            self.edit(MAX_GROUP_SIZE=size)

    def define(self, function: str) -> None:
        """Define a function in the place of the one of its name, as a user does."""
        path = self.folder / self.script
        above, mark, below = path.read_text("utf-8").partition("# --- The API")
        path.write_text(f"{above}{function}\n\n{mark}{below}", "utf-8")

    def ask(self, questions: dict[str, str]) -> None:
        """Define load_questions, with these questions by custom id."""
        self.define(f"def load_questions():\n    return {questions!a}")

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start the script, in a session of its own."""
        environment = {**os.environ, **self.environment}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(
            [sys.executable, self.script, *arguments],
            cwd=self.folder,
            env={name: value for name, value in environment.items() if value is not None},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            **options,
        )

    def finish(self, process: subprocess.Popen[str]) -> Run:
        """Wait for the end, and check what holds at every end."""
        try:
            stdout, stderr = process.communicate(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        run = Run(process.returncode, stdout or "", stderr or "", self.folder)
        shown = run.stdout + run.stderr
        assert "Traceback" not in shown, shown
        assert "Exception ignored" not in shown, shown
        key = (self.environment["INFERENCE_API_KEY"] or "").strip()
        kept = [path for path in self.folder.glob("results/*") if path.is_file()]
        assert not key or key not in shown
        assert not any(key and key.encode() in path.read_bytes() for path in kept)
        made = Counter(generation.custom_id for generation in self.api.generations.values())
        assert all(count <= self.may_be_made for count in made.values()), made
        return run

    def run(self, *arguments: str, **options: Any) -> Run:
        """Run the script to its end."""
        return self.finish(self.start(*arguments, **options))

    def refuse(self, *arguments: str) -> str:
        """Run the script with a mistake, so nothing is sent; return the line that names it."""
        run = self.run(*arguments)
        assert (run.code, run.stdout, self.api.calls) == (2, "", [])
        assert not list(self.folder.glob("results/*"))
        [line] = run.stderr.splitlines()
        program, message = line.split(": ", 1)
        assert program == self.script
        return message


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalApi]:
    """The local API, with generations that are done at once."""
    with LocalApi(seconds=(0, 0)) as local_api:
        for name, value in local_api.environment.items():  # for programs in this process
            monkeypatch.setenv(name, value)
        yield local_api


@pytest.fixture(params=SCRIPTS)
def example(request: pytest.FixtureRequest, tmp_path: Path, api: LocalApi) -> Example:
    """Each of the two scripts."""
    return Example(request.param, tmp_path, api)


@pytest.fixture
def single(tmp_path: Path, api: LocalApi) -> Example:
    """The script that submits one by one."""
    return Example(SINGLE, tmp_path, api)


@pytest.fixture
def group(tmp_path: Path, api: LocalApi) -> Example:
    """The script that submits groups."""
    return Example(GROUP, tmp_path, api)


def load(script: str, folder: Path = TOP, **constants: Any) -> types.ModuleType:
    """Import a script, which does nothing but define, and edit constants; each call anew."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, folder / script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for name, value in constants.items():
        assert hasattr(module, name), name
        setattr(module, name, value)
    return module


def calls(api: LocalApi, method: str) -> int:
    """How many calls of a method have reached the API."""
    return [called for called, _ in api.calls].count(method)


def custom_ids(body: Json) -> list[str]:
    """The custom ids in a submission."""
    return [each["metadata"]["custom_id"] for each in body.get("requests", [body])]


def faulty(
    fault: Fault, polls: bool, times: float = float("inf")
) -> Callable[[web.Request, Json], Fault | None]:
    """Return a choose_fault: fault for so many polls, or submissions, of each request."""
    seen: Counter[str] = Counter()

    def choose(request: web.Request, body: Json) -> Fault | None:
        if (request.method == "GET") != polls:
            return None
        seen[request.path + json.dumps(body)] += 1
        return fault if seen[request.path + json.dumps(body)] <= times else None

    return choose


class Gate:
    """Holds the calls of a method until it is opened; arrived is set when count are held."""

    def __init__(self, method: str, count: int = 1) -> None:
        self.method, self.count = method, count
        self.arrived, self.opened = threading.Event(), threading.Event()

    def __call__(self, request: web.Request, body: Json) -> Fault | None:
        """Hold a call, if it is of the method."""
        return self.hold if request.method == self.method else None

    async def hold(self, request: web.Request, proceed: Proceed) -> web.StreamResponse:
        """Carry out the call when the gate is open."""
        self.count -= 1
        if self.count == 0:
            self.arrived.set()
        while not self.opened.is_set():
            await asyncio.sleep(0.01)
        return await proceed()


class Striker:
    """Sends a signal to a process at one of its calls, which is carried out first or not."""

    def __init__(self, signal: int, methods: str, number: int, is_carried_out: bool) -> None:
        self.signal = signal
        self.methods = methods
        self.calls_left = number
        self.is_carried_out = is_carried_out
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, request: web.Request, body: Json) -> Fault | None:
        """Count a call. Those of a process that was killed before do not count."""
        if self.process and request.method in self.methods:
            self.calls_left -= 1
        return self.strike if self.calls_left == 0 else None

    async def strike(self, request: web.Request, proceed: Proceed) -> web.StreamResponse:
        """Send the signal."""
        self.calls_left = -1
        answer = await proceed() if self.is_carried_out else None
        assert self.process
        self.process.send_signal(self.signal)
        if self.signal == 9:
            return await close(request, proceed)
        return answer or await proceed()


def start_at(gate: Gate, example: Example) -> subprocess.Popen[str]:
    """Start the script, and return when the gate holds what it is to hold."""
    example.api.choose_fault = gate
    process = example.start()
    assert gate.arrived.wait(HANG_SECONDS), process.poll()
    return process
