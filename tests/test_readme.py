"""What the README says: its commands and programs are run, its tables and its picture compared."""

import ast
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any
from xml.etree import ElementTree

import pandas
import pytest
from conftest import API_KEY, GROUP, HANG_SECONDS, SINGLE, TOP, Example, Run, load
from local_api import Fault, Json, LocalApi, after, reset, status, web

README = (TOP / "README.md").read_text("utf-8")
LOCAL_API = str(TOP / "tests" / "local_api.py")
EXAMPLE_ID = "kzoDLD6m6HhKf1TehfDZ2"


def blocks(language: str) -> list[str]:
    """Return the code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def block(language: str, word: str) -> str:
    """Return the one code block in a language that has a word in it."""
    [found] = [text for text in blocks(language) if word in text]
    return found


def commands_of_blocks() -> list[str]:
    """Return the commands in the blocks; the lines of a command after its first are indented."""
    commands: list[str] = []
    for text in blocks("bash"):
        commands += re.split(r"\n(?! )", text.strip())
    return commands


def inline(pattern: str) -> list[str]:
    """Return the code in the sentences that begins like this."""
    sentences = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    return re.findall(rf"`({pattern}[^`]*)`", sentences)


def rows_below(heading: str) -> list[list[str]]:
    """Return the rows of the table whose first heading this is, each a list of its cells."""
    [table] = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.M)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


# Commands

FIRST_COMMANDS = [
    "uv run tests/local_api.py async_polling_example.py",
    "uv run tests/local_api.py async_group_example.py",
    "export INFERENCE_API_KEY=your-key",
    "uv run async_polling_example.py",
    "uvx --with-requirements tests/requirements.txt pytest tests",
]
SUBMIT, POLL = (command for command in commands_of_blocks() if command.startswith("curl"))
ALL_ANSWERS, ONE_ANSWER = (
    command for command in commands_of_blocks() if command.startswith("jq")
)
RUN_PROGRAM = "uv run my_program.py"
RUN_PROGRAM_LOCALLY = "uv run tests/local_api.py my_program.py"
REMOVE_IMPORTS = "uvx ruff check --select F401 --fix my_program.py"
START_LOCAL_API = "uv run tests/local_api.py --port 8000"
RESUME = "uv run async_polling_example.py --resume"
RESUME_AND_SUBMIT = "uv run async_polling_example.py --resume results/NAME.db --submit"
RUN_UNKNOWN = "uv run --with requests unknown.py"
RUN_BELOW = {
    *(
        SUBMIT,
        POLL,
        ALL_ANSWERS,
        ONE_ANSWER,
        RUN_PROGRAM,
        RUN_PROGRAM_LOCALLY,
        REMOVE_IMPORTS,
    ),
    *(START_LOCAL_API, RESUME, RESUME_AND_SUBMIT, RUN_UNKNOWN),
}


def test_the_first_screen_has_the_first_commands() -> None:
    lines = README.splitlines()[:40]
    assert [line for line in lines if line in commands_of_blocks()] == FIRST_COMMANDS


def test_every_command_is_run_somewhere() -> None:
    gate = (TOP / ".ci" / "run").read_text("utf-8")
    commands = {*commands_of_blocks(), *inline("uvx? ")}
    assert commands >= RUN_BELOW
    for command in commands - RUN_BELOW - {"export INFERENCE_API_KEY=your-key"}:
        assert re.search(rf"{re.escape(command)}( |$)", gate, re.M), command
    workflow = (TOP / ".github" / "workflows" / "test.yml").read_text("utf-8")
    for command in (*FIRST_COMMANDS[:2], FIRST_COMMANDS[-1]):
        assert f"- run: {command}\n" in workflow


def run_command(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a command of the README to its good end; return what it has printed."""
    done = subprocess.run(
        shlex.split(command.replace("\\\n", "")),
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", "UV_PYTHON": sys.executable, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_curl_makes_a_request_and_gets_its_answer(api: LocalApi, tmp_path: Path) -> None:
    def call(command: str) -> Any:
        command = command.replace("https://api.inference.net/v1", api.url)
        command = command.replace("$INFERENCE_API_KEY", API_KEY)
        return json.loads(run_command(command, tmp_path, api.environment))

    accepted = call(SUBMIT)
    [generation_id] = api.generations
    assert accepted == {"id": generation_id}
    [shown_id] = inline('{"id"')
    assert json.loads(shown_id) == {"id": EXAMPLE_ID}
    generation = call(POLL.replace(EXAMPLE_ID, generation_id))
    shown = json.loads(block("json", '"response"'))
    assert generation["request"]["metadata"]["custom_id"]
    for name in ("dispatchedAt", "finishedAt"):
        form = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
        assert re.fullmatch(form, shown.pop(name))
        assert re.fullmatch(form, generation.pop(name))
    assert shown == generation | {"id": EXAMPLE_ID}


# Data of one's own


def paste(example: Example, recipe: str) -> None:
    """Replace load_questions in a script."""
    path = example.folder / example.script
    text = path.read_text("utf-8")
    start, end = text.index("def load_questions"), text.index("def build_request")
    path.write_text(f"{text[:start]}{recipe}\n\n{text[end:]}", "utf-8")


def test_the_lines_of_a_file_are_asked(example: Example) -> None:
    paste(example, block("python", "questions.txt"))
    missing = example.run()
    assert missing.code == 2
    assert "questions.txt" in missing.stderr
    content = "\ufeffWhy?\r\n\r\n \r\nWhat is\u2028the form feed \x0c for?\r\n東京?"
    (example.folder / "questions.txt").write_bytes(content.encode())
    run = example.run()
    assert run.code == 0
    assert {row["custom_id"]: row["question"] for row in run.answers} == {
        "line-1": "Why?",
        "line-4": "What is\u2028the form feed \x0c for?",
        "line-5": "東京?",
    }


def test_a_folder_of_documents_is_summarized(example: Example) -> None:
    folder = example.folder / "documents"
    folder.mkdir()
    texts = {f"Report {number} ü.txt": f"Line {number}.\n\n" * 70 for number in range(10)}
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    (folder / "notes.md").write_text("not this one", "utf-8")
    paste(example, block("python", "documents"))
    run = example.run()
    assert run.code == 0
    assert {row["finish_reason"] for row in run.answers} == {"length"}
    assert re.search(r"Cut off: +10 .*MAX_TOKENS", run.stdout)
    example.edit(MAX_TOKENS=1000)
    run = example.run()
    # The local API's answer to a question that it does not know is the question.
    answers = {row["custom_id"]: row["response"] for row in run.answers}
    assert answers.keys() == texts.keys()
    for name, answer in answers.items():
        assert answer == f"You asked: Summarize this text:\n\n{texts[name]}"
    assert {row["finish_reason"] for row in run.answers} == {"stop"}
    command = ONE_ANSWER.replace("req-003", "Report 3 ü.txt")
    assert read_with(command, run) == answers["Report 3 ü.txt"] + "\n"


def test_the_rows_of_a_table_are_asked(example: Example) -> None:
    paste(example, block("python", "rows.csv"))
    table = 'id,text\r\n7,"Good, and\r\ncheap"\r\n007,Bad\r\n'
    (example.folder / "rows.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    run = example.run()
    assert run.code == 0
    assert {row["custom_id"]: row["question"].partition("? ")[2] for row in run.answers} == {
        "7": "Good, and\r\ncheap",
        "007": "Bad",
    }
    (example.folder / "rows.csv").write_text(f"{table}7,Neither\n", "utf-8")
    doubled = example.run()
    assert doubled.code == 2
    assert "two rows have the same id" in doubled.stderr


def test_what_failed_or_was_cut_off_is_asked_again(example: Example) -> None:
    def alter(generation: Json) -> Json:
        custom_id = generation["request"]["metadata"]["custom_id"]
        if custom_id in ("req-002", "req-004"):
            return {
                **generation,
                "state": "Failed",
                "response": None,
                "stateMessage": "overloaded",
            }
        if custom_id == "req-003":
            generation["response"]["choices"][0]["finish_reason"] = "length"
        return generation

    example.api.alter = alter
    first = example.run()
    assert first.code == 1
    questions = {row["custom_id"]: row["question"] for row in first.answers}
    example.api.alter = lambda generation: generation
    recipe = block("python", '== "Failed"').replace("NAME", first.results.stem)
    paste(example, recipe)
    again = example.run()
    assert again.code == 0
    found = {row["custom_id"]: row["question"] for row in again.answers}
    assert found == {name: questions[name] for name in ("req-002", "req-004")}
    [cut_off] = inline('row\\["finish_reason"')
    paste(example, recipe.replace('row["state"] == "Failed"', cut_off))
    assert [row["custom_id"] for row in example.run().answers] == ["req-003"]


# Programs of one's own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the scripts and the program of the README."""
    for script in (SINGLE, GROUP):
        shutil.copy(TOP / script, tmp_path)
    (tmp_path / "my_program.py").write_text(block("python", "my_program.db"), "utf-8")
    return tmp_path


PRINTED_AT_THE_END = ["sum Success 2 + 2 equals 4.", "bees Success Bees make honey."]


def test_the_program_goes_on_where_it_was(folder: Path, api: LocalApi) -> None:
    def choose(request: web.Request, body: Json) -> Fault | None:
        is_bees = body.get("metadata") == {"custom_id": "bees"}
        return status(402, "no credit") if is_bees else None

    api.choose_fault = choose
    run_again = shlex.join([sys.executable, "my_program.py"])
    printed = run_command(run_again, folder, api.environment)
    assert "Not all was submitted: HTTP 402: no credit" in printed
    assert "sum Success 2 + 2 equals 4." in printed  # what was accepted is polled
    assert len(api.generations) == 1
    api.choose_fault = lambda request, body: None
    for _ in range(2):
        printed = run_command(run_again, folder, api.environment)
        assert printed.splitlines()[-2:] == PRINTED_AT_THE_END
    more = (folder / "my_program.py").read_text("utf-8")
    more = more.replace("questions = {", 'questions = {"why": "Why?", ')
    (folder / "my_program.py").write_text(more, "utf-8")
    printed = run_command(run_again, folder, api.environment)
    assert printed.splitlines()[-3:] == [
        *PRINTED_AT_THE_END,
        "why Success You asked: Why?",
    ]
    assert len(api.generations) == 3
    assert api.made_again() == 0


def test_the_program_runs_without_a_key(folder: Path) -> None:
    command = RUN_PROGRAM_LOCALLY.replace("tests/local_api.py", f"{LOCAL_API!r}")
    printed = run_command(command, folder, {"INFERENCE_API_KEY": ""})
    assert printed.splitlines()[-2:] == PRINTED_AT_THE_END


def test_the_program_runs_with_a_copy_of_the_parts(folder: Path, api: LocalApi) -> None:
    [mark] = inline("# --- The screen")
    copied = (folder / SINGLE).read_text("utf-8").partition(mark)[0]
    program = (
        (folder / "my_program.py").read_text("utf-8").partition("poll_all, submit_all\n")[2]
    )
    (folder / "my_program.py").write_text(copied + program, "utf-8")
    for script in (SINGLE, GROUP):
        (folder / script).unlink()
    command = REMOVE_IMPORTS.replace("uvx", f"{sys.executable!r} -m")
    assert "fixed" in run_command(command, folder, {})
    assert "import argparse" not in (folder / "my_program.py").read_text("utf-8")
    printed = run_command(RUN_PROGRAM, folder, api.environment)
    assert printed.splitlines()[-2:] == PRINTED_AT_THE_END


def test_the_client_works_when_it_is_copied_alone(folder: Path, api: LocalApi) -> None:
    [mark] = inline("# --- The API")
    text = (folder / SINGLE).read_text("utf-8")
    imports = text.partition("# --- Configuration")[0]
    part = text.partition(mark)[2].partition("# --- The records")[0]
    request = json.loads(block("json", '"request"'))["request"]
    program = (
        f"{imports}\n{mark}{part}\n"
        "client = Client()\n"
        f"generation_id = client.submit_generation({request!r})\n"
        'print(client.fetch_generation(generation_id)["state"])\n'
    )
    (folder / "my_program.py").write_text(program, "utf-8")
    assert run_command(RUN_PROGRAM, folder, api.environment) == "Success\n"


@pytest.fixture
def names(api: LocalApi, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Json]:
    """Return what a program has before its loop: a script's names, client, results and pool."""
    module = load(getattr(request, "param", SINGLE))
    results = module.Results(tmp_path / "my_program.db")
    with ThreadPoolExecutor(1) as pool:
        client = module.Client(API_KEY, api.url)
        yield {**vars(module), "client": client, "results": results, "pool": pool}
    results.close()


def records_of(names: Json, count: int) -> Any:
    """Return so many new records."""
    return [names["new_record"](f"my-{number}", "Why?") for number in range(count)]


@pytest.mark.parametrize("names", [GROUP], indirect=True)
def test_more_than_fifty_are_several_groups(
    names: Json, api: LocalApi, capsys: pytest.CaptureFixture[str]
) -> None:
    program = block("python", "range(0, len(records), 50)")

    def choose(request: web.Request, body: Json) -> Fault | None:
        is_second = len(api.groups) == 1 and request.method == "POST"
        return status(402, "no credit") if is_second else None

    api.choose_fault = choose
    names["records"] = records_of(names, 120)
    exec(program, names)
    api.choose_fault = lambda request, body: None
    names["records"] = names["results"].load()
    exec(program, names)
    assert capsys.readouterr().out.splitlines() == [
        "50 Pending",
        "50 Not sent",
        "Not all was submitted: HTTP 402: no credit",
        "50 more are final",
        "50 Pending",
        "20 Pending",
        "70 more are final",
    ]
    assert [len(group) for group in api.groups.values()] == [50, 50, 20]
    assert api.made_again() == 0
    assert {record.outcome for record in names["results"].load()} == {"Success"}


def test_a_loop_polls_until_all_is_final_or_it_is_stopped(names: Json, api: LocalApi) -> None:
    [loop] = inline("while ")
    body = (
        "for record in poll_all(client, pool, records, results.save, max_attempts=10): pass"
    )
    assert "max_attempts=10" in inline("max_attempts")
    names["records"] = records_of(names, 3)
    names["stop"] = Event()
    list(names["submit_all"](names["client"], names["pool"], names["records"], list))
    submissions = len(api.calls)
    names["stop"].set()
    exec(f"{loop}\n    {body}", names)
    assert len(api.calls) == submissions
    names["stop"].clear()
    exec(f"{loop}\n    {body}", names)
    assert {record.outcome for record in names["records"]} == {"Success"}


def test_a_test_needs_no_network(names: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFERENCE_API_KEY", raising=False)
    generation = json.loads(block("json", '"response"'))

    client_class: Any = names["Client"]

    class FakeClient(client_class):  # type: ignore[misc]
        def submit_generation(self, request: Json) -> str:
            return EXAMPLE_ID

        def fetch_generation(self, generation_id: str) -> Json:
            return generation  # type: ignore[no-any-return]

    names["client"] = FakeClient(api_key="any")
    names["records"] = records_of(names, 3)
    work = (
        "for record in submit_all(client, pool, records, results.save): pass\n"
        "for record in poll_all(client, pool, records, results.save): pass\n"
    )
    exec(work, names)
    assert [record.response for record in names["records"]] == ["2 + 2 equals 4."] * 3
    names["records"] = [names["new_record"]("other", "Why?")]
    program = block("python", "from local_api")
    assert len(program.splitlines()) == 4
    exec(program + re.sub("^", "    ", work, flags=re.M), names)
    assert [record.response for record in names["records"]] == ["You asked: Why?"]


def test_every_program_is_run_by_a_test() -> None:
    words = [
        *("questions.txt", "documents", "rows.csv", '== "Failed"', "my_program.db"),
        *("range(0, len(records), 50)", "from local_api", "results/NAME.db"),
    ]
    assert sorted(block("python", word) for word in words) == sorted(blocks("python"))


def test_the_parameters_have_their_names_and_defaults() -> None:
    single = load(SINGLE)
    poll_parameters = inspect.signature(single.poll_all).parameters
    [call] = inline("interval_seconds=")
    for keyword in ast.parse(f"poll_all({call})").body[0].value.keywords:  # type: ignore[attr-defined]
        assert keyword.arg in poll_parameters
    assert 60 * 4320 == 3 * 24 * 60 * 60  # three days
    assert poll_parameters["max_attempts"].default == 120
    assert inline("max_concurrent") == ["max_concurrent=20"]
    for function in (single.submit_all, single.poll_all):
        assert inspect.signature(function).parameters["max_concurrent"].default == 5
    assert inspect.signature(single.Client).parameters["timeout_seconds"].default == 30
    assert inline("Record\\(") == ["Record(custom_id, question, request)"]
    assert list(single.Record.__dataclass_fields__)[:3] == [
        "custom_id",
        "question",
        "request",
    ]
    minutes = [
        script.POLL_INTERVAL_SECONDS * script.MAX_POLL_ATTEMPTS / 60
        for script in (single, load(GROUP))
    ]
    assert minutes == [2, 4]
    assert "a run polls for two minutes, in the group script for four" in " ".join(
        README.split()
    )


# Tables


def test_the_table_of_exceptions_has_all_and_no_other() -> None:
    exceptions = load(SINGLE).ApiError.__subclasses__()
    assert [row[1] for row in rows_below("what happens")] == [
        f"`{exception.__name__}`" for exception in exceptions
    ]


def test_the_table_of_outcomes_has_all_and_no_other() -> None:
    script = load(GROUP)
    outcomes = {
        script.SUCCESS,
        script.FAILED,
        script.PENDING,
        script.NOT_SENT,
        script.UNKNOWN,
    }
    outcomes |= {script.NO_MATCH, script.SUBMITTING}
    assert {row[0].strip("`") for row in rows_below("outcome")} == outcomes


def test_the_table_of_constants_has_every_constant_with_its_value() -> None:
    shown = {row[0].strip("`"): row[1:3] for row in rows_below("constant")}
    expected: dict[str, list[str]] = {name: ["", ""] for name in shown}
    for column, script in enumerate((SINGLE, GROUP)):
        text = (TOP / script).read_text("utf-8")
        part = text.partition("# --- Configuration")[2].partition("SAMPLE_QUESTIONS")[0]
        for name, value in re.findall(r"^([A-Z_]+) = (\S+)", part, re.M):
            expected[name][column] = value.strip('"')
    for row in shown.values():
        if row[1] == "the same":
            row[1] = row[0]
    assert {
        name: [cell.strip("`") for cell in row] for name, row in shown.items()
    } == expected


def test_the_table_of_keys_has_every_key_of_a_line(example: Example) -> None:
    run = example.run()
    assert run.code == 0
    assert [row["custom_id"] for row in run.answers] == [
        "req-001",
        "req-002",
        "req-003",
        "req-004",
    ]
    keys = [key for row in rows_below("key") for key in re.findall(r"`(\w+)`", row[0])]
    if example.script == SINGLE:
        keys.remove("group_id")
    assert sorted(run.answers[0]) == sorted(keys)


def test_the_exit_codes_are_those_of_the_scripts(example: Example) -> None:
    [sentence] = re.findall(r"^Exit codes: (.*?)\n\n", README, re.M | re.S)
    codes = [int(part.split(",")[0]) for part in sentence.split(";")]
    assert codes == [0, 1, 2, 130]  # 130 is seen below, where somebody presses Ctrl-C
    assert example.run().code == 0
    example.api.alter = lambda generation: {**generation, "state": "Failed"}
    assert example.run().code == 1
    submissions = example.submissions
    example.environment = {**example.environment, "INFERENCE_API_KEY": ""}
    assert example.run().code == 2
    assert example.run("--resume", "nothing.db").code == 2
    assert example.submissions == submissions


# Results

LOOKALIKES = [  # a reader that guesses types may need a whole column that looks alike
    ["007", "1700000000", "1e5", "-0"],
    ["2024-01-31", "2024-02-29T12:00:00Z", "2024-03-01"],
    ["true", "false", "true"],
    ["null", "NaN", "007", "2024-01-31", "true", "[1]", "", "Ünïcödé\n2"],
]


@pytest.fixture(params=LOOKALIKES, ids=["numbers", "dates", "booleans", "mixed"])
def texts(request: pytest.FixtureRequest) -> list[str]:
    """Return answers that are texts, but look like something else."""
    found: list[str] = request.param
    return found


@pytest.fixture
def answered(single: Example, texts: list[str]) -> Run:
    """Return a run with these answers and one failure."""

    def alter(generation: Json) -> Json:
        number = int(generation["request"]["metadata"]["custom_id"].removeprefix("req-"))
        if number > len(texts):
            return {
                **generation,
                "state": "Failed",
                "response": None,
                "stateMessage": "12",
            }
        generation["response"]["choices"][0]["message"]["content"] = texts[number - 1]
        return generation

    single.api.alter = alter
    single.edit(NUM_REQUESTS=len(texts) + 1)
    run = single.run()
    assert run.code == 1
    return run


def read_with(command: str, run: Run) -> str:
    """Read a run's answers with a jq command; return what it prints."""
    command = command.replace("NAME", run.results.stem)
    return run_command(command, run.folder, {})


def test_jq_reads_the_answers(answered: Run, texts: list[str]) -> None:
    lines = read_with(ALL_ANSWERS, answered).splitlines()
    expected = [[f"req-{n:03}", "Success", text] for n, text in enumerate(texts, start=1)]
    expected.append([f"req-{len(texts) + 1:03}", "Failed", None])  # type: ignore[list-item]
    assert [json.loads(line) for line in lines] == expected
    assert read_with(ONE_ANSWER, answered) == f"{texts[2]}\n"


def test_pandas_reads_the_answers(
    answered: Run, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(answered.folder)
    [line] = inline("answers = ")
    names: Json = {"pandas": pandas}
    exec(line.replace("NAME", answered.results.stem), names)
    rows = names["answers"].to_dict("records")
    assert [row["response"] for row in rows[:-1]] == texts
    for row, expected in zip(rows, answered.answers, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            if value is None:
                is_missing = isinstance(row[key], float) and math.isnan(row[key])
                assert row[key] is None or is_missing, key
            elif isinstance(value, str):
                assert type(row[key]) is str
                assert row[key] == value
            else:
                assert row[key] == pytest.approx(value)


# Coming back later


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def serving(command: str) -> Iterator[dict[str, str]]:
    """Start the local API as in a terminal of its own; yield what it says to export."""
    words = [sys.executable, "-u", LOCAL_API, *shlex.split(command)[3:]]
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, **options)
    assert process.stdout
    try:
        exports = [shlex.split(process.stdout.readline()) for _ in range(4)]
        assert {words[0] for words in exports} == {"export"}
        yield dict(words[1].split("=", 1) for words in exports)
    finally:
        process.send_signal(signal.SIGINT)
        _, bill = process.communicate(timeout=HANG_SECONDS)
    assert "none twice" in bill


def resume(example: Example, command: str) -> Run:
    """Run a script with the arguments of a command."""
    words = shlex.split(command)
    assert words[:3] == ["uv", "run", example.script]
    return example.run(*words[3:])


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process of its own")
def test_coming_back_can_be_tried_with_the_local_api(single: Example) -> None:
    single.edit(NUM_REQUESTS=3, POLL_INTERVAL_SECONDS=0.2, MAX_SUBMIT_ATTEMPTS=2)
    command = START_LOCAL_API.replace("8000", str(free_port()))
    with serving(command) as single.environment:
        process = single.start()
        assert process.stdout
        for line in process.stdout:
            if "Polling for Results" in line:
                process.send_signal(signal.SIGINT)
                break
        interrupted = single.finish(process)
        assert interrupted.code == 130
        resumed = resume(single, RESUME)
        assert resumed.code == 0
        assert resumed.results == interrupted.results
    unsent = single.run()
    assert set(unsent.states.values()) == {"Not sent"}
    [printed] = re.findall(r"uv run .* --submit$", unsent.stdout, re.M)
    expected = RESUME_AND_SUBMIT.replace("NAME", unsent.results.stem)
    assert shlex.split(printed) == shlex.split(expected)
    with serving(command):
        submitted = resume(single, printed)
    assert submitted.code == 0
    assert set(submitted.states.values()) == {"Success"}


def test_what_is_unknown_is_submitted_or_polled(single: Example) -> None:
    faults = {"req-003": reset, "req-004": after(reset)}

    def choose(request: web.Request, body: Json) -> Fault | None:
        return faults.pop(body.get("metadata", {}).get("custom_id"), None)

    single.api.choose_fault = choose
    run = single.run()
    assert list(run.states.values()) == ["Success", "Success", "Unknown", "Unknown"]
    ids = {
        each.custom_id: generation_id
        for generation_id, each in single.api.generations.items()
    }
    assert ids.keys() == {"req-001", "req-002", "req-004"}
    program = block("python", "results/NAME.db").replace("NAME", run.results.stem)
    program = program.replace(EXAMPLE_ID, ids["req-004"])
    (single.folder / "unknown.py").write_text(program, "utf-8")
    run_command(RUN_UNKNOWN, single.folder, {})
    mended = resume(single, RESUME_AND_SUBMIT.replace("NAME", run.results.stem))
    assert mended.code == 0
    assert [row["state"] for row in mended.answers] == ["Success"] * 4
    assert len(single.api.generations) == 4
    assert single.api.made_again() == 0


# Links and the picture


def test_the_links_lead_to_known_places() -> None:
    allowed = (
        r"https://(docs\.astral\.sh/uv/|docs\.inference\.net/|inference\.net(/models)?$)"
    )
    headings = re.findall(r"^## (.*)$", README, re.M)
    anchors = {re.sub(r"\W+", "-", heading.lower()) for heading in headings}
    for target in re.findall(r"\]\(([^)]*)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert re.match(allowed, target) or (TOP / target).is_file(), target


def lines_of(picture: Path) -> list[str]:
    """Return the lines of text in a picture, without what differs from run to run."""
    words = ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")
    lines: dict[int, str] = {}
    for word in words:
        y = int(word.attrib["y"])
        column = (int(word.attrib["x"]) - 16) // 8
        lines[y] = f"{lines.get(y, ''):<{column}}{word.text}"
    shown = []
    for line in lines.values():
        if "time:" in line or "Throughput:" in line:
            line = re.sub(r" +[\d.]+", " #", line)
        line = re.sub(r"(\d+% ✓ req-)\d+", r"\1#", line)
        shown.append(re.sub(r"-\d{8}-\d{6}-\d{6}\.", "-#.", line))
    return shown


@pytest.mark.skipif(os.name == "nt", reason="the picture is drawn from a pseudo-terminal")
def test_the_picture_is_of_the_end_of_a_run(tmp_path: Path) -> None:
    picture = TOP / ".github" / "answers.svg"
    assert "](.github/answers.svg)" in README
    draw = shlex.join([sys.executable, str(TOP / "tests" / "picture.py")])
    assert "usage:" in run_command(f"{draw} --help", tmp_path, {})
    assert not list(tmp_path.iterdir())
    run_command(f"{draw} new.svg", tmp_path, {})
    lines = lines_of(tmp_path / "new.svg")
    assert lines == lines_of(picture)
    assert "% ✓ req-#" in lines[0]
    assert "  req-001    ✓ Success  What is the capital of Fr...   " in "\n".join(lines)
    assert "The chemical symbol for water is H2O." in "\n".join(lines)
    assert lines[-2] == " Generation complete!"
