#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests"]
# ///
"""Ask inference.net's Asynchronous API questions, one by one, and poll for the answers.

    uv run async_polling_example.py                         submit all questions and poll
    uv run async_polling_example.py --resume                poll for what is still pending
    uv run async_polling_example.py --resume FILE --submit  submit what was not sent, and poll

INFERENCE_API_KEY is your key. INFERENCE_BASE_URL is for another address of the API. A run
keeps its requests in results/NAME.db; at its end it writes results/NAME.jsonl, to be read.

The life of a request, in the words of Record.state:

    Not sent -> Submitting -> Queued -> In Progress -> Success, or Failed
                    |
                    +-> Not sent   surely not accepted: it can be sent again
                    +-> Failed     refused
                    +-> Unknown    perhaps accepted, and paid for: never sent again by itself

The parts of this file:

    Configuration   what you edit: constants, questions, and the request for a question
    The API         four exceptions, and Client, with a method for each endpoint
    The records     Record, a request and what has come of it; Results, the file of them
    The work        submit_all and poll_all, which call the API in worker threads, and save
    The screen      everything that prints
    The script      the check of the configuration, the files of a run, and main

A program of your own needs no more than this. Run again, it goes on where it was:

    from concurrent.futures import ThreadPoolExecutor
    from async_polling_example import ApiError, Client, Results, new_record, poll_all, submit_all

    client = Client()
    results = Results("my_program.db")
    records = results.load() or [new_record("my-id", "What is 2 + 2?")]
    with ThreadPoolExecutor(5) as pool:
        try:
            for record in submit_all(client, pool, records, results.save):
                print(record.custom_id, record.outcome, record.error)
        except ApiError as error:  # what was accepted is polled all the same
            print("Not all was submitted:", error)
        for record in poll_all(client, pool, records, results.save):
            print(record.custom_id, record.outcome, record.response)
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import textwrap
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

from requests import Session
from urllib3 import HTTPResponse, Retry
from urllib3.exceptions import HTTPError

Json = dict[str, Any]

# --- Configuration: what you edit

NUM_REQUESTS = 10  # how many questions to ask; the samples repeat if there are fewer
MODEL_ID = "inference-net/load-test"  # the model that answers
MAX_TOKENS = 100  # the length of an answer, about 75 words; a longer one is cut off
POLL_INTERVAL_SECONDS = 1  # between two polls of a generation
MAX_POLL_ATTEMPTS = 120  # polls of each in a run; for hours, raise this and the interval
MAX_CONCURRENT_POLLS = 5  # calls at a time, submissions too; macOS allows about 200
REQUEST_TIMEOUT_SECONDS = 30  # to connect, and again for an answer; to read it, twice that
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


def load_questions() -> dict[str, str]:
    """Return the questions by custom id. Replace this to ask about data of your own."""
    questions = {}
    for index in range(NUM_REQUESTS):
        questions[f"req-{index + 1:03}"] = SAMPLE_QUESTIONS[index % len(SAMPLE_QUESTIONS)]
    return questions


def build_request(custom_id: str, question: str) -> Json:
    """Return the chat completion request for a question. Its answer repeats the metadata."""
    return {
        "model": MODEL_ID,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "metadata": {"custom_id": custom_id},  # metadata takes strings only
    }


# --- The API: a client, and what can go wrong

DEFAULT_BASE_URL = "https://api.inference.net/v1"
# https; http only to this machine, as everybody on the way could read the key
URL = r"(?a)(https://[\w.-]+|http://(localhost|127\.0\.0\.1|\[::1\]))(:\d+)?(/[\w./-]*)?"
# The longest pause for a Retry-After; a submission that is told to wait longer is LockedOut
MAX_RETRY_AFTER_SECONDS = 120
MAX_IDLE_SECONDS = 30  # an older connection may be dead: a submission would be Uncertain


def parse_json(content):
    """Return the JSON in the body of an answer, or None. NaN, which JSON lacks, is "NaN"."""
    try:
        return json.loads(content, parse_constant=str)
    except (ValueError, RecursionError):
        return None


def find(value, kind, *path):
    """Return what is in JSON at a path of keys and indexes, or None if it is of another kind."""
    try:
        for step in path:
            value = value[step]
    except (LookupError, TypeError):
        return None
    return value if isinstance(value, kind) else None


class ApiError(Exception):
    """A call to the API failed. The subclass says what that means for a submission."""


class Refused(ApiError):
    """The API refuses this request, but may take others: any 3xx, any 4xx not named below."""


class LockedOut(ApiError):
    """The API accepts no request for now: check the key, the credit, or the certificate.

    401; for a submission also 402, 403, and a 429 that asks to wait for more than two
    minutes; a certificate that can't be verified. For a poll, 402 and 403 are Refused.
    """


class NotAccepted(ApiError):
    """The call surely changed nothing, and is safe to repeat.

    No connection was made, or 429. For a poll, which never changes anything, also a timeout
    or a broken connection.
    """


class Uncertain(ApiError):
    """The call may have had an effect. To repeat a submission may be to pay for it twice.

    For a submission, a timeout or a broken connection after sending. For any call, 408, 5xx,
    or an answer that is no JSON object.
    """


class Client:
    """The API, for one account. Threads can share a client.

    api_key and base_url are by default the environment variables INFERENCE_API_KEY and
    INFERENCE_BASE_URL. timeout_seconds limits connecting, and then the wait for an answer;
    to read it may take twice that. ValueError: the key or the address can't be used.
    """

    def __init__(self, api_key=None, base_url=None, timeout_seconds=30):
        if not hasattr(HTTPResponse, "read1"):  # see read_content
            raise ValueError("urllib3 is too old: pip install --upgrade urllib3")
        if api_key is None:
            api_key = os.environ.get("INFERENCE_API_KEY", "")
        address = base_url or os.environ.get("INFERENCE_BASE_URL") or DEFAULT_BASE_URL
        self.api_key = api_key.strip()
        self.base_url = address.strip().rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.paused_until = 0.0  # Retry-After, in monotonic() time: see wait
        self.local = threading.local()  # each thread has a session of its own
        if not re.fullmatch("[!-~]+", self.api_key):
            raise ValueError(
                "set INFERENCE_API_KEY to your key, without spaces (see https://inference.net)"
            )
        if not re.fullmatch(URL, self.base_url):  # not shown, as it may hold the key
            raise ValueError(
                "INFERENCE_BASE_URL can't be used: it must begin with https:// (http:// only for "
                f"this machine) and have no user, ? or #, as in {DEFAULT_BASE_URL}"
            )

    def submit_generation(self, request) -> str:
        """POST /v1/async/chat/completions: submit a request and return its generation id."""
        answer = self.call("POST", "/async/chat/completions", request)
        generation_id = find(answer, str, "id") or ""
        if not re.fullmatch("[A-Za-z0-9_-]+", generation_id):
            raise Uncertain(f"accepted, but the answer has no usable id: {str(answer)[:500]}")
        return generation_id

    def fetch_generation(self, generation_id) -> Json:
        """GET /v1/generation/{id}: return the generation. A new one may be Refused with 404."""
        generation = self.call("GET", f"/generation/{generation_id}")
        is_another = generation.get("id") not in (None, generation_id)
        if is_another or not find(generation, str, "state"):
            raise Uncertain(f"not the state of {generation_id}: {str(generation)[:500]}")
        return generation

    def call(self, method, path, body=None) -> Json:
        """Make one HTTP request and return the JSON object in its answer, or raise ApiError."""
        upload = None
        if body is not None:
            # A file, as its position tells if anything of it may have been sent
            upload = io.BytesIO(json.dumps(body).encode())
        try:
            response = self.session().request(
                method,
                self.base_url + path,
                data=upload,
                auth=self.add_headers,  # a plain header would lose to an entry in .netrc
                timeout=self.timeout_seconds,
                allow_redirects=False,
                stream=True,
            )
        except (OSError, ValueError, HTTPError) as error:
            cause: BaseException = error
            while cause.__context__:  # the first error says why, the others wrap it
                cause = cause.__context__
            reason = f"{cause} ({type(error).__name__} at {urlsplit(self.base_url).netloc})"
            reason = reason.replace(self.api_key, "[API key]")
            # requests begins to read the upload when a connection stands.
            may_have_been_sent = upload is not None and upload.tell() > 0
            if may_have_been_sent:
                raise Uncertain(reason) from error
            if "CERTIFICATE_VERIFY_FAILED" in reason:
                raise LockedOut(reason) from error
            raise NotAccepted(reason) from error
        with response:
            content = self.read_content(response)
        if not 200 <= response.status_code < 300:
            raise self.status_error(method, response, content)
        answer = parse_json(content)
        if not isinstance(answer, dict):
            raise Uncertain(
                f"HTTP {response.status_code}: no whole JSON object: {content[:500]!r}"
            )
        return answer

    def session(self):
        """Return this thread's session, without a connection that was idle for long."""
        local = self.local
        # A new thread has none, and a fork has its parent's.
        is_missing = getattr(local, "process_id", None) != os.getpid()
        if is_missing or monotonic() > local.usable_until:
            local.process_id = os.getpid()
            local.session = Session()
        local.usable_until = monotonic() + MAX_IDLE_SECONDS
        return local.session

    def add_headers(self, request):
        """Add the key and the type of the content to a request."""
        request.headers["Authorization"] = f"Bearer {self.api_key}"
        request.headers["Content-Type"] = "application/json"
        return request

    def read_content(self, response):
        """Return what arrives of an answer until it ends, breaks off or takes too long."""
        deadline = monotonic() + self.timeout_seconds
        content = b""
        # If it breaks off, what has arrived may still be a whole answer.
        with suppress(HTTPError):
            while monotonic() < deadline:
                # read1 returns what is there, and waits only if there is nothing.
                chunk = response.raw.read1(65536, decode_content=True)
                if not chunk:
                    break
                content += chunk
        return content.replace(self.api_key.encode(), b"[API key]")

    def status_error(self, method, response, content):
        """Return the ApiError for an HTTP status that is not 2xx, and note its Retry-After."""
        status = response.status_code
        message = find(parse_json(content), str, "error", "message")
        text = message or content[:500].decode(errors="replace") or "no reason given"
        # JSON may have escaped the key: it is taken out again.
        reason = f"HTTP {status}: {text}".replace(self.api_key, "[API key]")
        wait_seconds = 0.0
        # A Retry-After that can't be read is ignored.
        with suppress(ValueError, OverflowError, HTTPError):
            wait_seconds = Retry().get_retry_after(response.raw) or 0
        if wait_seconds:
            reason += f" (Retry-After: {int(wait_seconds)} s)"
        paused_until = monotonic() + min(wait_seconds, MAX_RETRY_AFTER_SECONDS)
        self.paused_until = max(self.paused_until, paused_until)
        if status == 401:
            return LockedOut(f"{reason} (check INFERENCE_API_KEY)")
        # A 429 that asks a submission to wait longer is LockedOut, below.
        if status == 429 and (method == "GET" or wait_seconds <= MAX_RETRY_AFTER_SECONDS):
            return NotAccepted(reason)
        if method == "POST" and status in (402, 403, 429):
            return LockedOut(reason)
        if method == "POST" and status == 404:
            reason += " (check INFERENCE_BASE_URL: it usually ends in /v1)"
        if 300 <= status < 500 and status != 408:
            return Refused(reason)
        return Uncertain(reason)

    def wait(self, seconds, stop) -> bool:
        """Wait, and until any Retry-After is over; return False if stop is set meanwhile."""
        until = monotonic() + seconds
        while not stop.is_set():
            remaining_seconds = max(until, self.paused_until) - monotonic()
            if remaining_seconds <= 0:
                return True
            stop.wait(remaining_seconds)
        return False


