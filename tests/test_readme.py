"""What the README says is tried: its commands and programs are run, its tables compared."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_SECONDS, SCRIPTS, SINGLE, TOP, Example, faulty, load
from local_api import Json, LocalApi, status

README = (TOP / "README.md").read_text("utf-8")
GATE = (TOP / ".ci" / "run").read_text("utf-8")
EXAMPLE_ID = "kzoDLD6m6HhKf1TehfDZ2"


def blocks(language: str) -> list[str]:
    """Return the code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def block(language: str, word: str) -> str:
    """Return the one code block in a language that has a word in it."""
    [found] = [text for text in blocks(language) if word in text]
    return found


def commands() -> list[str]:
    """Return the commands of the bash blocks; a command's later lines are indented."""
    return [each for text in blocks("bash") for each in re.split(r"\n(?! )", text.strip())]


def run_command(command: str, folder: Path, shell: bool = False) -> str:
    """Run a command to its good end; return what it has printed."""
    arguments = command if shell else shlex.split(command)
    options: Any = {"cwd": folder, "shell": shell, "timeout": HANG_SECONDS}
    options |= {"capture_output": True, "encoding": "utf-8"}
    done = subprocess.run(arguments, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def paste(example: Example, recipe: str) -> None:
    """Follow the README: replace load_questions, and constants that the recipe names."""
    constants, _, function = recipe.rpartition("def load_questions")
    for name, value in re.findall(r"^([A-Z_]+) = (\d+)", constants, re.M):
        example.edit(**{name: int(value)})
    example.define(f"def load_questions{function}")


RUN_BY_TESTS = [
    "export INFERENCE_API_KEY=your-key",
    *(command for command in commands() if command.startswith(("curl", "jq"))),
    "uv run async_polling_example.py --resume results/NAME.db",
    "uv run async_polling_example.py --resume results/NAME.db --retry failed",
]


@pytest.mark.parametrize("command", commands())
def test_each_command_is_run_by_a_test_or_by_the_gate(command: str) -> None:
    assert command in RUN_BY_TESTS or re.search(rf"{re.escape(command)}( |$)", GATE, re.M)


def test_curl_makes_a_request_and_gets_its_answer(api: LocalApi, tmp_path: Path) -> None:
    submit, poll = (command for command in commands() if command.startswith("curl"))
    submit = submit.replace("https://api.inference.net/v1", api.url)
    poll = poll.replace("https://api.inference.net/v1", api.url)
    accepted = json.loads(run_command(submit, tmp_path, shell=True))
    [generation_id] = api.generations
    assert accepted == {"id": generation_id}
    poll = poll.replace(EXAMPLE_ID, generation_id)
    generation = json.loads(run_command(poll, tmp_path, shell=True))
    shown = json.loads(block("json", '"response"'))
    assert generation["request"]["metadata"] == shown["request"]["metadata"]
    assert generation.keys() == shown.keys()
    assert generation["response"].keys() >= shown["response"].keys()


def test_an_id_is_put_on_file_and_the_run_goes_on(single: Example) -> None:
    single.edit(MAX_POLL_ATTEMPTS=1)
    single.api.choose_fault = faulty(status(404), polls=True)
    first = single.run()
    module = load(SINGLE)
    with module.Results(first.path) as results:
        record = results.records["req-003"]
        lost_id, record.generation_id, record.state = record.generation_id, None, "Unknown"
        results.save([record])
    program = block("python", "results.records[").replace("results/NAME.db", str(first.path))
    (single.folder / "fix.py").write_text(program.replace(EXAMPLE_ID, lost_id), "utf-8")
    run_command(f"{sys.executable} fix.py", single.folder)
    single.api.choose_fault = lambda *_: None
    for command in commands():
        if "--resume" in command:  # --retry failed, too
            arguments = shlex.split(command.replace("results/NAME.db", str(first.path)))[3:]
            resumed = single.run(*arguments)
            assert resumed.code == 0
    assert resumed.records["req-003"]["generation_id"] == lost_id


def test_a_folder_of_documents_is_summarized_and_read(example: Example) -> None:
    paste(example, block("python", "documents"))
    missing = example.run()
    assert missing.code == 2
    assert str(example.folder / "documents") in missing.stderr
    texts = {f"report-{n}.txt": f"Report {n}. It is long.\n" * 70 for n in range(7)}
    texts |= {"café 🚀.txt": "Ein Text. " * 60, "large.TXT": "A sentence. " * 17_000}
    folder = example.folder / "documents"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    (folder / "bom.txt").write_text("\ufeff" + "With a BOM. " * 40, "utf-8")
    (folder / "old.txt").write_bytes("Größe und Maß. ".encode("cp1252") * 40)
    (folder / "empty.txt").write_text(" \n")
    (folder / "notes.md").write_text("not this one", "utf-8")
    run = example.run()
    assert run.code == 0
    assert "old.txt is not UTF-8" in run.stdout
    answers = {row["custom_id"]: row["answer"] for row in run.answers}
    assert answers.keys() == {*texts, "bom.txt", "old.txt"}
    assert "Größe und Maß" in answers["old.txt"]
    assert "With a BOM" in answers["bom.txt"]
    assert "\ufeff" not in answers["bom.txt"]

    answers_path = run.path.with_suffix(".jsonl").relative_to(example.folder)
    [jq] = [command for command in commands() if command.startswith("jq")]
    jq = jq.replace("req-003", "café 🚀.txt").replace("results/NAME.jsonl", str(answers_path))
    printed = run_command(jq, example.folder)
    assert printed == answers["café 🚀.txt"] + "\n"

    (example.folder / "to_csv.py").write_text(block("python", "pandas"), "utf-8")
    run_command(f"{sys.executable} to_csv.py", example.folder)
    with open(example.folder / "answers.csv", encoding="utf-8-sig", newline="") as file:
        table = {row["custom_id"]: row["answer"] for row in csv.DictReader(file)}
    assert table == answers


def test_the_rows_of_a_csv_file_are_asked(example: Example) -> None:
    paste(example, block("python", "DictReader(file)"))
    rows = example.folder / "rows.csv"
    rows.write_bytes('\ufeffid,text\r\n007,"Good, or\nnot?"\r\n8,東京\r\n'.encode())
    run = example.run()
    assert run.code == 0
    assert [row["custom_id"] for row in run.answers] == ["007", "8"]
    assert "Good, or\nnot?" in run.answers[0]["question"]
    rows.write_text("id,text\n1,a\n1,b\n", "utf-8")
    run = example.run()
    assert run.code == 2
    assert "two rows have the same id" in run.stderr


def test_the_program_goes_on_and_pays_once(api: LocalApi, tmp_path: Path) -> None:
    shutil.copy(TOP / SINGLE, tmp_path)
    (tmp_path / "my_program.py").write_text(block("python", "my_program.db"), "utf-8")
    for _ in range(2):
        printed = run_command(f"{sys.executable} my_program.py", tmp_path)
        assert printed == "sum Success 2 + 2 equals 4.\nbees Success Bees make honey.\n"
    assert len(api.generations) == 2


def test_a_client_of_ones_own_and_a_file_in_memory_need_no_network() -> None:
    module = load(SINGLE)

    class MyClient(module.Client):  # type: ignore[misc, name-defined]
        def submit_generation(self, request: Json) -> str:
            return "an-id"

        def fetch_generation(self, generation_id: str) -> Any:
            return json.loads(block("json", '"response"')) | {"id": generation_id}

    results = module.Results(":memory:")
    results.add([module.new_record("my-1", "What is 2 + 2?")])
    client = MyClient("any")
    module.submit_all(client, results)
    module.poll_all(client, results)
    assert results.records["my-1"].answer == "2 + 2 equals 4."


def test_what_is_above_the_screen_is_enough_to_copy(api: LocalApi, tmp_path: Path) -> None:
    for script in SCRIPTS:
        text = (TOP / script).read_text("utf-8").partition("# --- The screen")[0]
        program = block("python", "my_program.db").partition("import")[2].partition("\n")[2]
        program = program.replace("my_program.db", f"{script}.db")
        (tmp_path / "copied.py").write_text(text + program, "utf-8")
        assert "sum Success" in run_command(f"{sys.executable} copied.py", tmp_path)
