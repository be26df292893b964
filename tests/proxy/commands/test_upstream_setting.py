"""Setting `upstream`: one URL, several, or a file; and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.errors import SettingsError
from proxy.settings import MAX_REPLICAS, ReplicaAddress, Settings, load, parse_upstreams

SECRET = "canary-word"


def test_one_url_is_one_upstream() -> None:
    upstreams = parse_upstreams("http://a:8000/v1")
    assert upstreams.is_single
    assert upstreams.addresses == (ReplicaAddress("http://a:8000/v1"),)


@pytest.mark.parametrize(
    "text", ["http://a,https://b:1/v1", " http://a , https://b:1/v1, ", "http://a,\nhttps://b:1/v1"]
)
def test_urls_are_separated_by_commas(text: str) -> None:
    settings = load(upstream=text)
    assert settings.upstream == "http://a/,https://b:1/v1"
    assert [address.url for address in parse_upstreams(settings.upstream).addresses] == ["http://a/", "https://b:1/v1"]


def test_a_comma_within_a_password_separates_nothing() -> None:
    upstreams = parse_upstreams("http://me:one,two@a,http://me:three@b")
    assert upstreams.passwords == ["one,two", "three"]


def test_a_file_maps_models_to_urls(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text('"org/small" = "http://a"\n"big" = ["http://a", "http://b"]\n')
    upstreams = parse_upstreams(load(upstream=str(file)).upstream or "")
    assert not upstreams.is_single
    assert dict(upstreams.addresses) == {"http://a/": frozenset({"org/small", "big"}), "http://b/": frozenset({"big"})}


def test_a_name_stands_for_its_addresses() -> None:
    settings = load(upstream="dns+http://me:secret@vllm.models:8000/v1")
    assert settings.upstream == "dns+http://me:secret@vllm.models:8000/v1"
    upstreams = parse_upstreams(settings.upstream)
    assert (upstreams.is_dns, upstreams.is_single, upstreams.passwords) == (True, False, ["secret"])
    assert upstreams.addresses[0].url == "http://me:secret@vllm.models:8000/v1"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dns+https://a", "use dns+http: a certificate would have to name the addresses"),
        ("dns+http://10.0.0.1:8000", "10.0.0.1 is an address; name a host after dns+http://, or leave dns+ out"),
        ("dns+http://vllm..svc:8000", "vllm..svc is not a host name: its parts must have 1 to 63 characters"),
        (f"dns+http://{'v' * 64}.svc", "is not a host name: its parts must have 1 to 63 characters"),
        ("http://a:8000/v1?api=1", "leave out what follows ? or #; it would not reach the upstream"),
        ("http://a:8000/#x", "leave out what follows ? or #; it would not reach the upstream"),
        ("http://a,dns+http://b", "URL 2 of 2: dns+http://NAME:PORT must be the only upstream"),
        ("dns+http://a,http://b", "URL 1 of 2: dns+http://NAME:PORT must be the only upstream"),
        ("dns+http://a,dns+http://b", "URL 1 of 2: dns+http://NAME:PORT must be the only upstream"),
        ("http://a http://b", "separate several URLs by commas"),
        ("dns+a:8000", "URL scheme should be 'http' or 'https'"),
        ("http://a,ftp://b", "URL 2 of 2: URL scheme should be 'http' or 'https'"),
        ("http://a,b:8000", "separate URLs by commas, and begin each with http:// or https://"),
        ("http://a,http://a/", "http://a/ is named twice; name each replica once"),
        ("a:8000", "URL scheme should be 'http' or 'https'"),
        ("", "input is empty"),
        (",".join(f"http://h{i}" for i in range(MAX_REPLICAS + 1)), f"at most {MAX_REPLICAS} are supported"),
        ("missing.toml", "missing.toml: No such file or directory"),
    ],
)
def test_a_wrong_value_is_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(upstream=text)
    assert str(caught.value).startswith("upstream: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", 'names no model; add lines such as "MODEL" = ["http://HOST:8000"]'),
        ("a = 1", "model 'a' needs a URL or a list of URLs"),
        ("a = []", "model 'a' needs a URL or a list of URLs"),
        ("a = [1]", "model 'a' needs a URL or a list of URLs"),
        ("Qwen3-0.6B = 'http://a'", "quote model names that contain a dot"),
        ("a = 'dns+http://a'", "model 'a': dns+http://NAME:PORT must be the only upstream"),
        ("a = 'ftp://a'", "model 'a': URL scheme should be 'http' or 'https'"),
        ("a = ['http://a', 'http://a']", "model 'a': http://a/ is named twice"),
        (f"a = 'http://me:{SECRET}@a'\nb = 'http://a'", "http://a/ is named twice"),
        ("a = ", "Invalid value"),
        ("org/a = 'http://a'", 'lines are "MODEL" = ["http://HOST:8000"], with names of models in quotes'),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "models.toml"
    file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        load(upstream=str(file))
    assert str(caught.value).startswith(f"upstream: {file}")
    assert problem in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_wrong_time_between_resolutions_is_refused() -> None:
    with pytest.raises(SettingsError, match="dns_poll_s: it must be greater than 0, not 0"):
        load(upstream="dns+http://a", dns_poll_s=0)


@pytest.mark.parametrize("form", ["urls", "file"])
def test_passwords_of_replicas_appear_in_no_repr_and_no_error(tmp_path: Path, form: str) -> None:
    urls = f"http://a,http://me:{SECRET}@b"
    file = tmp_path / "models.toml"
    file.write_text(f"m = {urls.split(',')}")
    settings = load(upstream=urls if form == "urls" else str(file))
    assert SECRET not in repr(settings)
    with pytest.raises(SettingsError, match="upstream_api_key is set too; remove one of them") as caught:
        load(upstream=settings.upstream, upstream_api_key="key")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if not name.endswith("controller")])
def test_no_error_about_a_setting_shows_the_password_of_a_url(name: str) -> None:
    urls = [f"postgresql://me:{SECRET}@db/", f"redis://me:{SECRET}@db/zero", f"http://me:{SECRET}@db:port"]
    messages = []
    for value in [*urls, *([url] for url in urls)]:
        try:
            load(**{name: value})
        except SettingsError as error:
            messages.append(str(error))
    assert SECRET not in "\n".join(messages)


def test_an_error_about_the_registry_hides_its_password() -> None:
    with pytest.raises(SettingsError, match="registry: the registry's URL names no database") as caught:
        load(registry=f"postgresql://me:{SECRET}@db/")
    assert SECRET not in str(caught.value)
