"""What holds for both scripts: one text in two files, the parts, importing and copying."""

import ast
import functools
import inspect
import os
import re
import shutil
import stat
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import GROUP, SCRIPTS, SINGLE, TOP, load
from local_api import LocalApi

PARTS = [
    "# --- Configuration",
    "# --- The API",
    "# --- The records",
    "# --- The work",
    "# --- The screen",
    "# --- The script",
]


def source(script: str) -> str:
    """Return the text of a script."""
    return (TOP / script).read_text("utf-8")


@functools.cache
def tree(script: str) -> ast.Module:
    """Return the syntax tree of a script."""
    return ast.parse(source(script))


def docstring(script: str) -> str:
    """Return the docstring of a script."""
    return ast.get_docstring(tree(script)) or ""


def above(script: str, part: str) -> str:
    """Return what stands above the comment line of a part."""
    return source(script).partition(f"\n{part}")[0] + "\n"


# One text in two files

# What both scripts define, each in its own way, since the two APIs differ in it.
DIFFERENT = {
    *("NUM_REQUESTS", "POLL_INTERVAL_SECONDS", "MAX_POLL_ATTEMPTS"),
    *("Record.outcome", "Record.update", "check_unsent", "SCHEMA", "UPSERT", "Results.load"),
    *("# submit_all and poll_all", "submit_all", "submit_in_worker", "poll_all"),
    *("MARKS", "Screen.print_submission", "show_figures", "lost_ids"),
    *("PREFIX", "check_configuration", "run", "end_run"),
}
# The submissions and polls of many requests at a time, ...
ONLY_SINGLE = {
    *("from collections import deque", "from concurrent.futures import FIRST_COMPLETED"),
    *("from concurrent.futures import Future", "MAX_CONCURRENT_POLLS"),
    *("Client.submit_generation", "Client.fetch_generation"),
    *("MAX_UNCERTAIN", "MAX_LISTED", "Screen.print_answer"),
    *("CHECK_SECONDS", "poll_in_worker"),
}
# ... and those of a group, whose generations have to be matched.
ONLY_GROUP = {
    *("Client.submit_group", "Client.fetch_group", "MAX_GROUP_SIZE"),
    *("NO_MATCH", "Record.group_id", "mark", "match"),
    *("Screen.print_questions", "Screen.print_poll"),
}


def names_of(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.ImportFrom):
        return [f"from {node.module} import {ast.unparse(alias)}" for alias in node.names]
    if isinstance(node, ast.Import):
        return [f"import {ast.unparse(alias)}" for alias in node.names]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.If):
        return [f"if {ast.unparse(node.test)}"]
    if isinstance(node, ast.Assign):
        targets = node.targets
    else:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else []
    stored = [child for target in targets for child in ast.walk(target)]
    return [child.id for child in stored if isinstance(child, ast.Name)]


