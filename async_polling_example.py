#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests"]
# ///
"""Ask inference.net's Asynchronous API questions, one request each, and poll for the answers.

    uv run async_polling_example.py                         submit all questions and poll
    uv run async_polling_example.py --resume                poll for what is still pending
    uv run async_polling_example.py --resume FILE --submit  submit what was not sent, and poll

INFERENCE_API_KEY is your key. INFERENCE_BASE_URL is the API's address, if not the usual one.

The life of a request, in the words of Record.state:

    Not sent -> Submitting -> Queued -> In Progress -> Success, or Failed
                    |
                    +-> Not sent   surely not accepted: it can be sent again
                    +-> Failed     refused
                    +-> Unknown    perhaps accepted, and paid for: never sent again

The parts of this file:

    Configuration   what you edit: constants, questions, and the request for a question
    The API         four exceptions, and Client, with a method for each endpoint
    The records     Record, a request and what has come of it; Results, the file that keeps them
    The work        submit_all and poll_all, whose worker threads call the API and save
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
import shlex
import shutil
import signal
import sqlite3
import sys
import textwrap
import threading
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

from requests import PreparedRequest, Response, Session
from urllib3 import HTTPResponse, Retry
from urllib3.exceptions import HTTPError

Json = dict[str, Any]

# --- Configuration: what you edit

NUM_REQUESTS = 10  # how many questions to ask; they repeat if there are fewer
MODEL_ID = "inference-net/load-test"  # the model that answers
MAX_TOKENS = 100  # the length of an answer, about 75 words; a longer one is cut off
POLL_INTERVAL_SECONDS = 1  # between two polls of a generation; raise it to wait for hours
MAX_POLL_ATTEMPTS = 120  # polls of a generation in one run; a resumed run begins again
MAX_CONCURRENT_POLLS = 5  # worker threads, a connection each; macOS allows about 200
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


def load_questions() -> dict[str, str]:
    """Return the questions by custom id. Replace this to ask about data of your own."""
    questions = {}
    for index in range(NUM_REQUESTS):
        questions[f"req-{index + 1:03}"] = SAMPLE_QUESTIONS[index % len(SAMPLE_QUESTIONS)]
    return questions


def build_request(custom_id: str, question: str) -> Json:
    """Return the chat completion request for a question; its generation repeats the metadata."""
    return {
        "model": MODEL_ID,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "metadata": {"custom_id": custom_id},  # metadata takes strings only
    }


# --- The API: a client, and what can go wrong

DEFAULT_BASE_URL = "https://api.inference.net/v1"
# https; http only to this machine, as everybody on the way could read the key
URL = r"(https://[\w.-]+|http://(localhost|127\.0\.0\.1|\[::1\]))(:\d+)?(/[\w./-]*)?"
MAX_RETRY_AFTER_SECONDS = 120  # the longest Retry-After that is obeyed
MAX_IDLE_SECONDS = 30  # routers forget a connection that was idle for longer


def parse_json(content: bytes) -> Any:
    """Return the JSON in the body of an answer, or None. NaN, which is no JSON, is a text."""
    try:
        return json.loads(content, parse_constant=str)
    except (ValueError, RecursionError):
        return None


def find(value: Any, kind: type, *path: str | int) -> Any:
    """Follow a path of keys and indexes into JSON; return what is there if it is of that kind."""
    try:
        for step in path:
            value = value[step]
    except (LookupError, TypeError):
        return None
    if isinstance(value, kind):
        return value
    return None


class ApiError(Exception):
    """A call to the API failed. The subclass says what that means for a submission."""


class Refused(ApiError):
    """The API refuses this request: any 3xx or 4xx but those below. Others may be fine."""


class LockedOut(ApiError):
    """The API accepts no request for now: check the key, the credit, or the certificate.

    401; for a submission also 402, 403, and a 429 that asks to wait for more than two minutes; a
    certificate that can't be verified.
    """


class NotAccepted(ApiError):
    """The call surely had no effect, and is safe to repeat: no connection was made, or 429."""


class Uncertain(ApiError):
    """The call may have had an effect. To repeat a submission may be to pay for it twice.

    A timeout or a broken connection after sending, 408, 5xx, or an answer that makes no sense.
    """


class Client:
    """The API, for one account. Threads can share a client.

    api_key and base_url are by default the environment variables INFERENCE_API_KEY and
    INFERENCE_BASE_URL. timeout_seconds limits connecting and each wait for data; an answer that
    comes bit by bit may take twice that. ValueError: the key or the address can't be used.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout_seconds: float = 30,
    ) -> None:
        if not hasattr(HTTPResponse, "read1"):  # see read_content
            raise ImportError("urllib3 is too old: pip install --upgrade urllib3")
        if api_key is None:
            api_key = os.environ.get("INFERENCE_API_KEY", "")
        if base_url is None:
            base_url = os.environ.get("INFERENCE_BASE_URL") or DEFAULT_BASE_URL
        self.api_key = api_key.strip()
        self.base_url = base_url.strip().rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.paused_until = 0.0  # Retry-After, in monotonic() time: see wait
        self.local = threading.local()  # each thread has a session of its own
        if not re.fullmatch("[!-~]+", self.api_key):
            raise ValueError("set INFERENCE_API_KEY to your key (see https://inference.net)")
        if not re.fullmatch(
            URL, self.base_url, re.ASCII
        ):  # not shown, as it may hold the key
            raise ValueError(
                "INFERENCE_BASE_URL can't be used: it must begin with https:// (http:// only for "
                f"this machine) and have no user, ? or #, as in {DEFAULT_BASE_URL}"
            )

    def submit_generation(self, request: Json) -> str:
        """POST /v1/async/chat/completions: submit a request and return its generation id."""
        answer = self.call("POST", "/async/chat/completions", request)
        generation_id = answer.get("id")
        if not isinstance(generation_id, str) or not re.fullmatch(
            "[A-Za-z0-9_-]+", generation_id
        ):
            raise Uncertain(f"accepted, but the answer has no usable id: {str(answer)[:500]}")
        return generation_id

    def fetch_generation(self, generation_id: str) -> Json:
        """GET /v1/generation/{id}: return the generation. A new one may be Refused with 404."""
        generation = self.call("GET", f"/generation/{generation_id}")
        has_state = isinstance(generation.get("state"), str)
        if not has_state or generation.get("id") not in (None, generation_id):
            raise Uncertain(f"not the state of {generation_id}: {str(generation)[:500]}")
        return generation

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """Make one HTTP request and return the JSON object in its answer, or raise ApiError."""
        upload = None
        if body is not None:
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
            host = urlsplit(self.base_url).netloc
            text = str(cause).replace(self.api_key, "[API key]") or type(cause).__name__
            reason = f"{text} ({type(error).__name__} at {host})"
            # requests reads the upload only when a connection stands.
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

    def session(self) -> Session:
        """Return this thread's session, without a connection that was idle for long."""
        local = self.local
        if (
            getattr(local, "process_id", None) != os.getpid()
        ):  # a fork has its parent's sockets
            local.process_id = os.getpid()
            local.session = Session()
        elif monotonic() - local.used_at > MAX_IDLE_SECONDS:
            local.session.close()
        local.used_at = monotonic()
        session: Session = local.session
        return session

    def add_headers(self, request: PreparedRequest) -> PreparedRequest:
        """Add the key and the type of the content to a request."""
        request.headers["Authorization"] = f"Bearer {self.api_key}"
        request.headers["Content-Type"] = "application/json"
        return request

    def read_content(self, response: Response) -> bytes:
        """Return what arrives of an answer until it ends, breaks off or takes too long."""
        deadline = monotonic() + self.timeout_seconds
        content = bytearray()
        # If it breaks off, what has arrived may still be a whole answer.
        with suppress(HTTPError):
            while monotonic() < deadline:
                # read1 returns what is there, and waits only if there is nothing.
                chunk = response.raw.read1(65536, decode_content=True)
                if not chunk:
                    break
                content += chunk
        return bytes(content).replace(self.api_key.encode(), b"[API key]")

    def status_error(self, method: str, response: Response, content: bytes) -> ApiError:
        """Return the ApiError for an HTTP status that is not 2xx, and note its Retry-After."""
        status = response.status_code
        message = find(parse_json(content), str, "error", "message")
        text = message or content[:500].decode(errors="replace") or "no reason given"
        reason = f"HTTP {status}: {text}"
        wait_seconds = 0.0
        # What is neither seconds nor a date is not obeyed.
        with suppress(ValueError, OverflowError, HTTPError):
            wait_seconds = Retry().get_retry_after(response.raw) or 0
        if wait_seconds > 0:
            reason += f" (Retry-After: {int(wait_seconds)} s)"
        paused_until = monotonic() + min(wait_seconds, MAX_RETRY_AFTER_SECONDS)
        self.paused_until = max(self.paused_until, paused_until)
        if status == 401:
            return LockedOut(f"{reason} (check INFERENCE_API_KEY)")
        if status == 429 and (method == "GET" or wait_seconds <= MAX_RETRY_AFTER_SECONDS):
            return NotAccepted(reason)
        if method == "POST" and status in (402, 403, 429):
            return LockedOut(reason)
        if method == "POST" and status == 404:
            reason += " (check INFERENCE_BASE_URL: it usually ends in /v1)"
        if 300 <= status < 500 and status != 408:
            return Refused(reason)
        return Uncertain(reason)

    def wait(self, seconds: float, stop: Event) -> bool:
        """Wait that long, and as Retry-After asks; return False if stop is set meanwhile."""
        until = monotonic() + seconds
        while not stop.is_set():
            remaining_seconds = max(until, self.paused_until) - monotonic()
            if remaining_seconds <= 0:
                return True
            stop.wait(remaining_seconds)
        return False


