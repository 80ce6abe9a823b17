"""Runs the README's code blocks, in order, in one empty directory.

A `bash` block runs as a script, a `python` block as a program. A line `<!-- ci: COMMAND -->` right before a block runs COMMAND in its
stead, the block's short form; `<!-- ci: not run, REASON -->` leaves the block out and says why.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"(?:<!-- ci: (?P<short>[^\n]*?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)\n```", re.DOTALL)


def main(readme: Path) -> None:
    blocks = list(BLOCK.finditer(readme.read_text(encoding="utf-8")))
    if not blocks:
        raise SystemExit(f"{readme} has no code blocks: the pattern or the README is wrong")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        for block in blocks:
            short, language, code = block["short"], block["language"], block["code"]
            if short and short.startswith("not run, "):
                print(f"-- left out ({short.removeprefix('not run, ')}): {code.splitlines()[0]}", flush=True)
                continue
            if short:
                language, code = "bash", short
            print(f"-- {language}: {code}", flush=True)
            command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
            done = subprocess.run(command, cwd=folder, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"this block of {readme} exits with {done.returncode}:\n{code}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
