"""What is shown: the sample's layout, in a pipe and on a terminal, in any encoding."""

import asyncio
import os
import re
import sys
import threading
import unicodedata
from typing import Any

import pytest
from conftest import GROUP, SINGLE, Example, custom_ids, faulty
from local_api import Fault, Json, Proceed, status, web

if sys.platform != "win32":
    import pexpect
    import pyte

posix = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")

RULE = "=" * 80
HEADERS = {
    SINGLE: f"""\
{RULE}
 INFERENCE.NET ASYNC API - SINGLE REQUEST POLLING EXAMPLE
{RULE}

  Configuration:
    • Requests to submit: 10
    • Model: inference-net/load-test
    • Poll interval: 0.05s
    • Concurrent polls: 1

  Submitting 10 Requests
  --------------------------

    ✓ req-001: What is the capital of France? → ID
    ✓ req-002: What is 2 + 2? → ID
    ✓ req-003: Name one planet in our solar system. → ID
    ✓ req-004: What color is the sky on a clear day? → ID
    ✓ req-005: How many legs does a spider have? → ID
    ✓ req-006: What is the chemical symbol for water? → ID
    ✓ req-007: Which ocean is the largest? → ID
    ✓ req-008: How many days are in a leap year? → ID
    ✓ req-009: What do bees make? → ID
    ✓ req-010: What is the opposite of hot? → ID

  Polling for Results
  -----------------------

  [  1/10] |███░░░░░░░░░░░░░░░░░░░░░░░░░░░| 10% ✓ req-001
  [  2/10] |██████░░░░░░░░░░░░░░░░░░░░░░░░| 20% ✓ req-002
  [  3/10] |█████████░░░░░░░░░░░░░░░░░░░░░| 30% ✓ req-003
  [  4/10] |████████████░░░░░░░░░░░░░░░░░░| 40% ✓ req-004
  [  5/10] |███████████████░░░░░░░░░░░░░░░| 50% ✓ req-005
  [  6/10] |██████████████████░░░░░░░░░░░░| 60% ✓ req-006
  [  7/10] |█████████████████████░░░░░░░░░| 70% ✓ req-007
  [  8/10] |████████████████████████░░░░░░| 80% ✓ req-008
  [  9/10] |███████████████████████████░░░| 90% ✓ req-009
  [ 10/10] |██████████████████████████████| 100% ✓ req-010

{RULE}
 ASYNC GENERATION SUMMARY
{RULE}
""",
    GROUP: f"""\
{RULE}
 INFERENCE.NET ASYNC GROUP API - POLLING EXAMPLE
{RULE}

  Configuration:
    • Requests to submit: 10
    • Model: inference-net/load-test
    • Poll interval: 0.05s

  Submitting 10 Requests
  --------------------------

    req-001: What is the capital of France?
    req-002: What is 2 + 2?
    req-003: Name one planet in our solar system.
    req-004: What color is the sky on a clear day?
    req-005: How many legs does a spider have?
    ... and 5 more

  Submitting to Group API...
  ✓ Group created: ID
  ✓ Group size: 10

  Polling for Results
  -----------------------

  [  1] |░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░| 0/10 (0%) (⏳ 0 running, 10 queued)
  [  2] |████████████████████████░░░░░░| 8/10 (80%) (⏳ 2 running, 0 queued)
  [  3] |██████████████████████████████| 10/10 (100%)

{RULE}
 GROUP GENERATION SUMMARY
{RULE}
""",
}
SUMMARY = f"""
  Success Rate
  ----------------
  ✓ |████████████████████████████████████████| 100.0%

      Successful:    10
      Failed:         0
      Total:         10

  Performance Metrics
  -----------------------
      Total wall-clock time:       #.##s
      Avg generation time:       2803.1ms
      Min generation time:        955.0ms
      Max generation time:       4651.2ms
      Throughput:                 ##.## req/s

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

  Results: results/NAME

{RULE}
 Generation complete!
{RULE}
"""


def even(shown: str) -> str:
    """Blot out what is another at each run: ids, names of files, the wall clock."""
    shown = re.sub(r"→ [\w-]{12}\.\.\.", "→ ID", shown)
    shown = re.sub(r"created: [\w-]{21}", "created: ID", shown)
    shown = re.sub(r"async-(polling|group)-[\d-]+\.jsonl", "NAME", shown)
    shown = re.sub(r"(wall-clock time: +)\d\.\d\ds", r"\1#.##s", shown)
    return re.sub(r"(Throughput: +) \d*\d\.\d\d|(Throughput: +)\d\d\.\d\d", r"\1\2##.##", shown)


