"""What is found wrong before anything is sent, and the network settings that requests knows."""

import asyncio
import contextlib
import re
import socket
import ssl
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import (
    API_KEY,
    GROUP,
    SCRIPTS,
    SINGLE,
    Example,
    faulty,
    in_turn,
    load,
    one_each,
)
from local_api import LocalApi, status

# Mistakes in the configuration, found by main in this process


@pytest.fixture(params=SCRIPTS)
def module(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    api: LocalApi,
    monkeypatch: pytest.MonkeyPatch,
) -> types.ModuleType:
    """Each of the two scripts, imported, in an empty folder and with the local API."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [request.param])
    for name, value in api.environment.items():
        monkeypatch.setenv(name, value)
    return load(request.param)


@pytest.fixture
def find_mistake(
    module: types.ModuleType, api: LocalApi, capsys: pytest.CaptureFixture[str]
) -> Callable[[], str]:
    """Return a function that runs main, which ends before anything is sent and says why."""

    def run_main() -> str:
        with pytest.raises(SystemExit) as ended:
            module.main()
        shown = capsys.readouterr()
        assert ended.value.code == 2
        assert shown.out == ""
        [line] = shown.err.splitlines()
        assert line.startswith(f"{sys.argv[0]}: ")
        assert not api.calls
        assert not Path("results").exists()
        return line

    return run_main


NO_NUMBERS = ["ten", "1", None, 0, -1, float("nan"), float("inf"), 1_000_001]
BAD_CONSTANTS: dict[str, list[Any]] = {
    "NUM_REQUESTS": [*NO_NUMBERS, 2.5],
    "MAX_TOKENS": [*NO_NUMBERS, 2.5],
    "MAX_POLL_ATTEMPTS": [*NO_NUMBERS, 2.5],
    "MAX_CONCURRENT_POLLS": [*NO_NUMBERS, 2.5],
    "POLL_INTERVAL_SECONDS": [*NO_NUMBERS, -0.5],
    "REQUEST_TIMEOUT_SECONDS": [*NO_NUMBERS, -0.5],
}


@pytest.mark.parametrize("name", BAD_CONSTANTS)
def test_a_constant_that_can_not_be_used_is_named_with_its_value(
    find_mistake: Callable[[], str],
    module: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    if name == "MAX_CONCURRENT_POLLS" and module.__name__ == Path(GROUP).stem:
        assert not hasattr(module, name)
        return
    for value in BAD_CONSTANTS[name]:
        monkeypatch.setattr(module, name, value)
        error = find_mistake()
        assert f" {name} must be " in error
        assert error.endswith(f", not {value!r}")


@pytest.mark.parametrize("value", [None, 7, b"results"])
def test_a_folder_that_can_not_be_one_is_told(
    find_mistake: Callable[[], str],
    module: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    value: Any,
) -> None:
    monkeypatch.setattr(module, "RESULTS_DIR", value)
    assert type(value).__name__ in find_mistake()


def test_a_mistake_ends_the_process_with_2(example: Example) -> None:
    example.edit(NUM_REQUESTS="ten")
    run = example.run()
    assert run.code == 2
    assert run.stdout == ""
    assert run.stderr.startswith(f"{example.script}: NUM_REQUESTS must be ")
    assert run.stderr.endswith(", not 'ten'\n")
    assert not (example.folder / "results").exists()


RESULTS_FOLDERS = ["a file", "a file/inside"]
if sys.platform == "linux":  # nobody can make a file there
    RESULTS_FOLDERS += ["/proc", "/proc/inside"]


@pytest.mark.parametrize("folder", RESULTS_FOLDERS)
def test_a_results_folder_that_can_not_be_written_is_named(
    find_mistake: Callable[[], str],
    module: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
) -> None:
    Path("a file").write_text("")
    monkeypatch.setattr(module, "RESULTS_DIR", folder)
    assert str(Path(folder)) in find_mistake().replace("\\\\", "\\")  # Windows shows a repr


BAD_QUESTIONS: list[tuple[Any, list[str]]] = [
    (None, ["load_questions", "None"]),
    ({}, ["load_questions", "{}"]),
    ([], ["load_questions", "[]"]),
    (["Why?"], ["load_questions", "['Why?']"]),
    ("Why?", ["load_questions", "'Why?'"]),
    ({"my-1": "Why?", "my-2": 2}, ["load_questions", "'my-2'", " 2"]),
    ({"my-1": None}, ["load_questions", "'my-1'", "None"]),
    ({"my-1": "Why?", "": "How?"}, ["custom id", " ''"]),
    ({1: "Why?"}, ["custom id", " 1 "]),
    ({None: "Why?"}, ["custom id", " None "]),
]


@pytest.mark.parametrize(
    ("questions", "words"), BAD_QUESTIONS, ids=lambda value: str(value)[:30]
)
def test_questions_that_can_not_be_asked(
    find_mistake: Callable[[], str],
    module: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    questions: Any,
    words: list[str],
) -> None:
    monkeypatch.setattr(module, "load_questions", lambda: questions)
    error = find_mistake()
    for word in words:
        assert word in error


REPEATED = {"metadata": {"custom_id": "req-001"}}
BAD_REQUESTS: dict[str, tuple[Any, list[str]]] = {
    "nothing": (None, ["metadata.custom_id", "'req-001'"]),
    "a list": ([REPEATED], ["metadata.custom_id", "'req-001'"]),
    "no metadata": ({"model": "a"}, ["metadata.custom_id", "'req-001'"]),
    "metadata that is nothing": ({"metadata": None}, ["metadata.custom_id", "'req-001'"]),
    "no custom id": ({"metadata": {}}, ["metadata.custom_id", "'req-001'"]),
    "another custom id": ({"metadata": {"custom_id": "mine"}}, ["'req-001'", "'mine'"]),
    "a custom id that is no text": ({"metadata": {"custom_id": 1}}, ["'req-001'"]),
    "a set, which JSON does not have": (REPEATED | {"stop": {"."}}, ["JSON"]),
    "not a number, which JSON does not have": (
        REPEATED | {"top_p": float("nan")},
        ["JSON"],
    ),
}


@pytest.mark.parametrize(("body", "words"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_request_that_can_not_be_sent(
    find_mistake: Callable[[], str],
    module: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    body: Any,
    words: list[str],
) -> None:
    monkeypatch.setattr(module, "NUM_REQUESTS", 1)
    monkeypatch.setattr(module, "build_request", lambda custom_id, question: body)
    error = find_mistake()
    for word in words:
        assert word in error


def test_more_than_a_group_holds(group: Example) -> None:
    group.edit(NUM_REQUESTS=51)
    run = group.run()
    assert run.code == 2
    for word in ("51", "50", "NUM_REQUESTS", SINGLE):
        assert word in run.stderr
    assert not group.api.calls
    assert not (group.folder / "results").exists()  # nothing is left to be resumed
    group.edit(NUM_REQUESTS=50)
    assert group.run().code == 0


# The environment

BAD_KEYS = [None, "", " \n", "secrét", "sec\nret", "sec\x7fret", "“secret”", "my secret"]
BAD_URLS = [
    "secret.example.com/v1",
    "ftp://secret/v1",
    "file:///etc/secret",
    "http://",
    "https://",
    "https:///secret",
    "http://secret.example.com/v1",
    "http://10.0.0.1/secret",
    "http://127.0.0.1.secret.com/v1",
    "http://localhost.secret.com/v1",
    "http://localhost@secret.com/v1",
    "http://127.0.0.1:80@secret.com/v1",
    "http://secret.com\\@127.0.0.1/v1",
    "http://127.0.0.1#@secret.com/v1",
    "http://127.0.0.1:secret/v1",
    "http://1270000000/secret",
    "http://127...1/secret",
    "https://[::1/secret",
    "https://example.com/v1?api_key=secret",
    "https://example.com/v1#secret",
    "https://user:secret@example.com/v1",
    "https://secret .example.com/v1",
    "https://example.com/v1\nsecret",
    "the-secret-key-that-belongs-into-the-other-variable",
]


def test_a_key_that_can_not_be_used_is_not_shown(
    find_mistake: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in BAD_KEYS:
        monkeypatch.setenv("INFERENCE_API_KEY", key or "")
        if key is None:
            monkeypatch.delenv("INFERENCE_API_KEY")
        error = find_mistake()
        assert "sec" not in error, key
        assert "set INFERENCE_API_KEY" in error
        assert "https://inference.net" in error  # where keys come from


def test_an_address_that_can_not_be_used_is_not_shown(
    find_mistake: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in BAD_URLS:
        monkeypatch.setenv("INFERENCE_BASE_URL", url)
        error = find_mistake()
        assert "sec" not in error, url
        assert "INFERENCE_BASE_URL" in error
        assert "https://api.inference.net/v1" in error


def test_the_two_variables_swapped_do_not_show_the_key(
    find_mistake: Callable[[], str], api: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCE_API_KEY", api.url)
    monkeypatch.setenv("INFERENCE_BASE_URL", API_KEY)
    error = find_mistake()
    assert "INFERENCE_BASE_URL" in error
    assert API_KEY not in error


def test_a_resumed_run_needs_a_key_as_well(
    find_mistake: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INFERENCE_API_KEY")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    assert "INFERENCE_API_KEY" in find_mistake()


@pytest.mark.parametrize("value", [None, ""])
def test_without_an_address_it_is_the_usual_one(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.setenv("INFERENCE_BASE_URL", value or "")
    if value is None:
        monkeypatch.delenv("INFERENCE_BASE_URL")
    assert module.Client().base_url == "https://api.inference.net/v1"


def test_arguments_replace_the_environment(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = module.Client("another", "https://example.com/v2/")
    assert (client.api_key, client.base_url) == ("another", "https://example.com/v2")
    for name in ("INFERENCE_API_KEY", "INFERENCE_BASE_URL"):
        monkeypatch.delenv(name)
    assert module.Client("another").api_key == "another"
    with pytest.raises(ValueError, match="INFERENCE_API_KEY"):
        module.Client("")


@pytest.mark.parametrize("key", [f"  {API_KEY}\n", f"{API_KEY}\r\n", f"\t{API_KEY}"])
def test_white_space_round_the_key_is_stripped(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("INFERENCE_API_KEY", key)
    assert module.Client().api_key == API_KEY


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_plain_http_to_this_machine_is_fine(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("INFERENCE_BASE_URL", f" http://{host}:8000/v1/ ")
    assert module.Client().base_url == f"http://{host}:8000/v1"


def test_settings_that_are_fine(example: Example, tmp_path: Path) -> None:
    example.edit(
        RESULTS_DIR="~/kept/here", POLL_INTERVAL_SECONDS=0.01, MAX_POLL_ATTEMPTS=1_000_000
    )
    example.edit(REQUEST_TIMEOUT_SECONDS=2.5, MAX_TOKENS=1_000_000)
    home = tmp_path / "home"
    home.mkdir()
    example.environment = example.environment | {
        "HOME": str(home),
        "USERPROFILE": str(home),
        "INFERENCE_API_KEY": f" {API_KEY}\n",
        "INFERENCE_BASE_URL": f" http://localhost:{example.api.port}/v1/ ",
    }
    assert example.run().code == 0
    assert sorted(path.suffix for path in home.glob("kept/here/async-*")) == [
        ".db",
        ".jsonl",
    ]
    assert not (example.folder / "~").exists()


def test_an_address_without_v1_is_named(example: Example) -> None:
    url = example.api.url.removesuffix("/v1")
    example.environment = example.environment | {"INFERENCE_BASE_URL": url}
    run = example.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Failed"}
    for row in run.rows:
        assert row["error"].startswith("HTTP 404: ")
        assert "INFERENCE_BASE_URL" in row["error"]
    assert "INFERENCE_BASE_URL" in run.stdout
    assert not example.api.generations


# The command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-option"],
        ["a.db"],
        ["--resume", "a", "b"],
        ["--submit"],
        ["--submit=a"],
    ],
    ids=" ".join,
)
def test_usage_that_is_wrong(
    module: types.ModuleType,
    api: LocalApi,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")
    assert not api.calls
    assert not Path("results").exists()


def test_help_fits_a_screen(example: Example) -> None:
    example.environment = example.environment | {
        "COLUMNS": "80",
        "INFERENCE_API_KEY": "",  # help is there before a key is
    }
    run = example.run("--help")
    assert run.code == 0
    lines = run.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    text = " ".join(run.stdout.split())
    for words in (
        "--resume [FILE]",
        "--submit",
        "INFERENCE_API_KEY",
        "INFERENCE_BASE_URL",
    ):
        assert words in text
    assert re.search(r"without FILE\b.*\bnewest\b.*\bpending\b", text)


# What requests would do on its own


def test_a_netrc_entry_does_not_replace_the_key(example: Example) -> None:
    netrc = example.folder / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    netrc.chmod(0o600)
    example.environment = example.environment | {"NETRC": str(netrc)}
    assert example.run().code == 0


@pytest.mark.parametrize("polls", [False, True], ids=["submissions", "polls"])
def test_a_redirect_is_not_followed(example: Example, polls: bool) -> None:
    path = "generation/elsewhere" if polls else "async/chat/completions"
    example.edit(MAX_POLL_ATTEMPTS=5)
    with LocalApi(seconds=(0, 0)) as elsewhere:
        url = f"{elsewhere.url}/{path}"
        faults = [status(code, Location=url) for code in (301, 302, 307, 308)]
        if example.script == SINGLE:
            example.api.choose_fault = one_each(example.api, faults, polls)
        elif polls:
            example.api.choose_fault = in_turn([*faults, faults[0]])
        else:
            example.api.choose_fault = faulty(faults[2], polls)
        run = example.run()
        assert run.code == 1
        assert set(run.states.values()) == ({"Queued"} if polls else {"Failed"})
        assert not elsewhere.calls


# Connections that fail, TLS and proxies, mostly in this process

Outcome = tuple[str, str | None]


def refused_port() -> int:
    """Return a port of the loopback interface where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def unanswered_port() -> Iterator[int]:
    """A port whose backlog is full, so that connecting to it times out."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def submit_one(module: types.ModuleType, timeout_seconds: float = 5) -> Outcome:
    """Submit a request where the environment leads; return its state and its error."""
    client = module.Client(timeout_seconds=timeout_seconds)
    record = module.new_record("my-1", "Why?")
    with (
        ThreadPoolExecutor(1) as pool,
        contextlib.suppress(module.NotAccepted, module.LockedOut),
    ):
        list(module.submit_all(client, pool, [record], lambda records: None))
    return record.state, record.error


@pytest.fixture
def impatient(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Each of the two scripts, with one attempt for a submission, so that nothing is waited for."""
    monkeypatch.setattr(module, "MAX_SUBMIT_ATTEMPTS", 1)
    return module


