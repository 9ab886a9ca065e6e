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
import ssl
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

from requests import Response, Session
from urllib3.util import Retry

# --- Configuration: what you edit

NUM_REQUESTS = 10  # how many to submit, up to 50; the questions repeat if there are fewer
MODEL_ID = "inference-net/load-test"  # the model that answers
POLL_INTERVAL_SECONDS = 2  # between two polls of the group; raise it to wait for hours
MAX_POLL_ATTEMPTS = 120  # polls of the group in one run; a resumed run counts anew
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
    """The exchange may have had an effect: repeat a submission, and it may be paid for twice."""


def submit_group(session: Session, requests: list[Json], timeout_seconds: float) -> str:
    """Submit 1 to 50 chat completion requests as a group, and return its group id.

    POST /v1/async/group/chat/completions. Raises ApiError.
    """
    body = {"requests": requests}
    answer = exchange(session, "POST", "/async/group/chat/completions", timeout_seconds, body)
    group_id = answer.get("groupId")
    if not isinstance(group_id, str) or not re.fullmatch("[A-Za-z0-9_-]+", group_id):
        raise Uncertain(f"accepted, but the answer has no usable id: {answer}")
    return group_id


def fetch_group(session: Session, group_id: str, timeout_seconds: float) -> list[Any]:
    """Return a group's generations in their current state, in any order.

    GET /v1/async/group/{groupId}/generations. Raises ApiError. Just after the submission, a 404
    is normal; later a generation may be missing until it is final.
    """
    answer = exchange(session, "GET", f"/async/group/{group_id}/generations", timeout_seconds)
    if not isinstance(answer.get("generations"), list):
        raise Uncertain("the answer has no list of generations")
    return list(answer["generations"])