def timed(shown: Json) -> Json:
    """Give a generation the sample's times and tokens."""
    first = shown["request"]["metadata"]["custom_id"] == "req-001"
    last = shown["request"]["metadata"]["custom_id"] == "req-010"
    finished = "00.955" if first else "04.6512" if last else "02.803100"
    usage = {"prompt_tokens": 18, "completion_tokens": 100, "total_tokens": 118}
    return shown | {
        "dispatchedAt": "2026-01-01T00:00:00.000Z",
        "finishedAt": f"2026-01-01T00:00:{finished}Z",
        "response": shown["response"] | {"usage": usage},
    }


def test_all_is_shown_as_in_the_sample(example: Example) -> None:
    polls: list[int] = []

    def as_sampled(shown: list[Json]) -> list[Json]:
        polls.append(1)
        running = {"state": "In Progress", "response": None}
        is_early = [each["request"]["metadata"]["custom_id"] < "req-009" for each in shown]
        if len(polls) == 1:
            return []
        if len(polls) == 2:
            return [e if early else e | running for e, early in zip(shown, is_early, strict=True)]
        return shown

    example.edit(NUM_REQUESTS=10)
    if example.script == SINGLE:
        example.edit(MAX_CONCURRENT_POLLS=1)
    example.api.alter = timed
    example.api.alter_list = as_sampled
    run = example.run()
    shown = even(run.stdout)
    expected = HEADERS[example.script] + SUMMARY
    average = (955.0 + 4651.2 + 8 * 2803.1) / 10
    shown = shown.replace(f"{average:.1f}ms", "2803.1ms")
    assert re.sub(r"Throughput: .*", "", shown) == re.sub(r"Throughput: .*", "", expected)
    assert re.search(r"\n      Throughput: {1,18}\d+\.\d\d req/s\n", run.stdout)
    assert run.stderr == ""
    assert "\r" not in run.stdout
    assert "\x1b" not in run.stdout


NASTY = {
    "escapes": "\x1b[2J\x1b]0;title\x07red\x1b[0m",
    "line breaks": "one\ntwo\r\nthree\rfour\x0bfive\u2028six\u2029seven\x85eight",
    "wide": "東京は日本の首都です。人口はおよそ千四百万人です。",
    "emoji": "🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉",
    "direction": "\u202egnirts\u202c \u200b\u200d\ufeff \u061c",
    "surrogate": "half \ud83d of it",
    "nul": "a\0b",
    "a long word": "a" * 200,
    "a megabyte": "many words " * 100_000,
    "only white space": " \n\t ",
    "combining": "e\u0301" * 30,
    "Hindi": "नमस्ते दुनिया",
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "utf-16"])
def test_text_from_elsewhere_is_made_fit(example: Example, encoding: str) -> None:
    example.environment = example.environment | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    texts = list(NASTY.values())
    example.edit(NUM_REQUESTS=2 * len(texts), MODEL_ID=NASTY["emoji"])
    path = example.folder / example.script
    asked = [text if text.strip() else "?" for text in texts] * 2
    questions = f"SAMPLE_QUESTIONS = {asked!a}\n\n\ndef build_request"
    path.write_text(path.read_text("utf-8").replace("def build_request", questions, 1), "utf-8")

    def answer(shown: Json) -> Json:
        number = int(shown["request"]["metadata"]["custom_id"][4:]) - 1
        text = texts[number % len(texts)]
        if number >= len(texts):
            return shown | {"state": "Failed", "stateMessage": text, "response": None}
        return shown | {"response": {"choices": [{"message": {"content": text}}]}}

    example.api.alter = answer
    process = example.start(stdout=-1)
    assert process.stdout
    process.stdout.reconfigure(encoding=encoding, errors="strict", newline="")  # type: ignore[attr-defined]
    run = example.finish(process)
    assert run.code == 1
    assert all(each == "\n" or each.isprintable() for each in run.stdout)
    table = run.stdout.split("Request-Response")[1].splitlines()
    if encoding.startswith("utf"):  # in others a combining mark is a ? of its own
        rows = [line for line in table if line.startswith("  req-")]
        assert len(rows) == 2 * len(texts)
        assert max(map(columns, rows)) <= 80
        assert max(map(columns, table)) <= 13 + 300
    answers = [run.final[f"req-{number:03}"]["response"] for number in range(1, len(texts) + 1)]
    assert answers == texts  # in full, whatever the screen can hold
    assert ("|████" in run.stdout) == encoding.startswith("utf")
    assert ("|????" in run.stdout) != encoding.startswith("utf")


