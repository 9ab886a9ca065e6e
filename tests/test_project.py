"""What the project promises: one text in two scripts, parts that can be copied, a true README."""

import ast
import builtins
import inspect
import json
import math
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import API_KEY, GROUP, SCRIPTS, SINGLE, TOP, Example, Run, faulty
from local_api import LocalApi, reset, status

README = (TOP / "README.md").read_text("utf-8")
PARTS = [
    *("# --- Configuration", "# --- The API", "# --- The record", "# --- The work"),
    *("# --- The screen", "# --- The script"),
]


def source(script: str) -> str:
    """Return the text of a script."""
    return (TOP / script).read_text("utf-8")


def story(script: str) -> str:
    """Return what stands above the screen."""
    return source(script).partition("# --- The screen")[0]


def api_part(script: str) -> str:
    """Return the imports and the part on the API: the two pieces that the README names."""
    text = source(script)
    imports, part = text.partition("# --- Configuration")[0], text.partition("# --- The API")[2]
    return f"{imports}# --- The API{part.partition('# --- The record')[0]}"


# Two scripts, one text

# What the scripts define differently, as the two APIs differ in it ...
DIFFERENT = {
    *("NUM_REQUESTS", "POLL_INTERVAL_SECONDS", "MAX_POLL_ATTEMPTS"),  # configuration
    *("Record", "Save", "submit_all", "submit", "poll_all", "poll", "hold_back"),  # the work
    "MARKS",  # the screen
    *("PREFIX", "check_configuration", "run", "main"),  # the script
}
# ... and what only one of them has.
ONLY_SINGLE = {
    *("import queue", "from collections import defaultdict", "from collections import deque"),
    *("MAX_CONCURRENT_POLLS", "submit_generation", "fetch_generation"),
    *("sessions", "hold_lock", "check_stall", "show_submission"),
}
ONLY_GROUP = {
    *("submit_group", "fetch_group", "NO_MATCH", "session", "mark", "match", "wait_for"),
}


def named(node: ast.stmt) -> list[str]:
    """Return the names that a statement at the top of a script defines."""
    if isinstance(node, ast.ImportFrom):
        return [f"from {node.module} import {ast.unparse(each)}" for each in node.names]
    if isinstance(node, ast.Import):
        return [f"import {ast.unparse(each)}" for each in node.names]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    stored = [each for target in targets if target for each in ast.walk(target)]
    return [each.id for each in stored if isinstance(each, ast.Name)]


