"""What the project promises of itself: one text in two scripts, parts to copy, a README."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import API_KEY, GROUP, SCRIPTS, SINGLE, TOP, Example
from local_api import LocalApi, reset, status

README = (TOP / "README.md").read_text("utf-8")

# What the two scripts define differently, since the two APIs differ in it.
DIFFERENT = {
    *("NUM_REQUESTS", "POLL_INTERVAL_SECONDS", "MAX_POLL_ATTEMPTS", "MAX_CONCURRENT_POLLS"),
    *("Batch", "RESULTS_PREFIX"),
    *("Record", "POLLED_ID", "read_results"),
    *("show_submission", "submit", "poll", "poll_all", "check_configuration", "main"),
}
ONLY_SINGLE = {"submit_generation", "fetch_generation", "show_finished"}
ONLY_GROUP = {
    *("submit_group", "fetch_group", "show_poll", "show_unmatched", "take", "MAX_GROUP_SIZE"),
}


def definitions(script: str) -> dict[str, str]:
    """Return the lines of all that a script defines, by name, in its order."""
    source = (TOP / script).read_text("utf-8")
    lines = source.splitlines()
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found[text] = text
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = text
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = text
    return found


def test_what_both_scripts_need_stands_in_both_word_for_word() -> None:
    single, group = definitions(SINGLE), definitions(GROUP)
    assert set(single) - set(group) == ONLY_SINGLE
    assert set(group) - set(single) == ONLY_GROUP
    drifted = {name for name in set(single) & set(group) if single[name] != group[name]}
    assert drifted <= DIFFERENT
    assert not {name for name in DIFFERENT if name in single and single[name] == group.get(name)}
    moved = {"MAX_CONCURRENT_POLLS"}  # one is set by the user, the other follows from the API
    shared = [name for name in single if name in group and name not in moved]
    assert shared == [name for name in group if name in single and name not in moved]


def comments(script: str) -> set[str]:
    """Return the lines of a script that are comments as a whole."""
    lines = (TOP / script).read_text("utf-8").splitlines()
    return {line.strip() for line in lines if line.strip().startswith("# ")}


def test_the_comments_of_the_shared_parts_do_not_drift() -> None:
    assert comments(SINGLE) ^ comments(GROUP) == set()


def api_part(script: str) -> dict[str, Any]:
    """Run a script's imports and its part on the API, and nothing else, in an empty namespace."""
    source = (TOP / script).read_text("utf-8")
    tree = ast.parse(source)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    part = source[source.index("# --- The API") : source.index("# --- The record")]
    alias = re.findall(r"^Json = .*$", source, re.M)
    namespace: dict[str, Any] = {}
    text = "\n".join([*map(ast.unparse, imports), *alias, part])
    exec(compile(text, script, "exec"), namespace)
    return namespace