def columns(line: str) -> int:
    """How many columns of a terminal a line takes."""
    shown = [each for each in line if unicodedata.category(each) not in ("Mn", "Me")]
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in shown)


FIVE_ENDS = """\
      Successful:     4
      Failed:         1
      Unknown:        1
      Pending:        1
      Not sent:       3
      Total:         10
"""


def test_what_did_not_succeed_is_counted_and_listed(single: Example) -> None:
    single.edit(NUM_REQUESTS=10, MAX_CONCURRENT_POLLS=1, MAX_POLL_ATTEMPTS=2)
    faults = {
        "req-002": status(400, "a bad request"),
        "req-003": status(500, "a bad day"),
        "req-008": status(402, "no credit"),
    }

    def choose(request: web.Request, body: Json) -> Fault | None:
        if request.method == "POST":
            return faults.get(body["metadata"]["custom_id"])
        generation = single.api.generations[request.path.rpartition("/")[2]]
        return status(404, "not here yet") if generation.custom_id == "req-004" else None

    single.api.choose_fault = choose
    run = single.run()
    assert run.code == 1
    assert FIVE_ENDS in run.stdout
    assert "\n Not complete: 1 failed, 1 unknown, 1 pending, 3 not sent\n" in run.stdout
    assert "Generation complete!" not in run.stdout
    below = run.stdout.partition("Request-Response")[2]
    expected = [
        r"  req-002    ✗ Failed   .*\n             HTTP 400: a bad request$",
        r"  req-003    \? Unknown  .*\n             HTTP 500: a bad day$",
        r"  req-004    … Pending  .*\n             HTTP 404: not here yet$",
        r"  req-008    - Not sent .*\n             HTTP 402: no credit$",
        r"  req-009    - Not sent .*$",
        r"  req-010    - Not sent .*$",
        r"  \? Unknown: perhaps accepted, and paid for: see the dashboard ",
        rf"  … Pending: .*\n      uv run {single.script} --resume results/{run.results.name}$",
        rf"  - Not sent: .*\n      uv run .* --resume results/{run.results.name} --submit$",
    ]
    assert re.search(r"(?:.*\n)*?".join(expected), below, re.M)
    marks = re.findall(r"^  req-\d+ +(\S \w+(?: sent)?) ", run.stdout, re.M)
    assert marks == [
        *("✓ Success", "✗ Failed", "? Unknown", "… Pending"),
        *["✓ Success"] * 3,
        *["- Not sent"] * 3,
    ]


def failed(shown: Json) -> Json:
    return shown | {"state": "Failed", "stateMessage": "no", "response": None}


@pytest.mark.parametrize("way", ["failed", "refused"])
def test_ten_failures_are_no_completion(example: Example, way: str) -> None:
    example.edit(NUM_REQUESTS=10)
    if way == "failed":
        example.api.alter = failed
    else:
        example.api.choose_fault = lambda request, body: status(400, "no")
    run = example.run()
    assert run.code == 1
    assert "Generation complete!" not in run.stdout
    assert "\n Not complete: 10 failed\n" in run.stdout
    assert "\n      Failed:        10\n      Total:         10\n" in run.stdout
    assert "\n  ✗ |░░░░░" in run.stdout
    listed = re.findall(r"^  (req-\d+) +✗ Failed .*\n {13}(?:HTTP 400: )?no$", run.stdout, re.M)
    assert listed == [f"req-{number:03}" for number in range(1, 11)]
    if way == "refused":  # nothing was measured
        for name in ("Avg", "Min", "Max"):
            assert re.search(rf"^      {name} generation time: +-$", run.stdout, re.M)
        assert re.search(r"^      Avg completion/req: +0\.0$", run.stdout, re.M)


