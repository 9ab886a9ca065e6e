# /// script
# requires-python = ">=3.10"
# dependencies = ["requests"]
# ///
"""Ask inference.net's Asynchronous API questions, as one group, and poll for all the answers.

A new run submits the group, then polls it until each of its generations is final. With --resume
nothing is submitted: what an earlier run left unfinished is polled, and its file added to.

to run it: uv run async_group_example.py
environment: INFERENCE_API_KEY, your key; INFERENCE_BASE_URL, if the API is somewhere else
exit codes: 0 every request succeeded; 1 some failed, are unfinished or unknown, or were not sent;
2 a mistake in configuration or usage, nothing was sent; 130 interrupted
"""

import argparse
import codecs
import heapq
import io
import itertools
import json
import math
import os
import queue
import random
import re
import shlex
import signal
import ssl
import sys
import textwrap
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_type_hints

from requests import PreparedRequest, Response, Session
from requests.exceptions import InvalidSchema, InvalidURL
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

Json = dict[str, Any]

# --- Configuration: what you edit ---

NUM_REQUESTS = 10  # how many to submit, 1 to 50; the questions are repeated as needed
MODEL_ID = "inference-net/load-test"  # the model that answers
POLL_INTERVAL_SECONDS = 2  # between two polls of the group; raise it for a long wait
MAX_POLL_ATTEMPTS = 120  # polls of the group in one run; what is unfinished then can be resumed
REQUEST_TIMEOUT_SECONDS = 30  # to connect, and again for each wait for data
RESULTS_DIR = "results"  # the folder for the results files; made where it is missing

SAMPLE_QUESTIONS = [
    "What is the capital of France?",
    "What is 2 + 2?",
    "Name one planet in our solar system.",
    "What color is the sky on a clear day?",
    "How many legs does a spider have?",
    "What is the chemical symbol for water?",
    "Which ocean is the largest?",
    "How many days are in a leap year?",
    "What do bees make?",
    "What is the opposite of hot?",
    "Which language is spoken in Brazil?",
    "How many sides does a hexagon have?",
    "At how many degrees Celsius does water freeze?",
    "Who wrote Romeo and Juliet?",
    "Which metal is liquid at room temperature?",
]


def build_request(custom_id: str, question: str) -> Json:
    """Return the chat completion request for a question; the API echoes its metadata (strings)."""
    return {
        "model": MODEL_ID,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 100,
        "metadata": {"custom_id": custom_id},
    }


# --- The API: every exchange brings an answer, or ends in an ApiError ---

REFUSED = "refused"  # this request will not do
LOCKED_OUT = "locked out"  # no exchange of this kind will do
UNAVAILABLE = "unavailable"  # no answer, and surely not carried out
UNCERTAIN = "uncertain"  # no answer, and perhaps carried out: a submission may be paid for
MAX_RETRY_AFTER_SECONDS = 120  # the longest wait that a server is granted


class ApiError(Exception):
    """An exchange without an answer: how it ended, and why, in a text free of the key."""

    def __init__(self, ending: str, reason: str, retry_after_seconds: float = 0) -> None:
        super().__init__(hide_key(reason))
        self.ending, self.retry_after_seconds = ending, retry_after_seconds


