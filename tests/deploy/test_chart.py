"""The Helm chart: rendered by Helm's library, checked against Kubernetes' schemas and the restricted standard."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from discovery.store import DatabaseUrl
from proxy.http.graceful_shutdown import CUT_S
from proxy.recording.store_writer import FLUSH_S
from proxy.server import CLOSE_S
from proxy.settings import Settings, configure
from tests.deploy.dockerfile import image
from tests.deploy.render_chart import CHART, RELEASE, render
from tests.readability import ROOT

KUBERNETES: Final = ("1.29", "1.37")
CONTROLLERS: Final = "/etc/autotts/controllers"
PLAIN: Final[dict[str, Any]] = {
    "upstream": {"url": "http://vllm.models:8000"},
    "secrets": {"keys": {"name": "autotts-keys"}},
}
FULL: Final[dict[str, Any]] = {
    "upstream": {"url": "https://vllm.example.org/base"},
    "image": {"repository": "registry.example.org/autotts-proxy", "tag": "1.2.3"},
    "imagePullSecrets": [{"name": "registry"}],
    "settings": {"beta": 0.5, "max_episodes": 192, "controller": f"{CONTROLLERS}/mine.py", "ui": False, "log": "plain"},
    "secrets": {
        "keys": {"name": "autotts-keys", "key": "clients.toml"},
        "adminKey": {"name": "autotts-secrets"},
        "upstreamApiKey": {"name": "autotts-secrets"},
        "cacheSecret": {"name": "autotts-secrets"},
        "limits": {"name": "autotts-redis", "key": "url"},
        "registry": {"name": "autotts-registry"},
    },
    "controllers": {"configMap": "controllers"},
    "store": {"kind": "none"},
    "podAnnotations": {"example.org/team": "serving"},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "serving", "operator": "Exists"}],
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "key": {"name": "autotts-prometheus"}},
    "prometheusRule": {"enabled": True, "tokensPerHour": 5_000_000},
    "env": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
    "stopDelaySeconds": 0,
    "networkPolicy": {
        "from": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
        "egress": [{"ports": [{"port": 4318, "protocol": "TCP"}]}],
    },
}


def changed(**values: Any) -> dict[str, Any]:
    return copy.deepcopy(PLAIN) | values


REFUSED: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "no upstream": ({"secrets": PLAIN["secrets"]}, "url"),
    "no keys": ({"upstream": PLAIN["upstream"]}, "name"),
    "a password in the URL": (changed(upstream={"url": "http://me:secret@vllm:8000"}), "url"),
    "a password in the second URL": (changed(upstream={"url": "http://a:8000,http://me:secret@b:8000"}), "url"),
    "a name for TLS": (changed(upstream={"url": "dns+https://vllm:8000"}), "url"),
    "an unknown value": (changed(replica=2), "replica"),
    "a secret among the settings": (changed(settings={"admin_key": "x"}), "invalid propertyName 'admin_key'"),
    "a setting of the chart": (changed(settings={"port": 9000}), "invalid propertyName 'port'"),
    "a password in the registry's URL": (
        changed(settings={"registry": "postgresql://me:secret@database/registry"}),
        "'/settings/registry'",
    ),
    "a setting among the variables": (changed(env=[{"name": "AUTOTTS_PORT", "value": "1"}]), "env"),
    "a database that the proxy cannot use": (changed(store={"kind": "mysql"}), "kind"),
    "PostgreSQL without a URL": (changed(store={"kind": "postgres"}), "set secrets.store.name to a Secret"),
    "replicas with SQLite": (changed(replicas=2), "replicas cannot share a SQLite store"),
    "autoscaling with SQLite": (changed(autoscaling={"enabled": True}), "replicas cannot share a SQLite store"),
    "replicas with a registry in a folder": (
        changed(replicas=2, store={"kind": "none"}, settings={"registry": "/data/registry"}),
        "replicas cannot share a registry in a folder",
    ),
    "replicas without a shared secret": (changed(replicas=2, store={"kind": "none"}), "secrets.cacheSecret.name"),
    "an autoscaler that never scales": (
        changed(
            store={"kind": "none"},
            secrets={**PLAIN["secrets"], "cacheSecret": {"name": "autotts-secrets"}},
            settings={"max_episodes": 128},
            autoscaling={"enabled": True},
        ),
        "set autoscaling.episodesPerReplica to less than settings.max_episodes",
    ),
    "a monitor without a key": (changed(serviceMonitor={"enabled": True}), "serviceMonitor.key.name"),
}
CASES: Final = {
    "plain": PLAIN,
    "full": FULL,
    "emptydir": changed(store={"kind": "sqlite", "sqlite": {"persistent": False}}),
    "claim": changed(store={"kind": "sqlite", "sqlite": {"existingClaim": "records"}}),
    "postgres": changed(
        replicas=3,
        store={"kind": "postgres"},
        secrets={**PLAIN["secrets"], "store": {"name": "database"}, "cacheSecret": {"name": "autotts-secrets"}},
    ),
    "port": changed(networkPolicy={"upstreamPort": 9000}),
    "several": changed(upstream={"url": "http://a.models:8000, https://b.models/base,http://c.models:8000"}),
    "name": changed(upstream={"url": "dns+http://vllm-pods.models:8001"}),
}

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        importlib.util.find_spec("helm_python") is None, reason="helm-python-sdk is not here; it is for Linux on x86-64"
    ),
]
Manifests = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return render(CASES | {name: values for name, (values, _) in REFUSED.items()})


@pytest.fixture(scope="module")
def rendered(results: dict[str, Any]) -> dict[str, Manifests]:
    """Return the manifests of each case by their kind."""
    found: dict[str, Manifests] = {}
    for case in CASES:
        assert "error" not in results[case], results[case]
        texts = [text for name, text in results[case].items() if name.endswith(".yaml") and text.strip()]
        manifests = [manifest for manifest in map(yaml.safe_load, texts) if manifest]
        found[case] = {manifest["kind"]: manifest for manifest in manifests}
        assert len(found[case]) == len(manifests)
    return found


def test_helm_renders_the_kinds_that_the_values_ask_for(rendered: dict[str, Manifests]) -> None:
    always = {"Deployment", "Service", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"}
    assert rendered["plain"].keys() == always | {"PersistentVolumeClaim"}
    assert rendered["full"].keys() == always | {"HorizontalPodAutoscaler", "ServiceMonitor", "PrometheusRule"}
    assert rendered["emptydir"].keys() == rendered["claim"].keys() == rendered["postgres"].keys() == always


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", CASES)
def test_manifests_follow_the_schemas_of_kubernetes(case: str, version: str, rendered: dict[str, Manifests]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for kind, manifest in rendered[case].items():
        if not manifest["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes_validate.validate(manifest, version, strict=True)
        assert manifest["metadata"]["name"] == RELEASE, kind
    wrong = copy.deepcopy(rendered[case]["Deployment"])
    wrong["spec"]["template"]["spec"]["containers"][0]["readOnly"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_cannot_work_are_refused_with_the_reason(case: str, results: dict[str, Any]) -> None:
    assert REFUSED[case][1] in results[case].get("error", ""), results[case]


@pytest.mark.parametrize("case", CASES)
def test_pods_meet_the_restricted_pod_security_standard(case: str, rendered: dict[str, Manifests]) -> None:
    pod = rendered[case]["Deployment"]["spec"]["template"]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    user, _, group = image("proxy").user.partition(":")
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (int(user), int(group))
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all("hostPort" not in port for port in container["ports"])
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False  # a Service named autotts would set AUTOTTS_PORT


@pytest.mark.parametrize("case", CASES)
def test_the_proxy_accepts_the_settings(
    case: str, rendered: dict[str, Manifests], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (container,) = rendered[case]["Deployment"]["spec"]["template"]["spec"]["containers"]
    secret = "redis://of-a-secret"  # which suits any secret but those of databases
    variables = {entry["name"]: entry.get("value", secret) for entry in container["env"]}
    databases = {"AUTOTTS_STORE": case == "postgres", "AUTOTTS_REGISTRY": case == "full"}
    url = "postgresql://me:password@database/autotts"
    variables |= {name: url for name, is_database in databases.items() if is_database}
    known = {f"AUTOTTS_{field.upper()}" for field in Settings.model_fields} | {"AUTOTTS_CONFIG"}
    known |= {entry["name"] for entry in CASES[case].get("env", [])}
    assert variables.keys() <= known
    file = tmp_path / "autotts.toml"
    shutil.copy(ROOT / "controllers/discovered/lockstep_lead.py", tmp_path / "mine.py")  # what the ConfigMap has
    mounted = rendered[case]["ConfigMap"]["data"]["autotts.toml"]
    file.write_text(mounted.replace(CONTROLLERS, str(tmp_path)))
    assert tomllib.loads(file.read_text()).keys() == CASES[case].get("settings", {}).keys()
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("/data/", f"{tmp_path}/"))  # the volume, a folder that must exist
    settings, sources = configure(file, {})
    assert settings.port == container["ports"][0]["containerPort"]
    assert settings.record is (case != "full")
    assert isinstance(settings.registry_place, DatabaseUrl) is (case in ("postgres", "full"))
    for name, value in CASES[case].get("settings", {}).items():
        wanted = value.replace(CONTROLLERS, str(tmp_path)) if isinstance(value, str) else value
        source = "environment" if name == "log" else f"file {file}"
        assert (getattr(settings, name), sources[name]) == (wanted, source)
    grace = rendered[case]["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > settings.drain_s + CUT_S + CLOSE_S + FLUSH_S + CASES[case].get("stopDelaySeconds", 5)


def test_no_variable_of_the_image_hides_a_setting(rendered: dict[str, Manifests]) -> None:
    of_image = {name for name in image("proxy").env if name.startswith("AUTOTTS_")}
    schema = json.loads((CHART / "values.schema.json").read_text())
    refused = schema["properties"]["settings"]["propertyNames"]["not"]["enum"]
    (container,) = rendered["full"]["Deployment"]["spec"]["template"]["spec"]["containers"]
    of_chart = {entry["name"] for entry in container["env"]}
    assert of_image - {f"AUTOTTS_{name.upper()}" for name in refused} <= of_chart
    assert "AUTOTTS_LOG" in of_image


def test_every_path_that_a_setting_names_is_mounted(rendered: dict[str, Manifests]) -> None:
    for manifests in rendered.values():
        (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
        folders = {mount["mountPath"] for mount in container["volumeMounts"]}
        paths = [entry["value"] for entry in container["env"] if entry.get("value", "").startswith("/")]
        assert {str(Path(path).parent) for path in paths} <= folders
        volumes = {volume["name"] for volume in manifests["Deployment"]["spec"]["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert {"/tmp", *image("proxy").volumes} <= folders


def test_probes_ask_paths_that_need_no_key(rendered: dict[str, Manifests]) -> None:
    (container,) = rendered["plain"]["Deployment"]["spec"]["template"]["spec"]["containers"]
    paths = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")]
    assert paths == ["/health", "/health", "/ready"]


def test_no_secret_is_in_a_manifest_but_by_reference(rendered: dict[str, Manifests]) -> None:
    (container,) = rendered["full"]["Deployment"]["spec"]["template"]["spec"]["containers"]
    secrets = [entry for entry in container["env"] if "valueFrom" in entry]
    references = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in secrets}
    assert references == {
        "AUTOTTS_ADMIN_KEY": {"name": "autotts-secrets", "key": "admin-key"},
        "AUTOTTS_UPSTREAM_API_KEY": {"name": "autotts-secrets", "key": "upstream-api-key"},
        "AUTOTTS_CACHE_SECRET": {"name": "autotts-secrets", "key": "cache-secret"},
        "AUTOTTS_LIMITS": {"name": "autotts-redis", "key": "url"},
        "AUTOTTS_REGISTRY": {"name": "autotts-registry", "key": "url"},
    }
    assert all("Secret" not in manifests for manifests in rendered.values())


def test_one_proxy_has_a_store_in_a_file_and_several_share_one_in_postgresql_or_have_none(
    rendered: dict[str, Manifests],
) -> None:
    for case, manifests in rendered.items():
        spec = manifests["Deployment"]["spec"]
        if case == "full":
            assert "replicas" not in spec  # the autoscaler sets them
            assert manifests["Service"]["spec"]["sessionAffinity"] == "ClientIP"
        elif case == "postgres":
            assert (spec["replicas"], spec["strategy"]["type"]) == (3, "RollingUpdate")
            (container,) = spec["template"]["spec"]["containers"]
            (url,) = [entry for entry in container["env"] if entry["name"] == "AUTOTTS_STORE"]
            assert url["valueFrom"] == {"secretKeyRef": {"name": "database", "key": "url"}}
        else:
            assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
            assert manifests["Service"]["spec"]["sessionAffinity"] == "None"
    volumes = {case: rendered[case]["Deployment"]["spec"]["template"]["spec"]["volumes"][0] for case in CASES}
    assert volumes["plain"]["persistentVolumeClaim"] == {"claimName": RELEASE}
    assert volumes["claim"]["persistentVolumeClaim"] == {"claimName": "records"}
    assert volumes["emptydir"]["emptyDir"] == volumes["full"]["emptyDir"] == volumes["postgres"]["emptyDir"] == {}


def test_the_selectors_match_the_pods(rendered: dict[str, Manifests]) -> None:
    for manifests in rendered.values():
        labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
        selectors = [*matched(manifests), manifests["Service"]["spec"]["selector"]]
        assert len(selectors) >= 5
        assert all(selector.items() <= labels.items() for selector in selectors)
        if "ServiceMonitor" in manifests:
            selector = manifests["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
            assert selector.items() <= manifests["Service"]["metadata"]["labels"].items()


def matched(value: object) -> Iterator[dict[str, str]]:
    """Yield every `matchLabels` of the release inside a manifest."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "matchLabels" and "app.kubernetes.io/name" in inner:
                yield inner
            else:
                yield from matched(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from matched(inner)


def test_the_network_policy_lets_the_proxy_reach_its_upstream(rendered: dict[str, Manifests]) -> None:
    ports = {
        case: [rule["port"] for rule in rendered[case]["NetworkPolicy"]["spec"]["egress"][1]["ports"]]
        for case in ("plain", "full", "port", "several", "name")
    }
    assert ports == {"plain": [8000], "full": [443], "port": [9000], "several": [8000, 443], "name": [8001]}
    assert "from" not in rendered["plain"]["NetworkPolicy"]["spec"]["ingress"][0]
    assert rendered["full"]["NetworkPolicy"]["spec"]["egress"][2:] == FULL["networkPolicy"]["egress"]


def test_prometheus_scrapes_the_job_of_the_alerts_with_a_key(rendered: dict[str, Manifests]) -> None:
    (endpoint,) = rendered["full"]["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "autotts"}]
    assert endpoint["authorization"]["credentials"] == {"name": "autotts-prometheus", "key": "key"}
    rules = ROOT / "deploy/prometheus/rules.yml"
    assert (CHART / "files/rules.yml").read_text() == rules.read_text(), f"copy {rules} into the chart"
    spec = yaml.safe_load(rules.read_text().replace("> 20e6", "> 5000000"))
    assert rendered["full"]["PrometheusRule"]["spec"] == spec


def test_a_stopping_pod_serves_until_the_service_has_dropped_it(rendered: dict[str, Manifests]) -> None:
    delays = {}
    for case in ("plain", "full"):
        pod = rendered[case]["Deployment"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        delays[case] = pod["terminationGracePeriodSeconds"], container.get("lifecycle")
    assert delays["plain"] == (90, {"preStop": {"exec": {"command": ["sleep", "5"]}}})
    assert delays["full"] == (85, None)


def test_further_variables_reach_the_container(rendered: dict[str, Manifests]) -> None:
    (container,) = rendered["full"]["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["env"][-1] == FULL["env"][0]


def test_the_notes_name_budgets_of_each_proxy_only_without_shared_limits(results: dict[str, Any]) -> None:
    warned = {
        case: any("budgets hold in each proxy alone" in text for name, text in results[case].items() if "NOTES" in name)
        for case in ("plain", "full", "postgres")
    }
    assert warned == {"plain": False, "full": False, "postgres": True}


def test_the_autoscaler_uses_a_metric_of_the_proxy(rendered: dict[str, Manifests]) -> None:
    spec = rendered["full"]["HorizontalPodAutoscaler"]["spec"]
    (metric,) = spec["metrics"]
    assert f"`{metric['pods']['metric']['name']}` | gauge" in (ROOT / "docs/metrics.md").read_text()
    target = int(metric["pods"]["target"]["averageValue"])
    assert target < Settings.model_fields["max_episodes"].default  # later it would never scale
    assert spec["minReplicas"] < spec["maxReplicas"]


def test_the_chart_has_the_version_of_the_package() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (about["version"], about["appVersion"]) == (package, package)
