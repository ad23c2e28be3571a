"""The constructor's signature is the schema: it checks what YAML says, builds the object and describes itself."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.schedules import Ramp, Schedule, SlantedTriangular

T = TypeVar("T")

SCHEDULES: dict[str, type] = {"ramp": Ramp, "slanted_triangular": SlantedTriangular}
"""What a ``Schedule`` can be in YAML: a name, or ``{name: options}``."""

_REQUIRED = inspect.Parameter.empty
_SCALARS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}


@dataclasses.dataclass(frozen=True)
class Checked:
    """Annotates plain data that has no class of its own: ``Annotated[dict[str, Any], Checked(check)]``.

    Args:
        check: Takes the value and its dotted path; returns the value to keep or raises :class:`ConfigurationError`.
    """

    check: Callable[[Any, str], Any]


class Supplied:
    """Annotates a parameter that YAML does not give, for the recipe has it: ``Annotated[nn.Module, Supplied()]``."""


def supplied(cls: Callable[..., Any]) -> set[str]:
    """The parameters of ``cls`` that are :class:`Supplied`."""
    return {name for name, parameter in _keywords(cls).items() if _is_supplied(parameter)}


def construct(
    cls: type[T], values: Mapping[str, Any], *, where: str = "", renamed: Mapping[str, str] | None = None
) -> T:
    """Build ``cls(**values)`` from plain data after checking every key and type against its constructor.

    Nested classes are built the same way, so one call checks a whole section. All problems are reported at once.

    Args:
        cls: The class to build; its annotations say what each value may be.
        values: Plain data, as ``yaml.safe_load`` returns it. Numbers may be text, because YAML reads ``1e-4`` as text.
        where: Dotted path of the section, for the messages.
        renamed: Former names of options, offered when one is found.

    Raises:
        ConfigurationError: Unknown or missing keys, or values of the wrong type; one line for each.
    """
    return cls(**bind(cls, values, where=where, renamed=renamed))


def bind(
    cls: Callable[..., Any], values: Mapping[str, Any], *, where: str = "", renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The checked and converted keyword arguments for ``cls``, without calling it; see :func:`construct`."""
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{_found(where, values)}: expected a mapping of options.")
    parameters, open_ended = _parameters(cls)
    problems: list[str] = []
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        path = _join(where, name)
        if name in parameters:
            try:
                arguments[name] = convert(parameters[name].annotation, value, where=path)
            except ConfigurationError as error:
                problems.append(str(error))
        elif open_ended:
            arguments[str(name)] = value
        else:
            hint = f"It is now '{renamed[name]}'." if renamed and name in renamed else nearest(name, parameters)
            problems.append(f"{_found(path, value)}: there is no such option. {hint}")
    for name, parameter in parameters.items():
        if parameter.default is _REQUIRED and name not in values:
            problems.append(f"{_join(where, name)} is missing: expected {type_name(parameter.annotation)}.")
    if problems:
        raise ConfigurationError("\n".join(problems))
    return arguments


def convert(annotation: Any, value: Any, *, where: str) -> Any:
    """``value`` as ``annotation`` says, or a :class:`ConfigurationError` that names ``where``."""
    origin = get_origin(annotation)
    if annotation is Any or annotation is _REQUIRED:
        return value
    if origin is Annotated:
        return annotation.__metadata__[0].check(value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(annotation), value, where)
    if annotation in _SCALARS:
        return _convert_scalar(annotation, value, where)
    if origin is Literal or _is_enum(annotation):
        return _convert_choice(annotation, value, where)
    if annotation == Schedule:
        return _convert_named(SCHEDULES, value, where)
    container = origin or annotation
    if isinstance(container, type) and issubclass(container, Mapping):
        if isinstance(value, Mapping):
            of = get_args(annotation)[1] if get_args(annotation) else Any
            return {key: convert(of, item, where=_join(where, key)) for key, item in value.items()}
    elif isinstance(container, type) and issubclass(container, Iterable) and container is not str:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return _convert_sequence(annotation, value, where)
    elif isinstance(annotation, type) and annotation is not types.NoneType:
        return value if isinstance(value, annotation) else construct(annotation, value, where=where)
    elif value is None and annotation in (None, types.NoneType):
        return None
    raise ConfigurationError(f"{_found(where, value)}: expected {type_name(annotation)}.")


