"""What the tests share: the scripts as a user has them, run as processes against the local API."""

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
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_api import API_KEY, Fault, Json, LocalApi, web

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
        self.folder = folder
        self.api = api
        self.environment: dict[str, str | None] = dict(api.environment)
        self.may_be_made = (
            1  # how often a custom id may be made: more after --retry, or a new run
        )
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
            line = f"{name} = {value!r}"
            text, count = re.subn(rf"^{name} = .*$", lambda _, x=line: x, text, flags=re.M)
            assert count == 1, name
        path.write_text(text, "utf-8")

    def define(self, function: str) -> None:
        """Define a function in the place of the one of its name, as a user does."""
        path = self.folder / self.script
        text = path.read_text("utf-8")
        path.write_text(
            text.replace("# --- The API", f"{function}\n\n# --- The API", 1), "utf-8"
        )

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start the script, in a session of its own."""
        environment = {**os.environ, **self.environment}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(
            [sys.executable, self.script, *arguments],
            cwd=self.folder,
            env={name: value for name, value in environment.items() if value is not None},
            text=True,
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
        is_poll = request.method == "GET"
        if is_poll != polls or (only and only not in custom_ids(body)):
            return None
        seen[request.path + json.dumps(body)] += 1
        return fault if seen[request.path + json.dumps(body)] <= times else None

    return choose


__all__ = ["API_KEY", "GROUP", "SCRIPTS", "SINGLE", "TOP", "Example", "Run", "faulty", "load"]