# --- The records: a request and what has come of it, and the file that keeps them

# The API's states of a generation. The last two are final; one that is not known here is not.
QUEUED = "Queued"
IN_PROGRESS = "In Progress"
SUCCESS = "Success"
FAILED = "Failed"  # also: refused when it was submitted
# Our states, before there is one of the API's
NOT_SENT = "Not sent"  # surely not accepted: it can be submitted
SUBMITTING = "Submitting"  # being sent, or about to be
UNKNOWN = "Unknown"  # sent, and perhaps accepted: it is never sent again
# Not a state, but an outcome: accepted, so that it has an id, and not final
PENDING = "Pending"


@dataclass
class Record:
    """A request and what has come of it. The keys are those of the results files."""

    custom_id: str
    question: str
    request: Json  # the chat completion request that is sent
    generation_id: str | None = None
    state: str = NOT_SENT
    response: str | Json | None = None  # the text, or all of it if it is more than one text
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    duration_ms: float | None = None
    error: str | None = None

    @property
    def outcome(self) -> str:
        """The state in fewer words: what has an id and is not final is PENDING."""
        if self.state in (SUCCESS, FAILED, NOT_SENT, SUBMITTING):
            return self.state
        if self.generation_id:
            return PENDING
        return UNKNOWN

    def update(self, generation: Json) -> None:
        """Copy what the API says of the generation."""
        usage = find(generation, dict, "response", "usage")
        self.prompt_tokens = find(usage, int, "prompt_tokens")
        self.completion_tokens = find(usage, int, "completion_tokens")
        self.total_tokens = find(usage, int, "total_tokens")
        self.finish_reason = find(generation, str, "response", "choices", 0, "finish_reason")
        self.response = answer_of(generation)
        with suppress(ValueError, TypeError, OverflowError):  # a time is missing, or odd
            dispatched_at = parse_time(generation.get("dispatchedAt"))
            finished_at = parse_time(generation.get("finishedAt"))
            self.duration_ms = (finished_at - dispatched_at) / timedelta(milliseconds=1)
        self.error = None
        if generation["state"] == FAILED:
            self.error = find(generation, str, "stateMessage") or "no reason given"
        self.state = generation["state"]  # last: another thread may be reading the record