def plain(value: Any) -> Any:
    """The inverse of :func:`construct`: what ``yaml.safe_dump`` can write, without the options left at ``None``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        options = {
            field.name: plain(option) for field, option in given if option is not None or field.default is not None
        }
        name = next((name for name, schedule in SCHEDULES.items() if type(value) is schedule), None)
        return options if name is None else {name: options}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes`` laid over them: mappings merge, anything else replaces, a dotted key is a path.

    Example:
        >>> merge({"training": {"seed": 0, "max_steps": 9}}, {"training.seed": 1})
        {'training': {'seed': 1, 'max_steps': 9}}
    """
    merged = dict(values)
    for key, value in changes.items():
        head, _, rest = str(key).partition(".")
        change = {rest: value} if rest else value
        if isinstance(change, Mapping):
            old = merged.get(head)
            change = merge(old if isinstance(old, Mapping) else {}, change)
        merged[head] = change
    return merged


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``values`` changed by ``key.path=value`` texts, each value read as YAML.

    Raises:
        ConfigurationError: A text without ``=``, or whose value is not YAML. Unknown paths are refused by
            :func:`construct`, which knows them.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise ConfigurationError(f"Override '{override}': expected key.path=value, such as training.seed=1.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigurationError(
                f"Override '{override}': '{text}' is not YAML ({error}).".replace("\n", " ")
            ) from None
        values = merge(values, {path.strip(): value})
    return dict(values)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a class as :func:`describe` shows it; ``default`` is ``None`` where the option is required."""

    name: str
    type: str
    default: str | None
    doc: str


def describe(cls: type, *, prefix: str = "") -> list[Option]:
    """The options of ``cls`` and of its sections: dotted name, type, default and what the docstring's ``Args`` say."""
    parameters, _ = _parameters(cls)
    documented = _documented_arguments(cls)
    factories = {field.name: field.default_factory for field in getattr(cls, "__dataclass_fields__", {}).values()}
    options = []
    for name, parameter in parameters.items():
        factory = factories.get(name, dataclasses.MISSING)
        value = parameter.default if factory is dataclasses.MISSING else factory()
        default = None if value is _REQUIRED else _default_text(value)
        path = f"{prefix}{name}"
        options.append(Option(path, type_name(parameter.annotation), default, documented.get(name, "")))
        for section in _sections(parameter.annotation):
            options += describe(section, prefix=f"{path}.")
    return options


def prose(cls: type) -> str:
    """The docstring of ``cls`` without the sections that :func:`describe` and the error messages cover."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return re.sub(r"^(?:Args|Parameters|Raises|Example):\n(?:[ \t]+.*\n?|\n)+", "", text, flags=re.M).strip()


def type_name(annotation: Any) -> str:
    """What a value of ``annotation`` is called in messages."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _any_of(arguments)
    if origin is Annotated:
        return "a mapping of options"
    if origin is Literal or _is_enum(annotation):
        return "one of " + ", ".join(str(choice) for choice in _choices(annotation))
    if annotation == Schedule:
        return f"a schedule ({', '.join(SCHEDULES)})"
    if annotation in (None, types.NoneType):
        return "null"
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    container = origin or annotation
    if isinstance(container, type) and issubclass(container, Mapping):
        return "a mapping"
    if isinstance(container, type) and issubclass(container, Iterable):
        items = [type_name(argument) for argument in arguments if argument is not Ellipsis]
        return f"a list of {items[0].removeprefix('a ')}" if len(items) == 1 else "a list"
    return "anything" if annotation in (Any, _REQUIRED) else "a mapping of options"


