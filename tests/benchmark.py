# /// script
# requires-python = ">=3.10"
# dependencies = ["aiohttp", "requests"]
# ///
"""How fast the examples are, and how many connections and how much memory they take.

    uv run tests/benchmark.py           every workload, some minutes
    uv run tests/benchmark.py --short   counts only, on small workloads: what CI runs

It runs on Linux. The scripts run unchanged but for the constants at their top, as processes,
against the local API in a process of its own. Each side has a processor core of its own: on an
idle machine, threads that move between cores cost more than the work does, and the figures vary
twofold. Where no client could do better than some figure, that is called a floor; the bare loop
is only a reference. The exit code is 1 if a count is not as it should be; without --short, also
if another figure is not reached.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import requests
from local_api import LocalApi

TOP = Path(__file__).parent.parent
SINGLE, GROUP = "async_polling_example.py", "async_group_example.py"
CORES = sorted(os.sched_getaffinity(0))
CLIENT_CORES, SERVER_CORES = CORES[:1], CORES[1:] or CORES
verdicts: list[bool] = []


def report(workload: str, what: str, figure: str, wanted: str, is_reached: bool) -> None:
    """Print a row of the table, and keep its verdict."""
    verdicts.append(is_reached)
    verdict = "reached" if is_reached else "MISSED"
    print(f"| {workload} | {what} | {figure} | {wanted} | {verdict} |", flush=True)


class StragglersApi(LocalApi):
    """The first five generations take ten seconds; tells when each one's end was read."""

    def __init__(self, slow_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self.slow_seconds = slow_seconds
        self.read_after: dict[str, float] = {}

    def accept(self, request: Any, position: int = 0) -> Any:
        """Accept as ever, but make the first five slow."""
        usual = self.seconds
        if len(self.generations) < 5:
            self.seconds = (self.slow_seconds, self.slow_seconds)
        generation = super().accept(request, position)
        self.seconds = usual
        return generation

    def show(self, generation: Any) -> Any:
        """Note how long after its end a generation is first read."""
        shown = super().show(generation)
        if shown["state"] == "Success" and generation.id not in self.read_after:
            late = datetime.now(timezone.utc) - generation.finished
            self.read_after[generation.id] = late.total_seconds()
        return shown


def serve(kind: type[LocalApi], options: dict[str, Any], pipe: Connection) -> None:
    """Serve until told to stop, and then tell what was seen."""
    os.sched_setaffinity(0, SERVER_CORES)
    moments: list[float] = []
    with kind(**options) as api:

        def note(request: Any, body: Any) -> None:
            moments.append(time.monotonic())

        api.choose_fault = note
        pipe.send(api.environment)
        pipe.recv()
        made = api.generations.values()
        seen: dict[str, Any] = {
            "connections": len(api.connections),
            "calls": len(api.calls),
            "seconds": moments[-1] - moments[0] if moments else 0,
            "last": moments[-1] if moments else 0,
            "made again": api.made_again(),
            "read after": list(getattr(api, "read_after", {}).values()),
            "last end": max(
                (generation.finished.timestamp() for generation in made), default=0
            ),
        }
        pipe.send(seen)


class Served:
    """A local API in a process of its own."""

    def __init__(self, kind: type[LocalApi] = LocalApi, **options: Any) -> None:
        context = get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=serve, args=(kind, options, far), daemon=True)
        self.process.start()
        self.environment: dict[str, str] = self.pipe.recv()

    def stop(self) -> dict[str, Any]:
        """End it, and return what it has seen."""
        self.pipe.send("stop")
        seen: dict[str, Any] = self.pipe.recv()
        self.process.join()
        return seen


def run(script: str, environment: dict[str, str], **constants: Any) -> dict[str, Any]:
    """Run a script with edited constants; return its seconds, its CPU seconds and its memory."""
    with tempfile.TemporaryDirectory() as folder:
        text = (TOP / script).read_text("utf-8")
        for name, value in constants.items():
            text = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.M)
        (Path(folder) / script).write_text(text, "utf-8")
        # The child reports on itself at its end, so it calls main itself: the script would leave by
        # os._exit. Its peak memory is not taken from getrusage, which on Linux begins with what
        # the parent had.
        code = (
            "import re, resource, runpy, sys\n"
            f"sys.argv = [{script!r}]\n"
            f"exit_code = runpy.run_path({script!r})['main']()\n"
            "used = resource.getrusage(resource.RUSAGE_SELF)\n"
            "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
            "print(used.ru_utime + used.ru_stime, peak, file=sys.stderr)\n"
            "sys.exit(exit_code)\n"
        )
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - started
        ended = time.time()
        assert done.returncode == 0, done.stdout + done.stderr
        cpu_seconds, memory = done.stderr.split()
        results = next(Path(folder).glob("results/*.jsonl")).read_text("utf-8")
        answered = [row for row in map(json.loads, results.splitlines()) if row["response"]]
    return {
        "seconds": seconds,
        "ended": ended,
        "cpu": float(cpu_seconds),
        "bytes": int(memory) * 1024,
        "answered": len(answered),
    }


