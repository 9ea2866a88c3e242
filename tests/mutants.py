"""`make mutants`: puts faults into the code one by one (mutmut) and prints those that go unnoticed.

A package's pyproject.toml names the modules and the tests in [tool.mutmut]. Survivors are killed by
a better test or a simpler line, or named in [tool.crisp.survivors] with the reason why no test can
tell them apart.

python tests/mutants.py [PACKAGE-FOLDER …]
"""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from crisplab import clone

_MUTMUT = str(Path(sys.executable).parent / "mutmut")


def main() -> int:
    chosen = [clone.ROOT / name for name in sys.argv[1:]] or _packages()
    survivors = [line for package in chosen for line in _survivors(package)]
    print("\n".join(survivors) or "no fault went unnoticed")
    return 1 if survivors else 0


def _packages() -> list[Path]:
    """Returns the folders of the packages that ask for mutation tests."""
    listed = subprocess.run(
        ["git", "ls-files", "**/pyproject.toml"], cwd=clone.ROOT, capture_output=True, text=True, check=True
    )
    files = [clone.ROOT / name for name in listed.stdout.split()]
    return [file.parent for file in files if "mutmut" in tomllib.loads(file.read_text()).get("tool", {})]


def _survivors(package: Path) -> list[str]:
    """Runs mutmut in one package from scratch; returns a line for each unnamed survivor."""
    print(f"{package.relative_to(clone.ROOT)} …", flush=True)
    shutil.rmtree(package / "mutants", ignore_errors=True)
    run = subprocess.run([_MUTMUT, "run"], cwd=package, capture_output=True, text=True, check=False)
    if "mutations/second" not in run.stdout:
        raise SystemExit(f"mutmut failed in {package}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    results = subprocess.run([_MUTMUT, "results"], cwd=package, capture_output=True, text=True, check=True)
    named = tomllib.loads((package / "pyproject.toml").read_text())["tool"].get("crisp", {}).get("survivors", {})
    return [
        line.strip()
        for line in results.stdout.splitlines()
        if line.strip().endswith(("survived", "no tests")) and line.strip().partition(":")[0] not in named
    ]


if __name__ == "__main__":
    raise SystemExit(main())
