#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests"]
# ///
"""Send questions to inference.net's Asynchronous API, one by one, and poll for the answers.

    uv run async_polling_example.py                  submit all questions, and poll
    uv run async_polling_example.py --resume FILE    go on with an earlier run

The life of a request, in the words of Record.state:

    Not sent -> Unknown -> Queued -> In Progress -> Success, or Failed
                   +-> Not sent    certainly not accepted: sent again, now or in another run
                   +-> Failed      refused

It is saved as Unknown just before it is sent, and stays Unknown if no clear answer comes: it
may be paid for, and is not sent again unless you ask for it (--retry unknown). As long as it
has an id and is not final, Record.outcome calls it Pending.

The parts of this file:

    Configuration   what you edit: constants, questions, and the request for a question
    The API         ApiError and its four kinds, and Client, with a method for each endpoint
    The records     Record, a request and what has come of it; Results, the file of them
    The work        submit_all and poll_all, which use worker threads
    The screen      everything that prints
    The script      the command line, the files of a run, Ctrl-C

A program of your own imports Client, Results, new_record, submit_all and poll_all. See the
part 'The work' for one that goes on where it was when it is run again.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import sqlite3
import sys
import textwrap
from _thread import start_new_thread
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGTERM, signal
from threading import Event, RLock
from time import monotonic
from typing import Any, TypeVar

from requests import Response, Session
from urllib3 import Retry

Json = dict[str, Any]

# --- Configuration: what you edit

NUM_REQUESTS = 10  # how many questions to ask; the samples repeat if there are fewer
MODEL_ID = "inference-net/load-test"  # the model that answers
MAX_TOKENS = 100  # the length of an answer, about 75 words; a longer one is cut off
POLL_INTERVAL_SECONDS = 1  # from the start of a round of polls to the next
MAX_POLL_ATTEMPTS = 120  # rounds of polls in a run; for hours, raise this and the interval
MAX_CONCURRENT_POLLS = 5  # worker threads, for submissions too; more are faster
REQUEST_TIMEOUT_SECONDS = 30  # to connect, and then for each wait for data
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
    """Return the chat completion request for a question. The API returns the metadata."""
    return {
        "model": MODEL_ID,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "metadata": {"custom_id": custom_id},  # metadata takes strings only
    }


# --- The API: a client, and what can go wrong

DEFAULT_BASE_URL = "https://api.inference.net/v1"
# Plain http would show the key to others, and an @ can hide which host is meant
BASE_URL_PATTERN = r"https://[^@]+|http://(localhost|127\.0\.0\.1|\[::1\])([:/][^@]*)?"
ID_PATTERN = "[A-Za-z0-9_-]+"
MAX_PAUSE_SECONDS = 120  # if more remains of a Retry-After, pause_seconds() raises LockedOut

# The states of a generation. Only the last two are final.
QUEUED = "Queued"
IN_PROGRESS = "In Progress"
SUCCESS = "Success"
FAILED = "Failed"
FINAL = (SUCCESS, FAILED)


Kind = TypeVar("Kind")


def find(value: Any, kind: type[Kind], *path: str | int) -> Kind | None:
    """Return what is at a path of keys and indexes; None if it is missing or of another type."""
    try:
        for step in path:
            value = value[step]
    except (LookupError, TypeError):
        return None
    return value if isinstance(value, kind) else None


class ApiError(Exception):
    """A call failed. The kind of error says what that means for a submission.

                                              submission     poll
        no connection, or no body sent        NotAccepted    Uncertain
        429                                   NotAccepted    NotAccepted
        401                                   LockedOut      LockedOut
        402, 403                              LockedOut      Refused
        other 3xx and 4xx, but for 408        Refused        Refused
        no reply, 1xx, 408, 5xx, odd 2xx      Uncertain      Uncertain

    A poll costs nothing, and can be made again after any of them; after LockedOut, later. A 2xx
    is odd if it is no JSON object, or lacks what the endpoint promises.
    """


class Refused(ApiError):
    """The API refuses this request, but may take others."""


class LockedOut(ApiError):
    """The API takes no requests for now: check the key and the credit, or wait.

    pause_seconds() raises it, too, while more than two minutes of a pause remain.
    """


class NotAccepted(ApiError):
    """Certainly not accepted, so it is safe to send again."""


class Uncertain(ApiError):
    """Perhaps accepted, and paid for: to send it again may be to pay twice."""


class Client:
    """The API, for one account. Threads can share a client.

    api_key and base_url are by default the environment variables INFERENCE_API_KEY and
    INFERENCE_BASE_URL. timeout_seconds limits connecting, and then each wait for data.
    ValueError: the key or the address can't be used.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> None:
        if api_key is None:
            api_key = os.environ.get("INFERENCE_API_KEY", "")
        if base_url is None:
            base_url = os.environ.get("INFERENCE_BASE_URL", DEFAULT_BASE_URL)
        self.api_key = api_key.strip()
        self.base_url = base_url.strip("/ \r\n")
        self.timeout_seconds = timeout_seconds
        self.idle_sessions: list[Session] = []  # each serves one call at a time
        # Of earlier submissions: an id given twice would bring another question's answer.
        self.given_ids: set[str | None] = set()
        self.paused_until = 0.0  # in monotonic() time
        if not re.fullmatch("[!#-&(-~]+", self.api_key):  # ASCII without quotes
            raise ValueError(
                "set INFERENCE_API_KEY to your key from https://inference.net, without spaces or "
                "quotes (none is needed to try it: uv run tests/local_api.py SCRIPT)"
            )
        if not re.fullmatch(BASE_URL_PATTERN, self.base_url):
            raise ValueError(  # without the address, as it may hold the key
                "INFERENCE_BASE_URL must begin with https:// (http:// only for this machine) "
                f"and have no @, as in {DEFAULT_BASE_URL}"
            )

    def submit_generation(self, request: Json) -> str:
        """POST /v1/async/chat/completions: submit a request, return its generation id."""
        reply = self.call("POST", "/async/chat/completions", request)
        generation_id = find(reply, str, "id") or ""
        if generation_id in self.given_ids or not re.fullmatch(ID_PATTERN, generation_id):
            raise self.error(Uncertain, f"accepted, but without a new id: {generation_id!r}")
        self.given_ids.add(generation_id)
        return generation_id

    def fetch_generation(self, generation_id: str) -> Json:
        """GET /v1/generation/{id}: return the generation. A new one may be Refused with 404."""
        generation = self.call("GET", f"/generation/{generation_id}")
        is_another = generation.get("id") not in (None, generation_id)
        if is_another or not find(generation, str, "state"):
            raise Uncertain("the reply is not this generation, or has no state")
        return generation

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """Make one HTTP request and return the JSON object in the reply, or raise ApiError."""
        upload = None
        if body is not None:
            # A file, as requests reads it only once the connection stands: if it is still
            # unread after an error, nothing was submitted.
            upload = io.BytesIO(json.dumps(body).encode())
        try:
            session = self.idle_sessions.pop()
        except IndexError:
            session = Session()
        try:
            response = session.request(
                method,
                f"{self.base_url}{path}",
                data=upload,
                headers={
                    "Authorization": f"Bearer {self.api_key}",
                    "Content-Type": "application/json",
                },
                auth=lambda prepared: prepared,  # else a .netrc file would replace the key
                timeout=self.timeout_seconds,
                allow_redirects=False,
                proxies={"http": ""},  # http:// is for this machine only, so for no proxy
            )
        except Exception as error:  # whatever it is, there is no reply
            cause: BaseException = error
            while cause.__context__:  # the first error says why, the others wrap it
                cause = cause.__context__
            reason = f"no answer from {self.base_url}: {cause!r} (check network and address)"
            is_unread = upload and upload.tell() == 0
            raise self.error(NotAccepted if is_unread else Uncertain, reason) from None
        # A connection is not used again after a 1xx status: the real reply may still come.
        if response.status_code >= 200:
            self.idle_sessions.append(session)
        return self.read_reply(method, response)

    def read_reply(self, method: str, response: Response) -> Json:
        """Return the JSON object in a reply, or raise what its status means."""
        status = response.status_code
        reply = None
        with suppress(ValueError, RecursionError):
            # Written anew before the key is taken out, as it could be escaped
            text = json.dumps(json.loads(response.content)).replace(self.api_key, "[API key]")
            reply = json.loads(text, parse_constant=str)  # NaN, which JSON lacks, as text
        if 200 <= status < 300 and isinstance(reply, dict):
            return reply
        message = find(reply, str, "error", "message")
        reason = f"HTTP {status}: {message or response.content.decode(errors='replace')}"
        pause_seconds = 0.0
        retry = Retry()
        retry.retry_after_max = 10**9  # seconds; urllib3 would shorten it to six hours
        with suppress(Exception):  # what can't be read is ignored
            pause_seconds = retry.get_retry_after(response.raw) or 0.0
        kind: type[ApiError] = Uncertain
        if status == 401 or (method == "POST" and status in (402, 403)):
            kind = LockedOut
            reason += " (check INFERENCE_API_KEY, and your credit)"
        elif status == 429:
            kind = NotAccepted
            pause_seconds = max(1.0, pause_seconds)
        elif 300 <= status < 500 and status != 408:
            kind = Refused
        self.paused_until = max(self.paused_until, monotonic() + pause_seconds)
        raise self.error(kind, reason)

    def error(self, kind: type[ApiError], reason: str) -> ApiError:
        """Make an error, without the key."""
        return kind(reason.replace(self.api_key, "[API key]")[:500])

    def pause_seconds(self) -> float:
        """Return what remains of the pause. LockedOut: it is more than two minutes."""
        seconds = max(0.0, self.paused_until - monotonic())
        if seconds > MAX_PAUSE_SECONDS:
            raise LockedOut(f"the API asks to wait for {seconds:.0f} seconds")
        return seconds