# --- The records: a request and what has come of it, and the file that keeps them

# The API's states of a generation. The last two are final, and no other is.
QUEUED = "Queued"
IN_PROGRESS = "In Progress"
SUCCESS = "Success"
FAILED = "Failed"  # also: refused when it was submitted
# Our states, before there is one of the API's
NOT_SENT = "Not sent"  # surely not accepted: it can be submitted
SUBMITTING = "Submitting"  # being sent, or about to be
UNKNOWN = "Unknown"  # sent, and perhaps accepted: only you can make it Not sent again
# An outcome, not a state: accepted, so that it has an id, and not final yet
PENDING = "Pending"


@dataclass
class Record:
    """A request and what has come of it. The keys are those of the results files."""

    custom_id: str
    question: str
    request: Json  # the chat completion request that is sent
    generation_id: str | None = None
    state: str = NOT_SENT
    response: str | Json | None = None  # the text; all of it, if it is more than one text
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    duration_ms: float | None = None
    error: str | None = None

    @property
    def outcome(self) -> str:
        """Success, Failed, Not sent, Submitting. Any other is Pending with an id, else Unknown."""
        if self.state in (SUCCESS, FAILED, NOT_SENT, SUBMITTING):
            return self.state
        if self.generation_id:
            return PENDING
        return UNKNOWN

    def update(self, generation):
        """Copy what the API says of the generation."""
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            setattr(self, name, find(generation, int, "response", "usage", name))
        self.finish_reason = find(generation, str, "response", "choices", 0, "finish_reason")
        self.response = answer_of(generation)
        with suppress(ValueError, TypeError):  # a time is missing, or odd
            dispatched_at = parse_time(generation.get("dispatchedAt"))
            finished_at = parse_time(generation.get("finishedAt"))
            self.duration_ms = (finished_at - dispatched_at) / timedelta(milliseconds=1)
        self.error = None
        if generation["state"] == FAILED:
            self.error = find(generation, str, "stateMessage") or "no reason given"
        self.state = generation["state"]  # last: another thread may be reading the record


