"""A software bill of materials (SBOM) in CycloneDX's format: of an environment, and of the dashboard's libraries."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, Final

from tests.packaging.distributions import STATIC
from tests.packaging.installation import PIP, Installation
from tests.readability import ROOT

TOOL: Final = "cyclonedx-bom==7.5.0"
VALIDATE: Final = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
sys.exit(fault and str(fault))
"""


def write(installed: Installation, target: Path, tools: Path) -> int:
    """Write the bill of an installation, check it against CycloneDX's schema, and return the number of components.

    The tool that makes it is installed into `tools`. Raises subprocess.CalledProcessError.
    """
    if not (tools / "bin" / "cyclonedx-py").exists():
        venv.create(tools, symlinks=True)
        subprocess.run([*PIP, "--python", str(tools / "bin" / "python"), "install", "--quiet", TOOL], check=True)
    options = ["--pyproject", str(ROOT / "pyproject.toml"), "--sv", "1.6", "--of", "JSON", "--output-file", str(target)]
    python = str(installed.python)
    subprocess.run([str(tools / "bin" / "cyclonedx-py"), "environment", *options, python], check=True)
    bill = json.loads(target.read_text())
    bill["components"] += vendored_components()
    target.write_text(json.dumps(bill, indent=2) + "\n")
    subprocess.run([str(tools / "bin" / "python"), "-c", VALIDATE, str(target)], check=True, stderr=sys.stderr)
    return len(bill["components"])


def vendored_components() -> list[dict[str, Any]]:
    """Return the components of the libraries of JavaScript that the dashboard's folder `vendor` holds."""
    libraries = json.loads((STATIC / "vendor" / "vendor.json").read_text())
    return [
        {
            "type": "library",
            "bom-ref": (address := f"pkg:npm/{library['name']}@{library['version']}"),
            "name": library["name"],
            "version": library["version"],
            "purl": address,
            "licenses": [{"license": {"id": library["licence"]}}],
            "hashes": [{"alg": "SHA-256", "content": library["sha256"][library["file"]]}],
        }
        for library in libraries
    ]
