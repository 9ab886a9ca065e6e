"""What is shown: the sample's layout, in a pipe and on a terminal, in any encoding."""

import asyncio
import os
import re
import sys
import threading
from typing import Any

import pytest
from conftest import GROUP, SINGLE, Example, custom_ids, in_turn, is_submission
from local_api import Fault, Json, Proceed, status, web

if sys.platform != "win32":
    import pexpect
    import pyte

posix = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")


@pytest.fixture(autouse=True)
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget how wide a terminal the tests were started on."""
    monkeypatch.delenv("COLUMNS", raising=False)


# The sample

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
      Max generation time:       4556.0ms
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
    return re.sub(
        r"(Throughput: +) \d*\d\.\d\d|(Throughput: +)\d\d\.\d\d", r"\1\2##.##", shown
    )


def timed(shown: Json) -> Json:
    """Give a generation the sample's times and tokens."""
    first = shown["request"]["metadata"]["custom_id"] == "req-001"
    last = shown["request"]["metadata"]["custom_id"] == "req-010"
    finished = "00.955" if first else "04.556" if last else "02.815"
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
            return [
                e if early else e | running for e, early in zip(shown, is_early, strict=True)
            ]
        return shown

    example.edit(NUM_REQUESTS=10)
    if example.script == SINGLE:
        example.edit(MAX_CONCURRENT_POLLS=1)
    example.api.alter = timed
    example.api.alter_list = as_sampled
    run = example.run()
    shown = even(run.stdout)
    expected = HEADERS[example.script] + SUMMARY
    assert re.sub(r"Throughput: .*", "", shown) == re.sub(r"Throughput: .*", "", expected)
    assert re.search(r"\n      Throughput: {1,18}\d+\.\d\d req/s\n", run.stdout)
    assert run.stderr == ""
    assert "\r" not in run.stdout
    assert "\x1b" not in run.stdout


# Reading what is shown


def too_wide(shown: str) -> list[str]:
    """The lines of more than 80 columns, commands aside: they can't be wrapped."""
    lines = [line for line in shown.splitlines() if not line.startswith("      uv run ")]
    return [line for line in lines if len(line) > 80]


def part(shown: str, start: str, end: str) -> list[str]:
    """The lines between two headings, without the rule and the empty lines."""
    lines = shown.partition(start)[2].partition(end)[0].splitlines()
    return [line for line in lines if line.strip("-= ")]


def read_table(shown: str) -> tuple[list[int], dict[str, list[str]]]:
    """The widths of the table's columns, and its rows by custom id."""
    lines = iter(shown.partition("Request-Response")[2].splitlines())
    ruler = next(line for line in lines if re.fullmatch(r" (?: -+){4}", line))
    spans = [match.span() for match in re.finditer("-+", ruler)]
    rows = {}
    for line in lines:
        if not line or line.startswith("  ... and "):
            break
        custom_id, *cells = [line[start:end].rstrip() for start, end in spans]
        assert line == line[: spans[-1][1]]
        rows[custom_id] = cells
    return [end - start for start, end in spans], rows


def read_reasons(shown: str) -> dict[str, int]:
    """The reasons below the table, unwrapped, and how many requests have each."""
    blocks = re.findall(r"^  (\d+) without an answer: (.*\n(?:  \S.*\n)*)", shown, re.M)
    reasons = [" ".join(text.split()) for _, text in blocks]
    assert len(reasons) == len(set(reasons))
    return {reason: int(count) for reason, (count, _) in zip(reasons, blocks, strict=True)}


def ask(example: Example, questions: dict[str, str]) -> None:
    """Let load_questions return these, as a user does."""
    example.replace(
        "\n\n\ndef build_request(",
        f"\n\n\ndef load_questions():\n    return {questions!a}\n\n\ndef build_request(",
    )


def with_text(shown: Json, text: str) -> Json:
    """Give a generation another answer."""
    return shown | {"response": {"choices": [{"message": {"content": text}}]}}


def custom_id_of(shown: Json) -> str:
    """Return the custom id of a generation."""
    return str(shown["request"]["metadata"]["custom_id"])


def until(event: threading.Event) -> Fault:
    """Answer properly, but not before the event."""

    async def fault(request: web.Request, proceed: Proceed) -> web.StreamResponse:
        while not event.is_set():
            await asyncio.sleep(0.01)
        return await proceed()

    return fault


# Text from elsewhere