def api_key() -> str:
    """Return the key from INFERENCE_API_KEY, or raise a ValueError that does not show it."""
    key = os.environ.get("INFERENCE_API_KEY", "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError("INFERENCE_API_KEY must be set to your key, which is printable ASCII")
    return key


def base_url() -> str:
    """Return the API's URL from INFERENCE_BASE_URL, or raise ValueError if no key may go there."""
    url = os.environ.get("INFERENCE_BASE_URL", "https://api.inference.net/v1").strip()
    origin = r"https://([\w.-]+|\[[\da-f:.]+\])|http://(localhost|127(\.\d+){3}|\[::1\])"
    match = re.fullmatch(rf"({origin})(:(?P<port>\d+))?(/[\w.~/%-]*)?", url, re.I | re.A)
    if not match or int(match["port"] or 443) > 65535:
        what = "an https URL, or an http one on the loopback interface"  # http would show the key
        raise ValueError(f"INFERENCE_BASE_URL must be {what}, not {url!r}")
    return url.rstrip("/")


def hide_key(text: str) -> str:
    """Return text without the key, which a server may echo."""
    return text.replace(api_key(), "[API key]")


def authorize(request: PreparedRequest) -> PreparedRequest:
    """Put the key into a request, as its auth: a plain header would be overridden by .netrc."""
    request.headers["Authorization"] = f"Bearer {api_key()}"
    return request


def exchange(session: Session, path: str, timeout_seconds: float, body: Json | None = None) -> Json:
    """GET path, or POST body to it; return the JSON object that answers, or raise ApiError."""
    # A file object is read once the connection stands and not before, so that its position
    # tells whether anything of the request's body can have reached the server.
    payload = io.BytesIO(json.dumps(body).encode()) if body else None
    url = base_url() + path
    try:
        response = session.request(
            "POST" if body else "GET",
            url,
            data=payload,
            headers={"Content-Type": "application/json"} if body else None,
            auth=authorize,
            timeout=timeout_seconds,
            allow_redirects=False,
            proxies={"http": ""},  # plain http is for the loopback, where a proxy has no business
        )
    except Exception as error:  # not all that comes out of a broken exchange is requests' own
        raise broken(error, has_left=bool(payload and payload.tell())) from error
    if not 200 <= response.status_code < 300:
        raise rejected(response, is_submission=bool(body))
    try:
        answer = json.loads(response.content)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ApiError(UNCERTAIN, f"HTTP {response.status_code}: the answer is no JSON object")
    return answer


def broken(error: Exception, has_left: bool) -> ApiError:
    """Return the ApiError for an exchange that broke; has_left: after its body began to leave."""
    cause: BaseException = error
    while deeper := cause.__cause__ or cause.__context__:
        cause = deeper
    ending = UNCERTAIN if has_left else UNAVAILABLE
    # What no retry mends: a proxy's URL, a CA bundle that is not there (a bare OSError), and
    # a certificate that can't be trusted, as against other trouble with TLS.
    is_setting = isinstance(error, (InvalidURL, InvalidSchema)) or type(error) is OSError
    if is_setting or isinstance(cause, ssl.SSLCertVerificationError):
        ending = LOCKED_OUT
    return ApiError(ending, f"{type(error).__name__}: {cause}")


def rejected(response: Response, is_submission: bool) -> ApiError:
    """Return the ApiError for an answer whose status is not 2xx."""
    status = response.status_code
    try:
        message = str(json.loads(response.content)["error"]["message"])
    except (ValueError, TypeError, LookupError, RecursionError):
        message = re.sub("<[^>]*>", " ", response.content[:2000].decode(errors="replace"))
    reason = f"HTTP {status}: {' '.join(message.split()) or response.reason}"
    try:
        wait_seconds = Retry().parse_retry_after(response.headers["Retry-After"])
    except (LookupError, ValueError, OverflowError, InvalidHeader):
        wait_seconds = None
    reason += f" (Retry-After: {wait_seconds:.0f} s)" if wait_seconds else ""
    if status in (401, 403) or (is_submission and status == 402):
        ending = LOCKED_OUT
    elif status == 429 or (status == 503 and wait_seconds is not None):
        is_too_long = is_submission and (wait_seconds or 0) > MAX_RETRY_AFTER_SECONDS
        ending = LOCKED_OUT if is_too_long else UNAVAILABLE
    else:
        ending = REFUSED if 300 <= status < 500 else UNCERTAIN
    return ApiError(ending, reason, min(wait_seconds or 0, MAX_RETRY_AFTER_SECONDS))


def usable_id(value: object) -> str | None:
    """Return value if it is an id; anything else might change the URL that it is put in."""
    return value if isinstance(value, str) and re.fullmatch("[A-Za-z0-9_-]+", value) else None


def submit_group(session: Session, requests: list[Json], timeout_seconds: float) -> str:
    """Submit 1 to 50 chat completion requests as a group; return its id, or raise ApiError.

    POST /v1/async/group/chat/completions. After an UNCERTAIN end it may have been accepted: sent
    again, it may be paid for twice.
    """
    body = {"requests": requests}
    answer = exchange(session, "/async/group/chat/completions", timeout_seconds, body)
    group_id = usable_id(answer.get("groupId"))
    if not group_id:
        raise ApiError(UNCERTAIN, "the answer has no usable id")
    return group_id


def fetch_group(session: Session, group_id: str, timeout_seconds: float) -> list[Any]:
    """Return a group's generations as they are now, in any order, or raise ApiError.

    GET /v1/async/group/{groupId}/generations. A 404 for a while after the submission is normal,
    and so is a generation that is missing until it is done.
    """
    answer = exchange(session, f"/async/group/{group_id}/generations", timeout_seconds)
    if not isinstance(answer.get("generations"), list):
        raise ApiError(UNCERTAIN, "the answer has no generations")
    return list(answer["generations"])


# --- The record of a request, and the results file ---

NOT_SENT, SUBMITTING, UNKNOWN = "Not sent", "Submitting", "Unknown"  # before the API has a word
QUEUED, IN_PROGRESS, SUCCESS, FAILED = "Queued", "In Progress", "Success", "Failed"  # its words
PENDING = "Pending"  # the outcome, so far, of what is accepted and not final
MAX_NUMBER = 2**53  # the end of what every JSON reader agrees on


@dataclass
class Record:
    """A request and its fate. As JSON, a row of the results file: the last row of an id counts."""

    custom_id: str | None
    question: str
    group_id: str | None = None
    generation_id: str | None = None
    state: str = NOT_SENT
    response: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    duration_ms: int | float | None = None
    error: str | None = None


POLLED_ID = "group_id"  # the field with the id by which the API is polled
Batch = list[Record]  # what travels in one exchange; here all records


def outcome_of(record: Record) -> str:
    """Return what the record has come to: SUCCESS, FAILED, UNKNOWN, PENDING or NOT_SENT."""
    if record.state in (SUCCESS, FAILED):
        return record.state
    if getattr(record, POLLED_ID):
        return PENDING
    return UNKNOWN if record.state in (SUBMITTING, UNKNOWN) else NOT_SENT


def is_pending(record: Record) -> bool:
    """Tell whether the API has accepted the request, and its answer is still to come."""
    return outcome_of(record) == PENDING


def dig(value: Any, kind: type, *path: str | int) -> Any:
    """Follow path into JSON; return what is there if it is of that kind, and else None."""
    try:
        for step in path:
            value = value[step]
    except (LookupError, TypeError):
        return None
    return value if isinstance(value, kind) else None


def parse_time(text: object) -> datetime | None:
    """Return an ISO 8601 time, UTC where it names no offset; None if it is not one."""
    # Python 3.10 reads neither a Z nor any number of decimals but three and six.
    padded = re.sub(r"\.\d+", r"\g<0>00000", str(text))
    iso = re.sub(r"(\.\d{6})\d+", r"\1", padded).replace("Z", "+00:00")
    try:
        parsed = datetime.fromisoformat(iso)
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)