Records = list[Record]


def answer_of(generation):
    """Return the text of an answer, or the whole response if it is more than one text.

    Tool calls, a refusal, several choices, log probabilities are more, and paid for, too.
    """
    response = find(generation, dict, "response")
    text = find(response, str, "choices", 0, "message", "content")
    if text is None:
        return response
    choice = response["choices"][0]
    extras = {key for key, value in choice["message"].items() if value} - {"role", "content"}
    if extras or choice.get("logprobs") or len(response["choices"]) > 1:
        return response
    return text


def parse_time(text):
    """Read a time of the API's, to the millisecond. (Python 3.10 can't read its Z.)"""
    return datetime.fromisoformat(str(text).rstrip("Z")[:23])


def new_record(custom_id, question) -> Record:
    """Return a record with the request of build_request; ValueError if it can't be sent."""
    record = Record(custom_id, question, build_request(custom_id, question))
    check_unsent([record])
    return record


def check_unsent(records):
    """Return the records that are Not sent; ValueError or TypeError if one can't be sent."""
    counts = Counter(record.custom_id for record in records)
    unsent = [record for record in records if record.state == NOT_SENT]
    for record in unsent:
        if counts[record.custom_id] > 1:
            raise ValueError(f"more than one record has the custom id {record.custom_id!r}")
        json.dumps(asdict(record), allow_nan=False)  # raises, if it is no JSON
        repeated = find(record.request, str, "metadata", "custom_id")
        if not repeated or repeated != record.custom_id:
            raise ValueError(
                "a custom id must be a text, not empty, and be the request's metadata.custom_id "
                f"too: {record.custom_id!r} has {repeated!r} there"
            )
    return unsent