# --- The records: a request and what has come of it, and the file that keeps them

# The states of a request before the API has one for its generation
NOT_SENT = "Not sent"  # surely not accepted
UNKNOWN = "Unknown"  # being sent, or perhaps accepted
# Not a state, but the outcome of a request that has an id and is not final
PENDING = "Pending"


@dataclass
class Record:
    """A request and what has come of it."""

    custom_id: str
    question: str
    request: Json  # the chat completion request that is sent
    generation_id: str | None = None
    state: str = NOT_SENT
    response: Json | None = None  # the chat completion that the API returns, whole
    duration_ms: float | None = None
    error: str | None = None  # what went wrong last

    @property
    def outcome(self) -> str:
        """Success, Failed, Pending, Not sent or Unknown."""
        if self.generation_id and self.state not in FINAL:
            return PENDING
        return self.state

    @property
    def answer(self) -> str | None:
        """The text of the answer; None if there is none, or if it is no text (tool calls)."""
        return find(self.response, str, "choices", 0, "message", "content")

    @property
    def is_cut_off(self) -> bool:
        """Whether MAX_TOKENS has cut off the answer."""
        reason = find(self.response, str, "choices", 0, "finish_reason")
        return self.state == SUCCESS and reason == "length"

    def update(self, generation: Json) -> None:
        """Note what the API says of the generation."""
        if self.state == SUCCESS:  # a late reply must not undo an answer
            return
        state = generation["state"]
        response = find(generation, dict, "response")
        self.error = None
        if state == SUCCESS and not response:
            state = "Success without a response"  # not final: it is polled again
        if state not in (QUEUED, IN_PROGRESS, SUCCESS):
            reason = find(generation, str, "stateMessage") or "no reason given"
            self.error = f"the API says {state}: {reason:.500}"
        if state in FINAL:
            # Without a new answer, that of an earlier try stays.
            self.response = response or self.response
            with suppress(ValueError):  # a time is missing, or odd
                dispatched_at = parse_time(generation.get("dispatchedAt"))
                duration = parse_time(generation.get("finishedAt")) - dispatched_at
                self.duration_ms = duration.total_seconds() * 1000
        self.state = state  # last: another thread may be reading the record


