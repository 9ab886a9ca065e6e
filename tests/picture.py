# /// script
# requires-python = ">=3.10"
# dependencies = ["aiohttp", "pexpect", "pyte", "requests"]
# ///
"""Draw the README's picture: what a terminal shows at the end of a run.

    uv run tests/picture.py             draw .github/answers.svg
    uv run tests/picture.py FILE.svg    draw another file

It runs a script against the local API, in a terminal of its own. Not on Windows.
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
from html import escape
from pathlib import Path

import pexpect
import pyte
from local_api import LocalApi

TOP = Path(__file__).parent.parent
PICTURE = TOP / ".github" / "answers.svg"
SCRIPT = "async_polling_example.py"
COLUMNS = 110
ROWS = 54  # from the last answers down to the end
LETTER_WIDTH = 8
LINE_HEIGHT = 18
MARGIN = 16


def run_in_terminal() -> list[str]:
    """Run the script in a terminal; return the lines that the terminal shows at the end."""
    output = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, LocalApi() as api:
        shutil.copy(TOP / SCRIPT, folder)
        environment = {**os.environ, **api.environment, "PYTHONUTF8": "1"}
        environment.pop("COLUMNS", None)  # it would count for more than the terminal
        script = pexpect.spawn(
            sys.executable,
            [SCRIPT],
            cwd=folder,
            env=environment,
            dimensions=(ROWS, COLUMNS),
            timeout=60,
        )
        script.logfile_read = output
        script.expect(pexpect.EOF)
        script.close()
    if script.exitstatus != 0:
        raise RuntimeError(output.getvalue().decode(errors="replace"))
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.ByteStream(screen).feed(output.getvalue())
    lines = [line.rstrip() for line in screen.display]
    if not lines[-1]:  # the cursor's line
        lines.pop()
    return lines


def draw(lines: list[str]) -> str:
    """Return an SVG picture of lines of text."""
    width = COLUMNS * LETTER_WIDTH + 2 * MARGIN
    height = len(lines) * LINE_HEIGHT + 2 * MARGIN
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#1e1e1e"/>',
        '<g fill="#d8d8d8" font-family="Menlo, Consolas, DejaVu Sans Mono, monospace" '
        'font-size="13.3">',
    ]
    for number, line in enumerate(lines):
        y = MARGIN + number * LINE_HEIGHT + 13
        column = 0
        # Each word has its own place and length: not every font has every letter in one width.
        for word in line.split(" "):
            if word:
                x = MARGIN + column * LETTER_WIDTH
                length = len(word) * LETTER_WIDTH
                drawn.append(
                    f'<text x="{x}" y="{y}" textLength="{length}" '
                    f'lengthAdjust="spacingAndGlyphs">{escape(word)}</text>'
                )
            column += len(word) + 1
    return "\n".join([*drawn, "</g>", "</svg>", ""])


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, default=PICTURE, metavar="FILE.svg")
    options = parser.parse_args()
    options.file.write_text(draw(run_in_terminal()), "utf-8")
    print(f"drawn: {options.file}")


if __name__ == "__main__":
    main()