def first_line(node: ast.stmt) -> int:
    """Return the line on which a definition begins, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min(each.lineno for each in [node, *decorators])


def definitions(script: str) -> dict[str, str]:
    """Return the lines of all that a script defines, by name, in its order."""
    lines = source(script).splitlines()
    found: dict[str, str] = {}
    for node in ast.parse(source(script)).body:
        text = "\n".join(lines[first_line(node) - 1 : node.end_lineno])
        for name in named(node):
            found[name] = name if "import " in name else text
    return found


def test_what_both_scripts_need_is_the_same_text_in_both() -> None:
    single, group = definitions(SINGLE), definitions(GROUP)
    assert single.keys() - group.keys() == ONLY_SINGLE
    assert group.keys() - single.keys() == ONLY_GROUP
    shared = [name for name in single if name in group]
    assert shared == [name for name in group if name in single]
    assert {name for name in shared if single[name] != group[name]} == DIFFERENT


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_parts_come_in_order_under_their_comment_lines(script: str) -> None:
    marks = re.findall(r"^# --- .*$", source(script), re.M)
    assert len(marks) == len(PARTS)
    assert all(mark.startswith(part) for mark, part in zip(marks, PARTS, strict=True))


def test_the_comment_lines_of_the_scripts_do_not_drift() -> None:
    single, group = (set(re.findall(r"^ *# .*$", source(script), re.M)) for script in SCRIPTS)
    # What one of them has alone: the work for many, and what is said of one record or of several.
    assert len(single - group) == 3
    assert len(group - single) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_executed_and_needs_one_package(script: str) -> None:
    lines = source(script).splitlines()
    assert lines[0] == "#!/usr/bin/env -S uv run --script"
    assert lines[1:5] == [
        *("# /// script", '# requires-python = ">=3.10"'),
        *('# dependencies = ["requests"]', "# ///"),
    ]
    if os.name == "posix":
        assert (TOP / script).stat().st_mode & stat.S_IXUSR


# Sizes

MOST_LINES = {"the story": 440, "the script": 680, "submit many and poll them": 320}


def needed(script: str, *names: str) -> set[ast.stmt]:
    """Return the definitions, imports left out, that these ones use, and those that they use."""
    tree = ast.parse(source(script))
    homes = {
        name: node
        for node in tree.body
        if not isinstance(node, (ast.Import, ast.ImportFrom))
        for name in named(node)
    }
    found: set[ast.stmt] = set()
    left = list(names)
    while left:
        node = homes[left.pop()]
        if node not in found:
            found.add(node)
            used = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
            left += [name for name in used if name in homes]
    return found


@pytest.mark.parametrize("what", MOST_LINES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_read_in_ten_minutes(script: str, what: str) -> None:
    work = needed(script, "submit_all", "poll_all")
    lines = {
        "the story": story(script).count("\n"),
        "the script": source(script).count("\n"),
        "submit many and poll them": sum(
            (node.end_lineno or 0) - first_line(node) + 1 for node in work
        ),
    }
    assert lines[what] <= MOST_LINES[what]


def test_the_group_script_is_not_the_longer_one() -> None:
    for part in (story, source):
        assert part(GROUP).count("\n") <= part(SINGLE).count("\n")


# Copying


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("piece", [story, api_part])
def test_what_is_copied_uses_nothing_else(script: str, piece: Callable[[str], str]) -> None:
    tree = ast.parse(piece(script))
    known = {*dir(builtins), "__name__"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= {(each.asname or each.name).partition(".")[0] for each in node.names}
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            known.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert used <= known
    below = ast.parse(source(script)[len(story(script)) :])
    assert not used & {name for node in below.body for name in named(node)}


@pytest.fixture
def environment(api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead this process to the local API."""
    for name, value in api.environment.items():
        monkeypatch.setenv(name, value)


def copied(piece: str) -> dict[str, Any]:
    """Run a piece of a script in a namespace that was empty, and return what is in it then."""
    namespace: dict[str, Any] = {}
    exec(compile(piece, "copied", "exec"), namespace)
    return namespace


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_story_works_when_it_is_copied_alone(script: str, api: LocalApi) -> None:
    part = copied(re.sub(r"^(POLL_INTERVAL_SECONDS) = .*", r"\1 = 0.1", story(script), flags=re.M))
    records = [part["Record"]("my-1", "What is 2 + 2?"), part["Record"]("my-2", "Why?")]
    saved: list[Any] = []
    with ThreadPoolExecutor(5) as pool:
        submitted = list(part["submit_all"](pool, records, saved.extend))
        assert [record.outcome for record in records] == ["Pending", "Pending"]
        final = list(part["poll_all"](pool, records, saved.extend))
    if script == GROUP:
        submitted, final = list(chain(*submitted)), list(chain(*final))
    assert submitted == records
    assert sorted(record.custom_id for record in final) == ["my-1", "my-2"]
    assert [record.response for record in records] == ["2 + 2 equals 4.", "You asked: Why?"]
    assert [record.outcome for record in records] == ["Success", "Success"]
    assert {each.custom_id: each for each in saved} == {"my-1": records[0], "my-2": records[1]}
    assert api.made_again() == 0