# A row for each record, with the record as JSON. What was saved survives a kill.
SCHEMA = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS single_requests (
        custom_id TEXT PRIMARY KEY, state TEXT NOT NULL, record TEXT NOT NULL
    );

    -- Pay once. Only what is Not sent can become Submitting. What is Submitting, Unknown or
    -- Failed can become Not sent again, if it has an error: an attempt that failed leaves one.
    -- A record that a program has made anew, without load(), has none, and is refused.
    CREATE TRIGGER IF NOT EXISTS load_first BEFORE UPDATE ON single_requests
    WHEN (new.state = 'Submitting' AND old.state <> 'Not sent')
        OR (new.state = 'Not sent' AND old.state <> 'Not sent' AND (
            old.state NOT IN ('Submitting', 'Unknown', 'Failed')
            OR json_extract(new.record, '$.error') IS NULL
        ))
    BEGIN SELECT RAISE(ABORT, 'it was submitted: use load(), or save it as Not sent first'); END;

    -- Nobody else has the file open: what is Submitting was left so when a program ended.
    UPDATE single_requests
    SET state = 'Unknown', record = json_set(
        record, '$.state', 'Unknown', '$.error', 'the program ended while it was being sent'
    )
    WHERE state = 'Submitting';
"""
UPSERT = """
    INSERT INTO single_requests (custom_id, state, record) VALUES (?, ?, ?)
    ON CONFLICT (custom_id) DO UPDATE SET state = excluded.state, record = excluded.record
"""


class Results:
    """The file that keeps the records: SQLite, a row for each. It is made if it is missing.

    Threads can share it, processes can't: OSError if it is open already. (Open it after a
    fork, not before.) save raises OSError, too, if the file can't be written. Begin with
    load(): save refuses records that are made anew in the place of submitted ones. To submit a
    Failed or Unknown record again, make its state Not sent, leave its error, and save it.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.lock = Lock()
        self.process_id = os.getpid()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.connection = sqlite3.connect(path, timeout=0, check_same_thread=False)
            # One process at a time can have the file open.
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.connection.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise OSError(f"can't open {path}, or it is in use already: {error}") from error

    def save(self, records):
        """Put records on file, all of them or none. Each replaces the one with its custom id."""
        if os.getpid() != self.process_id:  # SQLite can't be used across a fork
            raise OSError(f"{self.path} was opened by another process: open it in this one")
        try:
            with self.lock, self.connection:  # a transaction: it commits, or rolls back
                rows = [
                    (record.custom_id, record.state, json.dumps(asdict(record)))
                    for record in records
                ]
                self.connection.executemany(UPSERT, rows)
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: {error}") from error

    def load(self) -> Records:
        """Return the records, in the order in which they were first saved."""
        query = "SELECT record FROM single_requests ORDER BY rowid"
        with self.lock:
            rows = self.connection.execute(query).fetchall()
        return [Record(**json.loads(text)) for [text] in rows]

    def close(self):
        """Close the file. Another process can open it now."""
        with self.lock:
            self.connection.close()


# --- The work: submit, then poll until final

# submit_all and poll_all hand out the work to worker threads, and yield what has ended.
# The workers call the API, change the records and save them: an id is on file the moment
# it arrives, whatever happens to the caller's thread. Both are iterators: nothing happens
# until you iterate. To stop, leave the loop; an iterator with a name lives on, so close it.

MAX_SUBMIT_ATTEMPTS = 5
MAX_UNCERTAIN = 5  # in a row
CHECK_SECONDS = 0.05  # how often poll_all looks for what is due


def submit_all(
    client, pool, records, save, max_concurrent=MAX_CONCURRENT_POLLS
) -> Iterator[Record]:
    """Submit the records that are Not sent; yield each when its submission has ended.

    At most max_concurrent are under way; they end even if you leave the loop. save gets what
    is new first, then [record] before and after each attempt. Raises ValueError or TypeError
    before anything is sent; after what was under way has ended, LockedOut, NotAccepted (five
    attempts), Uncertain (five in a row), or what save raised.
    """
    waiting = deque(check_unsent(list(records)))
    # The file has the whole job from now on. (What has an error is there since its attempt.)
    save([record for record in waiting if not record.error])
    under_way: dict[Future[None], Record] = {}
    stop = Event()
    uncertain_in_a_row = 0
    error = None
    try:
        while waiting or under_way:
            while waiting and len(under_way) < max_concurrent:
                record = waiting.popleft()
                if record.state != NOT_SENT:  # another submit_all has taken it
                    continue
                record.state = SUBMITTING
                try:
                    future = pool.submit(submit_in_worker, client, record, save, stop)
                except RuntimeError:  # the pool is shut down, or can't start a thread
                    record.state = NOT_SENT
                    raise
                under_way[future] = record
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                record = under_way.pop(future)
                error = error or future.exception()
                uncertain_in_a_row = uncertain_in_a_row + 1 if record.state == UNKNOWN else 0
                if uncertain_in_a_row >= MAX_UNCERTAIN and waiting and not error:
                    error = Uncertain(f"{MAX_UNCERTAIN} uncertain in a row: {record.error}")
                if error:
                    waiting.clear()
                    stop.set()
                yield record
        if error:
            raise error
    finally:
        stop.set()
        wait(under_way)  # until each has saved its id: it may have been paid for