def parse_time(text: object) -> datetime:
    """Read a time of the API's, such as 2026-01-31T12:00:00.000Z."""
    shortened = re.sub(r"(\.\d{6})\d+", r"\1", str(text))  # %f takes six digits at most
    return datetime.strptime(shortened, "%Y-%m-%dT%H:%M:%S.%f%z")


Records = list[Record]


def new_record(custom_id: str, question: str) -> Record:
    """Return a record with the request of build_request. ValueError: it can't be sent."""
    if not isinstance(question, str):
        raise ValueError(
            f"the question of {custom_id!r} must be a text, not {question!r:.60}"
        )
    # A copy, as build_request may change one template and return it each time
    request = deepcopy(build_request(custom_id, question))
    if not custom_id or find(request, str, "metadata", "custom_id") != custom_id:
        raise ValueError(
            f"the custom id {custom_id!r} must be a text that is not empty, and the request's "
            "metadata.custom_id must be the same"
        )
    return Record(custom_id, question, request)


TABLE = "single_records"
UPSERT = f"""
    INSERT INTO {TABLE} (custom_id, record) VALUES (?, ?)
    ON CONFLICT (custom_id) DO UPDATE SET record = excluded.record
"""


class Results:
    """The SQLite file that keeps the records. Threads can share it, processes can't.

    records has them by custom id, in the order in which they were added; while another thread
    adds records, read them by with_outcome. sqlite3.Error: the file is in use, or can't be
    read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records: dict[str, Record] = {}
        self.lock = RLock()
        self.connection = sqlite3.connect(path, timeout=0, check_same_thread=False)
        # One process at a time can have the file open.
        self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        query = f"SELECT 1 FROM sqlite_master WHERE tbl_name <> '{TABLE}'"
        if self.connection.execute(query).fetchone():
            raise sqlite3.DatabaseError("it is a file of another script or version")
        # FULL: after a power cut, too, the file must know what may have been sent.
        self.connection.executescript(f"""
            PRAGMA journal_mode = WAL;
            PRAGMA synchronous = FULL;
            CREATE TABLE IF NOT EXISTS {TABLE} (custom_id TEXT PRIMARY KEY, record TEXT);
        """)
        for [text] in self.connection.execute(f"SELECT record FROM {TABLE} ORDER BY rowid"):
            record = Record("", "", {})
            vars(record).update(json.loads(text))  # attributes of your own come back, too
            self.records[record.custom_id] = record

    def add(self, records: Iterable[Record]) -> None:
        """Save the records whose custom ids are new. What is on file stays as it is.

        ValueError: a custom id is there twice, or is no text. TypeError: a record is no JSON.
        """
        given = {}
        for record in records:
            if not isinstance(record.custom_id, str) or record.custom_id in given:
                raise ValueError(f"{record.custom_id!r} is no custom id, or is there twice")
            given[record.custom_id] = record
        with self.lock:
            self.save([given[key] for key in given if key not in self.records])

    def save(self, records: Iterable[Record], **changes: object) -> None:
        """Save the records with these changes to their fields, all or none.

        A record replaces the one with its custom id. To ask again, save a new_record().
        """
        records = list(records)
        with self.lock:
            with self.connection:  # a transaction
                for record in records:
                    text = json.dumps(vars(record) | changes)
                    self.connection.execute(UPSERT, [record.custom_id, text])
            for record in records:  # in memory only once it is on file
                vars(record).update(changes)
                self.records[record.custom_id] = record

    def with_outcome(self, outcome: str) -> Records:
        """Return the records that have this outcome, in order."""
        # In a copy, as another thread may add some
        return [each for each in list(self.records.values()) if each.outcome == outcome]

    def close(self) -> None:
        """Close the file, so that another process can open it."""
        with self.lock:  # SQLite crashes if it is closed while a thread saves
            self.connection.close()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- The work: submit, then poll until final

# A whole program, which goes on where it was when it is run again:
#
#     client = Client()
#     results = Results("my_program.db")
#     results.add(new_record(custom_id, text) for custom_id, text in questions.items())
#     submit_all(client, results)
#     poll_all(client, results)
#     for record in results.records.values():
#         print(record.custom_id, record.outcome, record.answer or record.error)

MAX_IN_VAIN = 5  # futile batches in a row: see submit_all
OnRecord = Callable[[Record], object] | None
STATE_AFTER = {
    Refused: FAILED,
    LockedOut: NOT_SENT,
    NotAccepted: NOT_SENT,
    Uncertain: UNKNOWN,
}


def submit_all(
    client: Client, results: Results, on_record: OnRecord = None, stop: Event | None = None
) -> None:
    """Submit all that is Not sent, until none is left.

    Requests are sent in batches, with a request for each worker thread; the next batch follows
    when all have ended. on_record gets each record after its submission, in the caller's
    thread. Once stop is set, or LockedOut or sqlite3.Error is raised, the batch under way ends
    and the rest stays Not sent (after an error, some may miss on_record). ApiError is raised
    when in five batches in a row nothing was accepted or refused; in such a batch, each Unknown
    request counts as one.
    """
    stop = stop or Event()
    # Ids of earlier runs count, too. None, of those without an id, does no harm.
    client.given_ids.update(each.generation_id for each in list(results.records.values()))
    in_vain = 0
    unsent = results.with_outcome(NOT_SENT)
    with ThreadPoolExecutor(MAX_CONCURRENT_POLLS) as pool:
        while unsent:
            # Up to 0, 1, 3, 7, 15 seconds, at random, so that programs don't retry together
            stop.wait(random.uniform(0, 2**in_vain - 1))
            if wait_for_pause(client, stop):
                return
            states = Counter[str]()
            batch = unsent[:MAX_CONCURRENT_POLLS]
            for record in pool.map(lambda each: submit(client, results, each), batch):
                if not record:  # another thread has taken it
                    continue
                states[record.state] += 1
                reason = record.error
                if on_record:
                    on_record(record)
            if states.keys() - {NOT_SENT, UNKNOWN}:  # some were accepted or refused
                in_vain = 0
            elif states:
                in_vain += max(1, states[UNKNOWN])  # as each of these may cost money
            if in_vain >= MAX_IN_VAIN:
                raise ApiError(reason)
            # At the end of the list, start again with those that were not accepted.
            unsent = unsent[MAX_CONCURRENT_POLLS:] or results.with_outcome(NOT_SENT)


def submit(client: Client, results: Results, record: Record) -> Record | None:
    """Submit one request, and save what has come of it. None: another thread has taken it."""
    with results.lock:
        record = results.records[record.custom_id]  # it may have been saved anew
        if record.state != NOT_SENT:
            return None
        # After a crash from here on it stays Unknown, so that no run sends it twice.
        results.save([record], state=UNKNOWN, error="perhaps sent: no reply was saved")
    try:
        generation_id = client.submit_generation(record.request)
        with results.lock:  # so that no other thread saves its answer first
            # Set first: if the save fails, the id is still in memory, and can be polled.
            record.generation_id = generation_id
            results.save([record], state=QUEUED, error=None)
    except ApiError as error:
        results.save([record], state=STATE_AFTER[type(error)], error=str(error))
        if isinstance(error, LockedOut):
            raise
    return record


def poll_all(
    client: Client,
    results: Results,
    on_record: OnRecord = None,
    stop: Event | None = None,
    interval_seconds: float = POLL_INTERVAL_SECONDS,
    max_attempts: int = MAX_POLL_ATTEMPTS,
) -> None:
    """Poll all that is Pending, until all is final or max_attempts rounds are over.

    A round polls each generation once, in batches, with one for each worker thread. Rounds
    begin interval_seconds apart, or later if one takes longer. A poll that fails leaves its
    reason in record.error, and is made again in the next round. on_record gets each record
    after each poll, final or not, in the caller's thread. Once stop is set, or LockedOut or
    sqlite3.Error is raised, the batch under way ends and the rest stays Pending (after an
    error, some may miss on_record).
    """
    stop = stop or Event()
    next_round_at = monotonic()
    with ThreadPoolExecutor(MAX_CONCURRENT_POLLS) as pool:
        for _ in range(max_attempts):
            pending = results.with_outcome(PENDING)
            if not pending or stop.wait(next_round_at - monotonic()):
                return
            next_round_at = monotonic() + interval_seconds
            while pending:
                if wait_for_pause(client, stop):
                    return
                batch = pending[:MAX_CONCURRENT_POLLS]
                pending = pending[MAX_CONCURRENT_POLLS:]
                for record in pool.map(lambda each: poll(client, results, each), batch):
                    if on_record:
                        on_record(record)


def poll(client: Client, results: Results, record: Record) -> Record:
    """Poll one generation, and save it if it is final. Else it changes in memory only."""
    try:
        generation = client.fetch_generation(str(record.generation_id))
        custom_id = find(generation, str, "request", "metadata", "custom_id")
        if custom_id not in (None, record.custom_id):
            raise Uncertain("the API returns the generation of another request")
    except LockedOut:
        raise
    except ApiError as error:
        if record.outcome == PENDING:  # no other thread has its answer
            record.error = str(error)
        return record
    with results.lock:
        record.update(generation)
        is_current = results.records[record.custom_id] is record  # and was not replaced
        if is_current and record.state in FINAL:
            results.save([record])
    return record


def wait_for_pause(client: Client, stop: Event) -> bool:
    """Wait for the end of the client's pause, or for stop; return whether stop is set.

    LockedOut: the pause is too long.
    """
    while not stop.is_set() and client.pause_seconds():
        stop.wait(client.pause_seconds())  # in a loop, as another thread may make it longer
    return stop.is_set()


# --- The screen: everything that prints

MARKS = {SUCCESS: "✓", FAILED: "✗", UNKNOWN: "?", PENDING: "…", NOT_SENT: "-"}
COLUMNS = shutil.get_terminal_size().columns
IS_TERMINAL = os.isatty(1)
MAX_ROWS = 50  # of the table, and of reasons
CUT_OFF = "Cut-off"  # a Success whose answer is cut off


def printable(text: str) -> str:
    """Return text from elsewhere on one line and without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def shorten(text: str, columns: int, at_word: bool = False) -> str:
    """Make text from elsewhere printable, and cut it to so many columns."""
    text = printable(text)
    if len(text) <= columns:
        return text
    if at_word:  # a word that is too long is cut all the same
        return f"{textwrap.wrap(text, columns - 3)[0]}..."
    return f"{text[: columns - 3].rstrip()}..."


