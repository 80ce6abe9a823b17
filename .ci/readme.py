"""Runs the code blocks of the README and of the pages in docs/, each file's in order, in one empty directory a file.

A `bash` block runs as a script, a `python` block as a program. A line `<!-- ci: ... -->` right before a block says otherwise:

    <!-- ci: COMMAND -->             COMMAND runs in its stead, the block's short form
    <!-- ci: file NAME -->           the block is written to NAME, for a later block to use
    <!-- ci: not run, REASON -->     the block is left out
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"(?:<!-- ci: (?P<short>[^\n]*?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)\n```", re.DOTALL)
TESTS = Path(__file__).resolve().parents[1] / "tests"  # a page that shows a test imports what the tests do


def main(page: Path) -> None:
    blocks = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    if not blocks:
        raise SystemExit(f"{page} has no code blocks: the pattern or the page is wrong")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TESTS))))
    environment = os.environ | {"PATH": path, "PYTHONPATH": modules}
    with tempfile.TemporaryDirectory() as folder:
        for block in blocks:
            short, language, code = block["short"], block["language"], block["code"]
            if short and short.startswith("not run, "):
                print(f"-- left out ({short.removeprefix('not run, ')}): {code.splitlines()[0]}", flush=True)
                continue
            if short and short.startswith("file "):
                (Path(folder) / short.removeprefix("file ")).write_text(f"{code}\n", encoding="utf-8")
                continue
            if short:
                language, code = "bash", short
            print(f"-- {language}: {code}", flush=True)
            command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
            done = subprocess.run(command, cwd=folder, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"this block of {page} exits with {done.returncode}:\n{code}")


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(f"== {each}", flush=True)
        main(Path(each).resolve())
