# /// script
# requires-python = ">=3.10"
# dependencies = ["aiohttp", "pexpect", "pyte", "requests"]
# ///
"""Draw the README's picture: what a terminal shows at the end of a run over documents.

    uv run tests/picture.py             draw .github/answers.svg
    uv run tests/picture.py FILE.svg    draw another file

It runs a script against the local API, in a terminal of its own. Not on Windows.
"""

import os
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from html import escape
from pathlib import Path
from typing import Any

import pexpect
import pyte
from local_api import LocalApi

TOP = Path(__file__).parent.parent
PICTURE = TOP / ".github" / "answers.svg"
SCRIPT = "async_polling_example.py"
DOCUMENTS = {
    "bee-survey.txt": "The hives lost a third of their bees last winter. Mites were the cause.",
    "bridge-minutes.txt": "The council will repair the bridge in May. Lorries must go round it.",
    "bus-timetable.txt": "Line 7 runs every ten minutes from June. The night bus stays as it was.",
    "energy-audit.txt": "The school could save a fifth of its heating. The roof loses the most.",
    "harbour-report.txt": "The harbour took in 412 ships this spring. Half of them carried grain.",
    "library-letter.txt": "The library opens on Sundays from now on. Readers had asked for years.",
    "market-rules.txt": "Stalls may open at six in the morning. Music is allowed until noon.",
    "river-levels.txt": "The river rose by two metres in one night. No house was flooded.",
    "theatre-review.txt": "The new play is short and very funny. Only its ending comes too soon.",
    "tree-register.txt": "The town has 1,204 old trees. Nine of them need a new support.",
}
# As in the README; the last of two functions with one name counts.
LOAD_QUESTIONS = """
def load_questions() -> dict[str, str]:
    paths = sorted(Path("documents").glob("*.txt"))
    return {path.name: "Summarize this text:\\n\\n" + path.read_text("utf-8") for path in paths}


"""
COLUMNS = 110
ROWS = 54  # from the last answers down to the end
LETTER_WIDTH = 8
LINE_HEIGHT = 18
MARGIN = 16


def run_in_terminal() -> list[str]:
    """Run the script in a terminal; return the lines that the terminal shows at the end."""
    above, mark, below = (TOP / SCRIPT).read_text("utf-8").partition("# --- The API")
    with tempfile.TemporaryDirectory() as folder, LocalApi() as api:
        Path(folder, SCRIPT).write_text(above + LOAD_QUESTIONS + mark + below, "utf-8")
        Path(folder, "documents").mkdir()
        for name, text in DOCUMENTS.items():
            Path(folder, "documents", name).write_text(text, "utf-8")
        env = {**os.environ, **api.environment, "PYTHONUTF8": "1"}
        env.pop("COLUMNS", None)  # it would count for more than the terminal
        options: Any = {"cwd": folder, "env": env, "dimensions": (ROWS, COLUMNS)}
        command = f"'{sys.executable}' {SCRIPT}"
        output, code = pexpect.run(command, withexitstatus=True, timeout=60, **options)
    if code != 0:
        raise RuntimeError(output.decode(errors="replace"))
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.ByteStream(screen).feed(output)
    return [line.rstrip() for line in "\n".join(screen.display).rstrip().split("\n")]


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
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=PICTURE, metavar="FILE.svg")
    options = parser.parse_args()
    options.file.write_text(draw(run_in_terminal()), "utf-8")
    print(f"drawn: {options.file}")


if __name__ == "__main__":
    main()