@pytest.fixture
def environment(api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead this process to the local API."""
    for name, value in api.environment.items():
        monkeypatch.setenv(name, value)


CHAT = {"model": "any", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}


@pytest.mark.usefixtures("environment")
def test_the_api_part_works_when_it_is_copied_alone(api: LocalApi) -> None:
    single, group = api_part(SINGLE), api_part(GROUP)
    with requests.Session() as session:
        generation_id = single["submit_generation"](session, CHAT, 5)
        generation = single["fetch_generation"](session, generation_id, 5)
        assert generation["response"]["choices"][0]["message"]["content"] == "2 + 2 equals 4."
        group_id = group["submit_group"](session, [CHAT, CHAT], 5)
        members = group["fetch_group"](session, group_id, 5)
    assert [member["state"] for member in members] == ["Success", "Success"]
    assert len(api.connections) == 1


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("fault", "ending", "wait_seconds"),
    [
        (status(400), "refused", 0),
        (status(302), "refused", 0),
        (status(401), "locked out", 0),
        (status(402), "locked out", 0),
        (status(429, Retry_After="7"), "unavailable", 7),
        (status(503, Retry_After="7"), "unavailable", 7),
        (status(503), "uncertain", 0),
        (status(500, Retry_After="7"), "uncertain", 7),
        (reset, "uncertain", 0),
    ],
)
def test_an_exchange_ends_in_one_of_four_ways(
    api: LocalApi, fault: Any, ending: str, wait_seconds: float
) -> None:
    part = api_part(SINGLE)
    api.choose_fault = lambda request, sent: fault
    with requests.Session() as session, pytest.raises(part["ApiError"]) as caught:
        part["submit_generation"](session, CHAT, 5)
    assert caught.value.ending == ending
    assert caught.value.retry_after_seconds == wait_seconds
    assert API_KEY not in str(caught.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script: str, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(TOP)!r}); import {Path(script).stem}"
    options: Any = {"cwd": tmp_path, "capture_output": True, "env": {"PATH": ""}}
    done = subprocess.run([sys.executable, "-B", "-c", code], check=True, **options)
    assert done.stdout == done.stderr == b""
    assert not list(tmp_path.iterdir())


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


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_the_excerpts_in_the_readme_are_the_code() -> None:
    sources = [(TOP / script).read_text("utf-8") for script in SCRIPTS]
    flat = ["\n".join(line.strip() for line in source.splitlines()) for source in sources]
    excerpts = [block for block in blocks("python") if "import pandas" not in block]
    assert len(excerpts) >= 4
    for excerpt in excerpts:
        if "questions.txt" in excerpt:
            continue
        for part in re.split(r"^ *# \.\.\.$", excerpt, flags=re.M):
            wanted = "\n".join(line.strip() for line in part.strip().splitlines())
            assert any(wanted in source for source in flat), part


def test_the_readme_has_its_commands_on_its_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:40])
    assert "uv run tests/local_api.py async_polling_example.py" in first_screen
    assert "uv run --with-requirements tests/requirements.txt pytest tests" in first_screen


def test_the_questions_come_from_a_file_as_the_readme_has_it(example: Example) -> None:
    [lines] = [block for block in blocks("python") if "questions.txt" in block]
    (example.folder / "questions.txt").write_text("Why?\n東京?\n", encoding="utf-8")
    path = example.folder / example.script
    text = re.sub(r"^NUM_REQUESTS = .*$", "", path.read_text("utf-8"), flags=re.M)
    start, end = text.index("SAMPLE_QUESTIONS = ["), text.index("def build_request")
    path.write_text(f"{text[:start]}{lines}\n\n{text[end:]}", "utf-8")
    run = example.run()
    assert run.code == 0
    assert [row["question"] for row in run.final.values()] == ["Why?", "東京?"]


def test_jq_reads_the_results_as_the_readme_has_it(single: Example) -> None:
    run = single.run()
    for command in blocks("bash"):
        for line in command.splitlines():
            if line.startswith("jq "):
                words = shlex.split(line.replace("results/NAME.jsonl", str(run.results)))
                try:
                    done = subprocess.run(words, capture_output=True, text=True, check=True)
                except FileNotFoundError:
                    pytest.skip("jq is not installed here")
                assert "The capital of France is Paris." in done.stdout


def test_pandas_reads_the_results_as_the_readme_has_it(
    single: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = single.run()
    monkeypatch.chdir(single.folder)
    [lines] = [block for block in blocks("python") if "import pandas" in block]
    namespace: dict[str, Any] = {}
    exec(lines.replace("NAME.jsonl", run.results.name), namespace)
    assert list(namespace["answers"]["state"]) == ["Success"] * 4
    assert dict(namespace["answers"]["response"]) == {
        custom_id: row["response"] for custom_id, row in run.final.items()
    }


def test_the_readme_has_every_constant_with_its_value() -> None:
    for column, script in enumerate((SINGLE, GROUP)):
        top = (TOP / script).read_text("utf-8").split("SAMPLE_QUESTIONS")[0]
        constants = re.findall(r"^([A-Z_]+) = (\S+)", top, re.M)
        assert len(constants) == 7 - column
        for name, value in constants:
            [row] = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
            shown = [cell.strip(" `") for cell in row.split("|")[2:4]]
            shown[1] = shown[0] if shown[1] == "the same" else shown[1]
            assert shown[column] == value.strip('"')


def test_the_picture_is_of_a_run() -> None:
    picture = (TOP / ".github" / "run.svg").read_text("utf-8")
    assert ".github/run.svg" in README
    assert "Generation complete!" in picture.replace("&#160;", " ").replace(
        "\N{NO-BREAK SPACE}", " "
    )