def test_a_connection_that_is_refused(example: Example) -> None:
    example.edit(NUM_REQUESTS=2, MAX_SUBMIT_ATTEMPTS=2)
    host = f"127.0.0.1:{refused_port()}"
    example.environment = example.environment | {"INFERENCE_BASE_URL": f"http://{host}/v1"}
    run = example.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Not sent"}
    error = run.final["req-001"]["error"]
    assert "refused" in error
    assert error.endswith(f" (ConnectionError at {host})")
    assert error in " ".join(run.stdout.split())  # it may be wrapped
    assert "\n      Not sent:       2\n" in run.stdout
    assert " --submit\n" in run.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog times out on Linux only")
def test_a_connection_that_times_out(
    impatient: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unanswered_port() as port:
        monkeypatch.setenv("INFERENCE_BASE_URL", f"http://127.0.0.1:{port}/v1")
        state, error = submit_one(impatient, timeout_seconds=0.2)
    assert (state, error) == (
        "Not sent",
        f"timed out (ConnectTimeout at 127.0.0.1:{port})",
    )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://no-such-host.invalid/v1", " (ConnectionError at no-such-host.invalid)"),
        ("https://127.0.0.1:99999/v1", " (InvalidURL at 127.0.0.1:99999)"),
        ("http://127.0.0.1:123456/v1", " (InvalidURL at 127.0.0.1:123456)"),
        ("https://127...1/v1", " at 127...1)"),
    ],
)
def test_an_address_that_leads_nowhere(
    impatient: types.ModuleType, monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    monkeypatch.setenv("INFERENCE_BASE_URL", url)
    state, error = submit_one(impatient)
    assert state == "Not sent"
    assert error
    assert error.endswith(reason)


def test_tls_where_there_is_none(
    impatient: types.ModuleType, api: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCE_BASE_URL", api.url.replace("http:", "https:"))
    state, error = submit_one(impatient)
    assert state == "Not sent"
    assert error
    assert error.endswith(f" (SSLError at 127.0.0.1:{api.port})")


# A name that has three addresses, of which the last is good, for want of a name server.
THREE_ADDRESSES = """
import socket
ports = {ports}
def getaddrinfo(*_):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
socket.getaddrinfo = getaddrinfo
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog times out on Linux only")
def test_two_dead_addresses_before_a_good_one(example: Example) -> None:
    with unanswered_port() as first, unanswered_port() as second:
        text = THREE_ADDRESSES.format(ports=(first, second, example.api.port))
        (example.folder / "sitecustomize.py").write_text(text)
        url = f"http://localhost:{example.api.port}/v1"
        example.environment |= {
            "INFERENCE_BASE_URL": url,
            "PYTHONPATH": str(example.folder),
        }
        run = example.run()
    assert run.code == 0, run.stdout
    assert set(run.states.values()) == {"Success"}
    assert example.submissions == (4 if example.script == SINGLE else 1)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority that nobody knows."""
    return trustme.CA()


@pytest.fixture
def tls_api(authority: trustme.CA) -> Iterator[LocalApi]:
    """The local API behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with LocalApi(seconds=(0, 0), tls=context) as local_api:
        yield local_api


BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.fixture
def tls_module(
    impatient: types.ModuleType, tls_api: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> types.ModuleType:
    """Each script, led to the API behind TLS, with the system's idea of whom to trust."""
    monkeypatch.setenv("INFERENCE_BASE_URL", tls_api.url)
    for name in BUNDLES:
        monkeypatch.delenv(name, raising=False)
    return impatient


def test_a_certificate_that_is_not_trusted(example: Example, tls_api: LocalApi) -> None:
    example.api = tls_api
    example.environment = tls_api.environment | dict.fromkeys(BUNDLES)  # type: ignore[operator]
    run = example.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Not sent"}
    assert f" (SSLError at 127.0.0.1:{tls_api.port})" in run.final["req-001"]["error"]
    assert "certificate verify failed" in " ".join(run.stdout.split())
    assert len(tls_api.connections) == 0
    assert not tls_api.calls


@pytest.mark.parametrize("name", BUNDLES)
def test_a_ca_bundle_of_ones_own(
    tls_module: types.ModuleType,
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    authority.cert_pem.write_to_path("ca.pem")
    monkeypatch.setenv(name, str(Path("ca.pem").absolute()))
    assert submit_one(tls_module) == ("Queued", None)


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_a_ca_bundle_that_is_none(
    tls_module: types.ModuleType,
    tls_api: LocalApi,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
) -> None:
    if content:
        Path("ca.pem").write_bytes(content)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(Path("ca.pem").absolute()))
    state, error = submit_one(tls_module)
    assert state == "Not sent"
    assert error
    assert "ca.pem" in error or "SSLError" in error
    assert not tls_api.calls


class Proxy:
    """A proxy on the loopback interface that tunnels, or refuses to."""

    def __init__(self, answer: bytes = b"200 OK") -> None:
        self.answer = answer
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head.split()[1])
        writer.write(b"HTTP/1.1 " + self.answer + b"\r\n\r\n")
        if not self.answer.startswith(b"200"):
            writer.close()
            return
        host, port = self.asked[-1].split(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(self.pipe(reader, far_writer), self.pipe(far_reader, writer))

    async def pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction."""
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    def __enter__(self) -> "Proxy":
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        starting = asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.server = asyncio.run_coroutine_threadsafe(starting, self.loop).result()
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture
def set_proxy(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that leads what is https through a proxy."""

    def set_variables(proxy: str) -> None:
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "")

    return set_variables


def test_a_proxy_is_used(
    tls_module: types.ModuleType,
    tls_api: LocalApi,
    authority: trustme.CA,
    set_proxy: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority.cert_pem.write_to_path("ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(Path("ca.pem").absolute()))
    with Proxy() as proxy:
        set_proxy(proxy.url)
        assert submit_one(tls_module) == ("Queued", None)
        assert proxy.asked == [f"127.0.0.1:{tls_api.port}"]


def test_a_proxy_that_refuses(
    tls_module: types.ModuleType, tls_api: LocalApi, set_proxy: Callable[[str], None]
) -> None:
    with Proxy(b"407 Proxy Authentication Required") as proxy:
        set_proxy(proxy.url)
        state, error = submit_one(tls_module)
    assert state == "Not sent"
    assert error
    assert "407" in error
    assert not tls_api.calls


@pytest.mark.parametrize(
    "proxy",
    ["nonsense://proxy", "http://", "http://127.0.0.1:1", "http://[::1", "http://:port"],
)
def test_a_proxy_that_is_none(
    tls_module: types.ModuleType,
    tls_api: LocalApi,
    set_proxy: Callable[[str], None],
    proxy: str,
) -> None:
    set_proxy(proxy)
    state, error = submit_one(tls_module)
    assert state == "Not sent"
    assert error
    assert error.endswith(f" at 127.0.0.1:{tls_api.port})")
    assert not tls_api.calls