def answer_of(generation: Json) -> str | Json | None:
    """Return the text of an answer, or the whole response if there is more to it than one text.

    More are tool calls, a refusal, several choices, log probabilities. They were paid for, too.
    """
    response: Json | None = find(generation, dict, "response")
    choices = find(response, list, "choices") or [{}]
    message = find(choices, dict, 0, "message") or {}
    content = message.get("content")
    extras = {key for key, value in message.items() if value} - {"role", "content"}
    is_one_text = isinstance(content, str) and len(choices) == 1 and not extras
    if is_one_text and not choices[0].get("logprobs"):
        return content
    return response


def parse_time(text: Any) -> datetime:
    """Read a time of the API's: ISO 8601 with Z and decimals, which Python 3.10 can't read."""
    whole, _, decimals = str(text).rstrip("Z").partition(".")
    return datetime.fromisoformat(whole) + timedelta(seconds=float(f"0.{decimals}"))


def new_record(custom_id: str, question: str) -> Record:
    """Return a record with the request that build_request makes; ValueError if it can't be sent."""
    record = Record(custom_id, question, build_request(custom_id, question))
    check_record(record)
    return record


def check_record(record: Record) -> None:
    """Raise ValueError or TypeError for what can't be submitted, as a request that is no JSON."""
    json.dumps(record.request, allow_nan=False)
    repeated = find(record.request, str, "metadata", "custom_id")
    if not repeated or repeated != record.custom_id:
        raise ValueError(
            "a custom id must be a text, not empty, and be the request's metadata.custom_id too: "
            f"{record.custom_id!r} has {repeated!r} there"
        )


Records = list[Record]


def mark_interrupted(records: Records) -> None:
    """Make records that were being sent Unknown, after a program has ended, or as it ends."""
    for record in records:
        if record.state == SUBMITTING:
            record.state = UNKNOWN
            record.error = "the program ended while it was being sent"


