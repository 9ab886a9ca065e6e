"""What is found wrong before anything is sent, and the network settings that requests knows."""

import asyncio
import contextlib
import errno
import socket
import ssl
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import API_KEY, SINGLE, TOP, Example, load
from local_api import LocalApi, status

BAD_CONSTANTS: list[tuple[str, Any]] = [
    ("NUM_REQUESTS", 0),
    ("NUM_REQUESTS", -1),
    ("NUM_REQUESTS", "10"),
    ("NUM_REQUESTS", None),
    ("NUM_REQUESTS", 1_000_001),
    ("POLL_INTERVAL_SECONDS", 0),
    ("POLL_INTERVAL_SECONDS", -0.5),
    ("POLL_INTERVAL_SECONDS", "1"),
    ("POLL_INTERVAL_SECONDS", 1e300),
    ("MAX_POLL_ATTEMPTS", 0),
    ("MAX_CONCURRENT_POLLS", 0),
    ("MAX_CONCURRENT_POLLS", -1),
    ("REQUEST_TIMEOUT_SECONDS", 0),
    ("REQUEST_TIMEOUT_SECONDS", -30),
    ("REQUEST_TIMEOUT_SECONDS", None),
    ("REQUEST_TIMEOUT_SECONDS", 10**12),
    ("RESULTS_DIR", "a file/inside"),
    ("RESULTS_DIR", "a file"),
    ("RESULTS_DIR", "no\0name"),
    ("RESULTS_DIR", None),
]
BAD_ENVIRONMENT: list[tuple[str, str | None]] = [
    ("INFERENCE_API_KEY", None),
    ("INFERENCE_API_KEY", ""),
    ("INFERENCE_API_KEY", " \n"),
    ("INFERENCE_API_KEY", "sk-sécret"),
    ("INFERENCE_API_KEY", "sk-sec\nret"),
    ("INFERENCE_API_KEY", "sk-sec\x7fret"),
    ("INFERENCE_API_KEY", "sk-“quoted”"),
    ("INFERENCE_BASE_URL", ""),
    ("INFERENCE_BASE_URL", "api.inference.net/v1"),
    ("INFERENCE_BASE_URL", "ftp://127.0.0.1/v1"),
    ("INFERENCE_BASE_URL", "file:///etc/passwd"),
    ("INFERENCE_BASE_URL", "http://"),
    ("INFERENCE_BASE_URL", "https://"),
    ("INFERENCE_BASE_URL", "https:///v1"),
    ("INFERENCE_BASE_URL", "http://api.inference.net/v1"),
    ("INFERENCE_BASE_URL", "http://10.0.0.1/v1"),
    ("INFERENCE_BASE_URL", "http://127.0.0.1.example.com/v1"),
    ("INFERENCE_BASE_URL", "http://localhost.example.com/v1"),
    ("INFERENCE_BASE_URL", "http://localhost@example.com/v1"),
    ("INFERENCE_BASE_URL", "http://127.0.0.1:80@example.com/v1"),
    ("INFERENCE_BASE_URL", "http://example.com\\@127.0.0.1/v1"),
    ("INFERENCE_BASE_URL", "http://127.0.0.1#@example.com/v1"),
    ("INFERENCE_BASE_URL", "http://127.0.0.1:123456/v1"),
    ("INFERENCE_BASE_URL", "http://127.0.0.1:port/v1"),
    ("INFERENCE_BASE_URL", "http://1270000000/v1"),
    ("INFERENCE_BASE_URL", "http://127...1/v1"),
    ("INFERENCE_BASE_URL", "https://[::1/v1"),
    ("INFERENCE_BASE_URL", "https://api.inference.net/v1?key=1"),
    ("INFERENCE_BASE_URL", "https://user:password@api.inference.net/v1"),
    ("INFERENCE_BASE_URL", "https://api.inference.net /v1"),
]


def check_refused(example: Example, name: str, *arguments: str) -> str:
    """Run it: it names what is wrong in a line, and sends nothing."""
    run = example.run(*arguments)
    assert run.code == 2
    assert run.stdout == ""
    assert name in run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert not example.api.calls
    return run.stderr


