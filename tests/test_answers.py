"""What the API answers, however odd, and which question it is the answer to."""

import json
import random
import re
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import GROUP, SCRIPTS, SINGLE, Example, load
from hypothesis import given
from hypothesis import strategies as st
from local_api import ANSWERS, Json, LocalApi, status

MODULES = {script: load(script) for script in SCRIPTS}
MODULE = MODULES[SINGLE]  # for what is the same text in both
both = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, which the scripts take out of errors."""
    monkeypatch.setenv("INFERENCE_API_KEY", "a-key-of-these-tests")


def generation(content: Any = "Paris", **changes: Any) -> Json:
    """A generation that succeeded, but for the changes."""
    choice = {"message": {"content": content}, "finish_reason": "stop"}
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


ODD = [None, "", 0, -1, 1.5, True, [], {}, "text", [None], [[]], {"a": {}}, 10**30, "\ud800"]
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
        record = MODULE.Record("req-001", "Where?")
        MODULE.copy_generation(alter(path, value), record)
        assert record.state == "Success"
        spoils_text = path[0] == "response" and "usage" not in path and path[-1] != "finish_reason"
        if not spoils_text:
            assert record.response == "Paris"
        json.loads(json.dumps(vars(record)), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Paris", "Paris"),
        ("", ""),
        (None, None),
        (["Pa", "ris"], '["Pa", "ris"]'),
        ([{"type": "text", "text": "Paris"}], '[{"type": "text", "text": "Paris"}]'),
        ({"text": None}, '{"text": null}'),
        ([], "[]"),
        (7, "7"),
        (False, "false"),
        (" \n", " \n"),
        ("é 東京 \ud800 \x1b", "é 東京 \ud800 \x1b"),
    ],
)
def test_the_text_of_an_answer(content: Any, text: str | None) -> None:
    record = MODULE.Record("req-001", "Where?")
    MODULE.copy_generation(generation(content), record)
    assert record.response == text


@pytest.mark.parametrize(
    ("dispatched", "finished", "milliseconds"),
    [
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:06Z", 1000),
        ("2026-01-02T03:04:05.1Z", "2026-01-02T03:04:05.2Z", 100),
        ("2026-01-02T03:04:05.123Z", "2026-01-02T03:04:05.124Z", 1),
        ("2026-01-02T03:04:05.123456789Z", "2026-01-02T03:04:05.124456Z", 1),
        ("2026-01-02T03:04:05.1234567890123456789Z", "2026-01-02T03:04:05.223456Z", 100),
        ("2026-01-02T03:04:05+00:00", "2026-01-02T05:04:06+02:00", 1000),
        ("2026-01-02T03:04:05", "2026-01-02T03:04:06Z", 1000),
        ("2026-01-02T03:04:05", "2026-01-02T03:04:06.5", 1500),
        ("2026-01-02T03:04:05", "2026-01-02T03:04:06+00:00", None),
        ("2026-01-02 03:04:05Z", "2026-01-02 03:04:06Z", 1000),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z", 0),
        ("2026-01-02T03:04:06Z", "2026-01-02T03:04:05Z", -1000),
        ("2026-13-02T03:04:05Z", "2026-01-02T03:04:05Z", None),
        ("yesterday", "2026-01-02T03:04:05Z", None),
        (None, "2026-01-02T03:04:05Z", None),
        (1767322000, 1767322001, None),
        ("", "", None),
        ("0001-01-01T00:00:00+23:59", "0001-01-01T00:00:01+23:59", 1000),
    ],
)
def test_generation_time(dispatched: Any, finished: Any, milliseconds: float | None) -> None:
    record = MODULE.Record("req-001", "Where?")
    MODULE.copy_generation(generation(dispatchedAt=dispatched, finishedAt=finished), record)
    assert record.duration_ms == milliseconds


@pytest.mark.parametrize("message", [None, "", 5, {}, [], "out of memory"])
def test_a_failure_has_a_reason(message: Any) -> None:
    record = MODULE.Record("req-001", "Where?")
    MODULE.copy_generation(generation(state="Failed", stateMessage=message, response=None), record)
    assert record.state == "Failed"
    assert record.error == ("out of memory" if message == "out of memory" else "no reason given")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.sampled_from(
    [
        *("response", "choices", "message", "content", "text", "usage", "finish_reason", "id"),
        *("prompt_tokens", "request", "metadata", "custom_id", "dispatchedAt", "stateMessage"),
    ]
)
states = st.sampled_from(["Queued", "Success", "Failed", "?"])
likely = st.recursive(
    scalars,
    lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=8,
)


@both
@given(st.dictionaries(keys, likely, max_size=5), states)
def test_any_generation_can_be_read(module: types.ModuleType, answer: Json, state: str) -> None:
    record = module.Record("req-001", "Where?")
    module.copy_generation(answer | {"state": state}, record)
    row = json.loads(json.dumps(vars(record)), parse_constant=pytest.fail)
    assert row["custom_id"] == "req-001"
    assert row["state"] == state


@given(
    st.lists(
        st.builds(
            lambda request, state, answer: answer | {"state": state, "request": request},
            likely
            | st.sampled_from(["req-1", "req-2", "req-3", None]).map(
                lambda custom_id: {"metadata": {"custom_id": custom_id}}
            ),
            states,
            st.dictionaries(keys, likely, max_size=3),
        ),
        max_size=6,
    )
)
def test_any_list_of_generations_can_be_matched(answers: list[Any]) -> None:
    module = MODULES[GROUP]
    names = ["req-1", "req-2"]
    records = [module.Record(name, "?", group_id="g", state="Queued") for name in names]
    for answer in answers:
        final = module.match(answer, records)
        assert final is None or final in records
        assert final is None or final.state in ("Success", "Failed")
    assert [record.custom_id for record in records[:2]] == names
    assert all(stray.outcome == "No match" for stray in records[2:])
    assert all(record.outcome != "No match" for record in records[:2])


@both
@given(content=st.binary())
def test_no_other_file_is_taken_for_results(
    module: types.ModuleType, tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any-{module.__name__}.jsonl"
    path.write_bytes(content)
    lines = [line for line in content.split(b"\n") if line.strip()]
    assert module.read_results(path) == ([], lines)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        module.open_run(str(path), False)
    assert path.read_bytes() == content


@both
@given(values=st.lists(likely | st.binary(max_size=20).map(lambda data: data.replace(b"\n", b""))))
def test_lines_that_are_no_rows_hide_none_that_are(
    module: types.ModuleType, tmp_path_factory: pytest.TempPathFactory, values: list[Any]
) -> None:
    odd = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    odd += [b"9" * 5000, b"[" * 100_000, b'{"custom_id": "req-001"}', b'{"custom_id": "req-0']
    records = [module.Record(f"req-{n}", "Where?", state="Success") for n in range(len(odd))]
    path = tmp_path_factory.getbasetemp() / f"odd-{module.__name__}.jsonl"
    path.write_bytes(b"")
    for record, line in zip(records, odd, strict=True):
        module.append_rows(path, [record])
        path.write_bytes(path.read_bytes() + line + b"\n\n")
    assert module.read_results(path) == (records, [line for line in odd if line.strip()])


@both
@given(st.data())
def test_what_is_saved_is_read_back(
    module: types.ModuleType, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    texts = st.none() | st.text()
    records = [
        module.Record(
            f"req-{number:03}",
            data.draw(st.text()),
            generation_id=data.draw(st.none() | st.text("abcXYZ0189_-", min_size=1)),
            state=data.draw(st.text()),
            response=data.draw(texts),
            total_tokens=data.draw(st.none() | st.integers(0, 2**53 - 1)),
            duration_ms=data.draw(st.none() | st.floats(0, 2**52)),
            error=data.draw(texts),
        )
        for number in range(1, data.draw(st.integers(2, 5)))
    ]
    path = tmp_path_factory.getbasetemp() / f"saved-{module.__name__}.jsonl"
    path.unlink(missing_ok=True)
    torn = data.draw(st.binary(max_size=50)).replace(b"\n", b"")
    module.append_rows(path, [module.Record(record.custom_id, "?") for record in records])
    module.append_rows(path, records)
    path.write_bytes(path.read_bytes() + torn)
    assert module.read_results(path) == (records, [torn] if torn.strip() else [])


@both
def test_resuming_takes_nothing_from_a_run_that_is_still_at_work(
    module: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read_results = tmp_path / "run.jsonl", module.read_results
    row = json.dumps(vars(module.Record("req-001", "Where?"))) + "\n"
    path.write_text(row)

    def read_while_it_grows(path: Path) -> Any:
        found = read_results(path)
        path.write_text(row + row)
        return found

    monkeypatch.setattr(module, "read_results", read_while_it_grows)
    module.open_run(str(path), False)
    assert path.read_text() == row + row


# Matching, in whole runs


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"id": "another"}, "not the state of"),
        ({"id": 7}, "not the state of"),
    ],
)
def test_a_generation_of_another_request_is_not_taken(
    single: Example, change: Json, error: str
) -> None:
    single.api.alter = lambda shown: (
        shown | change if shown["request"]["metadata"]["custom_id"] == "req-002" else shown
    )
    single.edit(MAX_POLL_ATTEMPTS=2)
    run = single.run()
    assert run.code == 1
    assert run.states == {
        "req-001": "Success",
        "req-002": "Queued",
        "req-003": "Success",
        "req-004": "Success",
    }
    assert error in run.stdout


def test_a_generation_without_an_id_is_taken(single: Example) -> None:
    single.api.alter = lambda shown: shown | {"id": None}
    run = single.run()
    assert run.code == 0
    for row in run.final.values():
        assert single.api.generations[row["generation_id"]].custom_id == row["custom_id"]


@pytest.mark.parametrize("echo", [None, {}, {"metadata": None}, {"metadata": {"custom_id": ""}}, 5])
def test_a_generation_that_echoes_nothing_is_matched_by_its_id(single: Example, echo: Any) -> None:
    single.api.alter = lambda shown: shown | {"request": echo}
    assert single.run().code == 0


def test_answers_in_any_order_find_their_questions(example: Example) -> None:
    example.edit(NUM_REQUESTS=10)
    example.api.seconds = (0, 0.5)
    run = example.run()
    assert run.code == 0
    module = MODULES[example.script]
    assert [row["question"] for row in run.final.values()] == module.SAMPLE_QUESTIONS
    assert list(ANSWERS) == module.SAMPLE_QUESTIONS
    for row in run.final.values():
        assert row["response"] == ANSWERS[row["question"]]


def rename(new: dict[str, Any]) -> Any:
    """Return an alter that changes the echoed custom ids."""

    def change(shown: Json) -> Json:
        custom_id = shown["request"]["metadata"]["custom_id"]
        echoed = {"custom_id": new.get(custom_id, custom_id)}
        return shown | {"request": shown["request"] | {"metadata": echoed}}

    return change


@pytest.mark.parametrize("echoed", [None, "", "req-999", "req-001", 7, ["req-002"]])
def test_an_unmatched_answer_is_kept_and_answers_nothing(group: Example, echoed: Any) -> None:
    group.api.alter = rename({"req-002": echoed})
    group.api.alter_list = lambda shown: sorted(
        shown, key=lambda each: each["response"]["choices"][0]["message"]["content"], reverse=True
    )
    group.edit(MAX_POLL_ATTEMPTS=3)
    run = group.run()
    assert run.code == 1
    assert run.states["req-002"] == "Queued"
    assert list(run.states.values()).count("Success") == 3
    unmatched = [row for row in run.rows if row["custom_id"] is None]
    assert len(unmatched) == 1
    assert unmatched[0]["generation_id"] in group.api.generations
    assert unmatched[0]["response"]
    shown = re.escape(unmatched[0]["response"])
    assert re.search(rf"^ +! No match *\n +{shown}$", run.stdout, re.M)
    assert "\n      Successful:     3\n" in run.stdout
    assert "\n Not complete: 1 pending, 1 no match\n" in run.stdout
    answers = {row["response"] for row in [*run.final.values(), *unmatched] if row["response"]}
    assert len(answers) == 4

    again = group.run("--resume")
    assert again.code == 1
    assert [row for row in again.rows if row["custom_id"] is None] == unmatched


def test_the_first_final_claim_of_a_custom_id_keeps_it(group: Example) -> None:
    polls: list[int] = []

    def two_claims(shown: list[Json]) -> list[Json]:
        polls.append(1)
        [first] = [each for each in shown if each["request"]["metadata"]["custom_id"] == "req-001"]
        early = first | {"id": "early", "state": "In Progress", "response": None}
        late = generation("the late one", id="late")
        rest = [each for each in shown if each is not first]
        if len(polls) == 1:
            return [early, late, *rest[:-1]]
        return [first | {"id": "early"}, late, *rest]

    group.api.alter_list = two_claims
    run = group.run()
    assert run.code == 1
    assert run.final["req-001"]["generation_id"] == "late"
    assert run.final["req-001"]["response"] == "the late one"
    assert [row["generation_id"] for row in run.rows if not row["custom_id"]] == ["early"]


def test_generations_without_ids_are_told_apart_by_what_they_hold(group: Example) -> None:
    group.api.alter_list = lambda shown: [
        *(each | {"id": None} for each in shown),
        generation("another", id=None),
        generation("another", id=None),
    ]
    run = group.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Success"}
    assert [row["response"] for row in run.rows if not row["custom_id"]] == ["another"]


def test_a_poll_of_a_group_is_complete_when_all_that_was_sent_is(group: Example) -> None:
    polls: list[int] = []

    def one_more_each_time(shown: list[Json]) -> list[Json]:
        polls.append(1)
        in_order = sorted(shown, key=lambda each: each["request"]["metadata"]["custom_id"])
        return random.sample(in_order[: len(polls)], len(polls))

    group.api.alter_list = one_more_each_time
    run = group.run()
    assert run.code == 0
    assert len(polls) == 4


def test_a_state_nobody_knows_is_not_final(example: Example) -> None:
    seen: set[str] = set()

    def unknown_once(shown: Json) -> Json:
        is_new = shown["id"] not in seen
        seen.add(shown["id"])
        return shown | {"state": "Success!"} if is_new else shown

    example.api.alter = unknown_once
    assert example.run().code == 0


def test_failed_generations_are_told_with_their_reasons(example: Example) -> None:
    def fail(shown: Json) -> Json:
        if shown["request"]["metadata"]["custom_id"] != "req-003":
            return shown
        return shown | {"state": "Failed", "stateMessage": "out of memory", "response": None}

    example.api.alter = fail
    run = example.run()
    assert run.code == 1
    assert "Failed:         1" in run.stdout
    assert "75.0%" in run.stdout
    row = r"^  req-003    ✗ Failed   Name one planet in our so\.\.\. *\n             out of memory$"
    assert re.search(row, run.stdout, re.M)
    assert run.final["req-003"]["error"] == "out of memory"
    assert "Not complete: 1 failed" in run.stdout
    assert "Generation complete!" not in run.stdout


# The API part, called as copied code calls it


SUBMIT = {SINGLE: "submit_generation", GROUP: "submit_group"}


@both
def test_a_missing_key_is_a_plain_error(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, api: LocalApi
) -> None:
    monkeypatch.setenv("INFERENCE_BASE_URL", api.url)
    monkeypatch.delenv("INFERENCE_API_KEY")
    submit = getattr(module, SUBMIT[f"{module.__name__}.py"])
    with pytest.raises(ValueError, match=r"^set INFERENCE_API_KEY to your key") as error:
        submit(module.Session(), {}, 1)
    assert error.value.__context__ is None
    assert not api.calls


@both
@pytest.mark.parametrize("body", [{}, [], {"model": ""}])
def test_a_submission_is_a_post_whatever_its_body(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, api: LocalApi, body: Any
) -> None:
    for name, value in api.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(module.Refused, match=r"^HTTP 400: "):
        getattr(module, SUBMIT[f"{module.__name__}.py"])(module.Session(), body, 1)
    assert [method for method, _ in api.calls] == ["POST"]


@both
@pytest.mark.parametrize(
    ("given_seconds", "seconds"), [("7", 7), ("120", 120), ("121", 120), ("9" * 30, 120)]
)
def test_a_retry_after_is_obeyed_up_to_two_minutes(
    module: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    api: LocalApi,
    given_seconds: str,
    seconds: float,
) -> None:
    for name, value in api.environment.items():
        monkeypatch.setenv(name, value)
    api.choose_fault = lambda request, sent: status(429, Retry_After=given_seconds)
    fetch = module.fetch_group if module is MODULES[GROUP] else module.fetch_generation
    with pytest.raises(module.NotAccepted, match="Retry-After") as error:
        fetch(module.Session(), "abc", 1)
    assert error.value.retry_after_seconds == seconds