def apply(record: Record, generation: Json) -> None:
    """Copy into record what is known of its generation, any field of which may be odd."""
    record.state = generation["state"]
    reason = dig(generation, str, "stateMessage") or "no reason given"
    record.error = hide_key(reason) if record.state == FAILED else None
    content = dig(generation, object, "response", "choices", 0, "message", "content")
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else dig(part, str, "text") for part in parts]
    record.response = "".join(filter(None, texts)) or None
    record.finish_reason = dig(generation, str, "response", "choices", 0, "finish_reason")
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        count = dig(generation, int, "response", "usage", name)
        setattr(record, name, count if count is None or 0 <= count < MAX_NUMBER else None)
    dispatched = parse_time(generation.get("dispatchedAt"))
    finished = parse_time(generation.get("finishedAt"))
    if dispatched and finished and finished >= dispatched:
        record.duration_ms = round((finished - dispatched) / timedelta(milliseconds=1), 3)


def save(results: io.FileIO, records: list[Record]) -> None:
    """Append a row for each of the records, all or none; OSError if they can't be written."""
    rows = "".join(json.dumps(vars(record)) + "\n" for record in records).encode()
    size = results.seek(0, os.SEEK_END)
    try:
        if results.write(rows) < len(rows):
            raise OSError(f"no room left for {results.name}")
    except OSError:
        results.truncate(size)  # else the next row would be glued to a torn one
        raise


def read_results(path: Path) -> tuple[list[Record], int | None]:
    """Return the records in a results file, and where its last line begins if a kill tore it.

    Raises OSError if the file can't be read, ValueError if it is not one of this script's.
    """
    content = path.read_bytes() if path.is_file() else b""
    *lines, torn = content.split(b"\n")
    records: dict[tuple[str | None, str | None], Record] = {}
    types = get_type_hints(Record)
    try:
        for row in map(json.loads, lines):
            record = Record(**row)
            records[record.custom_id, record.custom_id or record.generation_id] = record
            if not usable_id(row[POLLED_ID] or "none"):
                raise ValueError
            for name, kind in types.items():
                value = row[name]
                is_absurd = isinstance(value, (int, float)) and not 0 <= value < MAX_NUMBER
                if is_absurd or not isinstance(value, kind):
                    raise ValueError
    except (ValueError, TypeError, LookupError, RecursionError):
        records = {}
    if not any(record.custom_id for record in records.values()):
        raise ValueError(f"--resume needs a results file of this script, which {path} is not")
    return list(records.values()), len(content) - len(torn) if torn else None


