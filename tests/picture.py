# /// script
# requires-python = ">=3.10"
# dependencies = ["rich"]
# ///
"""Draw the README's picture: the first screen of a run, in .github/run.svg or a file you name.

    uv run tests/picture.py [FILE.svg]

It runs a script against the local API.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console

TOP = Path(__file__).parent.parent
SCRIPT = "async_polling_example.py"
LINES = 32


def main() -> None:
    """Draw the first lines of a run."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else TOP / ".github" / "run.svg"
    command = ["uv", "run", "tests/local_api.py", SCRIPT]
    done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    console = Console(record=True, width=82, file=io.StringIO())
    console.out("\n".join(done.stdout.splitlines()[:LINES]), highlight=False)
    picture = console.export_svg(title=f"uv run {SCRIPT}")
    # Without the fonts, which a browser would have to load from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.S)
    path.write_text("\n".join(map(str.rstrip, picture.splitlines())) + "\n", "utf-8")


if __name__ == "__main__":
    main()