@pytest.fixture
def module(single: Example, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The script that submits one by one, imported, in the folder where it runs."""
    monkeypatch.chdir(single.folder)
    for name, value in single.environment.items():
        monkeypatch.setenv(name, str(value))
    return load(single.script, single.folder)


def mistake(module: types.ModuleType) -> str:
    """Do what main does before anything is sent: the mistake that ends it, which is a line."""
    try:
        module.check_configuration()
        module.open_run(None, False)
    except (OSError, ValueError, TypeError) as error:  # what main tells in a line
        text = str(error)
    else:
        pytest.fail("no mistake was found")
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(("name", "value"), BAD_CONSTANTS, ids=map(str, BAD_CONSTANTS))
def test_a_constant_that_makes_no_sense(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    Path("a file").write_text("")
    monkeypatch.setattr(module, name, value)
    error = mistake(module)
    if name.endswith("_SECONDS") and not isinstance(value, (int, float)):
        assert type(value).__name__ in error  # Python's own words
    elif name != "RESULTS_DIR":
        assert "NUM_REQUESTS" in error
        assert repr(value) in error
    elif value not in (None, "no\0name"):
        assert value in error


@pytest.mark.parametrize(
    ("name", "value"),
    [("NUM_REQUESTS", 0), ("RESULTS_DIR", "a file"), ("RESULTS_DIR", None)],
    ids=["ValueError", "OSError", "TypeError"],
)
def test_a_constant_that_makes_no_sense_is_told(single: Example, name: str, value: Any) -> None:
    (single.folder / "a file").write_text("")
    single.edit(**{name: value})
    check_refused(single, "(0, " if value == 0 else value or "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NUM_REQUESTS", 2.5),
        ("NUM_REQUESTS", True),
        ("POLL_INTERVAL_SECONDS", 0.01),
        ("POLL_INTERVAL_SECONDS", True),
        ("MAX_POLL_ATTEMPTS", 40.0),
        ("REQUEST_TIMEOUT_SECONDS", 2.5),
        ("REQUEST_TIMEOUT_SECONDS", 1_000_000),
    ],
)
def test_a_number_of_another_kind_ends_well_or_is_refused(
    example: Example, name: str, value: float
) -> None:
    example.edit(**{name: value})
    run = example.run()
    assert run.code in (0, 2), run.stdout
    assert run.code == 0 or not example.api.calls


@pytest.mark.parametrize("questions", [[], "Why?", ["Why?", 1], [1], None])
def test_questions_that_are_none(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, questions: Any
) -> None:
    monkeypatch.setattr(module, "SAMPLE_QUESTIONS", questions)
    assert "SAMPLE_QUESTIONS" in mistake(module)


METADATA = '"metadata": {"custom_id": custom_id}'
BAD_REQUESTS = {
    "no JSON": ('"max_tokens": 100,', '"max_tokens": {1, 2},'),
    "a list": ("    return {\n", "    return [] and {\n"),
    "nothing": ("    return {\n", "    return None and {\n"),
    "no metadata": (METADATA, '"metadata": None'),
    "no custom id": (METADATA, '"metadata": {}'),
    "another custom id": (METADATA, '"metadata": {"custom_id": "mine-" + custom_id}'),
    "a custom id that is no text": (METADATA, '"metadata": {"custom_id": 7}'),
}


def edit_build_request(example: Example, old: str, new: str) -> None:
    """Edit a line of build_request, as a user does."""
    # Only what is in build_request, which comes before everything else that could match.
    path = example.folder / example.script
    head, build_request, rest = path.read_text("utf-8").partition("def build_request")
    assert old in rest
    path.write_text(head + build_request + rest.replace(old, new, 1), "utf-8")


@pytest.mark.parametrize(("old", "new"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_request_that_makes_no_sense(
    example: Example, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    monkeypatch.setenv("INFERENCE_API_KEY", API_KEY)
    edit_build_request(example, old, new)
    assert "JSON" in mistake(load(example.script, example.folder))


@pytest.mark.parametrize("case", ["no JSON", "no custom id"])
def test_a_request_that_makes_no_sense_is_told(example: Example, case: str) -> None:
    edit_build_request(example, *BAD_REQUESTS[case])
    check_refused(example, "JSON")


def check_names_the_setting(error: str, name: str) -> None:
    """Check that an error says which setting is wrong, and does not show the key."""
    assert name in error
    assert "sec" not in error
    if name == "INFERENCE_API_KEY":
        assert "set INFERENCE_API_KEY" in error
        assert "https://inference.net" in error  # where keys come from


@pytest.mark.parametrize(("name", "value"), BAD_ENVIRONMENT, ids=map(repr, BAD_ENVIRONMENT))
def test_an_environment_that_makes_no_sense(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    read = module.api_key if name == "INFERENCE_API_KEY" else module.base_url
    with pytest.raises(ValueError, match=name) as caught:
        read()
    assert mistake(module) == str(caught.value)
    check_names_the_setting(str(caught.value), name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INFERENCE_API_KEY", None),
        ("INFERENCE_API_KEY", "sk-sec\nret"),
        ("INFERENCE_BASE_URL", "http://api.inference.net/v1"),
    ],
)
def test_an_environment_that_makes_no_sense_is_told(
    single: Example, name: str, value: str | None
) -> None:
    single.environment = single.environment | {name: value}  # type: ignore[dict-item]
    check_names_the_setting(check_refused(single, name), name)


def test_a_group_and_a_resumed_run_need_a_key_as_well(example: Example) -> None:
    example.environment = example.environment | {"INFERENCE_API_KEY": ""}
    check_refused(example, "INFERENCE_API_KEY")
    check_refused(example, "INFERENCE_API_KEY", "--resume")


def test_more_than_a_group_holds(group: Example) -> None:
    group.edit(NUM_REQUESTS=51)
    error = check_refused(group, "NUM_REQUESTS")
    assert "50" in error
    assert SINGLE in error
    group.edit(NUM_REQUESTS=50)
    assert group.run().code == 0


@pytest.mark.parametrize(
    "arguments",
    [["--no-such-option"], ["what.jsonl"], ["--resume", "a", "b"], ["--submit"]],
)
def test_usage_that_is_wrong(example: Example, arguments: list[str]) -> None:
    run = example.run(*arguments)
    assert run.code == 2
    assert "usage:" in run.stderr
    assert not example.api.calls


def test_help_fits_a_screen(example: Example) -> None:
    run = example.run("--help")
    assert run.code == 0
    assert len(run.stdout.splitlines()) <= 24
    assert max(map(len, run.stdout.splitlines())) <= 99
    for word in ("--resume [FILE]", "--submit", "ended run"):
        assert word in run.stdout


@pytest.mark.parametrize("key", [f"  {API_KEY}\n", f"{API_KEY}\r\n", f"\t{API_KEY}"])
def test_white_space_round_the_key_is_stripped(example: Example, key: str) -> None:
    example.environment = example.environment | {"INFERENCE_API_KEY": key}
    assert example.run().code == 0


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_plain_http_to_the_loopback_is_fine(example: Example, host: str) -> None:
    url = f" http://{host}:{example.api.port}/v1/ "
    example.environment = example.environment | {"INFERENCE_BASE_URL": url}
    assert example.run().code == 0


def test_a_proxy_never_sees_what_goes_to_the_loopback(example: Example) -> None:
    proxy = f"http://127.0.0.1:{refused_port()}"
    example.environment |= dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), proxy)
    example.environment |= {"NO_PROXY": "", "no_proxy": ""}
    assert example.run().code == 0


def test_a_netrc_entry_does_not_replace_the_key(example: Example) -> None:
    netrc = example.folder / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    netrc.chmod(0o600)
    example.environment = example.environment | {"NETRC": str(netrc)}
    assert example.run().code == 0


def test_a_redirect_is_not_followed(example: Example) -> None:
    with LocalApi(seconds=(0, 0)) as elsewhere:
        for code in (301, 302, 307, 308):
            url = f"{elsewhere.url}/async/chat/completions"
            example.api.choose_fault = lambda request, sent, c=code, u=url: status(c, Location=u)
            assert example.run().code == 1
        assert not elsewhere.calls


# Failing to connect, and TLS


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


def check_never_sent(example: Example, reason: str, **environment: str) -> None:
    """Run it: nothing was accepted, surely, and the error has this reason in it."""
    example.edit(NUM_REQUESTS=2, REQUEST_TIMEOUT_SECONDS=0.2, MAX_SUBMIT_ATTEMPTS=2)
    example.environment = example.environment | environment
    run = example.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Not sent"}
    assert reason in run.final["req-001"]["error"]
    assert reason in run.stdout
    assert "Not sent:       2" in run.stdout
    assert not example.api.generations


def test_a_connection_that_is_refused(example: Example) -> None:
    host = f"127.0.0.1:{refused_port()}"
    reason = f"ConnectionError at {host}: [Errno {errno.ECONNREFUSED}] Connection refused"
    check_never_sent(example, reason, INFERENCE_BASE_URL=f"http://{host}/v1")


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog times out on Linux only")
def test_a_connection_that_times_out(example: Example) -> None:
    with unanswered_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        check_never_sent(example, f"Timeout at 127.0.0.1:{port}: ", INFERENCE_BASE_URL=url)


def test_a_host_that_is_not_found(example: Example) -> None:
    reason, url = "Error at no-such-host.invalid: ", "https://no-such-host.invalid/v1"
    check_never_sent(example, reason, INFERENCE_BASE_URL=url)


def test_a_port_that_does_not_exist(example: Example) -> None:
    reason, url = "InvalidURL at 127.0.0.1:99999: ", "http://127.0.0.1:99999/v1"
    check_never_sent(example, reason, INFERENCE_BASE_URL=url)


def test_tls_where_there_is_none(example: Example) -> None:
    url = example.api.url.replace("http:", "https:")
    reason = f"SSLError at 127.0.0.1:{example.api.port}: "
    check_never_sent(example, reason, INFERENCE_BASE_URL=url)


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
        example.environment |= {"INFERENCE_BASE_URL": url, "PYTHONPATH": str(example.folder)}
        run = example.run()
    assert run.code == 0, run.stdout
    assert set(run.states.values()) == {"Success"}
    assert example.submissions == (4 if example.script == SINGLE else 1)


@pytest.fixture
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
def tls_example(example: Example, tls_api: LocalApi) -> Example:
    """Each script, led to the API behind TLS, with the system's idea of whom to trust."""
    example.api = tls_api
    example.environment = tls_api.environment | dict.fromkeys(BUNDLES)  # type: ignore[operator]
    return example


def test_a_certificate_that_is_not_trusted(tls_example: Example) -> None:
    run = tls_example.run()
    assert run.code == 1
    assert "certificate verify failed" in run.stdout
    assert set(run.states.values()) == {"Not sent"}
    assert "SSLError" in run.final["req-001"]["error"]
    attempts = [row["custom_id"] for row in run.rows if row["state"] == "Submitting"]
    assert len(attempts) == len(set(attempts))  # none of them is tried again
    assert not tls_example.api.calls


@pytest.mark.parametrize("name", BUNDLES)
def test_a_ca_bundle_of_ones_own(
    tls_example: Example, authority: trustme.CA, name: str, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls_example.environment[name] = str(tmp_path / "ca.pem")
    assert tls_example.run().code == 0


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_a_ca_bundle_that_is_none(
    tls_example: Example, tmp_path: Path, content: bytes | None
) -> None:
    if content:
        (tmp_path / "ca.pem").write_bytes(content)
    tls_example.edit(NUM_REQUESTS=1, MAX_SUBMIT_ATTEMPTS=2)
    tls_example.environment["REQUESTS_CA_BUNDLE"] = str(tmp_path / "ca.pem")
    run = tls_example.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Not sent"}
    error = run.final["req-001"]["error"]
    assert "ca.pem" in error or "SSLError" in error
    assert not tls_example.api.calls


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


def through(example: Example, proxy: str) -> None:
    """Lead the script through a proxy."""
    example.edit(NUM_REQUESTS=2, MAX_SUBMIT_ATTEMPTS=2)
    example.environment |= {"HTTPS_PROXY": proxy, "NO_PROXY": "", "no_proxy": ""}


def test_a_proxy_is_used(tls_example: Example, authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls_example.environment["REQUESTS_CA_BUNDLE"] = str(tmp_path / "ca.pem")
    with Proxy() as proxy:
        through(tls_example, proxy.url)
        assert tls_example.run().code == 0
        assert set(proxy.asked) == {f"127.0.0.1:{tls_example.api.port}"}


def test_a_proxy_that_refuses(tls_example: Example) -> None:
    with Proxy(b"407 Proxy Authentication Required") as proxy:
        through(tls_example, proxy.url)
        run = tls_example.run()
    assert run.code == 1
    assert "407" in run.final["req-001"]["error"]
    assert set(run.states.values()) == {"Not sent"}


@pytest.mark.parametrize(
    "proxy", ["nonsense://proxy", "http://", "http://127.0.0.1:1", "http://[::1", "http://:port"]
)
def test_a_proxy_that_is_none(tls_example: Example, proxy: str) -> None:
    through(tls_example, proxy)
    run = tls_example.run()
    assert run.code == 1
    assert set(run.states.values()) == {"Not sent"}
    assert f" at 127.0.0.1:{tls_example.api.port}: " in run.final["req-001"]["error"]


def test_the_local_api_is_given_a_command_that_is_not_found() -> None:
    command = [sys.executable, str(TOP / "tests" / "local_api.py"), "nosuchcmd"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 127
    assert run.stderr == "local_api.py: command not found: nosuchcmd\n"