NASTY = {
    "escapes": "\x1b[2J\x1b]0;title\x07red\x1b[0m",
    "line breaks": "one\ntwo\r\nthree\rfour\x0bfive\u2028six\u2029seven\x85eight",
    "wide": "東京は日本の首都です。人口はおよそ千四百万人です。",
    "emoji": "🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉",
    "direction": "\u202egnirts\u202c \u200b\u200d\ufeff \u061c",
    "surrogate": "half \ud83d of it",
    "nul": "a\0b",
    "a long word": "a" * 200,
    "a long text": "many words " * 10_000,
    "only white space": " \n\t ",
    "combining": "e\u0301" * 30,
    "Hindi": "नमस्ते दुनिया",
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "utf-16"])
def test_text_from_elsewhere_is_made_fit(example: Example, encoding: str) -> None:
    example.environment = example.environment | {
        "PYTHONIOENCODING": encoding,
        "LC_ALL": "C",
    }
    example.edit(MODEL_ID=NASTY["emoji"])
    texts = list(NASTY.values())
    questions = {}
    for number, text in enumerate(texts * 2):
        name = text[:60].replace("\ud83d", "")  # SQLite takes no half of a surrogate pair
        questions[f"{number:02} {name}"] = text
    ask(example, questions)

    def answer(shown: Json) -> Json:
        number = int(custom_id_of(shown)[:2])
        text = texts[number % len(texts)]
        if number >= len(texts):
            return shown | {"state": "Failed", "stateMessage": text, "response": None}
        return with_text(shown, text)

    example.api.alter = answer
    process = example.start(stdout=-1)
    assert process.stdout
    process.stdout.reconfigure(encoding=encoding, errors="strict", newline="")  # type: ignore[attr-defined]
    run = example.finish(process)
    assert run.code == 1
    assert all(letter == "\n" or letter.isprintable() for letter in run.stdout)
    rows = part(run.stdout, "Request-Response", "without")
    assert len([line for line in rows if re.match(r"  \d\d ", line)]) == len(questions)
    assert not too_wide(run.stdout)
    answers = [run.final[custom_id]["response"] for custom_id in questions]
    assert answers[: len(texts)] == texts  # in full, whatever the screen can hold
    assert ("|████" in run.stdout) == encoding.startswith("utf")
    assert ("|????" in run.stdout) != encoding.startswith("utf")


# Where not all has an answer

REASON = (
    "no request can be carried out, as the model that is asked for was not found, or does not take "
    "what was sent: https://docs.inference.net"
)
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
        "req-002": status(400, REASON),
        "req-003": status(500, "a bad day"),
        "req-008": status(402, "no credit"),
    }

    def choose(request: web.Request, body: Json) -> Fault | None:
        if is_submission(request):
            return faults.get(body["metadata"]["custom_id"])
        generation = single.api.generations[request.path.rpartition("/")[2]]
        return status(404, "not here yet") if generation.custom_id == "req-004" else None

    single.api.choose_fault = choose
    run = single.run()
    assert run.code == 1
    submissions = part(run.stdout, "Submitting 10 Requests", "Polling for Results")
    assert [line[:28] for line in submissions if " → " not in line] == [
        "    ✗ req-002: HTTP 400: no ",
        "    ? req-003: HTTP 500: a b",
        "    - req-008: HTTP 402: no ",
    ]
    assert FIVE_ENDS in run.stdout
    assert "\n Not complete: 1 failed, 1 unknown, 1 pending, 3 not sent\n" in run.stdout
    assert "Generation complete!" not in run.stdout
    _, rows = read_table(run.stdout)
    assert {custom_id: (cells[0], cells[2]) for custom_id, cells in rows.items()} == {
        "req-001": ("✓ Success", "The capital of France..."),
        "req-002": ("✗ Failed", "HTTP 400: no request..."),
        "req-003": ("? Unknown", "HTTP 500: a bad day"),
        "req-004": ("… Pending", "HTTP 404: not here yet"),
        "req-005": ("✓ Success", "A spider has eight legs."),
        "req-006": ("✓ Success", "The chemical symbol..."),
        "req-007": ("✓ Success", "The Pacific Ocean is..."),
        "req-008": ("- Not sent", "HTTP 402: no credit"),
        "req-009": ("- Not sent", ""),
        "req-010": ("- Not sent", ""),
    }
    assert read_reasons(run.stdout) == {
        f"HTTP 400: {REASON}": 1,
        "HTTP 500: a bad day": 1,
        "HTTP 404: not here yet": 1,
        "HTTP 402: no credit": 1,
    }
    advice = [
        r"^  \? Unknown: perhaps paid for\b.* dashboard\b.*$",
        rf'^  … Pending: .*\n      uv run "{single.script}" --resume "results/{run.results.name}"$',
        rf'^  - Not sent: .*\n      uv run .* --resume "results/{run.results.name}" --submit$',
        rf"^  Results: results/{run.results.stem}\.jsonl$",
    ]
    assert re.search(r"\n(?:.*\n)*?".join(advice), run.stdout, re.M)
    assert not too_wide(run.stdout)

    single.api.choose_fault = lambda request, body: None
    resumed = single.run("--resume")
    assert f"\n    • Resuming: results/{run.results.name}\n" in resumed.stdout
    assert "\n      Successful:     5\n" in resumed.stdout
    assert re.search(r"^      Throughput: +-$", resumed.stdout, re.M)


