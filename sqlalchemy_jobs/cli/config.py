"""Where a command's options come from besides the command line, and how its errors look."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from sqlalchemy_jobs.errors import ConfigurationError

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


ARGUMENTS = "sqlalchemy_jobs.arguments"
"""Where a command's context has its arguments as they were given: in its ``meta``."""


class Refused(click.ClickException):
    """A configuration that cannot work: one line, status 2."""

    exit_code = 2

    def __init__(self, error: ConfigurationError) -> None:
        super().__init__(str(error))


class Configured(click.Command):
    """A command whose options may stand in ``[tool.sajobs]``, spelled as on the command line."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        try:
            settings = from_pyproject(Path.cwd())
        except ConfigurationError as error:
            raise Refused(error) from error
        extra["default_map"] = self._by_parameter(settings, parent)
        given = tuple(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[ARGUMENTS] = given
        return context

    def _by_parameter(self, settings: dict[str, Any], parent: Any) -> dict[str, Any]:
        names = {
            option.removeprefix("--"): parameter.name
            for parameter in self.params
            for option in parameter.opts
            if option.startswith("--") and parameter.name
        }
        # A key may be another command's.
        root = None if parent is None else parent.find_root().command
        of_others = {
            option.removeprefix("--")
            for command in _commands(root)
            for parameter in command.params
            for option in parameter.opts
        }
        unknown = sorted(set(settings) - set(names) - of_others)
        if unknown:
            raise Refused(
                ConfigurationError(
                    f"[tool.sajobs] in pyproject.toml has the unknown key {', '.join(unknown)}: "
                    f"known are {', '.join(sorted(names))}"
                )
            )
        several = {
            parameter.name for parameter in self.params if getattr(parameter, "multiple", False)
        }
        return {
            names[key]: [value]
            if isinstance(value, str) and names[key] in several
            else _as_options(key, value)
            for key, value in settings.items()
            if key in names
        }


class ConfiguredGroup(Configured, click.Group):
    """A command with commands of its own."""

    command_class = Configured


def _commands(command: click.Command | None) -> Iterator[click.Command]:
    """Yield a group's commands, and theirs."""
    for each in getattr(command, "commands", {}).values():
        yield each
        yield from _commands(each)


def _as_options(key: str, value: Any) -> Any:
    """Spell a TOML value as on the command line: a table ``{mail = 2}`` is ``mail=2``."""
    if isinstance(value, dict):
        return [f"{name}={each}" for name, each in value.items()]
    if isinstance(value, list) and not all(isinstance(each, str) for each in value):
        raise Refused(
            ConfigurationError(
                f"[tool.sajobs] in pyproject.toml: {key} = {value!r}: '--{key}' wants strings"
            )
        )
    return value


def from_pyproject(folder: Path) -> dict[str, Any]:
    """Return ``[tool.sajobs]`` of the nearest pyproject.toml, from ``folder`` upwards.

    Raises: ConfigurationError.
    """
    for each in (folder, *folder.parents):
        path = each / "pyproject.toml"
        if path.is_file():
            try:
                tool = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"{path} cannot be read: {error}") from error
            found = tool.get("sajobs", {}) if isinstance(tool, dict) else tool
            if not isinstance(found, dict):
                raise ConfigurationError(f"{path}: tool.sajobs is {found!r}, not a table")
            return found
    return {}
