"""Builds the wheel and imports it, alone, from another directory."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import crqat_fx, passes.fx
for module in (crqat_fx, passes):
    assert module.__file__.startswith(sys.argv[1]), f"{module.__name__} came from {module.__file__}"
model, checkpoint = crqat_fx.load("pico-v2")
print("imported", crqat_fx.__version__, "with a shipped model of", sum(p.numel() for p in model.parameters()), "parameters")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out / "dist"), str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = (out / "dist").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(out / "site")
        subprocess.run([sys.executable, "-c", CHECK, str(out / "site")], check=True, cwd=out)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
