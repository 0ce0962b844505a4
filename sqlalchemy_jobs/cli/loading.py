"""From ``pkg.module:name`` to a JobApp."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

import sqlalchemy_jobs
from sqlalchemy_jobs.app import JobApp
from sqlalchemy_jobs.errors import AppError

importing = click.option(
    "--import",
    "modules",
    multiple=True,
    envvar="SAJOBS_IMPORT",
    metavar="MODULE",
    help="A further module to import, for the handlers it registers. May be repeated.",
)


def load_app(name: str, modules: Iterable[str] = ()) -> JobApp[Any, Any]:
    """Import and return the app, then import further modules, which register their handlers on it.

    The current folder can be imported from, as with ``python -m``. Raises: AppError.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise AppError(f'--app {name}: wanted "package.module:name", for example shop.jobs:jobs')
    found: Any = import_module(module_name)
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            apps = [key for key in dir(found) if isinstance(getattr(found, key, None), JobApp)]
            hint = f"; it has {', '.join(apps)}" if apps else ""
            raise AppError(f"--app {name}: {module_name} has no {part}{hint}") from None
    if not isinstance(found, JobApp):
        kind = (
            f"the class {found.__name__}"
            if isinstance(found, type)
            else f"a {type(found).__name__}"
        )
        raise AppError(f"--app {name}: it is {kind}, not a JobApp")
    for module in modules:
        import_module(module)
    return found


def import_module(name: str) -> Any:
    """Import a module; an error of its own code is told in one line, with file and line.

    Raises: AppError.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise AppError(
                f"there is no module {error.name}, looked for in {Path.cwd()} and the installed packages"
            ) from error
        raise AppError(_said(name, error)) from error
    except (Exception, SystemExit) as error:
        raise AppError(_said(name, error)) from error


def _said(name: str, error: BaseException) -> str:
    ours = str(Path(sqlalchemy_jobs.__file__).parent)
    frames = [
        each
        for each in traceback.extract_tb(error.__traceback__)
        if not each.filename.startswith(ours)
    ]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"importing {name} raised {type(error).__name__}: {text}{where}"