# What was saved survives a kill of the program. The trigger: a program that forgets to load
# its records, or loads them twice, must not pay for them again.
SCHEMA = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS single_requests (
        custom_id TEXT PRIMARY KEY, state TEXT, is_new INTEGER, record TEXT NOT NULL
    );
    CREATE TRIGGER IF NOT EXISTS load_first BEFORE UPDATE ON single_requests
    WHEN (new.is_new AND NOT old.is_new)
        OR (new.state = 'Submitting' AND old.state <> 'Not sent')
    BEGIN SELECT RAISE(ABORT, 'it has a record of this custom_id already: use load()'); END;
"""
OTHERS = "SELECT 1 FROM sqlite_master WHERE tbl_name != 'single_requests'"
UPSERT = """
    INSERT INTO single_requests VALUES (?, ?, ?, ?)
    ON CONFLICT (custom_id) DO UPDATE
    SET state = excluded.state, is_new = excluded.is_new, record = excluded.record
"""


class Results:
    """The file that keeps the records: SQLite, a row each. It is made if it is missing.

    Threads can share it, processes can't: OSError if it is open already. (Open it after a fork,
    not before.) save and load raise OSError, too, if the file can't be written or read. Begin
    with load(): save refuses records that are made anew in the place of submitted ones.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = Lock()
        self.process_id = os.getpid()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.connection = sqlite3.connect(path, timeout=0, check_same_thread=False)
            # One process at a time can have the file open.
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            if self.connection.execute(OTHERS).fetchone():
                raise sqlite3.Error("another program made it, perhaps async_group_example.py")
            self.connection.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise OSError(f"can't open {path}, or it is in use already: {error}") from error
        # Nobody else is using the file: what is Submitting was so when a program ended.
        interrupted = [record for record in self.load() if record.state == SUBMITTING]
        mark_interrupted(interrupted)
        self.save(interrupted)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Let no other thread in; commit at the end, or roll back."""
        if os.getpid() != self.process_id:  # SQLite can't be used across a fork
            raise OSError(f"{self.path} was opened by another process: open it in this one")
        try:
            with self.lock, self.connection:
                yield self.connection
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: {error}") from error

    def save(self, records: Iterable[Record]) -> None:
        """Put records on file, all of them or none. Each replaces the one with its custom id."""
        with self.transaction() as connection:
            rows = []
            for record in records:
                is_new = record.state == NOT_SENT and not record.error  # never submitted
                row = json.dumps(asdict(record))
                rows.append((record.custom_id, record.state, is_new, row))
            connection.executemany(UPSERT, rows)

    def load(self) -> Records:
        """Return the records, in the order in which they were first saved."""
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT record FROM single_requests ORDER BY rowid"
            ).fetchall()
        return [Record(**json.loads(text)) for [text] in rows]

    def close(self) -> None:
        """Close the file. Another process can open it now."""
        with self.lock:
            self.connection.close()


# --- The work: submit, then poll until final

# submit_all and poll_all hand out the work to worker threads, and yield what has ended. The
# workers call the API, change the records and save them: an id is on file the moment it
# arrives, whatever happens to the caller's thread. Both are iterators: nothing happens until
# you iterate. To stop, leave the loop; an iterator with a name lives on, so close it, too.

MAX_SUBMIT_ATTEMPTS = 5
MAX_UNCERTAIN = 5  # in a row
CHECK_SECONDS = 0.05  # how often the loops look up; on Windows, also for Ctrl-C
Save = Callable[[Records], object]  # called in worker threads, several at a time


def submit_all(
    client: Client,
    pool: Executor,
    records: Records,
    save: Save,
    max_concurrent: int = MAX_CONCURRENT_POLLS,
) -> Iterator[Record]:
    """Submit the records that are Not sent; yield each when its submission has ended.

    At most max_concurrent are under way; they end even if you leave the loop. save gets all
    that is Not sent at the beginning, then [record] before and after each attempt. Raises
    ValueError or TypeError before anything is sent; when what was under way has ended,
    LockedOut, NotAccepted (five attempts), Uncertain (five in a row), or what save raised.
    """
    records = list(records)
    check_records(records)
    waiting = deque(record for record in records if record.state == NOT_SENT)
    save(list(waiting))  # whatever ends the program, the file has the whole job
    under_way: dict[Future[None], Record] = {}
    stop = Event()
    error: BaseException | None = None
    last_states: deque[str] = deque(maxlen=MAX_UNCERTAIN)
    try:
        while waiting or under_way:
            while waiting and len(under_way) < max_concurrent:
                record = waiting.popleft()
                if record.state != NOT_SENT:  # another submit_all has taken it
                    continue
                future = hand_out(pool, client, record, save, stop)
                under_way[future] = record
            for future in wait(under_way, CHECK_SECONDS, FIRST_COMPLETED).done:
                record = under_way.pop(future)
                error = error or future.exception()
                last_states.append(record.state)
                if waiting and not error and last_states.count(UNKNOWN) == MAX_UNCERTAIN:
                    error = Uncertain(f"{MAX_UNCERTAIN} uncertain in a row: {record.error}")
                if error:
                    waiting.clear()
                    stop.set()
                yield record
        if error:
            raise error
    finally:
        stop.set()
        wait(under_way)  # they may have been paid for


def hand_out(
    pool: Executor, client: Client, record: Record, save: Save, stop: Event
) -> Future[None]:
    """Give a record to a worker thread. It is Submitting now: nobody else takes it."""
    record.state = SUBMITTING
    try:
        return pool.submit(submit_in_worker, client, record, save, stop)
    except Exception:  # the pool is shut down, or can't start a thread
        record.state = NOT_SENT
        raise


def submit_in_worker(client: Client, record: Record, save: Save, stop: Event) -> None:
    """Submit one request. Try again only what surely was not accepted."""
    for attempt in range(MAX_SUBMIT_ATTEMPTS):
        record.state = SUBMITTING  # before the wait: nobody else may submit it
        record.generation_id = None
        if not client.wait(backoff_seconds(attempt), stop):  # stopped
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


def state_after(error: Exception) -> str:
    """Return what has become of a request whose submission failed with this error."""
    if isinstance(error, Refused):
        return FAILED
    if isinstance(error, LockedOut | NotAccepted):
        return NOT_SENT
    return UNKNOWN


def check_records(records: Records) -> None:
    """Raise ValueError or TypeError if one can't be submitted, or two have the same custom id."""
    for record in records:
        if record.state == NOT_SENT:
            check_record(record)
    for custom_id, count in Counter(record.custom_id for record in records).items():
        if count > 1:
            raise ValueError(f"{count} records have the custom id {custom_id!r}")