ENDS = {"LockedOut": status(402, "no credit"), "NotAccepted": status(429), "OSError": None}


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("end", ENDS)
def test_what_ends_the_submitting_is_raised_after_the_last_record(
    script: str, end: str, api: LocalApi
) -> None:
    part = copied(re.sub(r"^(MAX_SUBMIT_ATTEMPTS) = .*", r"\1 = 1", story(script), flags=re.M))
    records = [part["Record"](f"my-{number}", "Why?") for number in range(3)]
    api.choose_fault = lambda request, body: ENDS[end]
    submitted: list[Any] = []

    def save(rows: list[Any]) -> None:
        if end == "OSError":
            raise OSError("no room")

    with ThreadPoolExecutor(1) as pool, pytest.raises(part.get(end, OSError)):  # noqa: PT012
        for each in part["submit_all"](pool, records, save):
            submitted.append(each)
    assert submitted == (records if script == SINGLE else [records])
    assert [record.outcome for record in records] == ["Not sent"] * 3
    assert len(api.calls) == (0 if end == "OSError" else 1)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_answer_that_cannot_be_saved_stays_pending(script: str, api: LocalApi) -> None:
    part = copied(story(script))
    records = [part["Record"]("my-1", "Why?")]

    def fail(rows: list[Any]) -> None:
        raise OSError("no room")

    with ThreadPoolExecutor(1) as pool:
        list(part["submit_all"](pool, records, list))
        with pytest.raises(OSError, match="no room"):
            list(part["poll_all"](pool, records, fail))
        assert [record.outcome for record in records] == ["Pending"]
        list(part["poll_all"](pool, records, list))
    assert [record.outcome for record in records] == ["Success"]


CHAT = {"model": "any", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}


@pytest.mark.usefixtures("environment")
def test_the_api_part_works_when_it_is_copied_alone(api: LocalApi) -> None:
    single, group = copied(api_part(SINGLE)), copied(api_part(GROUP))
    with requests.Session() as session:
        generation_id = single["submit_generation"](session, CHAT, 5)
        generation = single["fetch_generation"](session, generation_id, 5)
        assert generation["response"]["choices"][0]["message"]["content"] == "2 + 2 equals 4."
        group_id = group["submit_group"](session, [CHAT, CHAT], 5)
        members = group["fetch_group"](session, group_id, 5)
    assert [member["state"] for member in members]
    assert {member["state"] for member in members} == {"Success"}
    assert len(api.connections) == 1


ENDPOINTS = [
    (SINGLE, "submit_generation", ["session", "request", "timeout_seconds"]),
    (SINGLE, "fetch_generation", ["session", "generation_id", "timeout_seconds"]),
    (GROUP, "submit_group", ["session", "requests", "timeout_seconds"]),
    (GROUP, "fetch_group", ["session", "group_id", "timeout_seconds"]),
]


@pytest.mark.parametrize(("script", "name", "parameters"), ENDPOINTS)
def test_the_endpoints_keep_their_signatures(script: str, name: str, parameters: list[str]) -> None:
    function = copied(api_part(script))[name]
    assert list(inspect.signature(function).parameters) == parameters


ENDINGS = [
    (status(400), "Refused", 0),
    (status(302), "Refused", 0),
    (status(401), "LockedOut", 0),
    (status(402), "LockedOut", 0),
    (status(429, Retry_After="7"), "NotAccepted", 7),
    (status(429, Retry_After="121"), "LockedOut", None),
    (status(503, Retry_After="7"), "Uncertain", 7),
    (status(503), "Uncertain", 0),
    (status(500, Retry_After="7"), "Uncertain", 7),
    (reset, "Uncertain", 0),
]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("fault", "ending", "retry_after_seconds"), ENDINGS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_exchange_that_fails_ends_in_one_of_four_ways(
    script: str, api: LocalApi, fault: Any, ending: str, retry_after_seconds: float | None
) -> None:
    part = copied(api_part(script))
    api.choose_fault = lambda request, sent: fault
    submit = part["submit_generation"] if script == SINGLE else part["submit_group"]
    with requests.Session() as session, pytest.raises(part["ApiError"]) as caught:
        submit(session, CHAT if script == SINGLE else [CHAT], 5)
    assert type(caught.value) is part[ending]
    assert issubclass(part[ending], part["ApiError"])
    if retry_after_seconds is not None:
        assert caught.value.retry_after_seconds == retry_after_seconds
    assert API_KEY not in str(caught.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script: str, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(TOP)!r}); import {Path(script).stem}"
    options: Any = {"cwd": tmp_path, "capture_output": True, "env": {**os.environ, "PATH": ""}}
    options["env"].pop("INFERENCE_API_KEY", None)
    done = subprocess.run([sys.executable, "-B", "-c", code], check=True, **options)
    assert done.stdout == done.stderr == b""
    assert not list(tmp_path.iterdir())