def test_submissions_are_listed_in_the_order_of_the_requests(single: Example) -> None:
    first = status(429, Retry_After="0")
    single.api.choose_fault = faulty(first, polls=False, times=2, only="req-001")
    run = single.run()
    assert run.code == 0
    sent = [row["custom_id"] for row in run.rows if row["state"] == "Queued"]
    assert sent[-1] == "req-001"
    listed = re.findall(r"^    ✓ (req-\d+): ", run.stdout, re.M)
    assert listed == [f"req-{number:03}" for number in range(1, 5)]


def test_a_cut_by_max_tokens_is_told(example: Example) -> None:
    def cut_off(shown: Json) -> Json:
        choice = shown["response"]["choices"][0] | {"finish_reason": "length"}
        return shown | {"response": shown["response"] | {"choices": [choice]}}

    example.api.alter = cut_off
    run = example.run()
    assert run.code == 0
    assert run.stdout.count("... [max_tokens]") == 4


def test_a_success_without_text_is_told(example: Example) -> None:
    example.api.alter = lambda shown: shown | {"response": None}
    run = example.run()
    assert run.code == 0
    assert run.stdout.count("(no text)") == 4


def test_a_long_table_begins_with_what_has_no_answer(single: Example) -> None:
    single.edit(NUM_REQUESTS=1001)

    def fail_two(shown: Json) -> Json:
        is_bad = shown["request"]["metadata"]["custom_id"] in ("req-051", "req-1001")
        return shown | ({"state": "Failed", "stateMessage": "no"} if is_bad else {})

    single.api.alter = fail_two
    run = single.run()
    table = run.stdout.partition("Request-Response")[2]
    rows = re.findall(r"^  (req-\d+) ", table, re.M)
    assert rows == ["req-051", "req-1001", *(f"req-{number:03}" for number in range(1, 49))]
    assert f"\n  ... and 951 more in results/{run.results.name}\n" in table
    assert list(run.final) == [f"req-{number:03}" for number in range(1, 1002)]


def test_a_pipe_is_told_something_every_minute(example: Example) -> None:
    path = example.folder / example.script
    text = path.read_text("utf-8")
    path.write_text(text.replace("MAX_SILENCE_SECONDS = 60", "MAX_SILENCE_SECONDS = 0.2"), "utf-8")
    example.edit(POLL_INTERVAL_SECONDS=1.5)
    example.api.seconds = (0.5, 0.5)
    run = example.run()
    assert run.code == 0
    assert re.search(r"^  ⏳ 0 running, 4 queued, 0:00:0\d$", run.stdout, re.M)
    assert "\r" not in run.stdout


# On a terminal


class Terminal:
    """A pseudo-terminal with a script on it, and what it has on its screen."""

    def __init__(self, example: Example, width: int) -> None:
        self.screen = pyte.HistoryScreen(width, 24, history=5000, ratio=1)
        self.stream = pyte.Stream(self.screen)
        self.raw = ""
        example.api.new_runs += 1
        self.child = pexpect.spawn(
            sys.executable,
            [example.script],
            cwd=str(example.folder),
            env={**os.environ, **example.environment, "COLUMNS": "200"},
            dimensions=(24, width),
            encoding="utf-8",
            timeout=30,
        )

    def read_until(self, pattern: str | Any) -> None:
        """Read until the pattern has come, and show all that came."""
        self.child.expect(pattern)
        after = self.child.after if isinstance(self.child.after, str) else ""
        self.raw += self.child.before + after
        self.stream.feed(self.child.before + after)

    def finish(self) -> int:
        """Read to the end, and return the exit code."""
        self.read_until(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus)

    @property
    def lines(self) -> list[str]:
        """All lines of the screen, and above it, as they were left."""
        top = [
            "".join(line[x].data for x in range(self.screen.columns)).rstrip()
            for line in self.screen.history.top
        ]
        return [*top, *(line.rstrip() for line in self.screen.display)]


@posix
@pytest.mark.parametrize("width", [80, 50])
def test_a_live_line_while_it_waits(example: Example, width: int) -> None:
    example.api.seconds = (3, 3)
    example.edit(POLL_INTERVAL_SECONDS=0.2)
    terminal = Terminal(example, width)
    terminal.read_until(r"4 queued, 0:00:01")
    assert "0 running, 4 queued, 0:00:01" in terminal.screen.display[terminal.screen.cursor.y]
    terminal.read_until(r"[24] running, [02] queued")
    code = terminal.finish()
    assert code == 0
    assert "\x1b" not in terminal.raw
    assert not [line for line in terminal.lines if "queued, 0:" in line]
    live = [part.rstrip("\n") for part in re.split(r"[\r\n]", terminal.raw) if "queued, 0:" in part]
    assert live
    assert max(map(columns, live)) < width
    if width == 80:  # no line wraps: the screen has the very lines that were printed
        printed = [re.sub(r".*\r(?!$)", "", line).rstrip() for line in terminal.raw.split("\r\n")]
        assert [line for line in terminal.lines if line] == [line for line in printed if line]


