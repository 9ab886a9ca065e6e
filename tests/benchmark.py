# /// script
# requires-python = ">=3.10"
# dependencies = ["aiohttp", "requests"]
# ///
"""How fast the examples are, and how many connections and how much memory they take.

    uv run tests/benchmark.py           every workload, some minutes
    uv run tests/benchmark.py --short   counts only, on small workloads: what CI runs

It runs on Linux. Of the scripts only constants are changed. They and the local API have a
processor core each: threads that move between cores make the figures vary twofold. No client
can do better than what is called a floor. The exit code is 1 if a figure is not reached.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
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


def report(workload: str, what: str, figure: float, most: float) -> None:
    """Print a row of the table, and keep its verdict."""
    verdicts.append(figure <= most)
    verdict = "reached" if figure <= most else "MISSED"
    print(f"| {workload} | {what} | {figure:.5g} | {most:.5g} | {verdict} |", flush=True)


class StragglersApi(LocalApi):
    """The first five generations take ten seconds; lags has how late each end was read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lags: dict[str, float] = {}

    def accept(self, request: Any, position: int = 0) -> Any:
        """Accept as ever, but make the first five slow."""
        self.seconds = (10, 10) if len(self.generations) < 5 else (0.5, 3)
        return super().accept(request, position)

    def show(self, generation: Any) -> Any:
        """Note how long after its end a generation is first read."""
        shown = super().show(generation)
        if shown["state"] == "Success":
            late = datetime.now(timezone.utc) - generation.finished
            self.lags.setdefault(generation.id, late.total_seconds())
        return shown


def serve(kind: type[LocalApi], options: dict[str, Any], pipe: Connection) -> None:
    """Serve until told to stop, and then tell what was seen."""
    os.sched_setaffinity(0, SERVER_CORES)
    moments: list[tuple[str, float]] = []  # the method and the time of each call
    with kind(**options) as api:
        api.choose_fault = lambda call, _: moments.append((call.method, time.monotonic()))
        pipe.send(api.environment)
        pipe.recv()
        submissions = [moment for method, moment in moments if method == "POST"]
        seen: dict[str, Any] = {
            "connections": len(api.connections),
            "calls": len(moments),
            "called in": moments[-1][1] - moments[0][1],
            "submissions": len(submissions),
            "submitted in": submissions[-1] - submissions[0],
            "made again": api.made_again(),
            "lags": list(getattr(api, "lags", {}).values()),
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


# The script would leave by os._exit, so main is called here, and the process reports on itself.
# Its peak memory is not taken from getrusage, which on Linux begins with what the parent had.
RUN = """
import re, runpy, sys
sys.argv = [{script!r}]
exit_code = runpy.run_path({script!r})["main"]()
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(exit_code)
"""


def run(script: str, served: Served, **constants: Any) -> dict[str, Any]:
    """Run a script with edited constants; return what was seen, its seconds and its memory."""
    with tempfile.TemporaryDirectory() as folder:
        text = (TOP / script).read_text("utf-8")
        for name, value in constants.items():
            text = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.M)
        Path(folder, script).write_text(text, "utf-8")
        command = [sys.executable, "-c", RUN.format(script=script)]
        env = {**os.environ, **served.environment}
        started = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        seconds = time.monotonic() - started
        seen = served.stop()
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        lines = next(Path(folder).glob("results/*.jsonl")).read_text("utf-8").splitlines()
        answered = sum(json.loads(line)["answer"] is not None for line in lines)
    lost = constants["NUM_REQUESTS"] - answered
    megabytes = int(done.stderr) / 1024
    return seen | {"seconds": seconds, "megabytes": megabytes, "lost": lost}


def far_away(count: int, is_short: bool) -> None:
    """Every call takes 50 ms, every new connection 100 ms more; nothing else takes time."""
    served = Served(seconds=(0, 0), delay_seconds=0.05, connect_seconds=0.1)
    used = run(SINGLE, served, NUM_REQUESTS=count, MAX_CONCURRENT_POLLS=5)
    floor = 2 * count * 0.05 / 5
    report("Far away", "calls", used["calls"], 2 * count)
    if not is_short:
        what = f"{count} requests, 5 workers: seconds (the floor is {floor:.1f})"
        report("Far away", what, used["seconds"], 1.35 * floor)


