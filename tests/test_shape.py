"""What holds for the files: one text in both scripts, their parts, and what importing them does."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GROUP, SCRIPTS, SINGLE, TOP

PARTS = ["Configuration", "The API", "The records", "The work", "The screen", "The script"]
# What both scripts define in ways of their own, or one of them alone, as their APIs differ
DIFFERENT = """
    POLL_INTERVAL_SECONDS MAX_CONCURRENT_POLLS Client.submit_generation Client.submit_group
    Client.fetch_generation Client.fetch_group Record.group_id Record.outcome TABLE
    MAX_GROUP_SIZE MAX_IN_VAIN OnRecord OnGroup submit_all submit poll_all poll take
    IS_TERMINAL Screen Screen.__init__ Screen.clear Screen.show_progress
    Screen.show_questions Screen.show_submission Screen.show_poll PREFIX NUMBERS run end_run
"""
SOURCES = {script: (TOP / script).read_text("utf-8") for script in SCRIPTS}
TREES = {script: ast.parse(source) for script, source in SOURCES.items()}
each_script = pytest.mark.parametrize("script", SCRIPTS)


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement defines, without imports."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Each statement with the name that it defines, or none; those of a class come after it."""
    for node in body:
        yield from ((prefix + name, node) for name in names_of(node) or [""])
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body[1:], f"{node.name}.")


def texts(script: str) -> dict[str, str]:
    """The text of each definition, with the comments above it; of a class, to its docstring."""
    found = {}
    end = 0
    for name, node in definitions(TREES[script].body):
        last = node.body[0] if isinstance(node, ast.ClassDef) else node
        start, end = end, last.end_lineno or 0
        found[name] = "\n".join(SOURCES[script].split("\n")[start:end])
    del found[""]
    return found


def test_what_both_scripts_need_is_the_same_text_in_the_same_order() -> None:
    single, group = texts(SINGLE), texts(GROUP)
    assert [name for name in single if name in group] == [n for n in group if n in single]
    different = {name for name in single | group if single.get(name) != group.get(name)}
    assert different == set(DIFFERENT.split())


@each_script
def test_a_script_is_for_uv_run_and_needs_one_package(script: str) -> None:
    assert SOURCES[script].startswith(
        "#!/usr/bin/env -S uv run --script\n# /// script\n"
        '# requires-python = ">=3.10"\n# dependencies = ["requests"]\n# ///\n"""'
    )
    imports = [
        node
        for node in ast.walk(TREES[script])
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    modules = {re.split(r"[ .]", ast.unparse(node))[1] for node in imports}
    assert modules - sys.stdlib_module_names == {"requests", "urllib3"}


@each_script
def test_each_part_uses_only_names_of_the_parts_above_it(script: str) -> None:
    lines = SOURCES[script].split("\n")
    starts = [n for n, line in enumerate(lines, 1) if line.startswith("# --- ")]
    assert [re.split("[-:,] ?", lines[n - 1])[3] for n in starts] == PARTS
    defined = {name: node.lineno for node in TREES[script].body for name in names_of(node)}
    used = [node for node in ast.walk(TREES[script]) if isinstance(node, ast.Name)]
    for end in starts:
        above = {node.id for node in used if node.lineno < end}
        assert not {name for name in above if defined.get(name, 0) > end}


IMPORT = """
import signal, sys, threading
def watch(event, arguments):
    assert event not in ("socket.connect", "sqlite3.connect", "subprocess.Popen", "os.mkdir")
before = signal.getsignal(signal.SIGINT), threading.active_count()
sys.addaudithook(watch)
__import__(sys.argv[1])
assert before == (signal.getsignal(signal.SIGINT), threading.active_count())
"""


@each_script
def test_importing_a_script_does_nothing(script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-c", IMPORT, script.removesuffix(".py")]
    env = {**os.environ, "PYTHONPATH": str(TOP)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not os.listdir(tmp_path)