def backoff_seconds(attempt: int) -> float:
    """Return how long to wait before an attempt: 0 before the first, then up to 1, 2, 4, 8."""
    if attempt == 0:
        return 0
    return random.uniform(0.5, 1) * float(2 ** (attempt - 1))


def poll_all(
    client: Client,
    pool: Executor,
    records: Records,
    save: Save,
    interval_seconds: float = POLL_INTERVAL_SECONDS,
    max_attempts: int = MAX_POLL_ATTEMPTS,
    max_concurrent: int = MAX_CONCURRENT_POLLS,
) -> Iterator[Record]:
    """Poll the records that are Pending; yield each when it has become final and was saved.

    An iterator, as submit_all is. At most max_concurrent polls are under way at a time. After
    max_attempts polls a record stays Pending. If you leave the loop, what is under way is not
    awaited: a poll costs nothing. Raises LockedOut, or what save has raised.
    """
    # (when it is due, which attempt, the record), in order of time, as all have the same interval
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


def poll_in_worker(client: Client, record: Record, save: Save, stop: Event) -> None:
    """Poll a generation once. If that fails, the record stays Pending."""
    if not client.wait(0, stop):  # stopped
        return
    try:
        generation = client.fetch_generation(str(record.generation_id))
    except LockedOut as error:
        record.error = str(error)
        raise
    except ApiError as error:  # a poll costs nothing: it is made again
        record.error = str(error)
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

    def __init__(self) -> None:
        self.lock = Lock()
        self.columns = shutil.get_terminal_size().columns
        self.is_terminal = sys.stdout.isatty()
        self.has_live_line = False
        self.is_ending = False
        self.watched: Records = []  # what the live line tells of
        self.notes: list[str] = []  # why the run ended before all was final
        self.started_at = monotonic()
        Thread(target=self.redraw, daemon=True).start()

    def print(self, text: str) -> None:
        """Print a line in the place of the live line."""
        with self.lock:
            self.erase()
            print(text)

    def erase(self) -> None:
        """Remove the live line."""
        if self.has_live_line:
            print("\r" + " " * (self.columns - 1), end="\r")
        self.has_live_line = False

    def redraw(self) -> None:
        """Print the live line again and again: how many are in which state, for how long."""
        while True:
            sleep(REDRAW_SECONDS if self.is_terminal else REPEAT_SECONDS)
            states = Counter(record.state.lower() for record in self.watched)
            parts = [f"{count} {state}" for state, count in sorted(states.items())]
            parts.append(str(timedelta(seconds=int(monotonic() - self.started_at))))
            # An accepted record has an error only while its polls fail.
            errors = [record.error for record in self.watched if record.outcome == PENDING]
            text = ", ".join(parts + [error for error in errors if error][:1])
            line = "  " + shorten(f"⏳ {text}", self.columns - 3)
            with (
                self.lock,
                suppress(OSError),
            ):  # stdout is closed: the main thread will notice
                if self.watched and self.is_terminal:
                    self.erase()
                    print(line, end="", flush=True)
                    self.has_live_line = True
                elif self.watched:
                    print(line)

    def print_title(self, title: str) -> None:
        """Print a title between two rules."""
        rule = "=" * min(80, self.columns)
        self.print(f"{rule}\n {title}\n{rule}")

    def print_section(self, title: str) -> None:
        """Print the heading of a section."""
        self.print(f"\n  {title}\n  {'-' * (len(title) + 4)}\n")

    def print_submission(self, record: Record, total: int) -> None:
        """Print what has come of one of so many submissions."""
        if record.error:
            line = f"{MARKS[record.outcome]} {record.custom_id}: {record.error}"
            self.print("    " + shorten(line, 74))
        elif record.generation_id and total <= MAX_LISTED:
            line = shorten(f"✓ {record.custom_id}: {record.question}", 58)
            self.print(f"    {line} → {shorten(record.generation_id, 15)}")

    def print_answer(self, record: Record, done: int, total: int) -> None:
        """Print that one of so many generations is final."""
        if record.outcome == FAILED or total <= MAX_LISTED:
            gauge = f"{bar(done, total, 30)} {done * 100 // total}%"
            name = f"{MARKS[record.outcome]} {shorten(record.custom_id, 24)}"
            self.print(f"  [{done:>3}/{total}] {gauge} {name}")