# --- The screen ---

MARKS = {SUCCESS: "✓", FAILED: "✗", UNKNOWN: "?", PENDING: "…", NOT_SENT: "-"}
LABELS = dict(zip(MARKS, ("Successful", FAILED, UNKNOWN, "Unfinished", NOT_SENT), strict=True))
PLAIN_SYMBOLS = dict(zip("█░✓✗…•→⏳", "#-+x.*>~", strict=True))  # for a stdout that can't show them
MAX_TABLE_ROWS = 50
MAX_SILENCE_SECONDS = 60

live_columns = 0  # the width of the live line that stands on the terminal
said_at = 0.0  # when the last line was shown


def width(text: str) -> int:
    """Return how many columns of a terminal text takes."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def fit(text: str, columns: int, at_word: bool = False) -> str:
    """Make text from elsewhere fit for the screen: printable, and cut or filled up to columns."""
    text = "".join(each if each.isprintable() else " " for each in text[:5000].strip())
    if width(text) > columns:
        ends = itertools.accumulate(map(width, text))
        kept = text[: sum(end <= columns - 3 for end in ends)]
        if at_word and " " in kept and text[len(kept)] != " ":
            kept = kept.rpartition(" ")[0]
        text = kept.rstrip() + "..."
    return text + " " * (columns - width(text))


def show_plainly(error: Any) -> tuple[str, int]:
    """Replace a character that stdout can't show: the error handler for its encoding."""
    return PLAIN_SYMBOLS.get(error.object[error.start], "?"), error.start + 1


def bar(done: int, total: int, columns: int) -> str:
    """Return a progress bar, which is full only when all is done."""
    filled = done * columns // total
    return f"|{'█' * filled}{'░' * (columns - filled)}|"


def say(text: str, is_live: bool = False) -> None:
    """Show text in the place of the live line, or as the live line."""
    global live_columns, said_at
    erase = "\r" + " " * (live_columns + len("^C")) + "\r" if live_columns else ""
    print(erase + text, end="" if is_live else "\n", flush=True)
    live_columns = width(text) if is_live else 0
    said_at = time.monotonic()


def show_waiting(records: list[Record], attempt: int, since: float, trouble: str) -> None:
    """Show what is waited for: in the live line of a terminal, or once a minute elsewhere."""
    outcomes = Counter(map(outcome_of, records))
    running = sum(record.state == IN_PROGRESS for record in records)
    queued = outcomes[PENDING] - running
    gauge = bar(outcomes[SUCCESS] + outcomes[FAILED], len(records), 4)
    passed = timedelta(seconds=int(time.monotonic() - since))
    text = f"[{attempt:>3}] {gauge} ⏳ {running} running, {queued} queued, {passed} {trouble}"
    if sys.stdout.isatty():
        columns = os.get_terminal_size(sys.stdout.fileno()).columns or 80
        say("  " + fit(text, columns - 4).rstrip(), is_live=True)
    elif time.monotonic() - said_at >= MAX_SILENCE_SECONDS:
        say("  " + fit(text, 200).rstrip())


def show_banner(title: str) -> None:
    """Show a title between two rules."""
    say(f"{'=' * 80}\n {title}\n{'=' * 80}")


def show_section(title: str) -> None:
    """Show the heading of a section."""
    say(f"\n  {title}\n  {'-' * (len(title) + 4)}\n")


def show_submission(batch: Batch) -> None:
    """Show what came of the submission."""
    first = batch[0]  # all share one fate
    if first.group_id:
        say(f"  ✓ Group created: {first.group_id}\n  ✓ Group size: {len(batch)}")
    else:
        say(f"  {MARKS[outcome_of(first)]} {fit(first.error or '', 76).rstrip()}")


def show_poll(attempt: int, batch: Batch, trouble: str, is_news: bool) -> None:
    """Show how many of the group's generations are final; no news only changes the live line."""
    if sys.stdout.isatty() and not is_news and (attempt > 1 or trouble):
        return
    total, running = len(batch), sum(record.state == IN_PROGRESS for record in batch)
    queued = sum(map(is_pending, batch)) - running
    done = total - running - queued
    rest = f" (⏳ {running} running, {queued} queued)" if done < total else ""
    text = f"[{attempt:>3}] {bar(done, total, 30)} {done}/{total} ({done * 100 // total}%){rest}"
    say(f"  {text} {fit(trouble, 200).rstrip()}".rstrip())