def bar(done: int, total: int, columns: int) -> str:
    """Return a progress bar, which is full only when all is done."""
    return f"|{'█' * (done * columns // total):░<{columns}}|"


def tally(counts: Counter[str]) -> str:
    """Return counts as text, such as "2 failed, 1 pending"."""
    return ", ".join(f"{counts[word]} {word.lower()}" for word in counts)


def print_title(title: str) -> None:
    """Print a title between two rules."""
    rule = "=" * min(80, COLUMNS)
    print(f"{rule}\n {title}\n{rule}")


def print_section(title: str) -> None:
    """Print the heading of a section."""
    print(f"\n  {title}\n  {'-' * (len(title) + 4)}\n")


def kind_of(record: Record) -> str:
    """Return the outcome of a record, or Cut-off."""
    if record.is_cut_off:
        return CUT_OFF
    return record.outcome


class Screen:
    """Prints the progress of a run, on a terminal with a live line, and how it ended."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.started_at = monotonic()
        self.printed_at = monotonic()
        self.answered_before = len(results.with_outcome(SUCCESS))
        self.to_poll = 0
        self.final = 0
        self.notes: list[str] = []  # why the run ended early

    def clear(self) -> None:
        """Make room for a line: remove the live line."""
        if IS_TERMINAL:
            print(" " * (COLUMNS - 1), end="\r")
        self.printed_at = monotonic()

    def show_progress(self, error: str | None) -> None:
        """Show how many are in which state: live on a terminal, else once a minute."""
        if not IS_TERMINAL and monotonic() - self.printed_at < 60:
            return
        states = Counter(record.state for record in self.results.records.values())
        line = shorten(f"⏳ {tally(states)}. {error or ''}", COLUMNS - 4)
        self.clear()
        print(f"  {line}", end="\r" if IS_TERMINAL else "\n")

    def show_submission(self, record: Record) -> None:
        """Print how a submission has ended; one that was not accepted comes again."""
        if record.outcome == NOT_SENT:
            self.show_progress(record.error)
            return
        mark = "✓" if record.generation_id else MARKS[record.outcome]
        text = shorten(f"{mark} {record.custom_id}: {record.error or record.question}", 58)
        self.clear()
        print(f"    {text} → {shorten(record.generation_id or 'no id', 15)}")

    def show_poll(self, record: Record) -> None:
        """Print that a generation is final, or how far the others are."""
        if record.outcome == PENDING:
            self.show_progress(record.error)
            return
        self.final += 1
        self.clear()
        print(
            f"  [{self.final:>3}/{self.to_poll}] {bar(self.final, self.to_poll, 30)} "
            f"{self.final * 100 // self.to_poll}% {MARKS[record.outcome]} "
            f"{shorten(record.custom_id, 24)}"
        )

    def show_ending(self, records: Records) -> str:
        """Print why the run ended early, what has no answer and why, and what to do about it.

        Return the title of the last banner.
        """
        reasons = Counter(
            f"{record.outcome.lower()}: {record.error}"
            for record in records
            if record.error and record.error not in "".join(self.notes)
        )
        counted = [f"{count} {reason}" for reason, count in reasons.most_common(MAX_ROWS)]
        for note in self.notes + counted:
            print(f"\n{textwrap.indent(textwrap.fill(printable(note), 76), '  ')}")
        kinds = Counter(kind_of(record) for record in records)
        command = f'uv run "{sys.argv[0]}" --resume "{self.results.path}"'
        if kinds[PENDING] or kinds[NOT_SENT]:
            print(
                "\n  To go on (a run without --resume pays for everything again):\n"
                f"      {command}"
            )
        if kinds[FAILED]:
            print(f"\n  To ask again what failed:\n      {command} --retry failed")
        if kinds[UNKNOWN]:
            print(
                "\n  What is unknown may be paid for: see the dashboard first. To ask it again:\n"
                f"      {command} --retry unknown"
            )
        if kinds[CUT_OFF]:
            print(
                "\n  To ask again what is cut off, first set a larger MAX_TOKENS:\n"
                f"      {command} --retry cut-off"
            )
        del kinds[SUCCESS]
        cut_off = kinds.pop(CUT_OFF, 0)
        if kinds or self.notes:
            return f"Not complete: {tally(kinds) or 'see above'}"
        if cut_off:
            return f"Generation complete, but {cut_off} answers are cut off"
        return "Generation complete!"


def show_figures(records: Records, answered: int, seconds: float) -> None:
    """Print counts, times and tokens; answered is how many answers came in so many seconds."""
    total = len(records)
    counts = Counter(record.outcome for record in records)
    succeeded = counts[SUCCESS]
    mark = "✓" if succeeded == total else "✗"
    print(f"""
  Success Rate
  ----------------
  {mark} {bar(succeeded, total, 40)} {succeeded * 1000 // total / 10}%

      Successful:  {succeeded:>4}
      Failed:      {counts[FAILED]:>4}""")
    for outcome in (UNKNOWN, PENDING, NOT_SENT):
        if counts[outcome]:
            print(f"      {outcome + ':':<13}{counts[outcome]:>4}")
    times = [record.duration_ms for record in records if record.duration_ms is not None]
    responses = [record.response for record in records if record.response]
    tokens = Counter[str]()
    for response in responses:
        for name in ("prompt", "completion", "total"):
            count = find(response, int, "usage", f"{name}_tokens") or 0
            tokens[name] += min(count, 10**9)  # 400 digits could not be averaged
    print(f"""\
      Total:       {total:>4}

  Performance Metrics
  -----------------------
      Total wall-clock time: {seconds:>10.2f}s
      Avg generation time:   {sum(times) / max(len(times), 1):>10.1f}ms
      Min generation time:   {min(times, default=0):>10.1f}ms
      Max generation time:   {max(times, default=0):>10.1f}ms
      Throughput:            {answered / max(seconds, 0.001):>10.2f} req/s

  Token Usage
  ---------------
      Prompt tokens:     {tokens["prompt"]:>10,}
      Completion tokens: {tokens["completion"]:>10,}
      Total tokens:      {tokens["total"]:>10,}
      Avg completion/req:{tokens["completion"] / max(len(responses), 1):>10,.1f}""")


def show_table(records: Records) -> None:
    """Print the questions with their answers, on a wide terminal more of the answers."""
    # From 10 to 24 columns, so that the name of a file can be a custom id
    id_columns = max(len(f"{shorten(record.custom_id, 24):<10}") for record in records)
    answer_columns = max(COLUMNS, 80) - id_columns - 45
    print(f"""
  Request-Response Correlation
  --------------------------------

  {"ID":<{id_columns}} Status     {"Question":<30} Response
  {"-" * id_columns} {"-" * 10} {"-" * 30} {"-" * answer_columns}""")
    for record in records[:MAX_ROWS]:
        text = str(record.error or record.answer or record.response or "")
        print(
            f"  {shorten(record.custom_id, 24):<{id_columns}} {MARKS[record.outcome]} "
            f"{kind_of(record):<8} {shorten(record.question, 28):<30} "
            f"{shorten(text, answer_columns, at_word=True)}"
        )
    if len(records) > MAX_ROWS:
        print(f"  ... and {len(records) - MAX_ROWS} more in the results")


# --- The script: the command line, the files of a run, main

PREFIX = "async-polling"  # of the names of results files
NUMBERS = (
    "NUM_REQUESTS",
    "MAX_TOKENS",
    "POLL_INTERVAL_SECONDS",
    "MAX_POLL_ATTEMPTS",
    "MAX_CONCURRENT_POLLS",
    "REQUEST_TIMEOUT_SECONDS",
)


def check_configuration() -> None:
    """Raise ValueError for a constant that can't be used, with its name and value."""
    for name in NUMBERS:
        value = globals()[name]
        kind = (int, float) if name.endswith("_SECONDS") else (int,)
        if not isinstance(value, kind) or not 0 < value <= 1_000_000:
            raise ValueError(
                f"{name} = {value!r} can't be used: it must be a number above 0, at most "
                "1,000,000, and whole unless it is seconds"
            )


def new_results() -> Results:
    """Make the results file of a new run, with all its requests."""
    step = "load_questions"  # what the message of an error begins with
    try:
        questions = load_questions()
        if not isinstance(questions, dict) or not questions:
            raise ValueError(
                f'it must return texts by custom id, as in {{"my-1": "What is 2 + 2?"}}, not '
                f"{questions!r:.60} (is return missing? relative paths start from {Path.cwd()})"
            )
        step = "build_request"
        records = [
            new_record(custom_id, question) for custom_id, question in questions.items()
        ]
        step = f"RESULTS_DIR = {RESULTS_DIR!r}"
        folder = Path(RESULTS_DIR).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        started_at = datetime.now(timezone.utc)
        results = Results(folder / f"{PREFIX}-{started_at:%Y%m%d-%H%M%S-%f}.db")
        step = "load_questions or build_request"
        results.add(records)
    except (OSError, ValueError, sqlite3.Error) as error:
        raise ValueError(f"{step}: {error}") from error
    return results


def open_results(name: str) -> Results:
    """Open the results file of an earlier run; name may also be that of its .jsonl."""
    path = Path(f"{os.path.splitext(name)[0]}.db")
    if not path.is_file():
        raise ValueError(f"--resume {name!r}: there is no file {path}")
    try:
        results = Results(path)
    except sqlite3.Error as error:
        raise ValueError(
            f"{path} is in use by another run, or can't be used: {error}"
        ) from error
    if not results.records:
        raise ValueError(f"there are no requests in {path}")
    return results


def renew(results: Results, kind: str) -> None:
    """Replace what is failed, unknown or cut-off by new requests, which are Not sent."""
    renewed = []
    for record in results.records.values():
        if kind_of(record).lower() == kind and record.request:
            again = new_record(record.custom_id, record.question)
            again.response = record.response  # stays until there is a new one
            renewed.append(again)
    results.save(renewed)


def stop_on_signals(stop: Event) -> None:
    """Let Ctrl-C and SIGTERM set stop. A second one ends the program as the system does."""

    def end() -> None:
        stop.set()
        os.write(2, b"\n  Stopping after the calls under way. Ctrl-C again: stop at once.\n")

    def handle(*_: object) -> None:
        signal(SIGINT, SIG_DFL)
        signal(SIGTERM, SIG_DFL)
        # In another thread, as this one may hold the lock of stop, or be printing
        start_new_thread(end, ())

    signal(SIGINT, handle)
    signal(SIGTERM, handle)


def run(client: Client, screen: Screen, stop: Event) -> None:
    """Submit what is Not sent, then poll what is Pending, and show both."""
    results = screen.results
    unsent = len(results.with_outcome(NOT_SENT))
    [record, *_] = results.records.values()
    print_title("INFERENCE.NET ASYNC API - SINGLE REQUEST POLLING EXAMPLE")
    print(f"""
  Configuration:
    • Requests to submit: {unsent}
    • Model: {record.request.get("model")}
    • Poll interval: {POLL_INTERVAL_SECONDS}s
    • Concurrent polls: {MAX_CONCURRENT_POLLS}""")
    try:
        if unsent:
            print_section(f"Submitting {unsent} Requests")
            submit_all(client, results, screen.show_submission, stop)
    except ApiError as error:  # what was accepted is polled all the same
        screen.notes.append(f"Stopped submitting: {error}")
    screen.to_poll = len(results.with_outcome(PENDING))
    if screen.to_poll and not stop.is_set():
        screen.clear()
        print_section("Polling for Results")
        poll_all(client, results, screen.show_poll, stop)
        if results.with_outcome(PENDING) and not stop.is_set():
            screen.notes.append(
                f"The polls are used up (MAX_POLL_ATTEMPTS = {MAX_POLL_ATTEMPTS})"
            )


def write_answers(records: Records, path: Path) -> None:
    """Write a line of JSON for each record, with its outcome as its state."""
    draft = path.with_suffix(".tmp")
    with draft.open("w") as file:
        for record in records:
            row = vars(record) | {"state": record.outcome, "answer": record.answer}
            del row["request"]
            file.write(f"{json.dumps(row)}\n")
    draft.replace(path)


def end_run(screen: Screen) -> bool:
    """Save everything, show the summary, and tell whether every request has its answer."""
    results = screen.results
    records = list(results.records.values())
    path = results.path.with_suffix(".jsonl")
    try:
        with results:
            results.save(records)
        write_answers(records, path)
    except (OSError, sqlite3.Error) as error:
        screen.notes.append(f"The results can't be written: {error}")
        for record in records:
            if record.generation_id:
                with suppress(OSError):
                    print(f"{record.custom_id}: {record.generation_id}", file=sys.stderr)
    succeeded = len(results.with_outcome(SUCCESS))
    answered = succeeded - screen.answered_before
    try:
        screen.clear()
        print()
        print_title("ASYNC GENERATION SUMMARY")
        show_figures(records, answered, monotonic() - screen.started_at)
        show_table(records)
        title = screen.show_ending(records)
        print(f"\n  Results: {path}\n")
        print_title(title)
    except OSError:  # stdout is closed or full
        return False
    return succeeded == len(records) and not screen.notes


def main() -> int:
    """Read the command line, run, show the summary, and return the exit code."""
    signal(SIGINT, SIG_DFL)  # until stop_on_signals, Ctrl-C ends it without a traceback
    parser = argparse.ArgumentParser(description="Ask inference.net's Asynchronous API.")
    parser.add_argument("--resume", metavar="FILE", help="go on with an earlier run")
    parser.add_argument(
        "--retry",
        choices=["failed", "cut-off", "unknown"],
        help="with --resume: ask these again; what is unknown may cost twice",
    )
    options = parser.parse_args()
    if options.retry and not options.resume:
        parser.error("--retry needs --resume FILE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        check_configuration()
        client = Client()
        results = new_results() if options.resume is None else open_results(options.resume)
        if options.retry:
            renew(results, options.retry)
    except (OSError, ValueError, sqlite3.Error) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    stop = Event()
    stop_on_signals(stop)
    screen = Screen(results)
    try:
        run(client, screen, stop)
    except (ApiError, OSError, RuntimeError, sqlite3.Error) as error:
        screen.notes.append(f"Stopped: {error}")
    is_complete = end_run(screen)
    if stop.is_set():
        return 130
    if not is_complete or sys.stdout is None:
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main())  # not sys.exit, which would write to stdout again: it may be closed
