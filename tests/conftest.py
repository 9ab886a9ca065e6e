"""What the tests share: the examples as a user has them, run as processes against the local API."""

import atexit
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from local_api import API_KEY, Fault, Json, LocalApi, web

TOP = Path(__file__).parent.parent
SINGLE, GROUP = "async_polling_example.py", "async_group_example.py"
SCRIPTS = (SINGLE, GROUP)
HANG_SECONDS = 60

# Hundreds of processes are started: without bytecode, half of their time goes into compiling.
if (
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    and "PYTHONPYCACHEPREFIX" not in os.environ
):
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)


@dataclasses.dataclass
class Run:
    """What a run left behind."""

    code: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def results(self) -> Path:
        """The newest results file, which the script resumes."""
        return max((self.folder / "results").glob("*.db"))

    @property
    def answers(self) -> list[Json]:
        """The lines of the .jsonl file, which users go on with: each of them must be JSON."""
        text = self.results.with_suffix(".jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def rows(self) -> list[Json]:
        """The records on file, as they were left, even by a kill."""
        return read_results(self.results)

    @property
    def final(self) -> dict[str, Json]:
        """The record of each custom id."""
        return {row["custom_id"]: row for row in self.rows}

    @property
    def states(self) -> dict[str, str]:
        """The state of each custom id."""
        return {custom_id: row["state"] for custom_id, row in self.final.items()}


def read_results(path: Path) -> list[Json]:
    """Read the records of a results file without the script."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
        ).fetchall()
        if not tables:  # killed while it was made
            return []
        rows = connection.execute(
            f"SELECT record FROM {tables[0][0]} ORDER BY rowid"
        ).fetchall()
    return [json.loads(text) for [text] in rows]


class Example:
    """A copy of one of the scripts in a folder of its own, to be edited and run there."""

    def __init__(self, script: str, folder: Path, api: LocalApi) -> None:
        self.script = script
        self.folder = folder
        self.api = api
        self.environment = api.environment
        shutil.copy(TOP / script, folder / script)
        self.edit(NUM_REQUESTS=4, POLL_INTERVAL_SECONDS=0.05, MAX_POLL_ATTEMPTS=40)
        self.edit(REQUEST_TIMEOUT_SECONDS=1)

    @property
    def submissions(self) -> int:
        """How many submissions have reached the API."""
        return sum(method == "POST" for method, _ in self.api.calls)

    def edit(self, **constants: Any) -> None:
        """Edit constants as a user does: the line at the top of the script."""
        path = self.folder / self.script
        text = path.read_text("utf-8")
        for name, value in constants.items():
            text, count = re.subn(
                rf"^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", text, flags=re.M
            )
            assert count == 1, name
        path.write_text(text, "utf-8")

    def replace(self, old: str, new: str) -> None:
        """Edit a line further down, as a user does: old occurs once, and becomes new."""
        path = self.folder / self.script
        text = path.read_text("utf-8")
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new), "utf-8")

    def start(
        self, *arguments: str, file_limit: int | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start the script, in a session of its own; no file of its may exceed file_limit bytes."""

        def limit() -> None:
            import resource  # not on Windows

            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        self.api.new_runs += "--resume" not in arguments
        environment = {**os.environ, **self.environment}
        if file_limit is not None:  # or it would leave bytecode that is cut off
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(
            [sys.executable, self.script, *arguments],
            cwd=self.folder,
            env={name: value for name, value in environment.items() if value is not None},
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=None if file_limit is None else limit,
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
        key = (self.environment["INFERENCE_API_KEY"] or "").strip().encode()
        kept = [path.read_bytes() for path in self.folder.glob("results/*") if path.is_file()]
        for content in (shown.encode(errors="replace"), *kept):
            assert not key or key not in content
        made = Counter(generation.custom_id for generation in self.api.generations.values())
        assert all(count <= self.api.new_runs for count in made.values())
        return run

    def run(self, *arguments: str, **options: Any) -> Run:
        """Run the script to its end."""
        return self.finish(self.start(*arguments, **options))


@pytest.fixture
def api() -> Iterator[LocalApi]:
    """The local API, with generations that are done at once."""
    with LocalApi(seconds=(0, 0)) as local_api:
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
    """The script that submits a group."""
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


def is_submission(request: web.Request) -> bool:
    """Tell a submission from a poll."""
    return request.method == "POST"


def custom_ids(body: Json) -> list[str]:
    """The custom ids in a submission."""
    return [each["metadata"]["custom_id"] for each in body.get("requests", [body])]


def faulty(
    fault: Fault, polls: bool, times: float = float("inf"), only: str | None = None
) -> Callable[[web.Request, Json], Fault | None]:
    """Return a choose_fault: fault for the first polls, or submissions, of each thing.

    times is how often for each; only restricts it to the submissions with that custom id.
    """
    seen: Counter[str] = Counter()

    def choose(request: web.Request, body: Json) -> Fault | None:
        if is_submission(request) == polls or (only and only not in custom_ids(body)):
            return None
        seen[request.path + json.dumps(body)] += 1
        return fault if seen[request.path + json.dumps(body)] <= times else None

    return choose


def one_each(
    api: LocalApi, faults: list[Fault], polls: bool, times: float = float("inf")
) -> Callable[[web.Request, Json], Fault | None]:
    """Return a choose_fault for the single script: the fault of req-001 is the first, and so on."""
    seen: Counter[int] = Counter()

    def choose(request: web.Request, body: Json) -> Fault | None:
        if is_submission(request) == polls:
            return None
        custom_id = (
            api.generations[request.path.rpartition("/")[2]].custom_id if polls else None
        )
        number = int((custom_id or body["metadata"]["custom_id"]).removeprefix("req-")) - 1
        seen[number] += 1
        return faults[number] if seen[number] <= times else None

    return choose


def in_turn(faults: list[Fault]) -> Callable[[web.Request, Json], Fault | None]:
    """Return a choose_fault for the group script: each poll meets the next fault, then no more."""
    left = iter(faults)
    return lambda request, body: None if is_submission(request) else next(left, None)


__all__ = [
    "API_KEY",
    "GROUP",
    "SCRIPTS",
    "SINGLE",
    "TOP",
    "Example",
    "Run",
    "faulty",
    "in_turn",
    "load",
    "one_each",
    "read_results",
]

hypothesis.settings.register_profile(
    "quick",
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # it goes by the clock
)
hypothesis.settings.load_profile("quick")
