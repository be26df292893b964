"""Read deploy/docker/Dockerfile: its stages, and the configuration of the images built from them."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from dockerfile_parse import DockerfileParser

from tests.readability import ROOT

DOCKERFILE: Final = ROOT / "deploy/docker/Dockerfile"
TARGETS: Final = ("proxy", "embedded")


class Instruction(NamedTuple):
    """One instruction, without line breaks and comments."""

    name: str
    value: str


@dataclass
class Stage:
    """One stage: the image or stage it begins with, and its instructions after FROM."""

    base: str
    instructions: list[Instruction] = field(default_factory=list)


class Image(NamedTuple):
    """Configuration of an image, as the container runtime applies it."""

    base: str
    env: dict[str, str]
    labels: dict[str, str]
    user: str
    folder: str
    entrypoint: list[str]
    command: list[str]
    health_check: list[str]
    volumes: list[str]
    stop_signal: str


def stages() -> dict[str, Stage]:
    """Return the stages of the Dockerfile by name, in order."""
    parser = DockerfileParser(fileobj=io.BytesIO(DOCKERFILE.read_bytes()))
    found: dict[str, Stage] = {}
    for parsed in parser.structure:
        name, value = parsed["instruction"], parsed["value"]
        if name == "FROM":
            base, _, stage = value.split()
            found[stage] = Stage(base)
        elif name != "COMMENT":
            list(found.values())[-1].instructions.append(Instruction(name, value))
    return found


def lineage(target: str) -> Iterator[Stage]:
    """Yield the stages that `target` consists of, beginning with the one whose base is a published image."""
    known = stages()
    stage = known[target]
    if stage.base in known:
        yield from lineage(stage.base)
    yield stage


def image(target: str) -> Image:
    """Return the configuration of the image that `docker build --target` would build."""
    instructions = [instruction for stage in lineage(target) for instruction in stage.instructions]
    last = dict(instructions)
    pairs = {kind: _pairs(value for name, value in instructions if name == kind) for kind in ("ENV", "LABEL")}
    return Image(
        base=next(lineage(target)).base,
        env=pairs["ENV"],
        labels=pairs["LABEL"],
        user=last["USER"],
        folder=last["WORKDIR"],
        entrypoint=_exec_form(last["ENTRYPOINT"]),
        command=_exec_form(last["CMD"]),
        health_check=_exec_form(last["HEALTHCHECK"].partition(" CMD ")[2]),
        volumes=json.loads(last["VOLUME"]),
        stop_signal=last["STOPSIGNAL"],
    )


def _pairs(values: Iterator[str]) -> dict[str, str]:
    words = (word.partition("=") for value in values for word in shlex.split(value))
    return {name: value for name, _, value in words}


def _exec_form(value: str) -> list[str]:
    """Return the words of a command in exec form. In shell form, a shell would keep signals from the command."""
    words: list[str] = json.loads(value)
    return words