@pytest.mark.parametrize("way", ["failed", "refused"])
def test_a_reason_of_many_stands_once_in_full(example: Example, way: str) -> None:
    example.edit(NUM_REQUESTS=10)
    reason = REASON
    if way == "failed":
        failed = {"state": "Failed", "stateMessage": REASON, "response": None}
        example.api.alter = lambda shown: shown | failed
    else:
        reason = f"HTTP 400: {REASON}"
        example.api.choose_fault = lambda request, body: status(400, REASON)
    run = example.run()
    assert run.code == 1
    assert "Generation complete!" not in run.stdout
    assert "\n Not complete: 10 failed\n" in run.stdout
    assert "\n      Failed:        10\n      Total:         10\n" in run.stdout
    assert "\n  ✗ |░░░░░" in run.stdout
    _, rows = read_table(run.stdout)
    assert list(rows) == [f"req-{number:03}" for number in range(1, 11)]
    for state, _, cell in rows.values():
        assert state == "✗ Failed"
        assert cell.endswith("...")
        assert reason.startswith(cell.removesuffix("..."))
    assert read_reasons(run.stdout) == {reason: 10}
    assert not too_wide(run.stdout)
    assert re.search(r"^      Throughput: +-$", run.stdout, re.M)
    if way == "refused":  # nothing was measured
        for name in ("Avg", "Min", "Max"):
            assert re.search(rf"^      {name} generation time: +-$", run.stdout, re.M)
        assert re.search(r"^      Avg completion/req: +0\.0$", run.stdout, re.M)


def test_submissions_are_listed_as_they_end(single: Example) -> None:
    seen = threading.Event()
    single.api.choose_fault = lambda request, body: (
        until(seen) if is_submission(request) and custom_ids(body) == ["req-001"] else None
    )
    single.edit(REQUEST_TIMEOUT_SECONDS=30)
    process = single.start()
    assert process.stdout
    listed: list[str] = []
    while len(listed) < 3:
        line = process.stdout.readline()
        assert line
        listed += re.findall(r"^    ✓ (req-\d+): ", line)
    assert sorted(listed) == ["req-002", "req-003", "req-004"]
    seen.set()
    run = single.finish(process)
    assert run.code == 0
    assert run.stdout.startswith("    ✓ req-001: ")  # what is left of it
    _, rows = read_table(run.stdout)
    assert list(rows) == ["req-001", *sorted(listed)]  # in the order of the questions


def test_an_answer_that_was_cut_off_is_told(example: Example) -> None:
    example.edit(MAX_TOKENS=5)  # which is enough for one of the four answers
    run = example.run()
    assert run.code == 0
    assert "\n Generation complete!\n" in run.stdout
    assert re.search(
        r"^      Successful: +4\n      Cut off: +3 .*MAX_TOKENS$", run.stdout, re.M
    )
    _, rows = read_table(run.stdout)
    assert [
        custom_id for custom_id in rows if rows[custom_id][2].startswith("[cut off] ")
    ] == [*("req-001", "req-003", "req-004")]
    assert rows["req-001"][2] == "[cut off] The capital..."
    assert rows["req-002"][2] == "2 + 2 equals 4."


def test_a_success_without_text_is_told(example: Example) -> None:
    call = {"choices": [{"message": {"content": None, "tool_calls": [{"id": "call-1"}]}}]}
    responses: dict[str, Json | None] = {"req-002": call, "req-003": None}
    example.api.alter = lambda shown: (
        shown | {"response": responses.get(custom_id_of(shown), shown["response"])}
    )
    run = example.run()
    assert run.code == 0
    _, rows = read_table(run.stdout)
    assert {custom_id: cells[2] for custom_id, cells in rows.items()} == {
        "req-001": "The capital of France...",
        "req-002": "(no plain text: see file)",
        "req-003": "",
        "req-004": "On a clear day the sky...",
    }


