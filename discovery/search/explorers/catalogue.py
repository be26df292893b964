"""Catalogue of the explorers: their names, their options, and how each is made. A new explorer is added here."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from discovery.data.safe_json import parse_json
from discovery.errors import ExplorerError, first_problem
from discovery.search.explorers import Explorer
from discovery.search.explorers.agent import Agent
from discovery.search.explorers.files import Files

TRANSCRIPT, EXPORT, WORKSPACES = "exchanges.jsonl", "search.jsonl", "workspaces"
"""Names in the folder of a run: exchanges with an LLM, recordings for an agent, and the folder of its workspaces."""


class ExplorerName(StrEnum):
    """Names of the explorers."""

    GRAMMAR = "grammar"
    LLM = "llm"
    AGENT = "agent"
    FILES = "files"


class ExplorerOptions(NamedTuple):
    """Options that only some explorers use."""

    folder: Path | None
    llm: Path | None
    command: str
    usd: float | None
    varied: int = 0


def make_explorer(name: ExplorerName, options: ExplorerOptions, out: Path) -> Explorer:
    """Create the explorer called `name`. Raises ExplorerError if an option it needs is missing."""
    if name is ExplorerName.GRAMMAR:
        from discovery.search.explorers.grammar import Grammar  # imports optuna, which imports every storage it knows

        return Grammar(varied=options.varied)
    if name is ExplorerName.FILES:
        if options.folder is None:
            raise ExplorerError("--explorer files needs --folder, the folder of the candidates")
        return Files(options.folder)
    if name is ExplorerName.LLM:
        if options.llm is None:
            raise ExplorerError("--explorer llm needs --llm, a JSON file that names the endpoint and its models")
        return _llm(options.llm, options.usd, out / TRANSCRIPT)
    if not options.command:
        raise ExplorerError("--explorer agent needs --command, its command line with {workspace} for the folder")
    try:
        command = shlex.split(options.command)
    except ValueError as error:
        raise ExplorerError(f"--command: {error}") from None
    return Agent(command, out / WORKSPACES, search=out / EXPORT)


def _llm(path: Path, usd: float | None, transcript: Path) -> Explorer:
    """Create the LLM explorer with the settings in the file at `path`. Raises ExplorerError."""
    from discovery.search.explorers.endpoint import KEY, LLMSettings  # imports `openai`, which is slow
    from discovery.search.explorers.llm import LLM
    from discovery.search.explorers.transcript import Transcript

    try:
        about = parse_json(path.read_text())
        settings = LLMSettings(**{**about, **({} if usd is None else {"usd": usd})})
    except OSError as error:
        raise ExplorerError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise ExplorerError(f"{path}: {_with_meaning(error, LLMSettings)}") from None
    except (TypeError, ValueError) as error:
        raise ExplorerError(f"{path}: {' '.join(str(error).split())[:400]}") from None
    recorded = Transcript(transcript)
    if settings.api_key is None and not len(recorded):  # nothing to replay: the first call would fail
        raise ExplorerError(f"{KEY} is not set; set it to the endpoint's key, or to any text if it needs none")
    return LLM(settings, recorded)


def _with_meaning(error: ValidationError, settings: type[BaseModel]) -> str:
    """Return the first problem of a settings file, and the meaning of its field."""
    name = str(next(iter(error.errors(include_input=False, include_context=False)[0]["loc"]), ""))
    field = settings.model_fields.get(name)
    meaning = f" ({name}: {field.description})" if field is not None and field.description else ""
    return first_problem(error, settings) + meaning