def far_away(count: int, is_short: bool) -> None:
    """Every call takes 50 ms, every new connection 100 ms more; nothing else takes time."""
    served = Served(seconds=(0, 0), delay_seconds=0.05, connect_seconds=0.1)
    used = run(SINGLE, served.environment, NUM_REQUESTS=count, MAX_CONCURRENT_POLLS=5)
    seen = served.stop()
    floor = 2 * count * 0.05 / 5
    what = f"{count} requests, 5 workers: seconds (floor {floor:.1f})"
    ratio = used["seconds"] / floor
    if not is_short:
        report(
            "Far away",
            what,
            f"{used['seconds']:.2f}",
            f"<= {1.35 * floor:.1f}",
            ratio <= 1.35,
        )
    report(
        "Far away",
        "calls",
        f"{seen['calls']}",
        f"{2 * count}",
        seen["calls"] == 2 * count,
    )


def stragglers() -> None:
    """Five generations that take long, the first ones, delay no other."""
    served = Served(StragglersApi, slow_seconds=10, seconds=(0.5, 3), delay_seconds=0.02)
    used = run(SINGLE, served.environment, NUM_REQUESTS=100, POLL_INTERVAL_SECONDS=1)
    seen = served.stop()
    median = statistics.median(seen["read after"])
    report(
        "Stragglers",
        "median seconds from a generation's end to its being read, polled every second",
        f"{median:.2f}",
        "<= 0.75",
        median <= 0.75,
    )
    late = used["ended"] - seen["last end"]
    report(
        "Stragglers",
        "seconds from the last end to the end of the script",
        f"{late:.2f}",
        "<= 1.5",
        late <= 1.5,
    )


def connections(count: int) -> None:
    """No more connections than workers; one for a group."""
    for script, most, number in ((SINGLE, 5, count), (GROUP, 1, 50)):
        served = Served(seconds=(0, 1))
        used = run(script, served.environment, NUM_REQUESTS=number, POLL_INTERVAL_SECONDS=0.2)
        seen = served.stop()
        report(
            "Connections",
            script,
            f"{seen['connections']}",
            f"<= {most}",
            seen["connections"] <= most,
        )
        again = seen["made again"] + number - used["answered"]
        report("Connections", f"{script}: lost or made again", f"{again}", "0", again == 0)


def bare_rate(count: int) -> float:
    """Return the calls per second of a bare loop over one Session: one at a time, no records."""
    served = Served(seconds=(0, 0))
    url = served.environment["INFERENCE_BASE_URL"]
    chat = {
        "model": "inference-net/load-test",
        "messages": [{"role": "user", "content": "What is 2 + 2?"}],
        "max_tokens": 100,
    }
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {served.environment['INFERENCE_API_KEY']}"
        ids = []
        for number in range(count):
            request = {**chat, "metadata": {"custom_id": str(number)}}
            answer = session.post(f"{url}/async/chat/completions", json=request, timeout=30)
            ids.append(answer.json()["id"])
        for generation_id in ids:
            session.get(f"{url}/generation/{generation_id}", timeout=30).json()
    seen = served.stop()
    return float((seen["calls"] - 1) / seen["seconds"])


def many() -> None:
    """A thousand requests as fast as they go; ten thousand in proportion."""
    bare = statistics.median(bare_rate(1000) for _ in range(3))
    sizes: dict[int, dict[str, Any]] = {}
    rates: dict[int, float] = {}
    for count, workers in ((1000, 5), (100, 32), (1000, 32), (10_000, 32)):
        served = Served(seconds=(0, 0))
        sizes[count] = run(
            SINGLE, served.environment, NUM_REQUESTS=count, MAX_CONCURRENT_POLLS=workers
        )
        seen = served.stop()
        rates[count] = (seen["calls"] - 1) / seen["seconds"]
        if workers == 5:
            ratio = rates[count] / bare
            what = f"calls per second, 1,000 requests (a bare loop: {bare:.0f})"
            report("Many", what, f"{rates[count]:.0f}", f">= {0.9 * bare:.0f}", ratio >= 0.9)
    growth = (sizes[10_000]["bytes"] - sizes[100]["bytes"]) / 2**20
    what = "MB that 10,000 requests take more than 100"
    report("Many", what, f"{growth:.0f}", "<= 60", growth <= 60)
    each = rates[1000] / rates[10_000]
    report(
        "Many",
        "time per call, 10,000 to 1,000 requests",
        f"{each:.2f}",
        "<= 1.2",
        each <= 1.2,
    )


def idle() -> None:
    """Waiting costs next to nothing."""
    used: dict[float, dict[str, Any]] = {}
    for script in (SINGLE, GROUP):
        for seconds in (1, 21):
            served = Served(seconds=(seconds, seconds))
            used[seconds] = run(
                script, served.environment, POLL_INTERVAL_SECONDS=seconds + 0.5
            )
            served.stop()
        waited = used[21]["seconds"] - used[1]["seconds"]
        share = 100 * (used[21]["cpu"] - used[1]["cpu"]) / waited
        report("Idle", f"{script}: % of a core", f"{max(share, 0):.2f}", "< 2", share < 2)


def main() -> int:
    """Run the workloads, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help="small workloads, counts alone judged"
    )
    is_short = parser.parse_args().short
    os.sched_setaffinity(0, CLIENT_CORES)
    print(
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {datetime.now():%Y-%m-%d}\n"
    )
    print("| workload | what | figure | to reach | |\n|---|---|---|---|---|")
    connections(30 if is_short else 200)
    far_away(20 if is_short else 100, is_short)
    if not is_short:
        stragglers()
        many()
        idle()
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
