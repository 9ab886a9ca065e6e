"""What a run shows: the sample output, any terminal, text from elsewhere, a user's mistakes."""

import os
import re
import sys
from typing import Any

import pexpect
import pyte
import pytest
from conftest import Example, custom_ids, faulty
from local_api import ANSWERS, Json, reset, status

os.environ.pop("COLUMNS", None)  # how wide a terminal the tests were started on
posix = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")

RULE = "=" * 80
ASKED = [f"req-{n:03}: {question}" for n, question in enumerate(ANSWERS, 1)]
SUBMITTED = "\n".join(f"S    ✓ {asked} → ID" for asked in ASKED)
LISTED = "\n".join(f"G    {asked}" for asked in ASKED[:5])
BARS = [f"[{n:>3}/10] |{'█' * 3 * n:░<30}| {n}0%" for n in range(1, 11)]
ANSWERED = "\n".join(f"S  {bar} ✓ req-{n:03}" for n, bar in enumerate(BARS, 1))
# The sample outputs of both scripts. A line that begins with S or G is only in one of them.
SAMPLE = f"""\
{RULE}
S INFERENCE.NET ASYNC API - SINGLE REQUEST POLLING EXAMPLE
G INFERENCE.NET ASYNC GROUP API - POLLING EXAMPLE
{RULE}

  Configuration:
    • Requests to submit: 10
    • Model: inference-net/load-test
S    • Poll interval: 1s
S    • Concurrent polls: 5
G    • Poll interval: 2s

  Submitting 10 Requests
  --------------------------

{SUBMITTED}
{LISTED}
G    ... and 5 more
G
G  Submitting to Group API...
G  ✓ Group created: ID
G  ✓ Group size: 10

  Polling for Results
  -----------------------

{ANSWERED}
G  [  1] |░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░| 0/10 (0%) (⏳ 0 running, 10 queued)
G  [  2] |████████████████████████░░░░░░| 8/10 (80%) (⏳ 2 running, 0 queued)
G  [  3] |██████████████████████████████| 10/10 (100%)

{RULE}
S ASYNC GENERATION SUMMARY
G GROUP GENERATION SUMMARY
{RULE}

  Success Rate
  ----------------
  ✓ |████████████████████████████████████████| 100.0%

      Successful:    10
      Failed:         0
      Total:         10

  Performance Metrics
  -----------------------
      Total wall-clock time:          #s
      Avg generation time:            #ms
      Min generation time:            #ms
      Max generation time:            #ms
      Throughput:                     # req/s

  Token Usage
  ---------------
      Prompt tokens:            180
      Completion tokens:      1,000
      Total tokens:           1,180
      Avg completion/req:     100.0

  Request-Response Correlation
  --------------------------------

  ID         Status     Question                       Response
  ---------- ---------- ------------------------------ -------------------------
  req-001    ✓ Success  What is the capital of Fr...   The capital of France...
  req-002    ✓ Success  What is 2 + 2?                 2 + 2 equals 4.
  req-003    ✓ Success  Name one planet in our so...   Mars is a planet in...
  req-004    ✓ Success  What color is the sky on...    On a clear day the sky...
  req-005    ✓ Success  How many legs does a spid...   A spider has eight legs.
  req-006    ✓ Success  What is the chemical symb...   The chemical symbol...
  req-007    ✓ Success  Which ocean is the largest?    The Pacific Ocean is...
  req-008    ✓ Success  How many days are in a le...   A leap year has 366 days.
  req-009    ✓ Success  What do bees make?             Bees make honey.
  req-010    ✓ Success  What is the opposite of hot?   The opposite of hot is...

  Results: NAME

{RULE}
 Generation complete!
{RULE}
"""


def like_the_sample(shown: str) -> str:
    """Blot out ids and times, and put what ended in threads in order."""
    shown = re.sub(r"(?<=→ )[\w-]{12}\.\.\.\n|(?<=created: )[\w-]{21}\n", "ID\n", shown)
    shown = re.sub(r"(?<=Results: )results/async-[\w-]+\.jsonl\n", "NAME\n", shown)
    times = r"(?<=: )[ \d]+\.\d+(?=m?s\n| req/s\n)"
    shown = re.sub(times, lambda found: "#".rjust(len(found[0])), shown)
    for pattern in (r"(?<=    ✓ )req-.*", r"(?<=% ✓ ).*"):
        lines = sorted(re.findall(pattern, shown))
        shown = re.sub(pattern, lambda _, lines=lines: lines.pop(0), shown)
    return shown