def printable(text: str) -> str:
    """Return text from elsewhere on one line and without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:2000]).strip()


def width(text: str) -> int:
    """Return how many columns of a terminal text takes: a Chinese letter two, an accent none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    accents = sum(unicodedata.category(letter) in ("Mn", "Me") for letter in text)
    return len(text) + wide - accents


def shorten(text: str, columns: int) -> str:
    """Make text from elsewhere printable, and cut it to at most so many columns."""
    text = printable(text)
    if width(text) <= columns:
        return text
    while text and width(text) > columns - 3:
        text = text[:-1]
    return text.rstrip() + "..."


def pad(text: str, columns: int) -> str:
    """Return text from elsewhere as a column of a table."""
    text = shorten(text, columns)
    return text + " " * (columns - width(text))


def wrap(text: str, indent: str) -> str:
    """Return text from elsewhere in lines of at most 80 columns."""
    wrapper = textwrap.TextWrapper(80, indent, indent, break_on_hyphens=False)
    return wrapper.fill(printable(text))


def bar(done: int, total: int, columns: int) -> str:
    """Return a progress bar, which is full only when all is done."""
    return f"|{'█' * (done * columns // total):░<{columns}}|"


def show_figures(records: Records, submitted: Records, seconds: float) -> None:
    """Print counts, times and what is billed; seconds is how long the run took."""
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


def show_table(records: Records, columns: int, path: Path) -> None:
    """Print the questions with their answers; of a long list, those without one first."""
    rows = records
    if len(records) > MAX_ROWS:
        rows = sorted(records, key=lambda record: record.outcome == SUCCESS)[:MAX_ROWS]
    # A long custom id, such as a file's name, takes columns from the question.
    longest_id = max(len(record.custom_id) for record in rows)
    id_columns = min(max(longest_id, 10), 24)
    question_columns = 40 - id_columns
    answer_columns = max(columns - 55, 25)
    print("\n  Request-Response Correlation\n  --------------------------------\n")
    print(
        f"  {'ID':<{id_columns}} Status     {'Question':<{question_columns}} Response\n"
        f"  {'-' * id_columns} {'-' * 10} {'-' * question_columns} {'-' * answer_columns}"
    )
    for record in rows:
        custom_id = pad(record.custom_id, id_columns)
        status = f"{MARKS[record.outcome]} {record.outcome:<8}"
        question = pad(shorten(record.question, question_columns - 2), question_columns)
        answer = answer_cell(record, answer_columns)
        print(f"  {custom_id} {status} {question} {answer}".rstrip())
    if len(records) > MAX_ROWS:
        print(f"  ... and {len(records) - MAX_ROWS} more in {path}")


def answer_cell(record: Record, columns: int) -> str:
    """Return what the table shows of an answer, cut between two words if there are some."""
    text = record.error or record.response
    if text is None and record.outcome != SUCCESS:
        return ""
    if not isinstance(text, str):
        return "(no text: see the file)"
    if record.finish_reason == "length":
        return shorten(text, columns - 10) + " [cut off]"
    start = textwrap.shorten(printable(text), columns, placeholder="...")
    if len(start) < columns // 2:  # it is short, or a long word was cut off
        start = text
    return shorten(start, columns)