def connections(count: int) -> None:
    """No more connections than workers; one for groups."""
    for script, most in ((SINGLE, 5), (GROUP, 1)):
        served = Served(seconds=(0, 1))
        used = run(script, served, NUM_REQUESTS=count, POLL_INTERVAL_SECONDS=0.2)
        wrong = used["lost"] + used["made again"]
        report("Connections", f"{script}: connections", used["connections"], most)
        report("Connections", f"{script}: lost or made twice", wrong, 0)


def limited(count: int, workers: int, rate: int, burst: int, times: float | None) -> None:
    """The API takes so many submissions a second, and turns away what is more."""
    served = Served(seconds=(0, 0), rate=rate, burst=burst, retry_after="1")
    used = run(SINGLE, served, NUM_REQUESTS=count, MAX_CONCURRENT_POLLS=workers)
    what = f"{count} requests, {rate} a second"
    report("Limited", f"{what}: lost or made twice", used["lost"] + used["made again"], 0)
    report("Limited", f"{what}: submissions of each", used["submissions"] / count, 8)
    if times:
        ideal = (count - burst) / rate
        what += f": seconds to submit (ideally {ideal:.1f})"
        report("Limited", what, used["submitted in"], times * ideal)


def stragglers() -> None:
    """Five generations that take long, the first ones, delay no other."""
    served = Served(StragglersApi, delay_seconds=0.02)
    used = run(SINGLE, served, NUM_REQUESTS=100, POLL_INTERVAL_SECONDS=1)
    what = "median seconds from a generation's end to its being read, polled every second"
    report("Stragglers", what, statistics.median(used["lags"]), 0.6)


def bare_rate(count: int) -> float:
    """Return the calls per second of a bare loop over one Session: one at a time, no records."""
    served = Served(seconds=(0, 0))
    url = served.environment["INFERENCE_BASE_URL"]
    message = {"role": "user", "content": "What is 2 + 2?"}
    chat = {"model": "inference-net/load-test", "messages": [message], "max_tokens": 100}
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
    return float(seen["calls"] / seen["called in"])


def many() -> None:
    """A thousand requests as fast as they go; ten thousand in proportion."""
    bare = statistics.median(bare_rate(1000) for _ in range(3))
    used: dict[int, dict[str, Any]] = {}
    rates: dict[int, float] = {}
    for count, workers in ((1000, 5), (100, 32), (1000, 32), (10_000, 32)):
        served = Served(seconds=(0, 0))
        used[count] = run(SINGLE, served, NUM_REQUESTS=count, MAX_CONCURRENT_POLLS=workers)
        rates[count] = used[count]["calls"] / used[count]["called in"]
        if workers == 5:
            what = f"1,000 requests: time per call, compared to a bare loop ({bare:.0f} a second)"
            report("Many", what, bare / rates[count], 1 / 0.55)
    what = "10,000 requests: time per call, compared to 1,000"
    report("Many", what, rates[1000] / rates[10_000], 1.2)
    growth = used[10_000]["megabytes"] - used[100]["megabytes"]
    report("Many", "10,000 requests: MB more than for 100", growth, 60)


def main() -> int:
    """Run the workloads, and return the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="counts only, small workloads")
    is_short = parser.parse_args().short
    os.sched_setaffinity(0, CLIENT_CORES)
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {datetime.now():%F}\n")
    print("| workload | what | figure | at most | |\n|---|---|---|---|---|")
    connections(30 if is_short else 200)
    far_away(20 if is_short else 100, is_short)
    if is_short:
        limited(count=16, workers=5, rate=10, burst=4, times=None)
    else:
        limited(count=60, workers=5, rate=4, burst=1, times=4.5)
        limited(count=200, workers=20, rate=20, burst=10, times=2.5)
        stragglers()
        many()
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