def test_a_run_without_trouble_prints_the_sample_output(example: Example) -> None:
    usage = {"prompt_tokens": 18, "completion_tokens": 100, "total_tokens": 118}
    changes = iter([None, {"state": "In Progress", "response": None}, {}])

    def alter_list(shown: list[Json]) -> list[Json]:
        change = next(changes)  # of the last two
        for late in (each for each in shown if custom_ids(each["request"]) > ["req-008"]):
            late |= change or {}
        return [] if change is None else shown

    example.edit(NUM_REQUESTS=10, POLL_INTERVAL_SECONDS=2 if example.is_group else 1)
    example.api.alter = lambda each: each | {"response": each["response"] | {"usage": usage}}
    example.api.alter_list = alter_list
    run = example.run()
    other = "S" if example.is_group else "G"
    sample = re.sub(rf"^{other}.*\n|^[GS]", "", SAMPLE, flags=re.M)
    assert like_the_sample(run.stdout) == sample
    assert (run.code, run.stderr) == (0, "")


def read_table(shown: str) -> tuple[list[int], list[list[str]], str]:
    """The widths of the columns, the rows, and what is below them, without its line breaks."""
    _, ruler, below = re.split(r"^( (?: -+){4})\n", shown, maxsplit=1, flags=re.M)
    table, below = below.split("\n\n", 1)
    spans = [found.span() for found in re.finditer("-+", ruler)]
    rows = []
    for line in re.sub(r"\n  \.\.\. and \d+ more.*", "", table).split("\n"):
        assert all(line[start - 1] == " " for start, _ in spans), line
        assert len(line) <= len(ruler), line
        rows.append([line[start:end].rstrip() for start, end in spans])
    notes = below.split("=" * 9)[0]
    assert all(len(line) <= 78 for line in notes.split("\n") if "uv run" not in line)
    return [end - start for start, end in spans], rows, re.sub(r"\n +", " ", notes)


CHINESE, HINDI = "东京是日本的首都人口约一千四百万" * 3, "नमस्ते दुनिया"
TEXTS = [CHINESE, HINDI, "\x1b[2J\x1b]0;title\x07red\x1b[0m", "\0", "half \ud83d of it"]
TEXTS += ["one\ntwo\rthree\x0bfour\u2028five\u2029six\x85", "\u202egnirts\u202c \u200b\ufeff"]


def test_text_from_elsewhere_is_harmless_and_cut_at_its_column(example: Example) -> None:
    """In questions, answers, custom ids and errors."""
    texts = TEXTS * 2
    names = [f"{n:02} {text[:40]}".replace("\ud83d", "") for n, text in enumerate(texts)]
    example.ask(dict(zip(names, texts, strict=True)))

    def answer(shown: Json) -> Json:
        number = int(custom_ids(shown["request"])[0][:2])
        state = "Failed" if number >= len(TEXTS) else "Success"
        response = {"choices": [{"message": {"content": texts[number]}}]}
        return shown | {"state": state, "stateMessage": texts[number], "response": response}

    example.api.alter = answer
    run = example.run()
    assert [row["answer"] for row in run.answers] == texts
    assert all(letter == "\n" or letter.isprintable() for letter in run.stdout)
    _, rows, _ = read_table(run.stdout)
    assert [row[0][:2] for row in rows] == [name[:2] for name in names]
    assert rows[0][2:] == [f"{CHINESE[:25]}...", f"{CHINESE[:8]}..."]
    assert rows[1][2:] == [HINDI, "नमस्ते..."]


LATE = {"req-001": {"state": "Failed"}, "req-002": {"state": "In Progress"}}
LATE["req-003"] = {"state": "Queued"}
FAULTS = {"4 unknown": status(500, "a reason"), "4 not sent": status(402, "a reason")}
ENDS = {
    "Generation complete, but 3 answers are cut off": ("0 Failed", " --retry cut-off"),
    "Not complete: 1 failed, 2 pending": ("1 Failed, 2 Pending", " --retry failed"),
    "Not complete: 4 unknown": ("0 Failed, 4 Unknown", " --retry unknown"),
    "Not complete: 4 not sent": ("0 Failed, 4 Not sent", ""),
}


