"""What a user gets who installs the package and nothing else: python tests/bare_install.py

The wheel goes into an environment of its own, with what it depends on. There `fused-lora info` runs, and the README's
Python as far as PEFT's part.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("fused_lora", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def readme() -> str:
    """The README's Python before the heading of PEFT's part, which needs PEFT."""
    text, heading, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## A PEFT model")
    assert heading, "the README has no part about PEFT"
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks, "the README shows no Python before PEFT's part"
    return "\n".join(blocks)


def run(*command: str | Path, cwd: Path) -> str:
    print("+", *(str(part) if "\n" not in str(part) else "…" for part in command), flush=True)
    # the environment's own packages alone: nothing of the checkout, nothing of who calls
    done = subprocess.run(command, cwd=cwd, env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)}, text=True, stdout=-1)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nexit status {done.returncode}")
    return done.stdout


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, bare, here = folder / "source", folder / "bare", folder / "here"
        source.mkdir()
        here.mkdir()
        # without what earlier builds left in the checkout
        for path in SOURCES:
            kept = ROOT / path
            copy = shutil.copytree if kept.is_dir() else shutil.copy
            copy(kept, source / path)
        subprocess.run(
            [
                sys.executable,
                *PIP,
                "wheel",
                "--no-deps",
                "--no-build-isolation",
                "--wheel-dir",
                str(folder),
                str(source),
            ],
            check=True,
        )
        (wheel,) = folder.glob("*.whl")
        venv.create(bare, with_pip=True)
        python = bare / "bin" / "python"
        subprocess.run(
            [python, *PIP, "install", "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True, cwd=here
        )  # fmt: skip
        print(run(bare / "bin" / "fused-lora", "info", cwd=here))
        run(python, "-W", "error::RuntimeWarning", "-c", readme(), cwd=here)
        run(python, *PIP, "check", cwd=here)
    print(f"the README's Python runs in a bare environment ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
