#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests"]
# ///
"""Ask inference.net's Asynchronous API questions, as one group, and poll for all the answers."""

import argparse
import io
import json
import os
import random
import re
import shlex
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from requests import Response, Session
from urllib3.util import Retry

# --- Configuration: what you edit

NUM_REQUESTS = 10  # how many to submit, up to 50; the questions repeat if there are fewer
MODEL_ID = "inference-net/load-test"  # the model that answers
POLL_INTERVAL_SECONDS = 2  # between two polls of the group; raise it to wait for hours
MAX_POLL_ATTEMPTS = 120  # polls of the group in one run; a resumed run starts at 0
REQUEST_TIMEOUT_SECONDS = 30  # to connect, and for each wait for data
RESULTS_DIR = "results"  # the folder for the results files; created if missing

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
]


def build_request(custom_id: str, question: str) -> dict[str, Any]:
    """Return the chat completion request for a question; its answer repeats the metadata."""
    return {
        "model": MODEL_ID,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 100,
        "metadata": {"custom_id": custom_id},  # metadata takes strings only
    }


# --- The API: a function for each endpoint, and exchange, which makes the HTTP request

MAX_RETRY_AFTER_SECONDS = 120  # the longest Retry-After that is obeyed
Json = dict[str, Any]


class ApiError(Exception):
    """An exchange failed: the class says how, the text why. The key is removed from the text."""

    def __init__(self, reason: str, retry_after_seconds: float = 0) -> None:
        super().__init__(reason.replace(api_key(), "[API key]")[:1000])
        self.retry_after_seconds = min(retry_after_seconds, MAX_RETRY_AFTER_SECONDS)


class Refused(ApiError):
    """The API rejects this request. Others may be fine."""


class LockedOut(ApiError):
    """The API rejects every request: the key, the credit or a certificate is at fault."""


class NotAccepted(ApiError):
    """The exchange certainly had no effect. It is safe to repeat."""


class Uncertain(ApiError):
    """The exchange may have had an effect. To repeat a submission may be to pay for it twice."""


def submit_group(session: Session, requests: list[Json], timeout_seconds: float) -> str:
    """POST /v1/async/group/chat/completions: submit 1 to 50 requests; return the group's id."""
    body = {"requests": requests}
    answer = exchange(session, "POST", "/async/group/chat/completions", timeout_seconds, body)
    group_id = answer.get("groupId")
    if not isinstance(group_id, str) or not re.fullmatch("[A-Za-z0-9_-]+", group_id):
        raise Uncertain(f"accepted, but the answer has no usable id: {answer}")
    return group_id


def fetch_group(session: Session, group_id: str, timeout_seconds: float) -> list[Json]:
    """GET /v1/async/group/{groupId}/generations: return those that are there, in any order."""
    answer = exchange(session, "GET", f"/async/group/{group_id}/generations", timeout_seconds)
    if not isinstance(answer.get("generations"), list):
        raise Uncertain("the answer has no list of generations")
    found = [each for each in answer["generations"] if isinstance(each, dict)]
    return [generation for generation in found if isinstance(generation.get("state"), str)]


def exchange(
    session: Session, method: str, path: str, timeout_seconds: float, body: Json | None = None
) -> Json:
    """Make one HTTP request; return its JSON object. Raises ApiError; ValueError before sending.

    timeout_seconds limits connecting and each wait for data; the whole answer may take twice that.
    """
    url, key = base_url() + path, api_key()
    # requests reads a file object only once a connection is open: tell() says if it was sent.
    payload = None if body is None else io.BytesIO(json.dumps(body).encode())
    try:
        response = session.request(
            method,
            url,
            data=payload,
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
            auth=lambda request: request,  # without one, an entry in .netrc replaces the key
            timeout=timeout_seconds,
            allow_redirects=False,
            # With a Location, requests would prepare a redirect, and may rewind the payload.
            hooks={"response": lambda answer, **_: answer.headers.update(Location="")},
            stream=True,
            proxies={"http": ""},  # plain http never leaves this machine: see base_url
        )
    except Exception as error:  # requests lets some errors of urllib3 through
        cause: BaseException = error
        while cause.__context__:
            cause = cause.__context__
        reason = f"{type(error).__name__} at {url.split('/')[2]}: {cause}"
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            raise LockedOut(reason) from error
        raise (Uncertain if payload and payload.tell() else NotAccepted)(reason) from error
    response.raw.enforce_content_length = False  # an answer that is whole JSON is not cut off
    deadline, content = time.monotonic() + 2 * timeout_seconds, bytearray()
    with response, suppress(Exception):  # what came until then is judged below
        for chunk in response.iter_content(64):  # small, as it waits for a full chunk
            content += chunk
            if time.monotonic() > deadline:
                break
    if response.status_code < 200:  # the real answer is still to come on this connection
        session.close()
    if not 200 <= response.status_code < 300:
        raise status_error(response, content.decode(errors="replace"), method)
    with suppress(ValueError, RecursionError):
        if isinstance(answer := json.loads(content), dict):
            return answer
    raise Uncertain(f"HTTP {response.status_code}: not a whole JSON object: {bytes(content)!r}")