@pytest.mark.parametrize("banner", ENDS)
def test_what_is_missing_is_counted_with_a_command(example: Example, banner: str) -> None:
    """Unknown, Pending and Not sent have lines only where there are any; a reason stands once."""
    fault = FAULTS.get(banner.removeprefix("Not complete: "))
    states = LATE if "pending" in banner else {}
    example.edit(MAX_TOKENS=5 if "cut off" in banner else 100, MAX_POLL_ATTEMPTS=2)
    example.api.choose_fault = lambda *_: fault
    example.api.alter = lambda each: each | states.get(custom_ids(each["request"])[0], {})
    run = example.run()
    assert f"\n{RULE}\n {banner}\n{RULE}\n" in run.stdout
    outcomes = r"^      (Failed|Unknown|Pending|Not sent): +(\d+)$"
    figures = [f"{n} {outcome}" for outcome, n in re.findall(outcomes, run.stdout, re.M)]
    _, _, below = read_table(run.stdout)
    command = f'uv run "{example.script}" --resume "{run.path.relative_to(run.folder)}"'
    assert ", ".join(figures) == ENDS[banner][0]
    assert f"{command}{ENDS[banner][1]}\n" in below
    assert ("MAX_POLL_ATTEMPTS" in below) == ("pending" in banner)
    assert below.count("a reason") == (fault is not None)


def test_a_hundred_that_fail_alike_have_one_reason_and_50_rows(example: Example) -> None:
    """300 polls with 404 do not make hundreds of lines."""
    example.edit(NUM_REQUESTS=100, MAX_POLL_ATTEMPTS=3, POLL_INTERVAL_SECONDS=0.01)
    example.api.choose_fault = faulty(status(404, "not here " * 12), polls=True)
    run = example.run()
    _, rows, below = read_table(run.stdout)
    assert [row[0] for row in rows] == [f"req-{n:03}" for n in range(1, 51)]
    assert "\n  ... and 50 more" in run.stdout
    assert re.search(r"\b100\b.*(not here ?){12}", below)
    group_sizes = re.findall(r"Group size: (\d+)\n", run.stdout)
    assert group_sizes == (["50", "50"] if example.is_group else [])
    polls_shown = 3 * len(group_sizes)
    assert run.stdout.count("HTTP 404") == 50 + 1 + polls_shown  # a poll has a line there


def run_on_terminal(example: Example, columns: int) -> tuple[int, str, str]:
    """Run a script on a pseudo-terminal; return its exit code, what it printed, and the screen."""
    env = {**os.environ, **example.environment, "PYTHONUTF8": "1"}
    options: Any = {"env": env, "cwd": str(example.folder), "dimensions": (24, columns)}
    options |= {"encoding": "utf-8", "withexitstatus": True, "timeout": 60}
    printed, code = pexpect.run(f"'{sys.executable}' {example.script}", **options)
    screen = pyte.HistoryScreen(columns, 24, history=5000, ratio=1)
    pyte.Stream(screen).feed(printed)
    top = ["".join(line[x].data for x in range(columns)) for line in screen.history.top]
    return code, printed, "".join([*top, *screen.display])


@posix
@pytest.mark.parametrize("columns", [50, 80, 120])
def test_a_terminal_of_any_width(example: Example, columns: int) -> None:
    """No wider rule, a live line without remains, a table in line, with more of the answers."""
    question, answer = next(iter(ANSWERS.items()))
    names = ["harbour-report-2024a.txt", "harbour-report-of-the-year-2024.txt", "c"]
    states = dict(zip(names, ["Success", "In Progress", "Queued"], strict=True))
    example.api.choose_fault = faulty(status(503, "busy " * 40), polls=True, times=2)
    early = iter([states] * 20)
    example.api.alter = lambda shown: (
        shown | {"state": next(early, {}).get(custom_ids(shown["request"])[0], "Success")}
    )
    example.ask(dict.fromkeys(names, question))
    code, printed, screen = run_on_terminal(example, columns)
    assert (code, "\x1b" in printed) == (0, False)
    if not example.is_group:  # the one with a live line
        lives = re.findall("⏳[^\r\n]*\r", printed)
        assert max(map(len, lives)) < columns
        assert "1 success, 1 in progress, 1 queued" in "".join(lives)
        assert re.search(r"--- *(  \[  \d/3\] \|[█░]{30}\| \d+% ✓ [\w.-]+ *){3}===", screen)
    shown = re.sub(r"[^\n]*\r(?!\n)", "", printed).replace("\r\n", "\n")
    assert set(map(len, re.findall("^=+$", shown, re.M))) == {min(columns, 80)}
    widths, rows, _ = read_table(shown)
    assert widths == [24, 10, 30, max(columns, 80) - 69]
    assert [row[0] for row in rows] == [names[0], f"{names[1][:21]}...", "c"]
    assert {row[3] for row in rows} == {answer if columns == 120 else "The..."}