def exchange(
    session: Session, method: str, path: str, timeout_seconds: float, body: Json | None = None
) -> Json:
    """Make one HTTP request, and return the JSON object that the API answers.

    timeout_seconds limits connecting and each wait for data; a dripping answer is given up after
    twice that. Raises ApiError, or, before anything is sent, ValueError (api_key, base_url, body).
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
            # Without a Location, requests does not prepare a redirect, and rewind the payload.
            hooks={"response": lambda answer, **_: answer.headers.update(Location="")},
            stream=True,
            proxies={"http": ""},  # plain http never leaves this machine: see base_url
        )
    except Exception as error:  # requests lets some errors of urllib3 through
        cause: BaseException = error
        while cause.__context__:
            cause = cause.__context__
        reason = f"{type(error).__name__} at {url.split('/')[2]}: {cause}"
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise LockedOut(reason) from error
        raise (Uncertain if payload and payload.tell() else NotAccepted)(reason) from error
    deadline, content = time.monotonic() + 2 * timeout_seconds, bytearray()
    with response, suppress(Exception):  # what has come is judged below, even if it is cut off
        for chunk in response.iter_content(64):  # small: each is waited for until it is full
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
    raise Uncertain(f"HTTP {response.status_code}: not a whole JSON object: {content[:200]!r}")


def api_key() -> str:
    """Return the key from INFERENCE_API_KEY, or raise a ValueError that does not show it."""
    key = os.environ.get("INFERENCE_API_KEY", "").strip()
    if not key or not key.isascii() or not key.isprintable():
        hint = "export INFERENCE_API_KEY=... (keys are on the dashboard of https://inference.net)"
        raise ValueError(f"set INFERENCE_API_KEY to your key, for example: {hint}")
    return key


def base_url() -> str:
    """Return INFERENCE_BASE_URL, or its default; raise ValueError if it would show the key."""
    url = os.environ.get("INFERENCE_BASE_URL", "https://api.inference.net/v1").strip().rstrip("/")
    https, http = r"https://([\w.-]+|\[[\da-f:.]+\])", r"http://(localhost|127(\.\d+){3}|\[::1\])"
    if not re.fullmatch(rf"({https}|{http})(:\d{{1,5}})?(/[\w.~/%-]*)?", url, re.ASCII):
        raise ValueError(f"INFERENCE_BASE_URL must be https, or http on this machine, not {url!r}")
    return url


def status_error(response: Response, text: str, method: str) -> ApiError:
    """Return the ApiError for an HTTP status that is not 2xx; text is the body of the answer."""
    status, retry_after_seconds = response.status_code, 0.0
    with suppress(ValueError, TypeError, LookupError, RecursionError):  # it may be a proxy's HTML
        text = str(json.loads(text)["error"]["message"])
    reason = f"HTTP {status}: " + (re.sub(r"<[^>]*>|\s+", " ", text).strip() or response.reason)
    with suppress(Exception):  # the header is missing, or cannot be read
        retry_after_seconds = Retry().parse_retry_after(response.headers["Retry-After"])
        reason += f" (Retry-After: {retry_after_seconds:.0f} s)"
    if status in (401, 403):
        return LockedOut(f"{reason} (check INFERENCE_API_KEY)")
    if method == "POST" and status == 402:
        return LockedOut(reason)
    if status == 429:
        is_too_long = method == "POST" and retry_after_seconds > MAX_RETRY_AFTER_SECONDS
        return (LockedOut if is_too_long else NotAccepted)(reason, retry_after_seconds)
    return Refused(reason) if 300 <= status < 500 else Uncertain(reason, retry_after_seconds)


# --- The record: a request, its state and its answer

QUEUED, IN_PROGRESS, SUCCESS, FAILED = "Queued", "In Progress", "Success", "Failed"  # the API's
# Our own, until the API has a state: SUBMITTING is saved just before a request is sent, so that
# after a kill it means UNKNOWN, perhaps accepted. PENDING is accepted, and not yet final.
NOT_SENT, SUBMITTING, UNKNOWN, PENDING = "Not sent", "Submitting", "Unknown", "Pending"


@dataclass
class Record:
    """A request, its state and its answer. As JSON it is a row of the results file."""

    custom_id: str | None
    question: str
    generation_id: str | None = None
    group_id: str | None = None
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
        """What the request has come to: SUCCESS, FAILED, PENDING, UNKNOWN or NOT_SENT."""
        if self.state in (SUCCESS, FAILED):
            return self.state
        if self.group_id:
            return PENDING
        return NOT_SENT if self.state == NOT_SENT else UNKNOWN


def copy_generation(generation: Json, record: Record) -> None:
    """Copy a generation into its record. Only its state has to be there, and of the right type."""
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
        if finished >= dispatched:
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
# thread hands out the work and waits. Once the event named stop is set, nothing more is sent.

MAX_SUBMIT_ATTEMPTS = 5
TICK_SECONDS = 0.25
Records = list[Record]
Save = Callable[[Records], object]  # called in the worker thread
Tick = Callable[[], object]  # called in the caller's thread; object, the default, does nothing
session = Session()  # one is enough, as there is one exchange at a time
hold_lock = threading.Lock()
held_until = 0.0  # no exchange begins before this time.monotonic()


def submit_all(
    pool: Executor, records: Records, save: Save, tick: Tick = object
) -> Iterator[Records]:
    """Submit the requests as one group; yield the records when the submission has ended.

    Nothing is sent until one iterates. save gets the records before and after each attempt. tick
    is called every TICK_SECONDS while waiting. Raises TimeoutError if the worker is stuck; after
    the records, LockedOut, NotAccepted (the API is down, or has no room) or what save raised.
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
        if records[0].outcome != NOT_SENT or not wait_to_send(backoff_seconds, stop):
            return
        # What cannot be saved is not sent: the records themselves change only after that.
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
        except (LockedOut, ValueError, TypeError) as error:
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

    tick is as in submit_all; save gets what is final. What belongs to none of the records is
    appended to them, without a custom_id. After MAX_POLL_ATTEMPTS polls a record stays pending.
    Raises LockedOut, what save raised, or TimeoutError if the worker is stuck.
    """
    stop = threading.Event()
    due = time.monotonic()
    try:
        for _ in range(MAX_POLL_ATTEMPTS):
            if all(record.outcome != PENDING for record in records):
                return
            while (left := due - time.monotonic()) > 0:
                time.sleep(min(left, TICK_SECONDS))
                tick()
            future = pool.submit(poll, records, save, stop)
            wait_for(future, tick)
            due = time.monotonic() + POLL_INTERVAL_SECONDS
            yield future.result()
    finally:
        stop.set()


def poll(records: Records, save: Save, stop: threading.Event) -> Records:
    """Poll the group once, in a worker thread; return what has become final, if anything."""
    if not wait_to_send(0, stop):
        return []
    pending = [record for record in records if record.outcome == PENDING]
    try:
        generations = fetch_group(session, str(pending[0].group_id), REQUEST_TIMEOUT_SECONDS)
    except ApiError as error:
        for record in pending:
            record.error = str(error)
        hold_back(error.retry_after_seconds)
        if isinstance(error, LockedOut):
            raise
        return []
    for record in pending:
        record.error = None
    copies = [replace(record) for record in records]
    save([final for each in generations if (final := match(each, copies))])  # or they stay pending
    return [final for each in generations if (final := match(each, records))]


def match(generation: Any, records: Records) -> Record | None:
    """Copy a generation into the record with its custom_id; return the record if it is now final.

    If no record with this custom_id is pending, a final generation becomes a record of its own.
    """
    if not dig(generation, str, "state"):
        return None
    custom_id = dig(generation, str, "request", "metadata", "custom_id")
    known = [(record.generation_id, record.response) for record in records]
    found = Record(None, "", group_id=records[0].group_id)
    for record in records:
        if record.outcome == PENDING and record.custom_id == custom_id:
            found = record
    found.generation_id = dig(generation, str, "id")
    copy_generation(generation, found)
    if found.outcome == PENDING:
        return None
    if found.custom_id is None:
        if (found.generation_id, found.response) in known:
            return None
        records.append(found)
    return found


def hold_back(seconds: float) -> None:
    """Let no worker send for that many seconds: Retry-After is for the whole account."""
    global held_until
    with hold_lock:
        held_until = max(held_until, time.monotonic() + seconds)


def wait_to_send(seconds: float, stop: threading.Event) -> bool:
    """Wait that many seconds, and until held_until; return False if stop is set."""
    until = time.monotonic() + seconds
    while not stop.is_set() and (left := max(until, held_until) - time.monotonic()) > 0:
        stop.wait(left)
    return not stop.is_set()


def wait_for(future: Future[Any], tick: Tick) -> None:
    """Wait until a future is done; TimeoutError if its worker is stuck, as on an endless header."""
    since = time.monotonic()
    limit_seconds = 30 * REQUEST_TIMEOUT_SECONDS + 20  # five attempts at six addresses, and backoff
    while not wait([future], TICK_SECONDS).done:
        if time.monotonic() > max(since, held_until) + limit_seconds:
            raise TimeoutError(f"an exchange has not ended within {limit_seconds} s")
        tick()


# --- The screen: everything that prints

MARKS = {SUCCESS: "✓", FAILED: "✗", UNKNOWN: "?", PENDING: "…", NOT_SENT: "-"}
MAX_ROWS = 50  # of the table, and of each list
MAX_SILENCE_SECONDS = 60  # in a pipe or a file
RULE = "=" * 80
live_columns, said_at = 0, 0.0  # the width of the live line, if there is one; the last print


def width(text: str) -> int:
    """Return how many columns of a terminal text takes."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return len(text) + wide - sum(unicodedata.category(each) in ("Mn", "Me") for each in text)