def submit_in_worker(client, record, save, stop):
    """Submit one request. Try again only what surely was not accepted."""
    for attempt in range(MAX_SUBMIT_ATTEMPTS):
        # From the second attempt on, too: nobody else may submit it during the wait.
        record.state = SUBMITTING
        record.generation_id = None  # of an earlier submission, if it is submitted again
        # Up to 0, 1, 2, 4, 8 seconds, at random: not all come again at the same time.
        backoff_seconds = random.uniform(0, 2**attempt // 2)
        if not client.wait(backoff_seconds, stop):  # stopped
            record.state = NOT_SENT
            return
        try:
            save([record])
        except Exception:  # what can't be put on file is not sent
            record.state = NOT_SENT
            raise
        try:
            record.generation_id = client.submit_generation(record.request)
            record.state = QUEUED
            record.error = None
        except Exception as error:
            record.state = state_after(error)
            record.error = str(error)
            if isinstance(error, LockedOut) or not isinstance(error, ApiError):
                raise
        finally:
            save([record])
        if record.state != NOT_SENT:
            return
    raise NotAccepted(f"{MAX_SUBMIT_ATTEMPTS} attempts: {record.error}")


def state_after(error):
    """Return what has become of a request whose submission failed with this error."""
    if isinstance(error, Refused):
        return FAILED
    if isinstance(error, LockedOut | NotAccepted):
        return NOT_SENT
    return UNKNOWN


def poll_all(
    client,
    pool,
    records,
    save,
    interval_seconds=POLL_INTERVAL_SECONDS,
    max_attempts=MAX_POLL_ATTEMPTS,
    max_concurrent=MAX_CONCURRENT_POLLS,
) -> Iterator[Record]:
    """Poll the records that are Pending; yield each when it has become final and was saved.

    An iterator, as submit_all is. At most max_concurrent polls are under way at a time.
    After max_attempts polls a record stays Pending. If you leave the loop, what is under way
    is not awaited: a poll costs nothing. Raises LockedOut, or what save has raised.
    """
    # (when it is due, which attempt, the record), in order of time: the interval is the same
    waiting = deque((0.0, 1, record) for record in records if record.outcome == PENDING)
    under_way: dict[Future[None], tuple[int, Record]] = {}
    stop = Event()
    try:
        while waiting or under_way:
            while (
                waiting and waiting[0][0] <= monotonic() and len(under_way) < max_concurrent
            ):
                _, attempt, record = waiting.popleft()
                future = pool.submit(poll_in_worker, client, record, save, stop)
                under_way[future] = (attempt, record)
            if not under_way:
                sleep(CHECK_SECONDS)
            for future in wait(under_way, CHECK_SECONDS, FIRST_COMPLETED).done:
                attempt, record = under_way.pop(future)
                future.result()
                if record.outcome != PENDING:
                    yield record
                elif attempt < max_attempts:
                    due_at = monotonic() + interval_seconds
                    waiting.append((due_at, attempt + 1, record))
    finally:
        stop.set()


def poll_in_worker(client, record, save, stop):
    """Poll a generation once. If that fails, the record stays Pending."""
    if not client.wait(0, stop):  # stopped
        return
    try:
        generation = client.fetch_generation(record.generation_id)
    except ApiError as error:  # a poll costs nothing: it is made again
        record.error = str(error)
        if isinstance(error, LockedOut):
            raise
        return
    if stop.is_set():  # the loop was left, and another one may be polling the record
        return
    record.update(generation)
    if record.outcome != PENDING:
        save([record])


# --- The screen: everything that prints

MARKS = {SUCCESS: "✓", FAILED: "✗", UNKNOWN: "?", PENDING: "…", NOT_SENT: "-"}
MAX_ROWS = 50  # of a list
MAX_LISTED = 200  # in a larger run, what goes well shows in the live line only
REDRAW_SECONDS = 0.25  # the live line of a terminal
REPEAT_SECONDS = 60  # a line about the progress, elsewhere


class Screen:
    """Prints lines and, below them, a live line that a thread keeps up to date.

    On a terminal the live line is redrawn in place, elsewhere it is printed once a minute.
    """

    def __init__(self, records):
        self.lock = Lock()
        self.columns = shutil.get_terminal_size().columns
        self.is_terminal = sys.stdout.isatty()
        self.watched = records  # which the live line counts
        self.notes = []  # what went wrong, to be printed at the end
        self.started_at = monotonic()
        blank = " " * (self.columns - 1)
        self.erase = f"\r{blank}\r" if self.is_terminal else ""  # removes the live line
        Thread(target=self.redraw, daemon=True).start()

    def print(self, text):
        """Print text in the place of the live line."""
        with self.lock:
            print(self.erase + text)

    def redraw(self):
        """Print the live line again and again: how many are in which state, for how long."""
        while True:
            sleep(REDRAW_SECONDS if self.is_terminal else REPEAT_SECONDS)
            states = tally(record.state for record in self.watched)
            duration = timedelta(seconds=int(monotonic() - self.started_at))
            line = shorten(f"⏳ {states}, {duration}", self.columns - 4)
            line_end = "" if self.is_terminal else "\n"
            # If stdout is closed, the main thread will notice.
            with self.lock, suppress(OSError):
                if self.watched:
                    print(f"{self.erase}  {line}", end=line_end, flush=True)

    def print_title(self, title):
        """Print a title between two rules."""
        rule = "=" * min(80, self.columns)
        self.print(f"{rule}\n {title}\n{rule}")

    def print_section(self, title):
        """Print the heading of a section."""
        self.print(f"\n  {title}\n  {'-' * (len(title) + 4)}\n")

    def print_submission(self, record, total):
        """Print how a submission has ended; total is how many there are."""
        if record.error:
            line = f"{MARKS[record.outcome]} {record.custom_id}: {record.error}"
            self.print("    " + shorten(line, 74))
        elif record.generation_id and total <= MAX_LISTED:
            line = shorten(f"✓ {record.custom_id}: {record.question}", 58)
            self.print(f"    {line} → {shorten(record.generation_id, 15)}")

    def print_answer(self, record, done, total):
        """Print that a generation is final; done of total are now."""
        if record.outcome == FAILED or total <= MAX_LISTED:
            gauge = f"{bar(done, total, 30)} {done * 100 // total}%"
            name = f"{MARKS[record.outcome]} {shorten(record.custom_id, 24)}"
            self.print(f"  [{done:>3}/{total}] {gauge} {name}")


def printable(text):
    """Return text from elsewhere on one line and without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:2000]).strip()


def shorten(text, columns):
    """Make text from elsewhere printable, and cut it to at most so many letters."""
    text = printable(text)
    if len(text) <= columns:
        return text
    return text[: columns - 3].rstrip() + "..."


def tally(words):
    """Return how often each word comes, as in "2 failed, 1 pending"."""
    counts = Counter(words)
    return ", ".join(f"{count} {word.lower()}" for word, count in counts.items())


def bar(done, total, columns):
    """Return a progress bar, which is full only when all is done."""
    return f"|{'█' * (done * columns // total):░<{columns}}|"


def show_figures(records, submitted, seconds):
    """Print counts, times and tokens of the records.

    submitted are those that this run was to submit, and seconds is how long it took.
    """
    total = len(records)
    counts = Counter(record.outcome for record in records)
    cut_off = sum(record.finish_reason == "length" for record in records)
    mark = "✓" if counts[SUCCESS] == total else "✗"
    gauge = f"{bar(counts[SUCCESS], total, 40)} {counts[SUCCESS] * 1000 // total / 10}%"
    print("\n  Success Rate\n  ----------------")
    print(f"  {mark} {gauge}\n\n      Successful:  {counts[SUCCESS]:>4}")
    if cut_off:
        print(f"      Cut off:     {cut_off:>4} of these, by MAX_TOKENS")
    for outcome in (FAILED, UNKNOWN, PENDING, NOT_SENT):
        if counts[outcome] or outcome == FAILED:
            print(f"      {outcome + ':':<13}{counts[outcome]:>4}")
    print(f"      Total:       {total:>4}")

    durations = [record.duration_ms for record in records if record.duration_ms is not None]
    average = least = most = throughput = "-"
    if durations:
        average = f"{sum(durations) / len(durations):.1f}ms"
        least = f"{min(durations):.1f}ms"
        most = f"{max(durations):.1f}ms"
    answered = sum(record.outcome == SUCCESS for record in submitted)
    if answered:
        throughput = f"{answered / seconds:.2f} req/s"
    completions = [record.completion_tokens for record in records if record.completion_tokens]
    print(
        "\n  Performance Metrics\n  -----------------------\n"
        f"      Total wall-clock time: {seconds:>10.2f}s\n"
        f"      Avg generation time:   {average:>12}\n"
        f"      Min generation time:   {least:>12}\n"
        f"      Max generation time:   {most:>12}\n"
        f"      Throughput:            {throughput:>16}\n"
        "\n  Token Usage\n  ---------------\n"
        f"      Prompt tokens:     {sum(record.prompt_tokens or 0 for record in records):>10,}\n"
        f"      Completion tokens: {sum(completions):>10,}\n"
        f"      Total tokens:      {sum(record.total_tokens or 0 for record in records):>10,}\n"
        f"      Avg completion/req:{sum(completions) / max(len(completions), 1):>10,.1f}"
    )


def show_table(records, columns, path):
    """Print the questions with their answers, on a wide terminal more of the answers."""
    width = max(columns, 80)
    # From 10 to 24 columns, so that the name of a file can be a custom id
    id_columns = max(len(f"{shorten(record.custom_id, 24):<10}") for record in records)
    print("\n  Request-Response Correlation\n  --------------------------------\n")
    print(f"  {'ID':<{id_columns}} Status     {'Question':<30} Response")
    print(f"  {'-' * id_columns} {'-' * 10} {'-' * 30} {'-' * (width - id_columns - 45)}")
    for record in records[:MAX_ROWS]:
        custom_id = shorten(record.custom_id, 24)
        question = shorten(record.question, 28)
        status = f"{MARKS.get(record.outcome, '?')} {record.outcome:<8}"
        start = f"  {custom_id:<{id_columns}} {status} {question:<30} "
        print(start + answer_cell(record, width - len(start)))
    if len(records) > MAX_ROWS:
        print(f"  ... and {len(records) - MAX_ROWS} more in {path}")


def answer_cell(record, columns):
    """Return what the table shows of an answer, cut between two words if there are some."""
    text = record.error or record.response or ""
    if not isinstance(text, str):
        return "(no plain text: see file)"
    if record.finish_reason == "length":
        text = "[cut off] " + text
    text = printable(text)
    if len(text) <= columns:
        return text
    start = re.sub(r" \S{0,12}$", "", text[: columns - 2])  # without a word that is cut
    return start[: columns - 3] + "..."


def lost_ids(records, path):
    """Return the ids that may not be on file, and the Python that puts them there."""
    # On file these records are Unknown, without an id. Once they have one they are Pending (see
    # Record.outcome), and --resume polls them.
    text = (
        "\n  The API gave these ids, but they may not be on file. To put them there:\n\n"
        f"      from {Path(sys.argv[0]).stem} import Results\n"
        f"      results = Results({str(path)!r})\n"
        "      records = {record.custom_id: record for record in results.load()}\n"
    )
    for record in records:
        text += (
            f"      records[{record.custom_id!r}].generation_id = {record.generation_id!r}\n"
        )
    return text + "      results.save(records.values())\n"


def advice(records, command):
    """Say what to do about the requests that are not final."""
    outcomes = {record.outcome for record in records}
    text = ""
    if UNKNOWN in outcomes:
        text += (
            "\n  ? Unknown: perhaps paid for. See README (Coming back later) and dashboard.\n"
        )
    if PENDING in outcomes:
        text += f"\n  … Pending: accepted. To go on polling:\n      {command}\n"
    if NOT_SENT in outcomes:
        text += f"\n  - Not sent: to submit them, and poll:\n      {command} --submit\n"
    return text


# --- The script: the configuration, the files of a run, main

PREFIX = "async-polling"  # of the names of results files


def check_configuration():
    """Raise ValueError for a constant that can't be used, with its name and value."""
    numbers = {
        "NUM_REQUESTS": NUM_REQUESTS,
        "MAX_TOKENS": MAX_TOKENS,
        "POLL_INTERVAL_SECONDS": POLL_INTERVAL_SECONDS,
        "MAX_POLL_ATTEMPTS": MAX_POLL_ATTEMPTS,
        "MAX_CONCURRENT_POLLS": MAX_CONCURRENT_POLLS,
        "REQUEST_TIMEOUT_SECONDS": REQUEST_TIMEOUT_SECONDS,
    }
    for name, value in numbers.items():
        kind = (int, float) if name.endswith("_SECONDS") else int
        if not isinstance(value, kind) or not 0 < value <= 1_000_000:
            raise ValueError(
                f"{name} must be a whole number from 1 to 1,000,000 (seconds: also a fraction), "
                f"not {value!r}"
            )


def new_records():
    """Return a record for each question; ValueError if load_questions returns anything else."""
    questions = load_questions()
    if not isinstance(questions, dict) or not questions:
        raise ValueError(
            f"load_questions must return texts by custom id, not {questions!r:.60}"
        )
    records = []
    for custom_id, question in questions.items():
        if not isinstance(question, str):
            raise ValueError(
                f"load_questions: {custom_id!r} has {question!r:.60}, which is no text"
            )
        records.append(new_record(custom_id, question))
    return check_unsent(records)


def open_results(resume):
    """Open a results file: resume is None for a new run, a path, or "" for the newest pending."""
    folder = Path(RESULTS_DIR).expanduser()
    if resume is None:
        name = f"{PREFIX}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}.db"
        records = new_records()
        results = Results(folder / name)
        results.save(records)
        return results
    if resume:
        path = Path(resume).with_suffix(".db")
        if not path.is_file():
            raise ValueError(
                f"there is no {path} (an earlier version's .jsonl can't be resumed)"
            )
        return Results(path)
    for path in sorted(folder.glob(f"{PREFIX}-*.db"), reverse=True):
        results = Results(path)
        outcomes = {record.outcome for record in results.load()}
        if PENDING in outcomes:
            return results
        results.close()
        if NOT_SENT in outcomes:
            print(
                f"{path} is newer, with requests that were not sent: --resume {path} --submit"
            )
    raise ValueError(f"nothing is pending in {folder}")


def handle_signals(command):
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt. A second one ends the program at once."""
    signals = [signal.SIGINT, signal.SIGTERM]

    def handle(*_):
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        # os.write, as print may be what is being interrupted
        text = (
            "\n  Stopping when the submissions under way have ended. Ctrl-C again: at once.\n"
            "  To go on later (add --submit for what was not sent):\n"
            f"      {command}\n"
        )
        os.write(2, text.encode())
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, handle)


def run(client, results, records, unsent, screen):
    """Submit what is unsent, then poll what is pending, and show both."""
    job = f"Requests to submit: {len(unsent)}" if unsent else f"Resuming: {results.path}"
    screen.print_title("INFERENCE.NET ASYNC API - SINGLE REQUEST POLLING EXAMPLE")
    screen.print(
        f"\n  Configuration:\n    • {job}\n    • Model: {records[0].request.get('model')}\n"
        f"    • Poll interval: {POLL_INTERVAL_SECONDS}s\n"
        f"    • Concurrent polls: {MAX_CONCURRENT_POLLS}"
    )
    pool = ThreadPoolExecutor(MAX_CONCURRENT_POLLS)
    try:
        if unsent:
            screen.print_section(f"Submitting {len(unsent)} Requests")
            for record in submit_all(client, pool, unsent, results.save):
                screen.print_submission(record, len(unsent))
    except ApiError as error:  # what was accepted is polled all the same
        screen.notes.append(f"Stopped submitting: {error}")
    pending = [record for record in records if record.outcome == PENDING]
    if pending:
        screen.print_section("Polling for Results")
        for done, record in enumerate(poll_all(client, pool, pending, results.save), start=1):
            screen.print_answer(record, done, len(pending))
    if any(record.outcome == PENDING for record in pending):
        duration = timedelta(seconds=MAX_POLL_ATTEMPTS * POLL_INTERVAL_SECONDS)
        screen.notes.append(
            f"The polls are used up: {MAX_POLL_ATTEMPTS} of each generation, in {duration}. "
            "To wait for longer, raise MAX_POLL_ATTEMPTS."
        )


def write_answers(records, path):
    """Write a line of JSON for each record, without the request that was sent."""
    with path.open("w") as file:
        for record in records:
            row = asdict(record)
            del row["request"]
            file.write(json.dumps(row) + "\n")


def end_run(screen, records, unsent, results, command):
    """Save everything, show the summary, and tell if every request has its answer."""
    screen.watched = []
    path = results.path.with_suffix(".jsonl")
    lost = []
    try:
        results.close()
        results = Results(results.path)  # makes it anew if it was deleted meanwhile
        # What Ctrl-C met on its way to a worker is Submitting still. The file knows if it
        # may have been sent.
        results.save([record for record in records if record.state != SUBMITTING])
        records = results.load()
        results.close()
    except OSError as error:
        screen.notes.append(str(error))
        lost = [record for record in records if record.generation_id]
    try:
        write_answers(records, path)
    except OSError as error:
        screen.notes.append(str(error))
    reasons = Counter(record.error for record in records if record.error)
    for reason, count in reasons.most_common(MAX_ROWS):
        screen.notes.append(f"{count} without an answer: {reason}")
    missing = tally(record.outcome for record in records if record.outcome != SUCCESS)
    ending = "Generation complete!"
    if missing or screen.notes:
        ending = f"Not complete: {missing or 'see above'}"
    next_steps = advice(records, command)
    if lost:
        next_steps += lost_ids(lost, results.path)
    try:
        screen.print("")
        screen.print_title("ASYNC GENERATION SUMMARY")
        show_figures(records, unsent, monotonic() - screen.started_at)
        show_table(records, screen.columns, path)
        for note in screen.notes:
            print("\n" + textwrap.indent(textwrap.fill(printable(note), 78), "  "))
        print(f"{next_steps}\n  Results: {path}\n")
        screen.print_title(ending)
    except OSError:  # stdout is closed or full
        sys.stderr.write(next_steps)
        return False
    return not missing and not screen.notes


def main():
    """Read the command line, run, show the summary, and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Ask inference.net's Asynchronous API questions, and poll for the answers.",
        epilog="INFERENCE_API_KEY is your key, INFERENCE_BASE_URL the API's address.",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on polling an earlier run, without FILE the newest with something pending",
    )
    parser.add_argument("--submit", action="store_true", help="also submit what was not sent")
    options = parser.parse_args()
    if options.submit and not options.resume:
        parser.error("--submit needs --resume FILE")
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    try:
        check_configuration()
        client = Client(timeout_seconds=REQUEST_TIMEOUT_SECONDS)
        results = open_results(options.resume)
        records = results.load()
        if not records:
            raise ValueError(f"there is no request of {parser.prog} in {results.path}")
        unsent = []
        if options.submit or options.resume is None:
            unsent = check_unsent(records)
    except (OSError, ValueError, TypeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    command = f'uv run "{sys.argv[0]}" --resume "{results.path}"'
    screen = Screen(records)
    handle_signals(command)
    try:
        run(client, results, records, unsent, screen)
    except (ApiError, OSError) as error:
        screen.notes.append(str(error))
    finally:  # whatever ends the run, Ctrl-C too
        is_complete = end_run(screen, records, unsent, results, command)
    return int(not is_complete)


if __name__ == "__main__":
    try:
        exit_code = main()
    except KeyboardInterrupt:
        exit_code = 130
    os._exit(exit_code)  # a poll that stalls must not hold up the exit