def show_unmatched(strays: list[Record]) -> None:
    """Show the generations that could not be matched to a question."""
    show_section("Unmatched Generations")
    for stray in strays:
        text = f"{MARKS[outcome_of(stray)]} {stray.generation_id}: {stray.response or stray.error}"
        say(f"    {fit(text, 76).rstrip()}")


def show_figures(records: list[Record], wall_seconds: float, finished: int) -> None:
    """Show success rate, performance and tokens; finished: how many became final in this run."""
    counts = Counter(map(outcome_of, records))
    done, total = counts[SUCCESS], len(records)
    shown = [outcome for outcome in MARKS if counts[outcome] or outcome in (SUCCESS, FAILED)]
    lines = "".join(f"      {LABELS[each] + ':':<13}{counts[each]:>4}\n" for each in shown)
    durations = [record.duration_ms for record in records if record.duration_ms is not None] or [0]
    completions = [record.completion_tokens for record in records if record.completion_tokens]
    say(f"""
  Success Rate
  ----------------
  {"✓" if done == total else "✗"} {bar(done, total, 40)} {done * 1000 // total / 10}%

{lines}      Total:       {total:>4}

  Performance Metrics
  -----------------------
      Total wall-clock time: {wall_seconds:>10.2f}s
      Avg generation time:   {sum(durations) / len(durations):>10.1f}ms
      Min generation time:   {min(durations):>10.1f}ms
      Max generation time:   {max(durations):>10.1f}ms
      Throughput:            {finished / max(wall_seconds, 0.01):>10.2f} req/s

  Token Usage
  ---------------
      Prompt tokens:     {sum(record.prompt_tokens or 0 for record in records):>10,}
      Completion tokens: {sum(completions):>10,}
      Total tokens:      {sum(record.total_tokens or 0 for record in records):>10,}
      Avg completion/req:{sum(completions) / max(len(completions), 1):>10,.1f}""")


def show_table(records: list[Record], results_name: str) -> None:
    """Show each answer beside its question."""
    show_section("Request-Response Correlation")
    say("  ID         Status     Question                       Response")
    say("  ---------- ---------- ------------------------------ -------------------------")
    for record in records[:MAX_TABLE_ROWS]:
        outcome = outcome_of(record)
        answer = record.error or record.state
        if outcome == SUCCESS:
            answer = fit(record.response or "(no text)", 25, at_word=True)
            if record.finish_reason == "length":
                answer = fit(answer, 12) + " [max_tokens]"
        name = fit(f"{record.custom_id}", 10)
        question = fit(fit(record.question, 28), 30)
        say(f"  {name} {MARKS[outcome]} {outcome:8} {question} {fit(answer, 25).rstrip()}")
    if len(records) > MAX_TABLE_ROWS:
        say(f"  ... and {len(records) - MAX_TABLE_ROWS} more in {results_name}")


def show_ending(records: list[Record], results_name: str, resume: str, stopped: str) -> None:
    """Show what did not succeed and what to do about it, and where the results are."""
    for outcome in (FAILED, UNKNOWN, PENDING):
        listed = [record for record in records if outcome_of(record) == outcome]
        if not listed:
            continue
        show_section(f"{LABELS[outcome]} Requests")
        for record in listed:
            name = f"{record.custom_id} {record.generation_id or getattr(record, POLLED_ID) or ''}"
            state = f"{record.state} " if outcome == PENDING else ""
            text = fit(f"{MARKS[outcome]} {name.strip()}: {state}{record.error or ''}", 1000)
            letters = 76 if width(text) == len(text) else 38  # wide ones take two columns
            say(textwrap.indent(textwrap.fill(text, letters), "    "))
        if outcome == UNKNOWN:
            say("\n    Perhaps accepted and paid for: look in the dashboard, then send anew.")
        if outcome == PENDING:
            say(f"\n    Paid for, and still to be fetched:\n      {resume}")
    counts = Counter(map(outcome_of, records))
    others = [outcome for outcome in (UNKNOWN, PENDING, NOT_SENT) if counts[outcome]]
    left = ", ".join(f"{counts[outcome]} {LABELS[outcome].lower()}" for outcome in others)
    say(f"\n  Results: {results_name}\n")
    show_banner(f"Not complete: {left}" if left else stopped or "Generation complete!")


# --- The work: submit, then poll ---

