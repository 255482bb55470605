"""From a YAML file and `key=value` overrides to a checked config, with errors that a user can act on."""

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gkd.config.built import refuse_unbuilt
from gkd.config.schema import Config
from gkd.config.stages import StageConfig, StageError, completed, in_stage
from gkd.errors import UserError, unreadable


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read, override and check a config.

    Args:
        path: the YAML file.
        overrides: `"section.key=value"`, the value in YAML; they reach into absent sections.

    Raises:
        UserError: naming the field, its value and the cure.
    """
    tree = _read_yaml(Path(path))
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Check a config given as nested dictionaries.

    Raises:
        UserError: naming the field, its value and the cure.
    """
    tree = completed(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise _user_error(error.errors(), tree) from None
    refuse_unbuilt(config)
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML; loading it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("CONFIG", str(path), unreadable(error), "Give the path of a YAML file.") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError("CONFIG", str(path), f"is not valid YAML: {error}.", "Mend the line named.") from None
    if not isinstance(tree, dict):
        raise UserError("CONFIG", str(path), "holds no mapping of sections.", "Start from a file in configs/.")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    names = key.split(".")
    if not separator or not all(names):
        raise UserError("override", override, "is not of the form section.key=value.", "Example: trainer.max_steps=10")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise UserError("override", override, "its value is not valid YAML.", "Quote the value.") from None
    node: Any = tree
    for depth, name in enumerate(names):
        entry = _entry(node, name, above=".".join(names[:depth]), override=override)
        if depth == len(names) - 1:
            node[entry] = value
        elif isinstance(node, dict) and node.get(entry) is None:
            node[entry] = {}
        node = node[entry]


def _entry(node: Any, name: str, *, above: str, override: str) -> str | int:
    """`name` as a key of `node`, which is found under `above`: as it is in a section, a number in a list."""
    if isinstance(node, dict):
        return name
    if not isinstance(node, list):
        raise UserError("override", override, f"{above} is a value, not a section.", "Correct the dotted key.")
    if not name.isdecimal() or int(name) >= len(node):
        raise UserError(
            "override", override, f"{above} is a list of {len(node)}.", f"Name an entry by its number: {above}.0"
        )
    return int(name)


def _user_error(errors: list[ErrorDetails], tree: dict[str, Any]) -> UserError:
    """The first error as the user's; several at once are counted."""
    # A typo explains what seems missing, and what stages bring is wrong outside of them, too.
    first = min(errors, key=lambda error: (error["type"] != "extra_forbidden", error["loc"][:1] != ("stages",)))
    if isinstance(failed := first.get("ctx", {}).get("error"), StageError):
        stage = StageConfig.model_validate(tree["stages"][failed.number])
        return in_stage(_user_error(failed.error.errors(), stage.applied_to(tree)), failed.number, stage)
    more = f" ({len(errors) - 1} more after this one.)" if len(errors) > 1 else ""
    field, value, problem, cure = _describe(first, tree)
    return UserError(field, value, problem, cure + more)


def _describe(error: ErrorDetails, tree: dict[str, Any]) -> tuple[str, object, str, str]:
    names = _field_names(error["loc"], tree)
    field, value = ".".join(names) or "config", error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = _known_keys(error["loc"][:-1])
            if names[0] == "stages" and names[-1] in _known_keys(tuple(names[2:-1])):
                cure = f"Set it outside of `stages`. A stage may set here: {', '.join(known)}."
                cure = "A stage's length is its `steps`." if names[-1] == "max_steps" else cure
                return field, value, "is the same in all stages.", cure
            nearest = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.4)
            hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
            return field, value, "is not a known key.", f"{hint}Known here: {', '.join(known)}."
        case "missing":
            return field, None, "is missing.", "Add it."
        case "union_tag_invalid" | "union_tag_not_found":
            tag = value.get("type") if isinstance(value, dict) else value
            expected = str(error.get("ctx", {}).get("expected_tags", "")).replace("'", "")
            expected = expected or "a mapping with a `type`"
            return f"{field}.type", tag, "is not a known type.", f"Use one of: {expected}."
        case "value_error":
            message = str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
            if not names:  # a check that spans sections names its field itself
                field, _, message = message.partition(": ")
                field, _, shown = field.partition(" = ")
                return field, yaml.safe_load(shown) if shown else None, "does not fit the rest.", _sentence(message)
            return field, value, "is not accepted.", _sentence(message)
        case _:
            return field, value, "is not accepted.", _sentence(error["msg"])


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _field_names(loc: tuple[int | str, ...], tree: dict[str, Any]) -> list[str]:
    """The location as the user wrote it: without what pydantic adds to name the members of a union, and without the
    number of a list's only entry where the list around it was left out."""
    names: list[str] = []
    node: Any = tree
    for name, _, is_tag in _walk(loc):
        if isinstance(node, list) and isinstance(name, int):
            node = node[name]
        elif isinstance(node, dict) and isinstance(name, str) and not is_tag:
            node = node.get(name)
        else:
            continue
        names.append(str(name))
    return names


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = Config
    for _, model, _ in _walk(loc):  # noqa: B007  the last one counts
        pass
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _walk(loc: tuple[int | str, ...]) -> list[tuple[int | str, Any, bool]]:
    """Each part of a location with the type found there, and whether the part is a union's tag."""
    found: list[tuple[int | str, Any, bool]] = []
    annotation: Any = Config
    for part in loc:
        if isinstance(part, int):  # an entry of a list, whose annotation is already that of its entries
            found.append((part, annotation, False))
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            known = annotation.model_fields.get(str(part))
            annotation = _unwrap(known.annotation) if known else None
            found.append((part, annotation, False))
            continue
        tagged = [model for model in _models_in(annotation) if _tag_of(model) == part]
        if tagged:
            annotation = tagged[0]
        found.append((part, annotation, bool(tagged)))
    return found


def _unwrap(annotation: Any) -> Any:
    models = _models_in(annotation)
    return models[0] if len(models) == 1 else annotation


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


def _tag_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    choices = get_args(field.annotation) if field else ()
    return choices[0] if choices else None