def test_of_many_requests_what_failed_has_a_line_and_the_table_the_first(
    single: Example,
) -> None:
    single.edit(NUM_REQUESTS=203)
    faults = {"req-007": status(400, "no"), "req-111": status(500, "perhaps")}

    def choose(request: web.Request, body: Json) -> Fault | None:
        return faults.get(custom_ids(body)[0]) if is_submission(request) else None

    def fail_one(shown: Json) -> Json:
        is_bad = custom_id_of(shown) == "req-203"
        return shown | ({"state": "Failed", "stateMessage": "no"} if is_bad else {})

    single.api.choose_fault = choose
    single.api.alter = fail_one
    run = single.run()
    submissions = part(run.stdout, "Submitting 203 Requests", "Polling for Results")
    assert sorted(submissions) == [
        "    ? req-111: HTTP 500: perhaps",
        "    ✗ req-007: HTTP 400: no",
    ]
    [answer] = part(run.stdout, "Polling for Results", "ASYNC GENERATION SUMMARY")
    assert re.fullmatch(r"  \[ *\d+/201\] \|[█░]{30}\| \d+% ✗ req-203", answer)
    _, rows = read_table(run.stdout)
    succeeded = [f"req-{number:03}" for number in range(1, 203)]
    assert list(rows) == succeeded[:50]
    assert f"\n  ... and 153 more in results/{run.results.stem}.jsonl\n" in run.stdout
    assert read_reasons(run.stdout) == {
        "no": 1,
        "HTTP 400: no": 1,
        "HTTP 500: perhaps": 1,
    }
    assert [row["custom_id"] for row in run.answers] == [*succeeded, "req-203"]


# In a pipe, and the lines of a group's polls


def test_a_pipe_is_told_how_far_it_is_again_and_again(example: Example) -> None:
    example.edit(REPEAT_SECONDS=0.1, POLL_INTERVAL_SECONDS=0.2)
    example.api.seconds = (1, 1)
    run = example.run()
    assert run.code == 0
    lines = re.findall(r"^  ⏳ (?:\d+ [a-z ]+, )+0:00:\d\d$", run.stdout, re.M)
    assert len(lines) > 1
    assert "\r" not in run.stdout
    assert "\x1b" not in run.stdout


def bars(shown: str) -> list[tuple[str, str]]:
    """The number of each poll that has a line, and the line."""
    return re.findall(r"^  \[ *(\d+)\] (.*)$", shown, re.M)


def test_each_poll_of_a_group_has_a_line(group: Example) -> None:
    polls: list[int] = []

    def at_last(shown: list[Json]) -> list[Json]:
        polls.append(1)
        if len(polls) == 1:
            return []
        running = {"state": "In Progress", "response": None}
        return [generation | running for generation in shown] if len(polls) == 2 else shown

    group.api.alter_list = at_last
    group.api.choose_fault = in_turn([None, status(500, REASON)])
    assert bars(group.run().stdout) == [
        ("1", f"|{'░' * 30}| 0/4 (0%) (⏳ 0 running, 4 queued)"),
        ("2", f"|{'░' * 30}| 0/4 (0%) (⏳ 0 running, 4 queued)"),
        ("3", f"|{'░' * 30}| 0/4 (0%) (⏳ 4 running, 0 queued)"),
        ("4", f"|{'█' * 30}| 4/4 (100%)"),
    ]


# On a terminal


