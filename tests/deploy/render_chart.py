"""Render the Helm chart with Helm's own Go library, in a process of its own because it brings Go's runtime.

    python -m tests.deploy.render_chart < values.json

It prints a JSON object: the manifests by template, or `error`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Final

from tests.readability import ROOT

CHART: Final = ROOT / "deploy/helm/autotts-proxy"
RELEASE: Final = "autotts"
NAMESPACE: Final = "serving"


def render(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what each case of values gives: manifests by template, or {"error": message}. Starts one process."""
    command = [sys.executable, "-m", "tests.deploy.render_chart"]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, timeout=200, check=True, cwd=ROOT
    )
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def _render(values: dict[str, Any]) -> dict[str, str]:
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        try:
            manifests: dict[str, str] = chart.render(values, name=RELEASE, namespace=NAMESPACE)
        except helm_python.HelmError as error:
            return {"error": str(error)}
    return manifests


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: _render(values) for name, values in json.load(sys.stdin).items()}))