def fit(text: str, columns: int, at_word: bool = False) -> str:
    """Make untrusted text printable, and cut or fill it to exactly so many columns."""
    text = "".join(each if each.isprintable() else " " for each in text[:2000].strip())
    if width(text) > columns:
        kept = text[: 3 * columns]
        while width(kept) > columns - 3:
            kept = kept[:-1]
        if at_word and text[len(kept)] != " " and " " in kept[columns // 2 :]:
            kept = kept.rpartition(" ")[0]
        text = kept.rstrip() + "..."
    return text + " " * (columns - width(text))


def bar(done: int, total: int, columns: int) -> str:
    """Return a progress bar, which is full only when all is done."""
    filled = done * columns // total
    return f"|{'█' * filled}{'░' * (columns - filled)}|"


def say(text: str, is_live: bool = False) -> None:
    """Print a line in the place of the live line, or a new live line."""
    global live_columns, said_at
    erase = "\r" + " " * (live_columns + len("^C")) + "\r" if live_columns else ""
    print(erase + text, end="" if is_live else "\n", flush=True)
    live_columns, said_at = width(text) if is_live else 0, time.monotonic()


def show_section(title: str) -> None:
    """Print the heading of a section."""
    say(f"\n  {title}\n  {'-' * (len(title) + 4)}\n")


def show_waiting(records: Records, since: float) -> None:
    """Redraw the live line of a terminal; elsewhere print a line, but only once a minute."""
    pending = [record for record in records if record.outcome == PENDING]
    running = sum(record.state == IN_PROGRESS for record in pending)
    text = f"{running} running, {len(pending) - running} queued"
    unsent = [record for record in records if record.state in (NOT_SENT, SUBMITTING)]
    if unsent:
        text = f"{len(records) - len(unsent)}/{len(records)} submitted"
    elapsed = timedelta(seconds=int(time.monotonic() - since))
    trouble = next((each.error for each in (*unsent, *pending) if each.error), "")
    if sys.stdout and sys.stdout.isatty():
        columns = max(os.get_terminal_size(sys.stdout.fileno()).columns or 80, 20)
        say("  " + fit(f"⏳ {text}, {elapsed} {trouble}", columns - 4).rstrip(), is_live=True)
    elif time.monotonic() - said_at >= MAX_SILENCE_SECONDS:
        say("  " + fit(f"⏳ {text}, {elapsed} {trouble}", 200).rstrip())


def show_submission(records: Records) -> None:
    """Print what came of the submission."""
    group_id, fate = records[0].group_id, f"{MARKS[records[0].outcome]} {answer_of(records[0])}"
    created = f"✓ Group created: {group_id}\n  ✓ Group size: {len(records)}"
    say(f"  {created if group_id else fit(fate, 300).rstrip()}")


def show_poll(attempt: int, records: Records, before: str) -> str:
    """Print how many generations are final, on a terminal only if that is not as before."""
    total, pending = len(records), [each for each in records if each.outcome == PENDING]
    done, running = total - len(pending), sum(each.state == IN_PROGRESS for each in pending)
    text = f"{bar(done, total, 30)} {done}/{total} ({done * 100 // total}%)"
    if pending:
        text += f" (⏳ {running} running, {len(pending) - running} queued)"
        text += f" {fit(pending[0].error or '', 200)}".rstrip()
    if text != before or not (sys.stdout and sys.stdout.isatty()):
        say(f"  [{attempt:>3}] {text}")
    return text


def answer_of(record: Record) -> str:
    """Return the answer to a request, or why there is none."""
    if record.outcome == SUCCESS:
        return record.response or "(no text)"
    return record.error or ("interrupted" if record.state == SUBMITTING else record.state)


def show_list(title: str, records: Records, path: Path) -> None:
    """Print up to MAX_ROWS requests, each with why it has no answer."""
    show_section(f"{title} of Group {records[0].group_id}" if records[0].group_id else title)
    for record in records[:MAX_ROWS]:
        name = record.custom_id or record.generation_id
        say(f"    {MARKS[record.outcome]} {name}: {fit(answer_of(record), 300).rstrip()}")
    if len(records) > MAX_ROWS:
        say(f"    ... and {len(records) - MAX_ROWS} more in {path}")


def show_summary(records: Records, seconds: float, answered: int, path: Path, resume: str) -> str:
    """Print all figures and answers, and what to do about requests without one; count these.

    answered: how many were answered in these seconds; resume: the command that polls again.
    """
    listed = {outcome: [each for each in records if each.outcome == outcome] for outcome in MARKS}
    done, total = len(listed[SUCCESS]), len(records)
    shown = [FAILED, *(each for each in (UNKNOWN, PENDING, NOT_SENT) if listed[each])]
    rows = "".join(f"\n      {f'{each}:':<13}{len(listed[each]):>4}" for each in shown)
    times = [record.duration_ms for record in records if record.duration_ms is not None]
    extremes = (sum(times) / len(times), min(times), max(times)) if times else ()
    average, least, most = [f"{ms:.1f}ms" for ms in extremes] or ["-", "-", "-"]
    completions = [record.completion_tokens for record in records if record.completion_tokens]
    mean = f"{sum(completions) / len(completions):,.1f}" if completions else "-"
    say(f"""
  Success Rate
  ----------------
  {"✓" if done == total else "✗"} {bar(done, total, 40)} {done * 1000 // total / 10}%

      Successful:  {done:>4}{rows}
      Total:       {total:>4}

  Performance Metrics
  -----------------------
      Total wall-clock time: {seconds:>10.2f}s
      Avg generation time:   {average:>12}
      Min generation time:   {least:>12}
      Max generation time:   {most:>12}
      Throughput:            {answered / max(seconds, 0.01):>10.2f} req/s

  Token Usage
  ---------------
      Prompt tokens:     {sum(record.prompt_tokens or 0 for record in records):>10,}
      Completion tokens: {sum(completions):>10,}
      Total tokens:      {sum(record.total_tokens or 0 for record in records):>10,}
      Avg completion/req:{mean:>10}

  Request-Response Correlation
  --------------------------------

  ID         Status     Question                       Response
  ---------- ---------- ------------------------------ -------------------------""")
    for record in records[:MAX_ROWS]:
        answer = fit(answer_of(record), 25, at_word=True).rstrip()
        if record.finish_reason == "length":
            answer = fit(answer, 12) + " [max_tokens]"
        name, question = fit(str(record.custom_id), 10), fit(fit(record.question, 28), 30)
        say(f"  {name} {MARKS[record.outcome]} {record.outcome:8} {question} {answer}")
    if total > MAX_ROWS:
        say(f"  ... and {total - MAX_ROWS} more in {path}")
    for outcome, advice in (
        (FAILED, ""),
        (UNKNOWN, "Perhaps accepted, and paid for: see the dashboard before you send them again."),
        (PENDING, f"Accepted, and paid for. To go on polling:\n      {resume}"),
        (NOT_SENT, f"To submit them, and poll what is pending:\n      {resume} --submit"),
    ):
        if listed[outcome]:
            show_list(f"{outcome} Requests", listed[outcome], path)
            say(f"\n    {advice}".rstrip())
    return ", ".join(f"{len(listed[each])} {each.lower()}" for each in shown if listed[each])


# --- The script: the results file, the configuration check, main

RESULTS_PREFIX = "async-group"
file_lock = threading.Lock()
EPILOG = """INFERENCE_API_KEY is your key, INFERENCE_BASE_URL an API elsewhere. Exit codes:
0 all succeeded; 1 not all did; 2 a mistake, nothing was sent; 130 interrupted."""
GRACE_SECONDS = 2  # at an early end, for exchanges that are under way


def append_rows(path: Path, records: Records) -> None:
    """Append a row for each record, in one write; raise OSError if it does not take them all."""
    rows = "".join(json.dumps(asdict(record)) + "\n" for record in records).encode()
    with file_lock, path.open("ab", buffering=0) as file:
        written = file.write(rows)
        if written < len(rows):  # the next row must not be glued to half a row
            file.truncate(file.tell() - written)
            raise OSError(f"no room left for {path}")


def read_results(path: Path) -> tuple[Records, list[bytes]]:
    """Return the last record of each request in a results file, and the lines that are no rows."""
    records: dict[str | None, Record] = {}
    others = []
    for line in filter(bytes.strip, path.read_bytes().split(b"\n")):
        with suppress(ValueError, TypeError, RecursionError):
            record = Record(**json.loads(line))
            if asdict(record) == json.loads(line):  # else it may be the other script's
                records[record.custom_id or record.generation_id] = record
                continue
        others.append(line)
    return list(records.values()), others


def new_run() -> tuple[Records, Path]:
    """Return the records of a new run, and its results file, which has a row for each of them."""
    questions = [SAMPLE_QUESTIONS[n % len(SAMPLE_QUESTIONS)] for n in range(NUM_REQUESTS)]
    digits = max(3, len(str(NUM_REQUESTS)))
    records = [Record(f"req-{n:0{digits}}", question) for n, question in enumerate(questions, 1)]
    now = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}"
    path = Path(RESULTS_DIR, f"{RESULTS_PREFIX}-{now}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    append_rows(path, records)
    return records, path


def earlier_run(name: str, is_submitting: bool) -> tuple[Records, Path]:
    """Return the records of a results file, and it: by default the newest with a pending one."""
    newest_first = sorted(Path(RESULTS_DIR).glob(f"{RESULTS_PREFIX}-*.jsonl"), reverse=True)
    for path in [Path(name)] if name else newest_first:
        records, damaged = read_results(path)
        if any(name or record.outcome == PENDING for record in records):
            break
    else:
        what = f"{name} has no row that this script has written"
        raise ValueError(what if name else f"nothing is pending in {RESULTS_DIR}")
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
    api_key()
    base_url()
    counts = (NUM_REQUESTS, MAX_POLL_ATTEMPTS)
    for number in (*counts, POLL_INTERVAL_SECONDS, REQUEST_TIMEOUT_SECONDS):
        if not isinstance(number, int | float) or not 0 < number <= 1_000_000:
            names = "NUM_REQUESTS, MAX_..., POLL_INTERVAL_SECONDS and REQUEST_TIMEOUT_SECONDS"
            raise ValueError(f"{names} must be numbers above 0, up to 1,000,000, not {number!r}")
    if not all(isinstance(count, int) for count in counts):
        raise ValueError(f"NUM_REQUESTS and MAX_... must be whole numbers, not {counts}")
    if NUM_REQUESTS > 50:
        raise ValueError("NUM_REQUESTS: a group holds 50; async_polling_example.py takes more")
    questions = SAMPLE_QUESTIONS if isinstance(SAMPLE_QUESTIONS, list) else []
    if not questions or not all(isinstance(each, str) and each.strip() for each in questions):
        raise ValueError("SAMPLE_QUESTIONS must be a list of questions, none of them blank")
    request = json.loads(json.dumps(build_request("any", questions[0])))
    if dig(request, str, "metadata", "custom_id") != "any":
        raise ValueError("build_request must return a JSON object with metadata.custom_id as given")


def run(records: Records, unsent: Records, path: Path) -> None:
    """Submit what is unsent, poll what is pending, and show both."""
    say(f"{RULE}\n INFERENCE.NET ASYNC GROUP API - POLLING EXAMPLE\n{RULE}\n")
    job = f"Requests to submit: {len(unsent)}" if unsent else f"Resuming: {path}"
    say(f"  Configuration:\n    • {job}\n    • Model: {MODEL_ID}")
    say(f"    • Poll interval: {POLL_INTERVAL_SECONDS}s")
    pool, save, shown = ThreadPoolExecutor(1), partial(append_rows, path), ""
    asked = [record for record in records if record.custom_id is not None]
    tick = partial(show_waiting, asked, time.monotonic())
    try:
        if unsent:
            show_section(f"Submitting {len(unsent)} Requests")
            for record in unsent[:5]:
                say(f"    {record.custom_id}: {fit(record.question, 65).rstrip()}")
            more = f"    ... and {len(unsent) - 5} more\n" if len(unsent) > 5 else ""
            say(f"{more}\n  Submitting to Group API...")
            with suppress(ApiError):  # it is the error of the requests that were not sent
                for submitted in submit_all(pool, unsent, save, tick):
                    show_submission(submitted)
        if any(record.outcome == PENDING for record in asked):
            show_section("Polling for Results")
        for attempt, _ in enumerate(poll_all(pool, records, save, tick), start=1):
            shown = show_poll(attempt, asked, shown)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_and_summarize(records: Records, unsent: Records, path: Path, resume: str) -> int:
    """Run, show a summary, even if the run has ended early, and return the exit code."""
    asked = [record for record in records if record.custom_id is not None]
    started, answered = time.monotonic(), sum(each.outcome == SUCCESS for each in asked)
    exit_code = 0
    try:
        run(records, unsent, path)
    except (ApiError, OSError, KeyboardInterrupt) as error:
        exit_code = 130 if isinstance(error, KeyboardInterrupt) else 1
        hint = f"up to {GRACE_SECONDS} s for ids on their way; Ctrl-C again ends now"
        say(f"\n  Stopping: {fit(str(error) or hint, 300).rstrip()}")
    finally:
        deadline = time.monotonic() + GRACE_SECONDS
        for thread in set(threading.enumerate()) - {threading.main_thread()}:
            with suppress(RuntimeError):  # Ctrl-C came before it had started
                thread.join(max(0, deadline - time.monotonic()))
    seconds = time.monotonic() - started
    answered = sum(each.outcome == SUCCESS for each in asked) - answered
    say(f"\n{RULE}\n GROUP GENERATION SUMMARY\n{RULE}")
    left = show_summary(asked, seconds, answered, path, resume)
    strays = [record for record in records if record.custom_id is None]
    if strays:
        show_list("Unmatched Generations", strays, path)
        left = ", ".join(filter(None, [left, f"{len(strays)} unmatched"]))
    if {record.group_id for record in asked} - {each.group_id for each in read_results(path)[0]}:
        say(f"\n  Keep this id, which the file does not have: {asked[0].group_id}")
    ending = f"Not complete: {left or 'stopped'}" if left or exit_code else "Generation complete!"
    say(f"\n  Results: {path}\n\n{RULE}\n {ending}\n{RULE}")
    return exit_code or (1 if left else 0)


def main() -> int:
    """Read the command line, run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    resume_help = "submit nothing; poll what FILE, or the newest results file, has pending"
    parser.add_argument("--resume", nargs="?", const="", metavar="FILE", help=resume_help)
    submit_help = "with --resume FILE, whose run must have ended: submit what was not sent"
    parser.add_argument("--submit", action="store_true", help=submit_help)
    options = parser.parse_args()
    if options.submit and not options.resume:
        parser.error("--submit needs --resume FILE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        check_configuration()
        if options.resume is None:
            records, path = new_run()
        else:
            records, path = earlier_run(options.resume, options.submit)
    except (OSError, ValueError, TypeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    is_submitting = options.resume is None or options.submit
    unsent = [record for record in records if is_submitting and record.outcome == NOT_SENT]
    resume = shlex.join(["uv", "run", sys.argv[0], "--resume", str(path)])
    try:
        return run_and_summarize(records, unsent, path, resume)
    except (OSError, KeyboardInterrupt) as error:  # stdout is closed or full; a second Ctrl-C
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            print(f"\n{path}: {str(error) or 'interrupted'}", file=sys.stderr)
        if any(record.outcome == PENDING for record in records):
            print(f"To go on polling: {resume}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


if __name__ == "__main__":
    exit_code = main()
    if exit_code:  # a worker that is stuck must not hold up the exit
        os._exit(exit_code)