class Terminal:
    """A pseudo-terminal with a script on it, and what it has on its screen."""

    def __init__(self, example: Example, width: int) -> None:
        self.screen = pyte.HistoryScreen(width, 24, history=5000, ratio=1)
        self.stream = pyte.Stream(self.screen)
        self.raw = ""
        example.edit(REDRAW_SECONDS=0.001)
        example.api.new_runs += 1
        self.child = pexpect.spawn(
            sys.executable,
            [example.script],
            cwd=str(example.folder),
            env={**os.environ, **example.environment},
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

    @property
    def printed(self) -> str:
        """All lines as they were printed at last, without what was redrawn."""
        lines = self.raw.split("\r\n")
        return "\n".join(re.sub(r".*\r(?!$)", "", line).rstrip() for line in lines)


LIVE_LINE = r"\r  ⏳ ([^\r]*), 0:00:\d\d"


@posix
@pytest.mark.parametrize("width", [80, 50])
def test_a_live_line_is_redrawn_in_place_while_a_call_waits(
    example: Example, width: int
) -> None:
    seen = threading.Event()
    example.api.choose_fault = lambda request, body: (
        None if is_submission(request) else until(seen)
    )
    example.edit(REQUEST_TIMEOUT_SECONDS=30)
    terminal = Terminal(example, width)
    for _ in range(3):
        terminal.read_until(r"\r  ⏳ 4 queued, 0:00:\d\d")
        assert "⏳ 4 queued, 0:00:0" in terminal.screen.display[terminal.screen.cursor.y]
    seen.set()
    assert terminal.finish() == 0
    assert "\x1b" not in terminal.raw
    assert not [line for line in terminal.lines if "⏳" in line.replace("(⏳", "")]
    live = [line for line in re.split(r"[\r\n]", terminal.raw) if re.match("  ⏳", line)]
    assert max(map(len, live)) < width
    if width == 80:  # no line wraps: the screen has the very lines that were printed
        printed = [line for line in terminal.printed.splitlines() if line]
        assert [line for line in terminal.lines if line] == printed


@posix
def test_the_live_line_counts_the_submissions(example: Example) -> None:
    seen = threading.Event()

    def choose(request: web.Request, body: Json) -> Fault | None:
        is_late = is_submission(request) and custom_ids(body)[-1] in (
            "req-003",
            "req-004",
        )
        return until(seen) if is_late else None

    example.api.choose_fault = choose
    example.edit(REQUEST_TIMEOUT_SECONDS=30)
    expected = {"4 submitting"}
    if example.script == SINGLE:
        example.edit(MAX_CONCURRENT_POLLS=1)
        expected = {"2 queued", "1 submitting", "1 not sent"}
    terminal = Terminal(example, 80)
    shown: set[str] = set()
    while shown != expected:
        terminal.read_until(LIVE_LINE)
        shown = set(terminal.child.match[1].split(", "))
    seen.set()
    assert terminal.finish() == 0


@posix
def test_ctrl_c_is_answered_below_the_live_line(example: Example) -> None:
    never = threading.Event()
    example.api.choose_fault = lambda request, body: (
        None if is_submission(request) else until(never)
    )
    example.edit(REQUEST_TIMEOUT_SECONDS=30)
    terminal = Terminal(example, 80)
    terminal.read_until(r"\r  ⏳ 4 queued, 0:00:\d\d")
    terminal.child.sendintr()
    assert terminal.finish() == 130
    lines = [line for line in terminal.lines if line]
    stopping = next(number for number, line in enumerate(lines) if "Stopping" in line)
    assert not [line for line in lines[stopping:] if re.match("  ⏳", line)]
    assert [line for line in lines if "Not complete: 4 pending" in line]


LONG_ANSWER = "This answer has sixty four columns, of which the last ends here."


@posix
@pytest.mark.parametrize(
    ("width", "answer"), [(50, 25), (60, 25), (80, 25), (120, 65), (200, 145)]
)
def test_the_table_takes_what_the_terminal_has(
    single: Example, width: int, answer: int
) -> None:
    names = {"a" * 24: "a" * 24, "b" * 25: "b" * 21 + "...", "c": "c"}
    ask(single, dict.fromkeys(names, "What is the capital of France?"))
    single.api.alter = lambda shown: with_text(shown, LONG_ANSWER)
    terminal = Terminal(single, width)
    assert terminal.finish() == 0
    widths, rows = read_table(terminal.printed)
    assert widths == [24, 10, 30, answer - 14]  # the custom ids take columns from the answers
    assert list(rows) == list(names.values())
    for state, question, cell in rows.values():
        assert (state, question) == ("✓ Success", "What is the capital of Fr...")
        if answer - 14 >= len(LONG_ANSWER):
            assert cell == LONG_ANSWER
        else:
            assert cell.endswith("...")
            assert LONG_ANSWER.startswith(cell.removesuffix("..."))
            assert len(cell) > answer - 14 - 10
    rules = re.findall("^=+$", terminal.printed, re.M)
    assert set(map(len, rules)) == {min(width, 80)}
    above, _, table = terminal.printed.partition("  ID ")
    assert not too_wide(above)
    assert max(map(len, table.splitlines())) <= max(width, 80)