def _parameters(cls: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The keyword parameters with resolved annotations, and whether any other key is accepted too."""
    every = inspect.signature(cls).parameters.values()
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in every)
    return {name: each for name, each in _keywords(cls).items() if not _is_supplied(each)}, open_ended


def _keywords(cls: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    hinted = cls if dataclasses.is_dataclass(cls) or not isinstance(cls, type) else cls.__init__  # type: ignore[misc]
    hints = get_type_hints(hinted, include_extras=True)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind in kinds
    }


def _is_supplied(parameter: inspect.Parameter) -> bool:
    return any(isinstance(each, Supplied) for each in getattr(parameter.annotation, "__metadata__", ()))


def _convert_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            if kind is float:
                return number
            if number.is_integer():
                return int(number)
    raise ConfigurationError(f"{_found(where, value)}: expected {_SCALARS[kind]}.")


def _convert_choice(annotation: Any, value: Any, where: str) -> Any:
    if _is_enum(annotation) and isinstance(value, annotation):
        return value
    for choice in _choices(annotation):
        if value == choice and type(value) is type(choice):
            return annotation(value) if _is_enum(annotation) else value
        if isinstance(value, str) and isinstance(choice, str) and _matches_template(value, choice):
            return value
    raise ConfigurationError(f"{_found(where, value)} is not a choice. {nearest(value, _choices(annotation))}")


def _matches_template(value: str, choice: str) -> bool:
    """PEFT writes an open choice as ``pissa_niter_[number of iters]``."""
    return "[" in choice and re.fullmatch(re.sub(r"\\\[.*\\\]", r"\\w+", re.escape(choice)), value) is not None


def _convert_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in members:
        return None
    candidates = _distinct(members)
    sections = [member for member in candidates if get_origin(member) is Annotated or _is_section(member)]
    if sections and isinstance(value, Mapping):
        return convert(_nearest_section(sections, value), value, where=where)
    converted, problems = [], []
    for member in candidates:
        try:
            converted.append(convert(member, value, where=where))
        except ConfigurationError as error:
            problems.append(error)
    if not converted:
        telling = [error for error in problems if "Did you mean" in str(error)]
        if len(telling) == 1 or len(problems) == 1:
            raise (telling or problems)[0]
        raise ConfigurationError(f"{_found(where, value)}: expected {_any_of(members)}.")
    return value if any(isinstance(item, type(value)) and item == value for item in converted) else converted[0]


def _distinct(members: tuple[Any, ...]) -> list[Any]:
    """Without the ``str`` beside an enumeration, which only says that its values may be spelled out."""
    return [member for member in members if not (member is str and any(map(_is_enum, members)))]


def _any_of(members: tuple[Any, ...]) -> str:
    return " or ".join(dict.fromkeys(type_name(member) for member in _distinct(members)))


def _nearest_section(sections: Sequence[Any], values: Mapping[str, Any]) -> Any:
    if len(sections) == 1:
        return sections[0]
    return max(sections, key=lambda section: len(set(values) & set(_parameters(section)[0])))


def _convert_named(registry: Mapping[str, type], value: Any, where: str) -> Any:
    if callable(value):
        return value
    name, options = next(iter(value.items())) if isinstance(value, Mapping) and len(value) == 1 else (value, {})
    if not isinstance(name, str) or name not in registry:
        raise ConfigurationError(
            f"{_found(where, value)}: expected a name or {{name: options}}. {nearest(name, registry)}"
        )
    return construct(registry[name], options or {}, where=_join(where, name))


def _convert_sequence(annotation: Any, value: Sequence[Any], where: str) -> Any:
    kinds = [kind for kind in get_args(annotation) if kind is not Ellipsis] or [Any]
    fixed = get_origin(annotation) is tuple and Ellipsis not in get_args(annotation)
    if fixed and len(kinds) != len(value):
        raise ConfigurationError(f"{_found(where, value)}: expected {len(kinds)} values.")
    pairs = zip(kinds if fixed else kinds[:1] * len(value), value, strict=True)
    items = [convert(kind, item, where=f"{where}[{index}]") for index, (kind, item) in enumerate(pairs)]
    return tuple(items) if (get_origin(annotation) or annotation) is tuple else items


def _choices(annotation: Any) -> list[Any]:
    return [member.value for member in annotation] if _is_enum(annotation) else list(get_args(annotation))


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Enum)


def _is_section(annotation: Any) -> bool:
    """Whether a value of this type is written as a mapping of the type's own options."""
    basic = (*_SCALARS, types.NoneType, object)
    return isinstance(annotation, type) and annotation not in basic and not issubclass(annotation, (Iterable, Enum))


def _sections(annotation: Any) -> list[type]:
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [member for member in members if _is_section(member)]


def _default_text(default: Any) -> str:
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(plain(default))


def _documented_arguments(cls: type) -> dict[str, str]:
    """The ``Args`` (or ``Parameters``) of the docstrings of ``cls`` and its bases, each folded to one line."""
    documented: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = re.search(
            r"^(?:Args|Parameters):\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(base.__doc__ or ""), re.M
        )
        entries = re.split(r"^ {4}(\w+) *(?:\(.*\))?: *", section[1], flags=re.M)[1:] if section else []
        for name, text in zip(entries[::2], entries[1::2], strict=True):
            documented[name] = " ".join(re.split(r"^ {4}>", text, flags=re.M)[0].replace("``", "").split())
    return documented


def _found(where: str, value: Any) -> str:
    return f"{where or 'The recipe'} = {value!r}"


def _join(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)