# The local API


@pytest.mark.parametrize("flags", [[], ["--flaky"]])
def test_the_local_api_runs_a_command(single: Example, flags: list[str]) -> None:
    single.edit(NUM_REQUESTS=10, MAX_POLL_ATTEMPTS=120, POLL_INTERVAL_SECONDS=0.2)
    local_api = str(TOP / "tests" / "local_api.py")
    command = [sys.executable, local_api, *flags, sys.executable, single.script]
    done = subprocess.run(command, cwd=single.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Successful:    10" in done.stdout
    assert "stand-in" in done.stderr
    assert "accepted 10 generations, answered 10, made 0 twice" in done.stderr
    failing = [sys.executable, local_api, sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(failing, capture_output=True, check=False).returncode == 7


CHECKED: list[tuple[Callable[[Any], Any], str]] = [
    (lambda chat: chat | {"metadata": {"number": 1}}, "metadata"),
    (lambda chat: chat | {"messages": []}, "messages"),
    (lambda chat: chat | {"model": ""}, "model"),
    (lambda chat: chat | {"surprise": 1}, "surprise"),
    (lambda chat: {"requests": [chat] * 51}, "1 to 50"),
    (lambda chat: {"requests": []}, "1 to 50"),
    (lambda chat: {"requests": [chat], "model": "any"}, "model"),
    (lambda chat: {"requests": [chat | {"messages": None}]}, "messages"),
]


@pytest.mark.parametrize(("change", "word"), CHECKED, ids=[word for _, word in CHECKED])
def test_the_local_api_checks_what_the_service_checks(
    api: LocalApi, change: Callable[[Any], Any], word: str
) -> None:
    sent = change(CHAT)
    path = "/async/group/chat/completions" if "requests" in sent else "/async/chat/completions"
    headers = {"Authorization": f"Bearer {API_KEY}"}
    answer = requests.post(api.url + path, json=sent, headers=headers, timeout=5)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]
    assert requests.post(api.url + path, json=sent, timeout=5).status_code == 401
    assert not api.generations


# The README


def blocks(language: str, word: str = "") -> list[str]:
    """Return the README's code blocks in a language, of those that have a word in them."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
    return [block for block in found if word in block]


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]
FIRST_COMMANDS = [
    "uv run tests/local_api.py async_polling_example.py",
    "uv run tests/local_api.py async_group_example.py",
    "export INFERENCE_API_KEY=your-key",
    "uv run async_polling_example.py",
    "uvx --with-requirements tests/requirements.txt pytest tests",
]
RUN_BELOW = [  # and jq's, by tests of this file
    "uv run tests/local_api.py",
    "uv run async_polling_example.py --resume",
    "uv run async_polling_example.py --resume results/NAME.jsonl --submit",
]


def test_the_readme_has_its_commands_on_its_first_screen() -> None:
    lines = README.splitlines()[:40]
    assert [line for line in lines if line in COMMANDS] == FIRST_COMMANDS


def test_every_command_of_the_readme_is_run_somewhere() -> None:
    gate = (TOP / ".ci" / "run").read_text("utf-8")
    for command in COMMANDS:
        if command in (".ci/run", "export INFERENCE_API_KEY=your-key"):
            continue
        is_run_below = command in RUN_BELOW or command.startswith("jq -sc ")
        assert is_run_below or re.search(rf"{re.escape(command)}( |$)", gate, re.M), command
    workflow = (TOP / ".github" / "workflows" / "test.yml").read_text("utf-8")
    for command in (*FIRST_COMMANDS[:2], FIRST_COMMANDS[-1]):
        assert f"- run: {command}\n" in workflow


def test_the_readme_leads_nowhere_else() -> None:
    allowed = r"https://(docs\.astral\.sh/uv/|docs\.inference\.net/|inference\.net$)"
    for target in re.findall(r"\]\(([^)]*)\)", README):
        assert re.match(allowed, target) or (TOP / target).is_file(), target


def run_program(text: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a program of one's own to its good end; return what it has printed."""
    (folder / "my_program.py").write_text(text, "utf-8")
    done = subprocess.run(
        [sys.executable, "my_program.py"],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_one_request_is_submitted_as_the_readme_has_it(api: LocalApi, tmp_path: Path) -> None:
    [program] = blocks("python", "submit_generation(")
    assert program.count("\n") <= 14
    api.choose_fault = faulty(status(404), polls=True, times=1)
    printed = run_program(f"{api_part(SINGLE)}\n{program}", tmp_path, api.environment)
    [generation_id] = api.generations
    accepted, error, answer = printed.splitlines()
    assert accepted == f"Accepted: {generation_id}"
    assert error == "HTTP 404: out of order"
    assert answer.startswith("Success {'choices': [{")
    assert "'content': '2 + 2 equals 4.'" in answer
    failed = {"state": "Failed", "response": None, "stateMessage": "overloaded"}
    api.alter = lambda generation: generation | failed
    printed = run_program(f"{api_part(SINGLE)}\n{program}", tmp_path, api.environment)
    assert printed.splitlines()[2:] == ["Failed overloaded"]


def test_many_requests_are_submitted_as_the_readme_has_it(api: LocalApi, tmp_path: Path) -> None:
    [program] = blocks("python", "submit_all(")
    assert program.count("\n") <= 14
    text = f"{story(SINGLE)}\n{program}"
    printed = run_program(text, tmp_path, api.environment).splitlines()
    assert [line.split()[0] for line in printed[:3]] == ["my-1", "my-2", "my-3"]
    assert {line.split()[1] for line in printed[:3]} == set(api.generations)
    assert sorted(printed[3:]) == [
        "my-1 Success 2 + 2 equals 4.",
        "my-2 Success The Pacific Ocean is the largest.",
        "my-3 Success Bees make honey.",
    ]
    assert not list(tmp_path.glob("results*"))
    assert "uv run tests/local_api.py my_program.py" in README
    command = [sys.executable, str(TOP / "tests" / "local_api.py"), "my_program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "accepted 3 generations, answered 3" in done.stderr
    api.choose_fault = faulty(status(402, "no credit"), polls=False, only="my-2")
    text = re.sub(r"^(MAX_CONCURRENT_POLLS) = .*", r"\1 = 1", text, flags=re.M)
    printed = run_program(text, tmp_path, api.environment).splitlines()
    assert "no credit" in printed[1]
    assert printed[2:] == ["my-3 None", "my-1 Success 2 + 2 equals 4."]


def with_questions(example: Example, lines: str) -> None:
    """Edit a script as the README says: with these lines in place of the sample questions."""
    path = example.folder / example.script
    text = re.sub(r"^NUM_REQUESTS = .*\n", "", path.read_text("utf-8"), flags=re.M)
    start, end = text.index("SAMPLE_QUESTIONS = ["), text.index("def build_request")
    path.write_text(f"{text[:start]}{lines}\n\n{text[end:]}", "utf-8")


def test_the_questions_come_from_a_file_as_the_readme_has_it(example: Example) -> None:
    [lines] = blocks("python", "questions.txt")
    with_questions(example, lines)
    missing = example.start()
    stderr = missing.communicate(timeout=30)[1]
    assert missing.returncode == 1
    assert re.fullmatch("questions.txt cannot be read: .*No such file.*\n", stderr)
    (example.folder / "questions.txt").write_bytes("\ufeffWhy?\r\n\r\n東京?\r\n".encode())
    run = example.run()
    assert run.code == 0
    assert [row["question"] for row in run.final.values()] == ["Why?", "東京?"]


def test_failed_requests_are_sent_again_as_the_readme_has_it(example: Example) -> None:
    questions = ["What is 2 + 2?", "What do bees make?"]

    def fail(generation: Any) -> Any:
        is_chosen = generation["request"]["messages"][0]["content"] in questions
        failed = {"state": "Failed", "response": None, "stateMessage": "overloaded"}
        return generation | failed if is_chosen else generation

    example.edit(NUM_REQUESTS=10)
    example.api.alter = fail
    run = example.run()
    assert list(run.states.values()).count("Failed") == 2
    example.api.alter = lambda generation: generation
    [lines] = blocks("python", '== "Failed"]')
    with_questions(example, lines.replace("NAME.jsonl", run.results.name))
    again = example.run()
    assert again.code == 0, again.stderr
    assert [row["question"] for row in again.final.values()] == questions


LOOKALIKES = [  # a reader that guesses types may need a whole column that looks alike
    ["007", "1700000000", "1e5", "-0"],
    ["2024-01-31", "2024-02-29T12:00:00Z"],
    ["true", "false"],
    ["null", "NaN", "007", "2024-01-31", "true", "[1]", "", "Ünïcödé\n2"],
]


@pytest.fixture(params=LOOKALIKES, ids=["numbers", "dates", "booleans", "mixed"])
def texts(request: pytest.FixtureRequest) -> list[str]:
    """Return answers that are texts, but look like something else."""
    found: list[str] = request.param
    return found


@pytest.fixture
def retried(example: Example, texts: list[str]) -> Run:
    """Return a run with retries, with these answers and one failure."""
    example.edit(NUM_REQUESTS=len(texts) + 1)
    if example.script == SINGLE:
        example.edit(MAX_CONCURRENT_POLLS=20)
    turned_away: set[str] = set()

    def choose(request: Any, sent: Any) -> Any:
        key = request.path + json.dumps(sent)
        if key in turned_away:
            return None
        turned_away.add(key)
        return status(429) if request.method == "POST" else status(500)

    def answer(generation: Any) -> Any:
        number = int(generation["request"]["metadata"]["custom_id"].removeprefix("req-")) - 1
        if number == len(texts):
            return generation | {"state": "Failed", "response": None, "stateMessage": "12"}
        if generation["response"]:
            generation["response"]["choices"][0]["message"]["content"] = texts[number]
        return generation

    stray = {
        "id": "stray-1",
        "state": "Success",
        "response": {"choices": [{"message": {"content": "0"}}]},
    }
    example.api.choose_fault = choose
    example.api.alter = answer
    example.api.alter_list = lambda generations: [*generations, stray]
    run = example.run()
    assert run.code == 1
    assert any(row["state"] == "Not sent" and row["error"] for row in run.rows)
    assert len(run.rows) > 3 * len(texts)
    return run


def last_rows(run: Run) -> dict[str, Any]:
    """Return the row that counts of each request, and of each generation without one."""
    return {row["custom_id"] or row["generation_id"]: row for row in run.rows}


def test_jq_reads_the_results_as_the_readme_has_it(retried: Run, texts: list[str]) -> None:
    [command] = [line for line in COMMANDS if line.startswith("jq ")]
    words = shlex.split(command.replace("results/NAME.jsonl", retried.results.as_posix()))
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    expected = last_rows(retried).values()
    assert sorted(rows, key=str) == sorted(
        ([row["custom_id"], row["state"], row["response"]] for row in expected), key=str
    )
    shown = {custom_id: response for custom_id, _, response in rows}
    assert [shown[f"req-{n:03}"] for n in range(1, len(texts) + 2)] == [*texts, None]


def test_pandas_reads_the_results_as_the_readme_has_it(
    retried: Run, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(retried.folder)
    [lines] = blocks("python", "import pandas")
    namespace = copied(lines.replace("NAME.jsonl", retried.results.name))
    answers = namespace["answers"].to_dict("records")
    expected = last_rows(retried)
    assert len(answers) == len(expected)
    for found in answers:
        has_name = isinstance(found["custom_id"], str)
        row = expected[found["custom_id"] if has_name else found["generation_id"]]
        assert found.keys() == row.keys()
        for key, value in row.items():
            if value is None:
                is_missing = isinstance(found[key], float) and math.isnan(found[key])
                assert found[key] is None or is_missing, key
            elif isinstance(value, str):
                assert type(found[key]) is str
                assert found[key] == value
            else:
                assert found[key] == pytest.approx(value)
    succeeded = [row for row in answers if row["state"] == "Success"]
    assert len(succeeded) >= len(texts)
    assert not any(isinstance(row["error"], str) for row in succeeded)


@contextmanager
def serving() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Start the local API as in a terminal of its own; yield it, and what it says to export."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(TOP / "tests" / "local_api.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        exports = [shlex.split(line) for line in lines if line.startswith("export ")]
        yield process, dict(words[1].split("=", 1) for words in exports)
    finally:
        process.send_signal(signal.SIGINT)
        _, bill = process.communicate(timeout=30)
        assert "made 0 twice" in bill


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process of its own")
def test_coming_back_later_can_be_tried_as_the_readme_has_it(single: Example) -> None:
    single.edit(NUM_REQUESTS=3, POLL_INTERVAL_SECONDS=0.2, MAX_SUBMIT_ATTEMPTS=2)

    def execute(command: str) -> Run:
        words = [sys.executable if word == "uv" else word for word in shlex.split(command)]
        assert words[1] == "run"
        return single.run(*words[3:])

    with serving() as (_, single.environment):
        process = single.start()
        assert process.stdout
        for line in process.stdout:
            if "Polling for Results" in line:
                process.send_signal(signal.SIGINT)
                break
        assert single.finish(process).code == 130
        resumed = execute("uv run async_polling_example.py --resume")
        assert resumed.code == 0
        assert set(resumed.states.values()) == {"Success"}
    unsent = single.run()
    assert unsent.code == 1
    assert set(unsent.states.values()) == {"Not sent"}
    [command] = re.findall(r"uv run .* --submit$", unsent.stdout, re.M)
    readme = "uv run async_polling_example.py --resume results/NAME.jsonl --submit"
    assert command == readme.replace("NAME.jsonl", unsent.results.name)
    with serving() as (_, single.environment):
        assert execute(command).code == 0
        assert set(unsent.states.values()) == {"Success"}


def test_the_readme_has_every_constant_with_its_value() -> None:
    for column, script in enumerate((SINGLE, GROUP)):
        top = source(script).partition("SAMPLE_QUESTIONS")[0]
        constants = re.findall(r"^([A-Z_]+) = (\S+)", top, re.M)
        assert len(constants) == 7 - column
        for name, value in constants:
            [row] = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
            shown = [cell.strip(" `") for cell in row.split("|")[2:4]]
            shown[1] = shown[0] if shown[1] == "the same" else shown[1]
            assert shown[column] == value.strip('"')


def test_the_readme_has_every_key_of_a_row() -> None:
    [table] = re.findall(r"^\| key \|.*?\n\n", README, re.M | re.S)
    cells = [line.split("|")[1] for line in table.splitlines()[2:] if line]
    keys = set(re.findall(r"`(\w+)`", "".join(cells)))
    assert keys == set(copied(story(GROUP))["Record"].__dataclass_fields__)


def without_figures(text: str) -> list[str]:
    """Return lines with their numbers, and the spaces before them, made the same."""
    return [re.sub(r" *\d[\d,.]*", " #", line) for line in text.splitlines()]


def test_the_summary_in_the_readme_is_that_of_a_run(single: Example) -> None:
    single.edit(NUM_REQUESTS=10)
    printed = without_figures(single.run().stdout)
    [summary] = blocks("text", "Success Rate")
    lines = without_figures(summary)
    start = printed.index(lines[0])
    assert printed[start : start + len(lines)] == lines


def test_the_picture_is_of_the_beginning_of_a_run(single: Example) -> None:
    picture = (TOP / ".github" / "run.svg").read_text("utf-8")
    assert "](.github/run.svg)" in README
    drawn = re.findall(r"<text [^>]*clip-path=[^>]*>(.*?)</text>", picture)
    lines = [line.replace("&#160;", " ").replace("\xa0", " ").rstrip() for line in drawn]
    lines = [line for line in lines if line]
    assert 20 <= len(lines) <= 32  # empty ones are not drawn
    single.edit(NUM_REQUESTS=10, POLL_INTERVAL_SECONDS=1)
    printed = [line for line in single.run().stdout.splitlines() if line]
    ids = re.compile(r"(→ |req-)\S+")
    assert [ids.sub("", line) for line in lines] == [
        ids.sub("", line) for line in printed[: len(lines)]
    ]