def show_reasons(records: Records) -> None:
    """Print why requests have no answer: each reason once, with the requests that have it."""
    ids_by_reason = defaultdict(list)
    for record in records:
        if record.error:
            ids_by_reason[record.error].append(record.custom_id)
    for reason, custom_ids in list(ids_by_reason.items())[:MAX_ROWS]:
        print(
            f"\n  {len(custom_ids)} without an answer: {shorten(', '.join(custom_ids), 50)}"
        )
        print(wrap(reason, "      "))


def show_lost_ids(records: Records, path: Path) -> None:
    """Print the ids that are not on file, and the Python that puts them there."""
    print(
        "\n  These ids have arrived and are not on file. This Python puts them there:\n\n"
        f"      from {Path(sys.argv[0]).stem} import Results\n"
        f"      results = Results({str(path)!r})\n"
        "      records = {record.custom_id: record for record in results.load()}"
    )
    for record in records:
        print(f"      records[{record.custom_id!r}].generation_id = {record.generation_id!r}")
    print("      results.save(records.values())")


def advice(records: Records, command: str) -> str:
    """Say what to do about the requests that are not final."""
    outcomes = {record.outcome for record in records}
    text = ""
    if UNKNOWN in outcomes:
        text += (
            "\n  ? Unknown: perhaps accepted, and paid for. Look at the dashboard first.\n"
        )
    if PENDING in outcomes:
        text += f"\n  … Pending: accepted. To go on polling:\n      {command}\n"
    if NOT_SENT in outcomes:
        text += f"\n  - Not sent: to submit them, and poll:\n      {command} --submit\n"
    return text


# --- The script: the configuration, the files of a run, main

PREFIX = "async-polling"  # of the names of results files
DESCRIPTION = "Ask inference.net's Asynchronous API questions, and poll for the answers."
ENVIRONMENT = "INFERENCE_API_KEY is your key, INFERENCE_BASE_URL the API's address."
RESUME_HELP = "go on polling an earlier run; without FILE, the newest with something pending"


def check_configuration() -> None:
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
        is_number = isinstance(value, int)
        if name.endswith("_SECONDS"):
            is_number = isinstance(value, int | float)
        if not is_number or not 0 < value <= 1_000_000:
            kind = "number" if name.endswith("_SECONDS") else "whole number"
            raise ValueError(f"{name} must be a {kind} up to 1,000,000, not {value!r}")
    if not isinstance(RESULTS_DIR, str):
        raise ValueError(f"RESULTS_DIR must be a text, not {RESULTS_DIR!r}")


def new_records() -> Records:
    """Return a record for each question; ValueError if load_questions returns anything else."""
    questions = load_questions()
    if not isinstance(questions, dict) or not questions:
        raise ValueError(
            f"load_questions must return one question or more, by custom id: not {questions!r}"
        )
    for custom_id, question in questions.items():
        if not isinstance(question, str):
            raise ValueError(
                f"load_questions: {custom_id!r} has {question!r}, which is no text"
            )
    return [new_record(custom_id, question) for custom_id, question in questions.items()]


def open_results(resume: str | None) -> Results:
    """Open the file of a new run (None), of the one named, or ("") of the newest pending one."""
    folder = Path(RESULTS_DIR).expanduser()
    if resume is None:
        records = new_records()
        results = Results(
            folder / f"{PREFIX}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}.db"
        )
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
            command = f"--resume {path} --submit"
            print(f"{path} is newer, and has requests not sent: {command}", file=sys.stderr)
    raise ValueError(f"nothing is pending in {folder}")