def api_key() -> str:
    """Return the key from INFERENCE_API_KEY, or raise a ValueError that does not show it."""
    key = os.environ.get("INFERENCE_API_KEY", "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError("set INFERENCE_API_KEY to your key (see https://inference.net)")
    return key


def base_url() -> str:
    """Return INFERENCE_BASE_URL, or its default; raise ValueError if it would show the key."""
    url = os.environ.get("INFERENCE_BASE_URL", "https://api.inference.net/v1").strip().rstrip("/")
    host = r"https://[\w.-]+|http://(localhost|127\.0\.0\.1|\[::1\])"
    if not re.fullmatch(rf"({host})(:\d{{1,5}})?(/[\w.~/%-]*)?", url, re.ASCII):
        raise ValueError(f"INFERENCE_BASE_URL must be https, or http on this machine, not {url!r}")
    return url


def status_error(response: Response, text: str, method: str) -> ApiError:
    """Return the ApiError for an HTTP status that is not 2xx; text is the body of the answer."""
    status, retry_after_seconds = response.status_code, 0.0
    with suppress(ValueError, TypeError, LookupError, RecursionError):  # it may be a proxy's HTML
        text = str(json.loads(text)["error"]["message"])
    reason = f"HTTP {status}: " + (re.sub(r"(<[^>]*>|\s)+", " ", text).strip() or response.reason)
    with suppress(Exception):  # the header is missing, or cannot be read
        retry_after_seconds = Retry().parse_retry_after(response.headers["Retry-After"])
        reason += f" (Retry-After: {retry_after_seconds:.0f} s)"
    is_too_long = status == 429 and retry_after_seconds > MAX_RETRY_AFTER_SECONDS
    if status in (401, 403):
        return LockedOut(f"{reason} (check INFERENCE_API_KEY)")
    if method == "POST" and (status == 402 or is_too_long):
        return LockedOut(reason)
    if status == 429:
        return NotAccepted(reason, retry_after_seconds)
    return Refused(reason) if 300 <= status < 500 else Uncertain(reason, retry_after_seconds)


# --- The record: a request, its state and its answer

QUEUED, IN_PROGRESS, SUCCESS, FAILED = "Queued", "In Progress", "Success", "Failed"  # the API's
# Our own. SUBMITTING is saved before a request is sent; after a kill, it may have been accepted.
NOT_SENT, SUBMITTING, UNKNOWN, PENDING = "Not sent", "Submitting", "Unknown", "Pending"
NO_MATCH = "No match"  # a generation of the group that answers none of its questions


@dataclass
class Record:
    """A request, its state and its answer. As JSON it is a row of the results file."""

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
    duration_ms: float | None = None
    error: str | None = None

    @property
    def outcome(self) -> str:
        """The result so far: SUCCESS, FAILED, PENDING, UNKNOWN, NOT_SENT or NO_MATCH."""
        if self.state in (SUCCESS, FAILED):
            return self.state if self.custom_id else NO_MATCH
        if self.group_id:
            return PENDING
        return NOT_SENT if self.state == NOT_SENT else UNKNOWN


def copy_generation(generation: Json, record: Record) -> None:
    """Copy a generation into its record, and clear its error, unless the generation failed."""
    record.state = generation["state"]
    reason = dig(generation, str, "stateMessage") or "no reason given"
    record.error = reason.replace(api_key(), "[API key]") if record.state == FAILED else None
    content = dig(generation, object, "response", "choices", 0, "message", "content")
    record.response = content if isinstance(content, str | None) else json.dumps(content)
    record.finish_reason = dig(generation, str, "response", "choices", 0, "finish_reason")
    record.prompt_tokens = dig(generation, int, "response", "usage", "prompt_tokens")
    record.completion_tokens = dig(generation, int, "response", "usage", "completion_tokens")
    record.total_tokens = dig(generation, int, "response", "usage", "total_tokens")
    times = [str(generation.get(key)) for key in ("dispatchedAt", "finishedAt")]
    with suppress(ValueError, TypeError):  # Python 3.10 wants six digits after the point, and no Z
        times = [re.sub(r"\.(\d+)", lambda match: f".{match[1]:0<6.6}", each) for each in times]
        dispatched, finished = [datetime.fromisoformat(each.rstrip("Z")) for each in times]
        record.duration_ms = round((finished - dispatched) / timedelta(milliseconds=1), 3)


def dig(value: Any, kind: type, *path: str | int) -> Any:
    """Follow path into JSON; return what is there if it is of that kind, otherwise None."""
    with suppress(LookupError, TypeError):
        for step in path:
            value = value[step]
        return value if isinstance(value, kind) else None
    return None


# --- The work: submit, then poll until final

# A worker thread makes the exchanges, changes the records and saves them: an id is saved by the
# thread that receives it, even if the caller's thread is slow or has been stopped. The caller's
# thread hands out the work and waits. Once the event named stop is set, no attempt begins.

MAX_SUBMIT_ATTEMPTS = 5
TICK_SECONDS = 0.05
Records = list[Record]
Save = Callable[[Records], object]  # called in the worker thread
Tick = Callable[[], object]  # called in the caller's thread; object, the default, does nothing
session = Session()  # one is enough, as there is one exchange at a time
held_until = 0.0  # no attempt begins before this time.monotonic()


def submit_all(
    pool: Executor, records: Records, save: Save, tick: Tick = object
) -> Iterator[Records]:
    """Submit the requests as one group; yield the records when the submission has ended.

    Nothing is sent until you iterate. save gets copies before each attempt, and the records after
    it. tick is called often while you wait. Raises TimeoutError if stuck; after the records,
    LockedOut, NotAccepted or what save raised.
    """
    stop = threading.Event()
    try:
        future = pool.submit(submit, records, save, stop)
        wait_for(future, tick)
        yield records
        future.result()
    finally:
        stop.set()


def submit(records: Records, save: Save, stop: threading.Event) -> None:
    """Submit the group, in a worker thread. Retry only what certainly was not accepted."""
    requests = [build_request(str(record.custom_id), record.question) for record in records]
    for attempt in range(MAX_SUBMIT_ATTEMPTS):
        backoff_seconds = random.uniform(0.5, 1) * 2 ** (attempt - 1) if attempt else 0
        if records[0].state != NOT_SENT or not wait_to_send(backoff_seconds, stop):
            return  # Queued, Failed or Unknown by now, or told to stop
        # Save first: if that fails, nothing is sent, and the records stay as they are.
        save([replace(record, state=SUBMITTING, error=None) for record in records])
        mark(records, SUBMITTING)
        try:
            mark(records, QUEUED, submit_group(session, requests, REQUEST_TIMEOUT_SECONDS))
        except Refused as error:
            mark(records, FAILED, error=error)
        except Uncertain as error:
            mark(records, UNKNOWN, error=error)
            hold_back(error.retry_after_seconds)
        except NotAccepted as error:
            mark(records, NOT_SENT, error=error)
            hold_back(error.retry_after_seconds)
            if attempt == MAX_SUBMIT_ATTEMPTS - 1:
                raise
        except (LockedOut, ValueError, TypeError) as error:  # no key; a non-JSON request
            mark(records, NOT_SENT, error=error)
            raise
        finally:
            save(records)


def mark(records: Records, state: str, group_id: str | None = None, error: object = "") -> None:
    """Note in each record what has come of the submission of the group."""
    for record in records:
        record.state, record.group_id, record.error = state, group_id, str(error) or None


def poll_all(
    pool: Executor, records: Records, save: Save, tick: Tick = object
) -> Iterator[Records]:
    """Poll the group every POLL_INTERVAL_SECONDS; yield, after each poll, what has become final.

    tick is as in submit_all; save gets what is final. A final generation that answers none of the
    records is appended to them, without a custom_id. After MAX_POLL_ATTEMPTS polls a record stays
    pending. Raises LockedOut, what save raised, or TimeoutError if the worker is stuck.
    """
    stop = threading.Event()
    try:
        for attempt in range(MAX_POLL_ATTEMPTS):
            if all(record.outcome != PENDING for record in records):
                return
            future = pool.submit(poll, records, save, stop, POLL_INTERVAL_SECONDS if attempt else 0)
            wait_for(future, tick)
            yield future.result()
    finally:
        stop.set()


def poll(records: Records, save: Save, stop: threading.Event, wait_seconds: float) -> Records:
    """Wait, poll the group once, in a worker thread, and return what has become final."""
    if not wait_to_send(wait_seconds, stop):
        return []
    pending = [record for record in records if record.outcome == PENDING]
    try:
        generations = fetch_group(session, str(pending[0].group_id), REQUEST_TIMEOUT_SECONDS)
        trouble = None
    except ApiError as error:  # whatever it is: a poll costs nothing
        generations, trouble = [], str(error)
        hold_back(error.retry_after_seconds)
        if isinstance(error, LockedOut):
            raise
    for record in pending:
        record.error = trouble
    copies = [replace(record) for record in records]
    save([final for each in generations if (final := match(each, copies))])  # or they stay pending
    return [final for each in generations if (final := match(each, records))]


def match(generation: Json, records: Records) -> Record | None:
    """Copy a generation into the record with its custom_id; return this if it is now final."""
    pending = {record.custom_id: record for record in records if record.outcome == PENDING}
    custom_id = dig(generation, str, "request", "metadata", "custom_id")
    record = pending.get(custom_id) or Record(None, "", group_id=records[0].group_id)
    record.generation_id = dig(generation, str, "id")
    copy_generation(generation, record)
    if record.state not in (SUCCESS, FAILED):
        return None
    if record.custom_id is None:  # it answers no question that is pending
        known = [(each.generation_id, each.response) for each in records]
        if (record.generation_id, record.response) in known:
            return None
        records.append(record)
    return record


def hold_back(seconds: float) -> None:
    """Let no worker send for that many seconds: Retry-After is for the whole account."""
    global held_until
    held_until = max(held_until, time.monotonic() + seconds)


def wait_to_send(seconds: float, stop: threading.Event) -> bool:
    """Wait that many seconds, and until held_until; return False if stop is set."""
    until = time.monotonic() + seconds
    while not stop.is_set() and (left := max(until, held_until) - time.monotonic()) > 0:
        stop.wait(left)
    return not stop.is_set()


def wait_for(future: Future[Any], tick: Tick) -> None:
    """Wait until a future is done; TimeoutError if its worker is stuck, as on endless headers."""
    since = time.monotonic()
    limit_seconds = 30 * REQUEST_TIMEOUT_SECONDS + 20  # five attempts, six IP addresses each
    while not wait([future], TICK_SECONDS).done:
        if time.monotonic() > max(since + POLL_INTERVAL_SECONDS, held_until) + limit_seconds:
            raise TimeoutError(f"an exchange has not ended within {limit_seconds} s")
        tick()


# --- The screen: everything that prints

MARKS = {SUCCESS: "✓", FAILED: "✗", UNKNOWN: "?", PENDING: "…", NOT_SENT: "-", NO_MATCH: "!"}
MAX_ROWS = 50  # of the table
MAX_SILENCE_SECONDS = 60  # in a pipe or a file
RULE = "=" * 80
live_columns, said_at, started_at = 0, 0.0, time.monotonic()  # columns of the live line


def width(text: str) -> int:
    """Return how many columns of a terminal text takes."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return len(text) + wide - sum(unicodedata.category(each) in ("Mn", "Me") for each in text)


def fit(text: str, columns: int, at_word: bool = False) -> str:
    """Make untrusted text printable, and cut it to at most so many columns."""
    text = "".join(each if each.isprintable() else " " for each in text[:2000]).strip()
    if width(text) <= columns:
        return text
    kept = text[: 3 * columns]
    while width(kept) > columns - 3:
        kept = kept[:-1]
    if at_word and " " in text[columns // 2 : len(kept) + 1]:
        kept = text[: len(kept) + 1].rpartition(" ")[0]
    return kept.rstrip() + "..."


def bar(done: int, total: int, columns: int) -> str:
    """Return a progress bar, which is full only when all is done."""
    return f"|{'█' * (done * columns // total):░<{columns}}|"


def say(text: str, is_live: bool = False) -> None:
    """Print a line in the place of the live line, or a new live line."""
    global live_columns, said_at
    erase = "\r" + " " * (live_columns + len("^C")) + "\r" if live_columns else ""
    print(erase + text, end="" if is_live else "\n", flush=True)
    live_columns, said_at = width(text) if is_live else 0, time.monotonic()


def show_section(title: str, gap: str = "") -> None:
    """Print the heading of a section."""
    say(f"\n  {title}\n  {'-' * (len(title) + 4)}{gap}")


def show_live(records: Records) -> None:
    """Redraw the live line of a terminal; elsewhere print a line, but only once a minute."""
    is_live = os.isatty(1)
    if time.monotonic() - said_at < (0.25 if is_live else MAX_SILENCE_SECONDS):
        return
    unsent = [record for record in records if record.state in (NOT_SENT, SUBMITTING)]
    waiting = unsent or [record for record in records if record.outcome == PENDING]
    running = sum(record.state == IN_PROGRESS for record in waiting)
    text = f"{running} running, {len(waiting) - running} queued"
    if unsent:
        text = f"{len(records) - len(unsent)}/{len(records)} submitted"
    elapsed = timedelta(seconds=int(time.monotonic() - started_at))
    trouble = next((record.error for record in waiting if record.error), "")
    columns = max(os.get_terminal_size(1).columns or 80, 20) if is_live else 200
    say("  " + fit(f"⏳ {text}, {elapsed} {trouble}", columns - 4), is_live)


def show_summary(records: Records, answered_before: int, path: Path, resume: str) -> str:
    """Print figures, answers, and what to do about the requests without one; count these."""
    counts = Counter(record.outcome for record in records)
    done, total, seconds = counts[SUCCESS], len(records), time.monotonic() - started_at
    others = [each for each in MARKS if each == FAILED or (counts[each] and each != SUCCESS)]
    show_section("Success Rate")
    say(f"  {'✓' if done == total else '✗'} {bar(done, total, 40)} {done * 1000 // total / 10}%\n")
    for title, count in (("Successful", done), *((each, counts[each]) for each in others)):
        say(f"      {title + ':':<13}{count:>4}")
    say(f"      Total:       {total:>4}")
    times = [record.duration_ms for record in records if record.duration_ms is not None]
    measured = (sum(times) / len(times), min(times), max(times)) if times else ()
    average, least, most = [f"{ms:.1f}ms" for ms in measured] or ["-", "-", "-"]
    show_section("Performance Metrics")
    say(f"      Total wall-clock time: {seconds:>10.2f}s")
    say(f"      Avg generation time:   {average:>12}")
    say(f"      Min generation time:   {least:>12}")
    say(f"      Max generation time:   {most:>12}")
    say(f"      Throughput:            {(done - answered_before) / seconds:>10.2f} req/s")
    tokens = [record.completion_tokens for record in records if record.completion_tokens]
    show_section("Token Usage")
    say(f"      Prompt tokens:     {sum(record.prompt_tokens or 0 for record in records):>10,}")
    say(f"      Completion tokens: {sum(tokens):>10,}")
    say(f"      Total tokens:      {sum(record.total_tokens or 0 for record in records):>10,}")
    say(f"      Avg completion/req:{sum(tokens) / max(len(tokens), 1):>10,.1f}")
    show_section("Request-Response Correlation", gap="\n")
    say("  ID         Status     Question                       Response")
    say("  ---------- ---------- ------------------------------ -------------------------")
    is_cut = total > MAX_ROWS  # then those without an answer come first
    for record in sorted(records, key=lambda each: is_cut and each.outcome == SUCCESS)[:MAX_ROWS]:
        question = fit(record.question, 28)
        answer = fit(record.response or "(no text)", 25, at_word=True)
        if record.finish_reason == "length":
            answer = fit(answer, 12) + " [max_tokens]"
        if record.outcome != SUCCESS:
            reason = "interrupted" if record.state == SUBMITTING else ""
            answer = f"\n{' ' * 13}{fit(record.error or record.response or reason, 300)}"
        status = f"{record.custom_id or '':10} {MARKS[record.outcome]} {record.outcome:8}"
        say(f"  {status} {question}{' ' * (30 - width(question))} {answer}".rstrip())
    if is_cut:
        say(f"  ... and {total - MAX_ROWS} more in {path}")
    if counts[UNKNOWN]:
        say("\n  ? Unknown: perhaps accepted, and paid for: see the dashboard before sending again")
    if counts[PENDING]:
        say(f"\n  … Pending: accepted, and paid for. To go on polling:\n      {resume}")
    if counts[NOT_SENT]:
        say(f"\n  - Not sent: to submit them, and poll what is pending:\n      {resume} --submit")
    return ", ".join(f"{counts[each]} {each.lower()}" for each in others if counts[each])


# --- The script: the results file, the configuration check, main

PREFIX = "async-group"  # of the names of results files
file_lock = threading.Lock()


def append_rows(path: Path, records: Records) -> None:
    """Append a row for each record, in one write; raise OSError if it does not take them all."""
    rows = "".join(json.dumps(asdict(record)) + "\n" for record in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock, path.open("ab", buffering=0) as file:
        written = file.write(rows)
        if written < len(rows):  # the next row must not be glued to half a row
            file.truncate(file.tell() - written)
            raise OSError(f"no room left for {path}")


def read_results(path: Path) -> tuple[Records, list[bytes]]:
    """Return the last record of each request in a results file, and the lines that are no rows."""
    records, others = dict[str | None, Record](), list[bytes]()
    for line in filter(bytes.strip, path.read_bytes().split(b"\n")):
        with suppress(ValueError, TypeError, RecursionError):
            record = Record(**json.loads(line))
            if asdict(record) == json.loads(line):  # else it may be the other script's
                records[record.custom_id or record.generation_id] = record
                continue
        others.append(line)
    return list(records.values()), others


def open_run(name: str | None, is_submitting: bool) -> tuple[Records, Path]:
    """Return the records and the results file of a new run, or of the earlier one of that name."""
    if name is None:
        questions = [SAMPLE_QUESTIONS[n % len(SAMPLE_QUESTIONS)] for n in range(NUM_REQUESTS)]
        records = [Record(f"req-{n:03}", question) for n, question in enumerate(questions, 1)]
        path = Path(RESULTS_DIR, f"{PREFIX}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}.jsonl")
        append_rows(path, records)
        return records, path
    newest_first = sorted(Path(RESULTS_DIR).glob(f"{PREFIX}-*.jsonl"), reverse=True)
    for path in [Path(name)] if name else newest_first:
        records, damaged = read_results(path)
        if any(name or record.outcome == PENDING for record in records):
            break
    else:
        raise ValueError(f"there is nothing to resume in {name or RESULTS_DIR}")
    last_line = path.read_bytes().rpartition(b"\n")[2]
    with path.open("ab") as file:
        if last_line in damaged:  # a kill tore it
            file.truncate(file.tell() - len(last_line))
            damaged.remove(last_line)
        elif last_line:  # an editor took its line break
            file.write(b"\n")
    if damaged and is_submitting:  # one of them may say that a request was sent
        raise ValueError(f"--submit might pay twice: {path} has lines that cannot be read")
    if damaged:
        print(f"{path}: {len(damaged)} lines cannot be read, and are ignored", file=sys.stderr)
    return records, path


def check_configuration() -> None:
    """Raise ValueError for a mistake that would lead to a hang, a traceback or a loss."""
    _ = base_url(), api_key()  # they raise ValueError too
    counts = (NUM_REQUESTS, MAX_POLL_ATTEMPTS)
    numbers = (*counts, POLL_INTERVAL_SECONDS, REQUEST_TIMEOUT_SECONDS)
    if {int} != {*map(type, counts)} or not all(0 < number <= 1_000_000 for number in numbers):
        raise ValueError(f"NUM_REQUESTS, MAX_... and ..._SECONDS must be 1 to 1,000,000: {numbers}")
    if NUM_REQUESTS > 50:
        raise ValueError("NUM_REQUESTS: a group holds 50; async_polling_example.py takes more")
    if not isinstance(SAMPLE_QUESTIONS, list) or {str} != {*map(type, SAMPLE_QUESTIONS)}:
        raise ValueError("SAMPLE_QUESTIONS must be a list of texts, and not be empty")
    request = json.loads(json.dumps(build_request("any", SAMPLE_QUESTIONS[0])))
    if dig(request, str, "metadata", "custom_id") != "any":
        raise ValueError("build_request must return a JSON object with metadata.custom_id as given")


def run(records: Records, unsent: Records, path: Path) -> int:
    """Submit what is unsent, poll what is pending, show both, and return the exit code."""
    job = f"Requests to submit: {len(unsent)}" if unsent else f"Resuming: {path}"
    say(f"{RULE}\n INFERENCE.NET ASYNC GROUP API - POLLING EXAMPLE\n{RULE}\n\n  Configuration:")
    say(f"    • {job}\n    • Model: {MODEL_ID}\n    • Poll interval: {POLL_INTERVAL_SECONDS}s")
    pool, save = ThreadPoolExecutor(1), lambda rows: append_rows(path, rows)
    try:
        if unsent:
            show_section(f"Submitting {len(unsent)} Requests", gap="\n")
            rows = [f"    {record.custom_id}: {fit(record.question, 65)}" for record in unsent]
            more = [f"    ... and {len(rows) - 5} more"] if len(rows) > 5 else []
            say("\n".join([*rows[:5], *more, "\n  Submitting to Group API..."]))
            with suppress(ApiError):  # it is the error of the requests that were not sent
                for [first, *_] in submit_all(pool, unsent, save, lambda: show_live(unsent)):
                    if first.group_id:
                        say(f"  ✓ Group created: {first.group_id}\n  ✓ Group size: {len(unsent)}")
        pending = [record for record in records if record.outcome == PENDING]
        if pending:
            show_section("Polling for Results", gap="\n")
        for attempt, new in enumerate(poll_all(pool, records, save, lambda: show_live(pending)), 1):
            if new or attempt == 1:
                total, done = len(pending), sum(record.outcome != PENDING for record in pending)
                text = f"{bar(done, total, 30)} {done}/{total} ({done * 100 // total}%)"
                if done < total:
                    running = sum(record.state == IN_PROGRESS for record in pending)
                    text += f" (⏳ {running} running, {total - done - running} queued)"
                say(f"  [{attempt:>3}] {text}")
        return 0
    except (ApiError, OSError, KeyboardInterrupt) as error:
        hint = "up to 2 s for ids on their way; Ctrl-C again ends now"
        say(f"\n  Stopping: {fit(str(error) or hint, 300)}")
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        pool.shutdown(wait=False)
        until = time.monotonic() + 2
        workers = {each for each in threading.enumerate() if each.is_alive()}
        for thread in workers - {threading.main_thread()}:
            thread.join(max(0, until - time.monotonic()))


def main() -> int:
    """Read the command line, run, show the summary, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", nargs="?", const="", metavar="FILE", help="poll an earlier run")
    parser.add_argument("--submit", action="store_true", help="submit the rest of an ended run too")
    options = parser.parse_args()
    if options.submit and not options.resume:
        parser.error("--submit needs --resume FILE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        check_configuration()
        records, path = open_run(options.resume, options.submit)
    except (OSError, ValueError, TypeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    is_submitting = options.submit or options.resume is None
    unsent = [record for record in records if is_submitting and record.outcome == NOT_SENT]
    resume = shlex.join(["uv", "run", sys.argv[0], "--resume", str(path)])
    answered_before = sum(record.outcome == SUCCESS for record in records)
    try:
        exit_code = run(records, unsent, path)
        say(f"\n{RULE}\n GROUP GENERATION SUMMARY\n{RULE}")
        left = show_summary(records, answered_before, path, resume)
        if left or exit_code:
            kept = {each.group_id for each in (read_results(path)[0] if path.exists() else [])}
            if records[0].group_id not in {*kept, None}:
                say(f"\n  Keep this id, which the file does not have: {records[0].group_id}")
        is_complete = not left and not exit_code
        ending = "Generation complete!" if is_complete else f"Not complete: {left or 'stopped'}"
        say(f"\n  Results: {path}\n\n{RULE}\n {ending}\n{RULE}")
        return exit_code or int(not is_complete)
    except (OSError, KeyboardInterrupt) as error:  # stdout is closed or full; a second Ctrl-C
        if not isinstance(error, BrokenPipeError):
            print(f"\n{path}: {str(error) or 'interrupted'}", file=sys.stderr)
        if any(record.outcome == PENDING for record in records):
            print(f"To go on polling: {resume}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


if __name__ == "__main__":
    if exit_code := main():  # a worker that is stuck must not hold up the exit
        os._exit(exit_code)