@posix
def test_the_live_line_counts_the_submissions(example: Example) -> None:
    arrived = threading.Event()  # the terminal has shown what was to be seen

    async def wait(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        while not arrived.is_set():
            await asyncio.sleep(0.01)
        return await proceed()

    def choose(request: web.Request, body: Json) -> Fault | None:
        is_polled = request.method == "GET"
        return wait if not is_polled and custom_ids(body)[-1] in ("req-003", "req-004") else None

    example.api.choose_fault = choose
    example.edit(REQUEST_TIMEOUT_SECONDS=30)
    if example.script == SINGLE:
        example.edit(MAX_CONCURRENT_POLLS=1)
    terminal = Terminal(example, 80)
    terminal.read_until(r"⏳ [0-3]/4 submitted, 0:00:01")
    assert "running" not in terminal.raw
    arrived.set()
    assert terminal.finish() == 0


@posix
def test_wide_characters_keep_the_table_in_its_columns(example: Example) -> None:
    example.api.alter = lambda shown: (
        shown | {"response": {"choices": [{"message": {"content": NASTY["wide"]}}]}}
    )
    path = example.folder / example.script
    questions = f"SAMPLE_QUESTIONS = [{NASTY['wide']!r}]\n\n\ndef build_request"
    path.write_text(path.read_text("utf-8").replace("def build_request", questions, 1), "utf-8")
    terminal = Terminal(example, 80)
    assert terminal.finish() == 0
    rows = [line for line in terminal.lines if re.match(r"  req-\d+ +✓", line)]
    assert len(rows) == 4
    assert all(columns(row.replace("\u200b", "")) <= 80 for row in rows)


def test_combining_marks_keep_the_table_in_its_columns(example: Example) -> None:
    hindi = "नमस्ते दुनिया"
    path = example.folder / example.script
    questions = f"SAMPLE_QUESTIONS = [{hindi!r}, 'Hello world']\n\n\ndef build_request"
    path.write_text(path.read_text("utf-8").replace("def build_request", questions, 1), "utf-8")
    example.api.alter = lambda shown: (
        shown | {"response": {"choices": [{"message": {"content": "the answer"}}]}}
    )
    run = example.run()
    rows = re.findall(r"^  req-\d+ +✓.*$", run.stdout, re.M)
    assert len(rows) == 4
    assert len([row for row in rows if hindi in row]) == 2
    assert {columns(row.partition("the answer")[0]) for row in rows} == {55}


@posix
def test_trouble_is_told_in_the_live_line(example: Example) -> None:
    example.api.choose_fault = lambda request, sent: (
        status(500, "oh dear") if request.method == "GET" else None
    )
    example.edit(MAX_POLL_ATTEMPTS=12, POLL_INTERVAL_SECONDS=0.2)
    terminal = Terminal(example, 80)
    terminal.read_until("HTTP 500: oh dear")
    assert terminal.finish() == 1


@posix
def test_the_live_line_is_gone_after_ctrl_c(example: Example) -> None:
    example.api.seconds = (60, 60)
    example.edit(MAX_POLL_ATTEMPTS=1000)
    terminal = Terminal(example, 80)
    terminal.read_until("4 queued, 0:00:01")
    terminal.child.sendintr()
    assert terminal.finish() == 130
    assert not [line for line in terminal.lines if "queued, 0:" in line]
    assert [line for line in terminal.lines if "Not complete: 4 pending" in line]


def test_a_poll_that_finds_nothing_final_adds_no_line(group: Example) -> None:
    group.api.seconds = (2, 2)
    group.edit(POLL_INTERVAL_SECONDS=0.1)
    bars = re.findall(r"^  \[ *(\d+)\] .* ([04])/4 ", group.run().stdout, re.M)
    assert [done for _, done in bars] == ["0", "4"]
    assert int(bars[0][0]) == 1
    assert int(bars[1][0]) > 10