@posix
def test_a_dead_connection_shows_once_a_minute_in_a_pipe(single: Example) -> None:
    single.define("import itertools\nmonotonic = itertools.count(0.0).__next__")  # 1 s a look
    single.api.choose_fault = faulty(reset, polls=True)
    run = single.run()
    lines = re.findall(r"^  .*4 queued.*127\.0\.0\.1.*$", run.stdout, re.M)
    [seconds] = re.findall(r"wall-clock time: +([\d.]+)s\n", run.stdout)
    assert 1 <= len(lines) <= float(seconds) / 60


def test_a_dead_connection_shows_at_once_on_a_terminal(single: Example) -> None:
    single.edit(MAX_POLL_ATTEMPTS=1)  # so it shows in the first round, or too late
    single.api.choose_fault = faulty(reset, polls=True)
    live = r"⏳[^\r\n]*4 queued[^\r\n]*127\.0\.0\.1[^\r\n]*\r"
    assert re.search(live, run_on_terminal(single, 80)[1])


CONSTANTS = {
    "NUM_REQUESTS": 0,
    "MAX_TOKENS": 1.5,
    "POLL_INTERVAL_SECONDS": None,
    "MAX_POLL_ATTEMPTS": -1,
    "MAX_CONCURRENT_POLLS": "x",
    "REQUEST_TIMEOUT_SECONDS": 1e10,
    "RESULTS_DIR": __file__,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_named_with_its_value(single: Example, name: str) -> None:
    single.edit(**{name: CONSTANTS[name]})
    line = single.refuse()
    assert name in line
    assert repr(CONSTANTS[name]) in line


VARIABLES = {
    "no key": ("INFERENCE_API_KEY", None, r"set INFERENCE_API_KEY to .*local_api\.py"),
    "a key in words": ("INFERENCE_API_KEY", "my xyz", "INFERENCE_API_KEY"),
    "a key in quotes": ("INFERENCE_API_KEY", '"xyz"', "INFERENCE_API_KEY"),
    "http elsewhere": ("INFERENCE_BASE_URL", "http://xyz.net/v1", "INFERENCE_BASE_URL"),
}


@pytest.mark.parametrize("what", VARIABLES)
def test_a_variable_is_named_without_its_value(example: Example, what: str) -> None:
    name, value, words = VARIABLES[what]
    example.environment[name] = value
    line = example.refuse()
    assert re.search(words, line)
    assert "xyz" not in line


LOAD = "def load_questions():\n    return "
BUILD = "def build_request(custom_id, question):\n    return "
EDITS = {
    LOAD + "['Why?']": ["load_questions", "['Why?']", '{"', "FOLDER"],
    LOAD + "{}": ["load_questions", "{}", '{"', "FOLDER"],
    LOAD + "{'my-7': None}": ["build_request: the question", "my-7", "None"],
    LOAD + "open('my.csv')": ["load_questions", "my.csv"],
    BUILD + "int('x7')": ["build_request", "x7"],
    BUILD + "open('my.csv')": ["build_request", "my.csv"],
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_mistake_in_a_function(example: Example, edit: str) -> None:
    """The line begins with the function's name, and has the folder of relative paths."""
    example.define(edit)
    line = example.refuse()
    assert line.startswith(EDITS[edit][0])
    for word in EDITS[edit]:
        assert word.replace("FOLDER", str(example.folder)) in line


@pytest.mark.parametrize("edit", [LOAD + "{}['my-7']", BUILD + "len(7)"])
def test_any_other_error_of_the_user_shows_its_traceback(example: Example, edit: str) -> None:
    example.define(edit)
    stdout, stderr = example.start().communicate(timeout=60)
    assert re.fullmatch(r"Traceback(.*\n)+(KeyError: 'my-7'|TypeError: .*)\n", stderr)
    assert (stdout, example.api.calls) == ("", [])
