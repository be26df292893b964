"""Messages about wrong options name the option, the value and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxy.cli import app

PROMOTE = ("promote", "cmc", "--registry", "installed")


def refusal(*arguments: str) -> str:
    """Return the message with which a command line is refused."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    return " ".join(done.output.split()).removeprefix("autotts: ")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOTTS_KEYS", raising=False)


@pytest.mark.parametrize("command", [("serve",), ("config", "show"), ("config", "check")])
def test_a_setting_without_a_flag_is_refused_as_an_option_with_the_ways_to_set_it(command: tuple[str, ...]) -> None:
    for arguments in (("--drain-s", "3"), ("--drain-s=3",)):
        assert refusal(*command, *arguments) == (
            "--drain-s is no option; use --set drain_s=VALUE, AUTOTTS_DRAIN_S, or drain_s in the settings file"
        )


def test_a_secret_is_refused_as_an_option_and_not_shown() -> None:
    assert refusal("serve", "--admin-key", "s3cret") == (
        "--admin-key is no option, because others can see the command line; set AUTOTTS_ADMIN_KEY, or admin_key in "
        "the file"
    )


def test_an_option_that_is_no_setting_is_refused_as_before() -> None:
    assert "No such option: --drainage" in refusal("serve", "--drainage", "3")


@pytest.mark.parametrize(
    ("arguments", "expected_text"),
    [
        (
            (*PROMOTE, "--as", "canary", "--share", "50"),
            "Invalid value for '--share': it must be less than or equal to 1, not 50; write 0.5 for 50 %",
        ),
        (
            (*PROMOTE, "--as", "canary", "--share", "101"),
            "Invalid value for '--share': it must be less than or equal to 1, not 101",
        ),
        (
            (*PROMOTE, "--as", "canari"),
            "Invalid value for '--as': 'canari' is not one of 'shadow', 'canary', 'champion'",
        ),
        (("serve", "--workers", "0"), "Invalid value for '--workers': it must be greater than or equal to 1, not 0"),
        (("serve", "--port", "http"), "Invalid value for '--port': it must be a valid integer"),
        (("keys", "list"), "Missing argument 'file'; give it, or set AUTOTTS_KEYS"),
    ],
)
def test_a_wrong_value_is_named_with_its_option(arguments: tuple[str, ...], expected_text: str) -> None:
    message = refusal(*arguments)
    assert message.startswith(expected_text)
    assert message.startswith(expected_text + ", unable") or message == expected_text
