"""What the API answers, however odd, which question it is the answer to, and how it is kept."""

import json
import math
import random
import re
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from conftest import API_KEY, GROUP, SCRIPTS, SINGLE, Example, load
from hypothesis import given
from hypothesis import strategies as st
from local_api import ANSWERS, Json, LocalApi, status

MODULES = {script: load(script) for script in SCRIPTS}
MODULE = MODULES[SINGLE]  # for what is the same text in both
both = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no address, and no proxy on the way to the local API."""
    monkeypatch.delenv("INFERENCE_API_KEY", raising=False)
    monkeypatch.delenv("INFERENCE_BASE_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def generation(content: Any = "Paris", **changes: Any) -> Json:
    """A generation that succeeded, but for the changes."""
    choice = {
        "message": {"role": "assistant", "content": content},
        "finish_reason": "stop",
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    return {
        "id": "abc",
        "state": "Success",
        "stateMessage": None,
        "request": {"metadata": {"custom_id": "req-001"}},
        "response": {"choices": [choice], "usage": usage},
        "dispatchedAt": "2026-01-02T03:04:05.000Z",
        "finishedAt": "2026-01-02T03:04:06.500Z",
    } | changes


def updated(shown: Json, module: types.ModuleType = MODULE) -> Any:
    """Return a record after it was told this of its generation."""
    record = module.Record("req-001", "Where?", {})
    record.update(shown)
    return record


# What a record keeps of a generation


def test_a_record_keeps_what_a_generation_says() -> None:
    record = updated(generation())
    assert record == MODULE.Record(
        "req-001",
        "Where?",
        {},
        state="Success",
        response="Paris",
        finish_reason="stop",
        prompt_tokens=5,
        completion_tokens=7,
        total_tokens=12,
        duration_ms=1500,
    )


ODD = [
    None,
    "",
    0,
    -1,
    1.5,
    True,
    [],
    {},
    "text",
    [None],
    [[]],
    {"a": {}},
    10**30,
    "\ud800",
]
ABSENT = object()


def alter(path: tuple[str | int, ...], value: Any) -> Json:
    """Return a generation with an odd value, or none, at path."""
    altered = generation()
    place: Any = altered
    for step in path[:-1]:
        place = place[step]
    if value is ABSENT:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return altered


PATHS: list[tuple[str | int, ...]] = [
    ("id",),
    ("stateMessage",),
    ("request",),
    ("request", "metadata"),
    ("response",),
    ("response", "choices"),
    ("response", "choices", 0),
    ("response", "choices", 0, "message"),
    ("response", "choices", 0, "message", "content"),
    ("response", "choices", 0, "finish_reason"),
    ("response", "usage"),
    ("response", "usage", "prompt_tokens"),
    ("response", "usage", "total_tokens"),
    ("dispatchedAt",),
    ("finishedAt",),
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_no_odd_field_spoils_a_success(path: Any) -> None:
    for value in [ABSENT, *ODD]:
        record = updated(alter(path, value))
        assert record.state == "Success"
        spoils_text = (
            path[0] == "response" and "usage" not in path and path[-1] != "finish_reason"
        )
        if not spoils_text:
            assert record.response == "Paris"
        json.loads(json.dumps(vars(record)), parse_constant=pytest.fail)


def message(**keys: Any) -> Json:
    """Return a choice with one message, which has these keys."""
    return {"message": {"role": "assistant", **keys}}


CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "find", "arguments": "{}"},
}
TEXTS = {
    "a text": [message(content="Paris")],
    "with keys that hold nothing": [
        message(content="Paris", tool_calls=[], refusal=None, annotations=[], audio=None)
        | {"logprobs": None, "index": 0}
    ],
    "with no role": [{"message": {"content": "Paris"}}],
}
WHOLE = {
    "a tool call": [message(content=None, tool_calls=[CALL])],
    "a tool call and an empty text": [message(content="", tool_calls=[CALL])],
    "a tool call and a text": [message(content="Let me see", tool_calls=[CALL])],
    "a function call": [message(content=None, function_call={"name": "find"})],
    "a refusal": [message(content=None, refusal="I can't help with that.")],
    "a refusal and a text": [message(content="No.", refusal="I can't help with that.")],
    "two choices": [message(content="Paris"), message(content="It is Paris.")],
    "log probabilities": [
        message(content="Paris") | {"logprobs": {"content": [{"token": "P"}]}}
    ],
    "reasoning": [message(content="Paris", reasoning_content="France, so ...")],
    "parts": [message(content=[{"type": "text", "text": "Paris"}])],
    "a number": [message(content=7)],
    "no text": [message(content=None)],
    "no message": [{"text": "Paris"}],
    "no choice": [],
    "choices that are none": {"message": {"content": "Paris"}},
}


@pytest.mark.parametrize("choices", TEXTS.values(), ids=TEXTS)
def test_an_answer_that_is_one_text_is_kept_as_its_text(choices: Any) -> None:
    assert updated(generation(response={"choices": choices})).response == "Paris"


@pytest.mark.parametrize("choices", WHOLE.values(), ids=WHOLE)
def test_any_other_answer_is_kept_whole(choices: Any) -> None:
    response = {"choices": choices, "usage": {"total_tokens": 3}, "model": "any"}
    record = updated(generation(response=response))
    assert record.response == response
    assert record.state == "Success"
    assert record.total_tokens == 3


@pytest.mark.parametrize("text", ["", " \n", "é 東京 \ud800 \x1b", '{"a": 1}', "null"])
def test_a_text_is_kept_as_it_is(text: str) -> None:
    assert updated(generation(text)).response == text


@pytest.mark.parametrize(
    ("dispatched", "finished", "milliseconds"),
    [
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:06Z", 1000),
        ("2026-01-02T03:04:05.123Z", "2026-01-02T03:04:05.124Z", 1),
        ("2026-01-02T03:04:05.123456789Z", "2026-01-02T03:04:05.124456Z", 1),
        ("2026-01-02T03:04:05.1234567890123456789Z", "2026-01-02T03:04:05.223456Z", 100),
        ("2026-01-02T03:04:05", "2026-01-02T03:04:06Z", 1000),
        ("2026-01-02T03:04:05", "2026-01-02T03:04:06.500", 1500),
        ("2026-01-02T03:04:05", "2026-01-02T03:04:06+00:00", None),
        ("2026-01-02 03:04:05Z", "2026-01-02 03:04:06Z", 1000),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z", 0),
        ("2026-01-02T03:04:06Z", "2026-01-02T03:04:05Z", -1000),
        ("2026-13-02T03:04:05Z", "2026-01-02T03:04:05Z", None),
        ("yesterday", "2026-01-02T03:04:05Z", None),
        (None, "2026-01-02T03:04:05Z", None),
        (1767322000, 1767322001, None),
        ("", "", None),
    ],
)
def test_generation_time(dispatched: Any, finished: Any, milliseconds: float | None) -> None:
    record = updated(generation(dispatchedAt=dispatched, finishedAt=finished))
    assert record.duration_ms == pytest.approx(milliseconds, abs=0.01)


@pytest.mark.parametrize("reason", [None, "", 5, {}, [], "out of memory"])
def test_a_failure_has_a_reason(reason: Any) -> None:
    record = updated(generation(state="Failed", stateMessage=reason, response=None))
    assert record.state == "Failed"
    assert record.error == (
        "out of memory" if reason == "out of memory" else "no reason given"
    )


def test_an_error_of_an_earlier_poll_is_gone_when_the_answer_is_there() -> None:
    record = MODULE.Record(
        "req-001", "Where?", {}, "abc", state="Queued", error="HTTP 503: busy"
    )
    record.update(generation())
    assert record.error is None


@pytest.mark.parametrize(
    ("value", "kind", "path", "found"),
    [
        ({"a": [{"b": "text"}]}, str, ("a", 0, "b"), "text"),
        ({"a": [{"b": "text"}]}, int, ("a", 0, "b"), None),
        ({"a": [{"b": "text"}]}, str, ("a", 1, "b"), None),
        ({"a": [{"b": "text"}]}, str, ("a", "b"), None),
        ({"a": None}, str, ("a", "b"), None),
        ({"a": {}}, dict, ("a",), {}),
        ([], dict, ("a",), None),
        (None, dict, (), None),
        ("text", str, (), "text"),
    ],
)
def test_find(value: Any, kind: type, path: Any, found: Any) -> None:
    assert MODULE.find(value, kind, *path) == found


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.sampled_from(
    [
        *(
            "response",
            "choices",
            "message",
            "content",
            "text",
            "usage",
            "finish_reason",
            "id",
        ),
        *(
            "prompt_tokens",
            "request",
            "metadata",
            "custom_id",
            "dispatchedAt",
            "stateMessage",
        ),
        *("logprobs", "tool_calls", "finishedAt"),
    ]
)
states = st.sampled_from(["Queued", "Success", "Failed", "?"])
likely = st.recursive(
    scalars,
    lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=8,
)


@both
@given(st.dictionaries(keys, likely, max_size=5), likely, states)
def test_any_generation_can_be_read(
    module: types.ModuleType, shown: Json, choice: Any, state: str
) -> None:
    for response in (
        shown.get("response"),
        {"choices": [choice]},
        {"choices": [choice, choice]},
    ):
        record = updated(shown | {"state": state, "response": response}, module)
        row = json.loads(json.dumps(vars(record)))
        assert row["custom_id"] == "req-001"
        assert row["state"] == state
        assert row["response"] is None or isinstance(row["response"], str | dict)
        assert row["error"] is None or isinstance(row["error"], str)


# Matching the generations of a group


class Answers:
    """A client whose polls are answered with these generations, one list after another."""

    def __init__(self, *polls: list[Json]) -> None:
        self.polls = list(polls)

    def wait(self, seconds: float, stop: Event) -> bool:
        """Wait for nothing."""
        return True

    def fetch_group(self, group_id: str) -> list[Json]:
        """Return what comes next."""
        return self.polls.pop(0)


def poll_group(records: list[Any], *polls: list[Json]) -> list[list[Any]]:
    """Poll as often as there are answers; return what becomes final with each of them."""
    saved: list[list[Any]] = []
    with ThreadPoolExecutor(1) as pool:
        final = list(
            MODULES[GROUP].poll_all(
                Answers(*polls),
                pool,
                records,
                saved.append,
                interval_seconds=0,
                max_attempts=len(polls),
            )
        )
    assert saved == final
    return final


def pending_records(*custom_ids: str) -> list[Any]:
    """Return records of a group that was accepted."""
    return [
        MODULES[GROUP].Record(custom_id, "?", {}, group_id="group", state="Queued")
        for custom_id in custom_ids
    ]


def member(custom_id: Any, generation_id: Any, **changes: Any) -> Json:
    """Return a generation of a group that repeats this custom id."""
    shown = {"id": generation_id, "request": {"metadata": {"custom_id": custom_id}}}
    return generation(f"The answer of {generation_id}.", **(shown | changes))


@pytest.mark.parametrize("repeated", [None, "", "req-999", "req-1", 7, ["req-2"]])
def test_a_generation_that_answers_no_question_is_kept(repeated: Any) -> None:
    records = pending_records("req-1", "req-2")
    answers = [member("req-1", "gen-1"), member(repeated, "gen-2")]
    [[matched, stray]] = poll_group(records, answers)
    assert matched is records[0]
    assert matched.response == "The answer of gen-1."
    assert records[1].state == "Queued"
    assert (stray.custom_id, stray.generation_id, stray.question) == (
        "gen-2",
        "gen-2",
        "",
    )
    assert (stray.state, stray.outcome, stray.group_id) == (
        "No match",
        "No match",
        "group",
    )
    assert stray.response == "The answer of gen-2."
    # Polled again, or in another run, it is the same one.
    assert poll_group([*records, stray], answers) == [[]]


def test_the_first_final_claim_of_a_custom_id_keeps_it() -> None:
    records = pending_records("req-1", "req-2")
    early = member("req-1", "early", state="In Progress", response=None)
    late = member("req-1", "late")
    [first, second, third] = poll_group(
        records,
        [early, late],
        [member("req-1", "early"), late],
        [member("req-2", "gen-2")],
    )
    assert first == [records[0]]
    assert (records[0].generation_id, records[0].response) == (
        "late",
        "The answer of late.",
    )
    assert [(record.custom_id, record.outcome) for record in second] == [
        ("early", "No match")
    ]
    assert third == [records[1]]


def test_a_second_claim_of_a_custom_id_in_the_same_poll_is_kept_beside_it() -> None:
    records = pending_records("req-1")
    answers = [member("req-1", "first"), member("req-1", "second")]
    [[matched, stray]] = poll_group(records, answers)
    assert matched is records[0]
    assert (matched.generation_id, matched.response) == ("first", "The answer of first.")
    assert (stray.custom_id, stray.outcome) == ("second", "No match")
    assert stray.response == "The answer of second."


def test_a_group_is_polled_until_every_question_has_its_answer() -> None:
    custom_ids = ["req-1", "req-2", "req-3", "req-4"]
    records = pending_records(*custom_ids)
    answers = [member(custom_id, f"gen-{custom_id}") for custom_id in custom_ids]
    polls = [random.sample(answers[:number], number) for number in (1, 2, 2, 4, 4)]
    final = poll_group(records, *polls)
    assert [len(found) for found in final] == [1, 1, 0, 2]  # the fifth poll is not made
    for record in records:
        assert record.generation_id == f"gen-{record.custom_id}"


members = st.builds(
    lambda request, state, generation_id, rest: (
        rest | {"state": state, "request": request, "id": generation_id}
    ),
    st.sampled_from(["req-1", "req-2", "req-3", None]).map(
        lambda custom_id: {"metadata": {"custom_id": custom_id}}
    )
    | likely,
    states,
    st.sampled_from(["gen-1", "gen-2", "gen-3", None]) | likely,
    st.dictionaries(keys, likely, max_size=3),
)


@given(st.lists(st.lists(members, max_size=6), min_size=1, max_size=3))
def test_any_list_of_generations_can_be_matched(polls: list[list[Json]]) -> None:
    records = pending_records("req-1", "req-2")
    final = [record for found in poll_group(records, *polls) for record in found]
    assert [record.custom_id for record in records] == ["req-1", "req-2"]
    done = [record for record in records if record.state in ("Success", "Failed")]
    strays = [record for record in final if record.outcome == "No match"]
    assert len(final) == len(done) + len(strays)  # each once
    assert all(any(record is other for other in final) for record in done)
    assert not any(record.outcome == "No match" for record in records)
    stray_ids = [record.custom_id for record in strays]
    assert stray_ids == [record.generation_id for record in strays]
    assert len(stray_ids) == len(set(stray_ids))
    if len(done) < len(records):  # all the polls were made
        shown_ids = [
            shown["id"]
            for poll in polls
            for shown in poll
            if shown["state"] in ("Success", "Failed")
        ]
        texts = {shown_id for shown_id in shown_ids if shown_id and isinstance(shown_id, str)}
        assert texts <= {record.generation_id for record in final}  # none is dropped


# The file that keeps them


def plain(records: list[Any]) -> str:
    """Return records as a text, in which two NaN are equal."""
    return json.dumps([vars(record) for record in records])


def records_of(module: types.ModuleType) -> st.SearchStrategy[Any]:
    """Any records that were submitted, among which custom ids come again."""
    given_id = "group_id" if module is MODULES[GROUP] else "generation_id"
    return st.builds(
        module.Record,
        custom_id=st.sampled_from(["a", "b", "c", "d"]) | st.text(),
        question=st.text(),
        request=st.dictionaries(st.text(), likely, max_size=2),
        **{given_id: st.text()},
        state=st.sampled_from(["Queued", "Success", "Failed", "Unknown", "?"]),
        response=st.none() | st.text() | st.dictionaries(keys, likely, max_size=2),
        total_tokens=st.none() | st.integers(),
        duration_ms=st.none() | st.floats(),
        error=st.none() | st.text(),
    )


@both
@given(st.data())
def test_what_is_saved_is_read_back(module: types.ModuleType, data: st.DataObject) -> None:
    lists = st.lists(records_of(module), max_size=4)
    new = module.Record("new", "?", {})
    spoilers = [
        module.Record("e", "?", {"what": object()}),  # is no JSON
        module.Record(["e"], "?", {}),  # type: ignore[list-item]
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "results.db"
        results = module.Results(path)
        expected: dict[str, Any] = {}
        for records in data.draw(st.lists(lists, min_size=1, max_size=4)):
            results.save(iter(records))
            expected |= {record.custom_id: record for record in records}
        assert plain(results.load()) == plain(list(expected.values()))

        # Each replaces the one with its custom id, and takes its place.
        changed = [replace(record, error="changed") for record in expected.values()]
        results.save(reversed(changed))
        assert plain(results.load()) == plain(changed)

        # All of them are saved, or none.
        for spoiler in spoilers:
            with pytest.raises((OSError, TypeError)):
                results.save([*expected.values(), new, spoiler])
            assert plain(results.load()) == plain(changed)
        results.close()
        again = module.Results(path)
        assert plain(again.load()) == plain(changed)
        again.close()


@both
def test_a_record_that_was_loaded_twice_is_submitted_once(
    module: types.ModuleType, tmp_path: Path
) -> None:
    results = module.Results(tmp_path / "results.db")
    results.save([module.new_record("a", "Where?")])
    [first], [second] = results.load(), results.load()
    for state in ("Submitting", "Not sent", "Submitting", "Queued"):  # after a 429
        first.state, first.error = state, "HTTP 429"
        results.save([first])
    second.state = "Submitting"
    with pytest.raises(OSError, match=r"results\.db: .*load"):
        results.save([second])
    assert plain(results.load()) == plain([first])
    results.close()


@both
def test_a_record_that_is_submitted_again_has_no_id_of_an_earlier_submission(
    module: types.ModuleType,
) -> None:
    class Offline(module.Client):  # type: ignore[misc,name-defined]
        def call(self, method: str, path: str, body: Any = None) -> Any:
            raise module.Uncertain("timed out")

    record = module.new_record("a", "Where?")
    record.generation_id = record.error = "earlier"
    if module is MODULES[GROUP]:
        record.group_id = "earlier"
    with ThreadPoolExecutor(1) as pool, suppress(module.Uncertain):
        list(module.submit_all(Offline("any"), pool, [record], lambda records: None))
    assert record.outcome == "Unknown"


@both
def test_a_record_that_is_made_anew_does_not_replace_one_that_was_submitted(
    module: types.ModuleType, tmp_path: Path
) -> None:
    results = module.Results(tmp_path / "results.db")
    new = [module.new_record(custom_id, "Where?") for custom_id in ("a", "b", "c")]
    results.save(new)
    submitted = module.new_record("b", "Where?")
    submitted.state = "Queued"
    if module is MODULES[GROUP]:
        submitted.group_id = "an-id"
    else:
        submitted.generation_id = "an-id"
    results.save([submitted])
    with pytest.raises(OSError, match=r"results\.db: .*load"):
        results.save(new)
    assert plain(results.load()) == plain([new[0], submitted, new[2]])
    results.close()


def test_numbers_that_are_no_json_leave_the_files_readable(example: Example) -> None:
    def spoil(shown: Json) -> Json:
        if shown["response"]:
            numbers = {"token_logprobs": [-math.inf, math.nan, math.inf]}
            shown["response"]["choices"][0]["logprobs"] = numbers
        return shown

    example.api.alter = spoil
    run = example.run()
    assert run.code == 0
    assert all("token_logprobs" in str(row["response"]) for row in run.rows)
    text = run.results.with_suffix(".jsonl").read_text("utf-8")
    for line in text.splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert len(MODULES[example.script].Results(run.results).load()) == 4


# Matching, in whole runs


def test_a_generation_with_another_id_is_not_taken(api: LocalApi) -> None:
    client = MODULE.Client(API_KEY, api.url)
    request = MODULE.new_record("req-001", "Where?").request
    generation_id = client.submit_generation(request)
    for given_id, is_taken in (
        (None, True),
        (ABSENT, True),
        ("another", False),
        (7, False),
    ):

        def rename(shown: Json, given_id: Any = given_id) -> Json:
            shown = shown | {"id": given_id}
            return {key: value for key, value in shown.items() if value is not ABSENT}

        api.alter = rename
        if is_taken:
            assert client.fetch_generation(generation_id)["state"] == "Success"
        else:
            with pytest.raises(
                MODULE.Uncertain, match=f"^not the state of {generation_id}: "
            ):
                client.fetch_generation(generation_id)


def test_a_generation_that_repeats_nothing_is_matched_by_its_id(single: Example) -> None:
    repeated = [None, {}, {"metadata": None}, {"metadata": {"custom_id": "req-001"}}]

    def change(shown: Json) -> Json:
        number = int(shown["request"]["metadata"]["custom_id"].removeprefix("req-"))
        return shown | {"request": repeated[number - 1], "id": None}

    single.api.alter = change
    run = single.run()
    assert run.code == 0
    for row in run.rows:
        assert single.api.generations[row["generation_id"]].custom_id == row["custom_id"]
        assert row["response"] == ANSWERS[row["question"]]


def test_answers_in_any_order_find_their_questions(example: Example) -> None:
    example.edit(NUM_REQUESTS=10)
    example.api.seconds = (0, 0.5)
    run = example.run()
    assert run.code == 0
    module = MODULES[example.script]
    assert [row["question"] for row in run.answers] == module.SAMPLE_QUESTIONS
    assert list(ANSWERS) == module.SAMPLE_QUESTIONS
    for row in run.answers:
        assert row["response"] == ANSWERS[row["question"]]


def test_an_answer_that_matches_no_question_is_shown_and_kept(group: Example) -> None:
    def rename(shown: Json) -> Json:
        if shown["request"]["metadata"]["custom_id"] == "req-002":
            return shown | {"request": {"metadata": {"custom_id": "req-999"}}}
        return shown

    group.api.alter = rename
    group.edit(MAX_POLL_ATTEMPTS=3)
    run = group.run()
    assert run.code == 1
    assert "\n      Successful:     3\n" in run.stdout
    assert "\n      No match:       1\n" in run.stdout
    assert "Not complete: 1 pending, 1 no match" in run.stdout
    [stray] = [row for row in run.rows if row["state"] == "No match"]
    assert stray["custom_id"] == stray["generation_id"]
    assert group.api.generations[stray["generation_id"]].custom_id == "req-002"
    assert stray["response"] == ANSWERS["What is 2 + 2?"]
    # A long custom id takes columns from the answer.
    assert re.search(rf"^  {stray['custom_id']} ! No match +2 \+ 2", run.stdout, re.M)
    assert run.states["req-002"] == "Queued"
    assert {row["custom_id"] for row in run.answers} == set(run.final)

    again = group.run("--resume")
    assert again.code == 1
    assert again.rows == run.rows  # the same one is not kept twice


def test_a_state_nobody_knows_is_not_final(example: Example) -> None:
    seen: set[str] = set()

    def unknown_once(shown: Json) -> Json:
        is_new = shown["id"] not in seen
        seen.add(shown["id"])
        return shown | {"state": "Success!"} if is_new else shown

    example.api.alter = unknown_once
    assert example.run().code == 0


def test_failed_generations_are_shown_with_their_reasons(example: Example) -> None:
    def fail(shown: Json) -> Json:
        if shown["request"]["metadata"]["custom_id"] != "req-003":
            return shown
        return shown | {
            "state": "Failed",
            "stateMessage": "out of memory",
            "response": None,
        }

    example.api.alter = fail
    run = example.run()
    assert run.code == 1
    assert "Failed:         1" in run.stdout
    assert "75.0%" in run.stdout
    assert "out of memory" in run.stdout
    assert run.final["req-003"]["error"] == "out of memory"
    assert "Not complete: 1 failed" in run.stdout
    assert "Generation complete!" not in run.stdout


# The API, called as programs call it that import it


def call_of(client: Any) -> tuple[Any, Any]:
    """Return the two calls of a client: to submit one request, and to poll."""
    if hasattr(client, "submit_group"):
        return (lambda request: client.submit_group([request])), client.fetch_group
    return client.submit_generation, client.fetch_generation


@both
@pytest.mark.parametrize("key", [None, "", " \n", "a key", "schlüssel"])
def test_a_key_that_is_missing_or_none_is_a_plain_error(
    module: types.ModuleType, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^set INFERENCE_API_KEY to your key") as caught:
        module.Client(api_key=key)
    assert caught.value.__context__ is None
    monkeypatch.setenv("INFERENCE_API_KEY", key or "")
    with pytest.raises(ValueError, match=r"^set INFERENCE_API_KEY to your key"):
        module.Client()


@both
def test_a_client_reads_the_environment_only_when_it_is_made(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, api: LocalApi
) -> None:
    monkeypatch.setenv("INFERENCE_API_KEY", API_KEY)
    monkeypatch.setenv("INFERENCE_BASE_URL", api.url)
    submit, fetch = call_of(module.Client())
    monkeypatch.setenv("INFERENCE_API_KEY", "another-key")
    monkeypatch.setenv("INFERENCE_BASE_URL", "http://127.0.0.1:9/v1")
    assert fetch(submit(module.new_record("req-001", "Where?").request))
    assert len(api.calls) == 2


@both
def test_two_clients_send_each_its_own_key(module: types.ModuleType, api: LocalApi) -> None:
    mine, yours = module.Client(API_KEY, api.url), module.Client("another-key", api.url)
    request = module.new_record("req-001", "Where?").request
    api.choose_fault = lambda request, sent: status(429, Retry_After="100")
    with pytest.raises(module.NotAccepted):
        call_of(mine)[1]("any-id")
    assert yours.wait(0, Event())  # whatever the other account is told
    api.choose_fault = lambda request, sent: None
    given_id = call_of(mine)[0](request)
    for call, argument in zip(call_of(yours), (request, given_id), strict=True):
        with pytest.raises(module.LockedOut, match=r"^HTTP 401: "):
            call(argument)
    assert call_of(mine)[1](given_id)
    sent = [headers["Authorization"].removeprefix("Bearer ") for headers in api.headers_seen]
    assert sent == [API_KEY, API_KEY, "another-key", "another-key", API_KEY]


@both
@pytest.mark.parametrize("body", [{}, [], {"model": ""}])
def test_a_submission_is_a_post_whatever_its_body(
    module: types.ModuleType, api: LocalApi, body: Any
) -> None:
    client = module.Client(API_KEY, api.url)
    submit = client.submit_group if module is MODULES[GROUP] else client.submit_generation
    with pytest.raises(module.Refused, match=r"^HTTP 400: "):
        submit(body)
    assert [method for method, _ in api.calls] == ["POST"]


@both
@pytest.mark.parametrize(
    ("given_seconds", "seconds"),
    [("0", 0), ("7", 7), ("120", 120), ("121", 120), ("9" * 30, 120)],
)
def test_a_retry_after_is_obeyed_up_to_two_minutes(
    module: types.ModuleType, api: LocalApi, given_seconds: str, seconds: float
) -> None:
    api.choose_fault = lambda request, sent: status(429, Retry_After=given_seconds)
    client = module.Client(API_KEY, api.url)
    _, fetch = call_of(client)
    before = time.monotonic()
    with pytest.raises(module.NotAccepted, match=r"^HTTP 429: "):
        fetch("any-id")
    after = time.monotonic()
    assert before + seconds <= client.paused_until <= after + seconds
    paused_until = client.paused_until
    api.choose_fault = lambda request, sent: status(503, Retry_After="0")
    with pytest.raises(module.Uncertain):
        fetch("any-id")
    assert client.paused_until >= paused_until  # a later answer does not shorten a pause


@both
@pytest.mark.parametrize("seconds", [60, 100_000, -60])
def test_a_retry_after_can_be_a_date(
    module: types.ModuleType, api: LocalApi, seconds: int
) -> None:
    moment = int(time.time()) + seconds
    date = formatdate(moment, usegmt=True)
    api.choose_fault = lambda request, sent: status(429, Retry_After=date)
    client = module.Client(API_KEY, api.url)
    submit, _ = call_of(client)
    is_too_long = seconds > module.MAX_RETRY_AFTER_SECONDS
    with pytest.raises(module.LockedOut if is_too_long else module.NotAccepted):
        submit(module.new_record("req-001", "Where?").request)
    if seconds == 60:  # the pause ends at that moment, on the clock on the wall
        ends_at = client.paused_until - time.monotonic() + time.time()
        assert ends_at == pytest.approx(moment, abs=1)
    pause_seconds = client.paused_until - time.monotonic()
    assert pause_seconds <= (0 if seconds < 0 else module.MAX_RETRY_AFTER_SECONDS)


@both
def test_a_client_waits_until_a_pause_is_over_or_it_is_stopped(
    module: types.ModuleType,
) -> None:
    client = module.Client("a-key")
    stop = Event()
    assert client.wait(0, stop)
    client.paused_until = time.monotonic() + 0.2
    assert client.wait(0, stop)
    assert time.monotonic() >= client.paused_until
    ends_at = time.monotonic() + 0.2
    assert client.wait(0.2, stop)
    assert time.monotonic() >= ends_at
    client.paused_until = time.monotonic() + 3600
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait, 0, stop)
        stop.set()
        assert not waiting.result()
