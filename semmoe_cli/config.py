"""semmoe.toml: what a project's commands have in common, as defaults of their options.

The file lies in the working directory, or --config names it. The command line wins. A command uses
the keys that it has an option for, says which, and records them in what it makes as if they had
been typed.
"""

import tomllib
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from semmoe.profiles.errors import InputError, visible
from semmoe.terminal.loudness import Quiet, Verbose

FILE = "semmoe.toml"
NAMED = "semmoe --config"  # where a context keeps the file that was named before the command
KEYS = {"model": str, "ranks": int, "engine": str, "hardware": str, "dispatch": str}
# Where a key is not, or not only, the option of its name.
PARAMETERS = {
    ("trace", "model"): ("sources", "model"),
    ("run", "model"): ("checkpoint",),
    ("export", "engine"): ("to",),
    ("demo", "ranks"): (),  # the demo places its own model
}
HELP = f"File with defaults of {', '.join(KEYS)}; ./{FILE} where there is one. The command line wins."
_used: list[str] = []  # by the command that was parsed last


def takes_common(command: Callable[..., None]) -> Callable[..., None]:
    """The command with --config, --quiet and --verbose beside its own options."""

    @wraps(command)
    def with_common(*, config: Path | None = None, quiet: bool = False, verbose: bool = False, **values: Any) -> None:
        command(**values)

    option = Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            is_eager=True,
            callback=_read_for,
            help=HELP,
        ),
    ]
    of_command = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in signature(command).parameters.values()]
    added = [
        Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=option),
        Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
        Parameter("verbose", Parameter.KEYWORD_ONLY, default=False, annotation=Verbose),
    ]
    with_common.__signature__ = signature(command).replace(parameters=[*of_command, *added])  # pyright: ignore[reportAttributeAccessIssue]
    return with_common


def read_config(path: Path) -> dict[str, Any]:
    """Keys and values of a configuration file. Raises InputError for what is none."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    for key, value in found.items():
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key}; it can hold {', '.join(KEYS)}")
        kind = KEYS[key]
        if type(value) is not kind or not value:
            raise InputError(f"{path}: {key} = {value!r}: expected {'a number' if kind is int else 'a text'}")
    return found


def used_words() -> list[str]:
    """Options that the configuration file gave to the command that runs, as they would be typed."""
    return list(_used)


def settle(context: Any) -> None:
    """Note what was taken from the file, after a command line was parsed; forget what does not go
    with the rest of it."""
    _used.clear()
    values, parameters = context.params, {p.name: p for p in context.command.params}
    given = {name for name in values if _from_file(context, name)}
    for name in given & _out_of_place(context.info_name, values):
        values[name] = parameters[name].default
        given.remove(name)
    for name in sorted(given):
        value = context.lookup_default(name)
        words = value if isinstance(value, list) else [str(value)]
        _used.extend(words if parameters[name].param_type_name == "argument" else [parameters[name].opts[0], *words])
    if _used:
        from semmoe.terminal.tables import note

        note(f"from {context.meta[FILE]}: {' '.join(_used)}")


def _out_of_place(command: str | None, values: dict[str, Any]) -> set[str]:
    """Parameters that the rest of a command line leaves no room for."""
    if command == "trace":
        return {"sources"} if values["from_"] or values.get("server") else {"model"}
    if command == "run" and values["replay"]:
        return {"checkpoint"}
    if command == "report" and len(values["paths"]) > 1:
        return {"ranks"}  # a plan has its own
    if command == "export" and str(values["to"].value).endswith("-plugin"):
        return {"model"}
    return set()


def blame(context: Any, error: typer.BadParameter) -> None:
    """Raise InputError where the value that `error` refuses stands in the file."""
    parameter = getattr(error, "param", None)
    if parameter is not None and _from_file(context, parameter.name):
        key = next(key for key in KEYS if parameter.name in _parameters(context.info_name, key))
        raise InputError(f"{context.meta[FILE]}: {key} = {context.lookup_default(parameter.name)}: {error.message}")


def _read_for(context: typer.Context, config: Path | None) -> Path | None:
    """Make the values of the file defaults of the command's options. A callback of --config."""
    config = config or context.meta.get(NAMED)
    path = config or Path(FILE)
    if context.resilient_parsing or (config is None and not path.is_file()):
        return config
    found = read_config(path)
    context.meta[FILE] = visible(str(path))
    has: dict[str, Any] = {parameter.name: parameter for parameter in context.command.params if parameter.name}
    context.default_map = {
        name: [value] if has[name].nargs == -1 else value
        for key, value in found.items()
        for name in _parameters(context.info_name, key)
        if name in has
    }
    return config


def _parameters(command: str | None, key: str) -> tuple[str, ...]:
    return PARAMETERS.get((command or "", key), (key,))


def _from_file(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"