# The main thread alone owns the records, the results file, the screen and the clock. Workers
# carry out one exchange at a time: they take it from jobs, and put how it ended into events.

MAX_CONCURRENT_POLLS = 1  # there is one group, and so one exchange at a time
MAX_SUBMIT_ATTEMPTS = 5
GRACE_SECONDS = 2  # what exchanges in flight are left at Ctrl-C
TICK_SECONDS = 0.5  # how often the live line is redrawn and deadlines are looked at

Call = Callable[[Session, Batch], Any]
Ticket = tuple[Call, int, int]  # what to carry out, for which batch, in which attempt

jobs: queue.SimpleQueue[tuple[Ticket, Batch]] = queue.SimpleQueue()
events: queue.SimpleQueue[tuple[Ticket | None, Any]] = queue.SimpleQueue()


def submit(session: Session, batch: Batch) -> str:
    """Submit the batch; return the id by which it is polled."""
    requests = [build_request(f"{record.custom_id}", record.question) for record in batch]
    return submit_group(session, requests, REQUEST_TIMEOUT_SECONDS)


def poll(session: Session, batch: Batch) -> list[Any]:
    """Return the generations of the batch's group as they are now."""
    return fetch_group(session, str(batch[0].group_id), REQUEST_TIMEOUT_SECONDS)