def handle_signals(screen: Screen, records: Records, command: str) -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt, or end the program if it is ending."""

    def handle(*_: object) -> None:
        # os.write, as print may be what is being interrupted
        if screen.is_ending:
            mark_interrupted(records)
            os.write(2, advice(records, command).encode())
            os._exit(130)
        screen.is_ending = True
        if any(record.state == SUBMITTING for record in records):
            text = (
                "Stopping when what is being submitted has ended. Ctrl-C again stops at once."
            )
            os.write(2, f"\n  {text}\n".encode())
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def run(
    client: Client, results: Results, records: Records, unsent: Records, screen: Screen
) -> None:
    """Submit what is unsent, then poll what is pending, and show both."""
    model = printable(str(records[0].request.get("model")))  # a resumed run keeps its own
    job = f"Requests to submit: {len(unsent)}" if unsent else f"Resuming: {results.path}"
    screen.print_title("INFERENCE.NET ASYNC API - SINGLE REQUEST POLLING EXAMPLE")
    screen.print(f"\n  Configuration:\n    • {job}\n    • Model: {model}")
    screen.print(f"    • Poll interval: {POLL_INTERVAL_SECONDS}s")
    screen.print(f"    • Concurrent polls: {MAX_CONCURRENT_POLLS}")
    pool = ThreadPoolExecutor(MAX_CONCURRENT_POLLS)
    try:
        if unsent:
            screen.print_section(f"Submitting {len(unsent)} Requests")
            screen.watched = unsent
            for record in submit_all(client, pool, unsent, results.save):
                screen.print_submission(record, len(unsent))
    except ApiError as error:
        screen.notes.append(f"The submitting has ended: {error}")
    try:
        pending = [record for record in records if record.outcome == PENDING]
        if pending:
            screen.print_section("Polling for Results")
            screen.watched = pending
            answered = poll_all(client, pool, pending, results.save)
            for done, record in enumerate(answered, start=1):
                screen.print_answer(record, done, len(pending))
        if any(record.outcome == PENDING for record in pending):
            duration = timedelta(seconds=MAX_POLL_ATTEMPTS * POLL_INTERVAL_SECONDS)
            screen.notes.append(
                f"The polls are used up: {MAX_POLL_ATTEMPTS} of each generation, in {duration}. "
                "To wait for longer, raise MAX_POLL_ATTEMPTS."
            )
    finally:
        pool.shutdown(wait=False)  # a poll that stalls must not hold up the end


def write_answers(records: Records, path: Path) -> None:
    """Write a line of JSON for each record, without the request that was sent."""
    new_path = path.with_suffix(".tmp")
    with new_path.open("w", encoding="utf-8") as file:
        for record in records:
            row = asdict(record)
            del row["request"]
            file.write(json.dumps(row) + "\n")
    new_path.replace(path)


def lost_ids(records: Records, results: Results) -> Records:
    """Return the records whose generation id is not on file."""
    on_file: set[str | None] = {None}
    if results.path.is_file():
        with suppress(OSError):
            on_file.update(record.generation_id for record in results.load())
    return [record for record in records if record.generation_id not in on_file]


def end_run(
    screen: Screen, records: Records, unsent: Records, results: Results, command: str
) -> bool:
    """Save everything, show the summary, and tell if every request has its answer."""
    screen.is_ending = True
    screen.watched = []
    mark_interrupted(records)
    path = results.path.with_suffix(".jsonl")
    try:
        if not results.path.is_file():  # it was deleted during the run
            results = Results(results.path)
        results.save(records)
    except OSError as error:
        screen.notes.append(str(error))
    try:
        write_answers(records, path)
    except OSError as error:
        screen.notes.append(str(error))
    lost = lost_ids(records, results)
    results.close()
    missing = Counter(
        record.outcome.lower() for record in records if record.outcome != SUCCESS
    )
    ending = "Generation complete!"
    if missing or screen.notes:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in missing.items())
        ending = f"Not complete: {counts or 'see above'}"
    try:
        screen.print("")
        screen.print_title("ASYNC GENERATION SUMMARY")
        show_figures(records, unsent, monotonic() - screen.started_at)
        show_table(records, screen.columns, path)
        show_reasons(records)
        if lost:
            show_lost_ids(lost, results.path)
        for note in screen.notes:
            print("\n" + wrap(note, "  "))
        print(f"{advice(records, command)}\n  Results: {path}\n")
        screen.print_title(ending)
    except OSError:  # stdout is closed or full
        sys.stderr.write(advice(records, command))
        return False
    return not missing and not screen.notes


def main() -> int:
    """Read the command line, run, show the summary, and return the exit code."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=ENVIRONMENT)
    parser.add_argument("--resume", nargs="?", const="", metavar="FILE", help=RESUME_HELP)
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
            raise ValueError(f"there are no requests in {results.path}")
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, TypeError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    unsent = []
    if options.submit or options.resume is None:
        unsent = [record for record in records if record.outcome == NOT_SENT]
    command = shlex.join(["uv", "run", sys.argv[0], "--resume", str(results.path)])
    screen = Screen()
    handle_signals(screen, records, command)
    exit_code = 0
    try:
        run(client, results, records, unsent, screen)
    except KeyboardInterrupt:
        exit_code = 130
    except (ApiError, OSError) as error:
        screen.notes.append(str(error))
    finally:  # whatever ends the run
        is_complete = end_run(screen, records, unsent, results, command)
    return exit_code or int(not is_complete)


if __name__ == "__main__":
    if exit_code := main():
        os._exit(exit_code)  # a poll that stalls must not hold up the exit