def statements(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Yield each statement by the name that it defines, and what a class defines after it."""
    for node in body:
        for name in names_of(node):
            yield prefix + name, node
        if isinstance(node, ast.ClassDef):
            yield from statements(node.body[1:], f"{node.name}.")


def definitions(script: str) -> dict[str, str]:
    """Return the lines of all that a script defines, by name, in its order.

    The lines of a class end with its docstring, as what it defines comes after it. The comments
    above a statement belong to it; a comment with an empty line below it goes by its first words.
    Of an import, only the name counts.
    """
    lines = source(script).splitlines()
    found: dict[str, str] = {}
    end = tree(script).body[0].end_lineno or 0  # of the docstring
    for name, node in statements(tree(script).body):
        start = end
        end = node.end_lineno or 0
        if isinstance(node, ast.ClassDef):
            end = node.body[0].end_lineno or 0
        text = "\n".join(lines[start:end])
        while comment := re.match(r"\n*((#.*\n)+)\n", text):
            text = text[comment.end() :]
            found[" ".join(comment[1].split()[:4])] = comment[1]
        found[name] = name if "import " in name else text.strip("\n")
    return found


def test_what_both_scripts_need_is_the_same_text_in_both() -> None:
    single = definitions(SINGLE)
    group = definitions(GROUP)
    assert single.keys() - group.keys() == ONLY_SINGLE
    assert group.keys() - single.keys() == ONLY_GROUP
    shared = [name for name in single if name in group]
    assert shared == [name for name in group if name in single]
    assert {name for name in shared if single[name] != group[name]} == DIFFERENT


def test_each_line_of_a_script_is_compared() -> None:
    for script in SCRIPTS:
        compared = "\n".join(definitions(script).values()).splitlines()
        body = source(script).split('"""\n', 2)[2]
        code = [line for line in body.splitlines() if line.strip()]
        missing = set(code) - set(compared)
        assert all(re.match("(import|from) ", line) for line in missing), missing


def test_the_docstrings_tell_the_same_of_each_script() -> None:
    # What differs are the first line and, at the end, the program.
    stories = []
    for script in SCRIPTS:
        story = docstring(script).partition("\n")[2].partition("A program of your own")[0]
        stories.append(story.replace(script, "SCRIPT"))
    assert stories[0] == stories[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_docstring_is_a_map_of_the_parts(script: str) -> None:
    named = [part.removeprefix("# --- ") for part in PARTS]
    lines = re.findall(rf"^    ({'|'.join(named)})  ", docstring(script), re.M)
    assert lines == named
    module = load(script)
    [states] = re.findall(r"^    Not sent -> .*$", docstring(script), re.M)
    life = ["NOT_SENT", "SUBMITTING", "QUEUED", "IN_PROGRESS", "SUCCESS", "FAILED"]
    assert re.split(" -> |, or ", states.strip()) == [getattr(module, name) for name in life]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_executed_and_needs_one_package(script: str) -> None:
    assert source(script).startswith(
        "#!/usr/bin/env -S uv run --script\n"
        "# /// script\n"
        '# requires-python = ">=3.10"\n'
        '# dependencies = ["requests"]\n'
        "# ///\n"
    )
    if os.name == "posix":
        assert (TOP / script).stat().st_mode & stat.S_IXUSR
    imported = set()
    for node in ast.walk(tree(script)):
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
    # requests stands on urllib3, and installs it
    assert imported - sys.stdlib_module_names == {"requests", "urllib3"}


# The parts


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_parts_come_in_order_under_their_comment_lines(script: str) -> None:
    lines = re.findall(r"^# --- .*$", source(script), re.M)
    assert len(lines) == len(PARTS)
    for line, part in zip(lines, PARTS, strict=True):
        assert re.match(rf"{part}\b", line)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("part", PARTS[1:])
def test_a_part_uses_nothing_of_what_stands_below(script: str, part: str) -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F821",
        "-",
    ]
    done = subprocess.run(
        [*command, "--output-format", "concise", "--target-version", "py310"],
        input=above(script, part),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def configuration_names(script: str) -> set[str]:
    """Return the names that are defined in the part Configuration."""
    first_line = above(script, PARTS[0]).count("\n")
    end_line = above(script, PARTS[1]).count("\n")
    part = [node for node in tree(script).body if first_line < node.lineno <= end_line]
    return {name for node in part for name in names_of(node)}


def functions(script: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield each function and method with its name."""
    for name, node in statements(tree(script).body):
        if isinstance(node, ast.FunctionDef):
            yield name, node


@pytest.mark.parametrize("script", SCRIPTS)
def test_below_the_configuration_its_names_are_only_defaults_of_parameters(
    script: str,
) -> None:
    configuration = configuration_names(script)
    assert {"MODEL_ID", "MAX_TOKENS", "load_questions", "build_request"} <= configuration
    first_line = above(script, PARTS[1]).count("\n")
    end_line = above(script, PARTS[4]).count("\n")
    defaults = [
        default for _, function in functions(script) for default in function.args.defaults
    ]
    used = set()
    for node in ast.walk(tree(script)):
        is_here = isinstance(node, ast.Name) and first_line < node.lineno <= end_line
        if is_here and node not in defaults and node.id in configuration:
            used.add(node.id)
    assert used == {"build_request"}
    users = {
        name for name, node in functions(script) if "build_request(" in ast.unparse(node.body)
    }
    assert users == {"new_record"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_environment_is_read_where_a_client_is_made_and_nowhere_else(
    script: str,
) -> None:
    readers = set()
    for name, function in functions(script):
        if re.search(r"\b(environ|getenv)\b", ast.unparse(function.body)):
            readers.add(name)
    assert readers == {"Client.__init__"}
    assert len(re.findall(r"\b(?:environ|getenv)\b", source(script))) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_constant_of_the_configuration_is_explained_where_it_is_set(
    script: str,
) -> None:
    text = above(script, "SAMPLE_QUESTIONS = [").partition(PARTS[0])[2]
    lines = [line for line in text.splitlines() if " = " in line]
    names = [line.partition(" = ")[0] for line in lines]
    expected = ["NUM_REQUESTS", "MODEL_ID", "MAX_TOKENS", "POLL_INTERVAL_SECONDS"]
    expected += ["MAX_POLL_ATTEMPTS", "MAX_CONCURRENT_POLLS"]
    expected += ["REQUEST_TIMEOUT_SECONDS", "RESULTS_DIR"]
    if script == GROUP:
        expected.remove("MAX_CONCURRENT_POLLS")
    assert names == expected
    assert all(re.search(r"  # \w.*", line) for line in lines)


SIGNATURES = {
    SINGLE: {
        "Client": "(api_key=None, base_url=None, timeout_seconds=30)",
        "Client.submit_generation": "(self, request)",
        "Client.fetch_generation": "(self, generation_id)",
        "Client.call": "(self, method, path, body=None)",
        "submit_all": "(client, pool, records, save, max_concurrent=5)",
        "poll_all": (
            "(client, pool, records, save, interval_seconds=1, max_attempts=120, max_concurrent=5)"
        ),
    },
    GROUP: {
        "Client": "(api_key=None, base_url=None, timeout_seconds=30)",
        "Client.submit_group": "(self, requests)",
        "Client.fetch_group": "(self, group_id)",
        "Client.call": "(self, method, path, body=None)",
        "submit_all": "(client, pool, records, save)",
        "poll_all": "(client, pool, records, save, interval_seconds=2, max_attempts=120)",
    },
}
FOR_BOTH = {
    "new_record": "(custom_id, question)",
    "build_request": "(custom_id, question)",
    "load_questions": "()",
    "Results": "(path)",
    "Results.save": "(self, records)",
    "Results.load": "(self)",
    "Results.close": "(self)",
    "Refused": "(*args)",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_signatures_that_programs_build_on(script: str) -> None:
    module = load(script)
    for path, expected in {**SIGNATURES[script], **FOR_BOTH}.items():
        value: Any = module
        for name in path.split("."):
            value = getattr(value, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert value("text").args == ("text",)
            continue
        signature = inspect.signature(value)
        plain = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in signature.parameters.values()
        ]
        assert str(inspect.Signature(plain)) == expected, path
    for name in ("Refused", "LockedOut", "NotAccepted", "Uncertain"):
        assert issubclass(getattr(module, name), module.ApiError)


# Importing

# What a script imports is imported first, since that opens files, and urllib3 tries out a socket.
# From then on, the script may read its own text and its bytecode, and nothing else may happen.
IMPORT = """
import ast, os, signal, sys, threading

path, folder = sys.argv[1:]
sys.path.insert(0, folder)
sys.dont_write_bytecode = True
with open(path, encoding="utf-8") as file:
    tree = ast.parse(file.read())
imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
exec(compile(ast.Module(imports, []), "imports", "exec"), {})
name = os.path.basename(path).removesuffix(".py")
harmless = ("import", "compile", "exec", "marshal.", "object.", "sys.", "os.listdir", "code.")
events = []


def watch(event, arguments):
    is_own_file = event == "open" and f"{os.sep}{name}." in str(arguments[0])
    if not is_own_file and not event.startswith(harmless):
        events.append(f"{event} {arguments}")


class Unreadable:
    def __getattribute__(self, name):
        raise AssertionError("the environment is read")

    __getitem__ = __contains__ = __iter__ = __getattribute__


environment = os.environ
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)
os.environ = Unreadable()
sys.addaudithook(watch)
__import__(name)
os.environ = environment
assert not events, events
assert threading.active_count() == 1
for number in (signal.SIGINT, signal.SIGTERM):
    assert signal.getsignal(number) is signal.default_int_handler
assert set(sys.modules[name].__dict__) >= {"Client", "Results", "submit_all", "poll_all"}
"""


def run_python(*arguments: str | Path, **options: Any) -> str:
    """Run Python in a process of its own to a good end; return what it has printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name == "SYSTEMROOT"}
    assert not run_python("-c", IMPORT, TOP / script, TOP, cwd=tmp_path, env=environment)
    assert not list(tmp_path.iterdir())


# Copying

RECORDS = """
client = Client()
records = [new_record("my-1", "What is 2 + 2?"), new_record("my-2", "What do bees make?")]
"""
WORK = """
saved = []
with ThreadPoolExecutor(2) as pool:
    submitted = list(submit_all(client, pool, records, saved.extend))
    final = list(poll_all(client, pool, records, saved.extend, interval_seconds=0.05))
for record in records:
    print(record.custom_id, record.outcome, record.response)
"""
PRINTED = "my-1 Success 2 + 2 equals 4.\nmy-2 Success Bees make honey.\n"
IMPORTS = """
from concurrent.futures import ThreadPoolExecutor
from {} import Client, new_record, poll_all, submit_all
"""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("way", ["imported", "copied and imported", "copied and continued"])
def test_what_stands_above_the_screen_does_a_job(
    script: str, way: str, tmp_path: Path, api: LocalApi
) -> None:
    copied = above(script, "# --- The screen")
    if way == "imported":
        shutil.copy(TOP / script, tmp_path / "parts.py")
    elif way == "copied and imported":
        (tmp_path / "parts.py").write_text(copied, "utf-8")
    beginning = copied if way == "copied and continued" else IMPORTS.format("parts")
    (tmp_path / "my_program.py").write_text(beginning + RECORDS + WORK, "utf-8")
    options: Any = {"cwd": tmp_path, "env": {**os.environ, **api.environment}}
    assert run_python("my_program.py", **options) == PRINTED
    assert len(api.generations) == 2


# The client and the records are made. From then on, the configuration and the environment are gone.
REMOVAL = """
import os
import {module}

for name in {names}:
    delattr({module}, name)
for name in ("INFERENCE_API_KEY", "INFERENCE_BASE_URL"):
    del os.environ[name]
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_work_reads_no_configuration_and_no_environment(
    script: str, api: LocalApi
) -> None:
    module = Path(script).stem
    removal = REMOVAL.format(module=module, names=sorted(configuration_names(script)))
    code = IMPORTS.format(module) + RECORDS + removal + WORK
    options: Any = {"cwd": TOP, "env": {**os.environ, **api.environment}}
    assert run_python("-c", code, **options) == PRINTED


def test_the_two_scripts_can_be_imported_together() -> None:
    modules: list[types.ModuleType] = [load(script) for script in SCRIPTS]
    assert modules[0].Client is not modules[1].Client
    assert modules[0].Record.__dataclass_fields__.keys() | {"group_id"} == (
        modules[1].Record.__dataclass_fields__.keys()
    )