def interrupt(*_: object) -> None:
    """Take note of Ctrl-C; a second one ends the script at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    events.put((None, KeyboardInterrupt("Ctrl-C")))


def work() -> None:
    """Carry out jobs over one connection, in a thread that never holds up the exit."""
    session = Session()
    while True:
        ticket, batch = jobs.get()
        call = ticket[0]
        try:
            events.put((ticket, call(session, batch)))
        except ApiError as error:
            events.put((ticket, error))


def carry_out(
    batches: list[Batch],
    call: Call,
    settle: Callable[[Batch, int, Any], float | None],
    results: io.FileIO,
) -> BaseException | None:
    """Have workers carry out call(session, batch) for each batch, until none is due again.

    settle(batch, attempt, outcome) takes what call returned, or its ApiError, and returns in how
    many seconds the batch is due again, if at all. Returns what ended the work early: Ctrl-C, the
    OSError of a file or screen that can't be written, or the ApiError that locked us out. Then
    nothing more leaves, and what is in flight is waited for.
    """
    started = time.monotonic()
    due = [(started, order, 1) for order in range(len(batches))]  # a heap
    deadlines: dict[Ticket, float] = {}  # of what is in flight
    held_until, tick_at, grace_ends = 0.0, 0.0, math.inf
    attempt, trouble = 0, ""
    stop: BaseException | None = None
    while deadlines or (due and not stop):
        now = time.monotonic()
        may_leave = due and not stop and len(deadlines) < MAX_CONCURRENT_POLLS
        leaves_at = max(due[0][0], held_until) if may_leave else math.inf
        try:
            if now >= tick_at:
                tick_at = now + TICK_SECONDS
                for late, deadline in deadlines.items():
                    if now >= min(deadline, grace_ends):
                        events.put((late, ApiError(UNCERTAIN, "no whole answer in time")))
                        threading.Thread(target=work, daemon=True).start()  # the old one is stuck
                show_waiting(list(itertools.chain(*batches)), attempt, started, trouble)
            if leaves_at <= now and events.empty():
                _, order, attempt = heapq.heappop(due)
                if call is submit:  # what can't be recorded is not sent
                    save(results, [replace(record, state=SUBMITTING) for record in batches[order]])
                deadlines[call, order, attempt] = now + 2 * REQUEST_TIMEOUT_SECONDS
                jobs.put(((call, order, attempt), batches[order]))
                continue
            ticket, outcome = events.get(timeout=max(0, min(leaves_at, tick_at) - now))
            now = time.monotonic()
            if isinstance(outcome, KeyboardInterrupt):
                stop, grace_ends = outcome, now + GRACE_SECONDS
            if ticket not in deadlines:  # it was Ctrl-C, or given up before
                continue
            del deadlines[ticket]
            _, order, attempt = ticket
            trouble = ""
            if isinstance(outcome, ApiError):
                trouble = str(outcome)
                held_until = max(held_until, now + outcome.retry_after_seconds)
                if outcome.ending == LOCKED_OUT:
                    stop = stop or outcome
            delay_seconds = settle(batches[order], attempt, outcome)
            if delay_seconds is not None:
                heapq.heappush(due, (now + delay_seconds, order, attempt + 1))
        except queue.Empty:
            pass
        except OSError as error:
            stop = stop or error
    return stop


def submit_all(batches: list[Batch], results: io.FileIO) -> BaseException | None:
    """Submit every batch, and record what came of it; return what ended that early, if anything."""

    def settle(batch: Batch, attempt: int, outcome: str | ApiError) -> float | None:
        delay_seconds = None
        if isinstance(outcome, ApiError):
            state = UNKNOWN if outcome.ending == UNCERTAIN else FAILED
            if outcome.ending == UNAVAILABLE and attempt < MAX_SUBMIT_ATTEMPTS:
                state, delay_seconds = NOT_SENT, 2 ** (attempt - 1) * random.uniform(0.5, 1)
            changes: Json = {"state": state, "error": str(outcome)}
        else:
            changes = {"state": QUEUED, "error": None, POLLED_ID: outcome}
        for record in batch:
            vars(record).update(changes)
        try:
            save(results, batch)
        finally:  # an id that can't be recorded is shown at least
            if delay_seconds is None:
                show_submission(batch)
        return delay_seconds

    stop = carry_out(batches, submit, settle, results)
    records = itertools.chain(*batches)
    try:
        save(results, [record for record in records if outcome_of(record) == NOT_SENT])
    except OSError as error:
        stop = stop or error
    return stop


def take(generation: Any, batch: Batch, strays: list[Record]) -> list[Record]:
    """Copy a generation into the record it belongs to; return that, if it has become final.

    The echoed custom_id decides, and the first final generation that echoes one. Any other
    final generation is a stray: it answers no question, but its answer is paid for, and kept.
    """
    if dig(generation, str, "state") is None:
        return []
    custom_id = dig(generation, str, "request", "metadata", "custom_id")
    record = Record(None, "", batch[0].group_id, usable_id(generation.get("id")))
    apply(record, generation)
    for asked in batch:
        if asked.custom_id != custom_id:
            continue
        claim = replace(record, custom_id=custom_id, question=asked.question)
        if is_pending(asked):
            vars(asked).update(vars(claim))
            return [] if is_pending(asked) else [asked]
        if claim == asked or (claim.generation_id and claim.generation_id == asked.generation_id):
            return []  # seen before
    if is_pending(record) or record in strays:
        return []
    strays.append(record)
    return [record]


def poll_all(
    batches: list[Batch], results: io.FileIO, strays: list[Record]
) -> BaseException | None:
    """Poll the group until it is final, and record that; return what ended it early."""

    def settle(batch: Batch, attempt: int, outcome: list[Any] | ApiError) -> float | None:
        before = [record.state for record in batch]
        generations = [] if isinstance(outcome, ApiError) else outcome
        trouble = str(outcome) if isinstance(outcome, ApiError) else ""
        final = [record for each in generations for record in take(each, batch, strays)]
        for record in filter(is_pending, batch):
            record.error = trouble or None
        save(results, final)
        show_poll(attempt, batch, trouble, before != [record.state for record in batch])
        if attempt < MAX_POLL_ATTEMPTS and any(map(is_pending, batch)):
            return POLL_INTERVAL_SECONDS
        return None

    return carry_out(batches, poll, settle, results)


# --- The script ---

RESULTS_PREFIX = "async-group"
MAX_GROUP_SIZE = 50


def check_configuration() -> None:
    """Raise ValueError for a constant or an environment variable that makes no sense."""
    if isinstance(NUM_REQUESTS, int) and NUM_REQUESTS > MAX_GROUP_SIZE:
        limit = f"a group holds {MAX_GROUP_SIZE} at most; async_polling_example.py takes more"
        raise ValueError(f"NUM_REQUESTS is {NUM_REQUESTS}, but {limit}")
    whole = ("NUM_REQUESTS", "MAX_POLL_ATTEMPTS", "MAX_CONCURRENT_POLLS")
    for name in (*whole, "POLL_INTERVAL_SECONDS", "REQUEST_TIMEOUT_SECONDS"):
        value = globals()[name]
        kind, wanted = (int, "a whole number") if name in whole else ((int, float), "a number")
        if not isinstance(value, kind) or value is True or not 0 < value <= 1_000_000:
            raise ValueError(f"{name} must be {wanted}, above 0 and to 1,000,000, not {value!r}")
    is_list = isinstance(SAMPLE_QUESTIONS, list) and SAMPLE_QUESTIONS != []
    if not is_list or not all(isinstance(text, str) and text.strip() for text in SAMPLE_QUESTIONS):
        wanted = "a list of one question or more, none of it blank"
        raise ValueError(f"SAMPLE_QUESTIONS must be {wanted}")
    api_key()
    base_url()


def new_run() -> tuple[list[Record], io.FileIO]:
    """Return the records of a new run, and its results file."""
    records = []
    for number in range(NUM_REQUESTS):
        custom_id = f"req-{number + 1:03}"
        question = SAMPLE_QUESTIONS[number % len(SAMPLE_QUESTIONS)]
        json.dumps(build_request(custom_id, question))  # fails here, before any other is paid for
        records.append(Record(custom_id, question))
    folder = Path(RESULTS_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{RESULTS_PREFIX}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}.jsonl"
    return records, io.FileIO(path, "xb")


def earlier_run(name: str) -> tuple[list[Record], io.FileIO]:
    """Return what the results file name holds, or else the newest with something unfinished."""
    newest_first = sorted(Path(RESULTS_DIR).glob(f"{RESULTS_PREFIX}-*.jsonl"), reverse=True)
    for path in [Path(name)] if name else newest_first:
        try:
            records, torn_at = read_results(path)
        except (OSError, ValueError):
            if name:
                raise
            continue
        if name or any(map(is_pending, records)):
            results = io.FileIO(path, "ab")
            if torn_at:  # and only then: another run may be at work on the file
                results.truncate(torn_at)
            return records, results
    raise ValueError(f"--resume finds nothing unfinished in {RESULTS_DIR}")


def main() -> int:
    """Run the script, and return its exit code."""
    signal.signal(signal.SIGINT, interrupt)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - None where it is closed
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("plain", show_plainly)
        sys.stdout.reconfigure(errors="plain")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    resume_help = "poll what FILE, or else the newest results file, has unfinished"
    parser.add_argument("--resume", nargs="?", const="", metavar="FILE", help=resume_help)
    resume = parser.parse_args().resume
    try:
        check_configuration()
        records, results = new_run() if resume is None else earlier_run(resume)
    except (OSError, ValueError, TypeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2

    started = time.monotonic()
    name = str(results.name)
    strays = [record for record in records if record.custom_id is None]
    records = [record for record in records if record.custom_id is not None]
    batches = [records]
    show_banner("INFERENCE.NET ASYNC GROUP API - POLLING EXAMPLE")
    say(f"""
  Configuration:
    • {f"Requests to submit: {len(records)}" if resume is None else f"Resuming: {name}"}
    • Model: {MODEL_ID}
    • Poll interval: {POLL_INTERVAL_SECONDS}s""")
    for _ in range(min(MAX_CONCURRENT_POLLS, len(batches))):
        threading.Thread(target=work, daemon=True).start()
    stop = None
    if resume is None:
        show_section(f"Submitting {len(records)} Requests")
        for record in records[:5]:
            say(f"    {record.custom_id}: {fit(record.question, 65).rstrip()}")
        if len(records) > 5:
            say(f"    ... and {len(records) - 5} more")
        say("\n  Submitting to Group API...")
        stop = submit_all(batches, results)
    accepted = sum(map(is_pending, records))
    unfinished = [batch for batch in batches if any(map(is_pending, batch))]
    if unfinished and not isinstance(stop, (KeyboardInterrupt, OSError)):
        show_section("Polling for Results")
        stop = poll_all(unfinished, results, strays) or stop
    stopped = fit(f"Stopped: {stop}", 1000).rstrip() if stop else ""
    if stop:
        say(f"\n  ✗ {stopped}")

    say("")
    show_banner("GROUP GENERATION SUMMARY")
    finished = accepted - sum(map(is_pending, records))
    show_figures(records, time.monotonic() - started, finished)
    show_table(records, name)
    if strays:
        show_unmatched(strays)
    resume_command = shlex.join(["uv", "run", sys.argv[0], "--resume", name])
    if isinstance(stop, OSError):
        resume_command = f"keep the ids above, as not all of them could be recorded in {name}"
    show_ending(records, name, resume_command, stopped)
    if isinstance(stop, KeyboardInterrupt):
        return 130
    has_all = all(outcome_of(record) == SUCCESS for record in records)
    return 0 if has_all and not stop and not strays else 1


if __name__ == "__main__":
    try:
        exit_code: int | str = main()
    except OSError as error:  # stdout is closed or full; what could be saved is saved
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        exit_code = 1 if isinstance(error, BrokenPipeError) else f"{sys.argv[0]}: {error}"
    sys.exit(exit_code)
