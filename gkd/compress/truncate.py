"""Teacher-free truncation: a student made of some of a model's layers (Jha et al., arXiv 2305.14864).

Embeddings, final norm, head and width stay; what the removed layers did is learned again by continued pretraining.
`gkd.compress.strategies` says which layers are kept.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Place = tuple[str, str]
"""Dotted name of a module, and an attribute of it."""


def truncated_config(config: Any, layers: Sequence[int]) -> Any:
    """The config of a model of these layers alone, as it is read from a file.

    Args:
        config: a causal language model's; it is not changed.
        layers: which are kept, in order.

    Raises:
        ValueError: as for `truncate`.
    """
    from transformers import AutoModelForCausalLM

    return _plan(config, layers, AutoModelForCausalLM.from_config).config


def truncate(model: Any, layers: Sequence[int]) -> Any:
    """Remove all other layers from a model, in place: no weight is copied, and those of removed layers are let go.

    Args:
        model: a `PreTrainedModel` for causal language modelling, whose decoder has its layers in a `ModuleList`.
        layers: which are kept, in order.

    Returns:
        The model.

    Raises:
        ValueError: if its layers cannot be found, or if a layer would be another one in its new place: one whose
            attention, scale or experts go by its number in a way that no list in the config says. Nothing is changed.
    """
    plan = _plan(model.config, layers, type(model))
    stack = model.get_submodule(plan.stack)
    for index in reversed(range(len(stack))):
        if index not in layers:
            del stack[index]
    for config in _configs(model):
        _shorten(config, layers)
    for (name, attribute), value in plan.settings.items():
        setattr(model.get_submodule(name), attribute, value)
    return model


@dataclass(frozen=True, slots=True)
class _Plan:
    """What becomes of a model."""

    config: Any
    """The smaller one's."""
    stack: str
    """Dotted name of the list of layers."""
    settings: dict[Place, object]
    """What modules have to know otherwise, once the layers are removed: above all each layer's own number."""


def _plan(config: Any, layers: Sequence[int], build: Callable[[Any], Any]) -> _Plan:
    """Compare the model with the one that its truncated config makes, both built without memory."""
    _check_layers(config, layers)
    shortened = copy.deepcopy(config)
    _shorten(shortened.get_text_config(decoder=True), layers)
    try:
        shortened = type(config).from_dict(shortened.to_dict())  # what is derived from other fields is derived again
        with torch.device("meta"):
            before, after = build(copy.deepcopy(config)), build(copy.deepcopy(shortened))
    except Exception as error:  # configs that do not fit together fail in each architecture's own way
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
        raise ValueError(f"no {type(config).__name__} of {len(layers)} layers can be made ({reason})") from None
    stack = _find_stack(before)
    if _find_stack(after) != stack:
        raise ValueError(f"{type(before).__name__} keeps its layers elsewhere when there are fewer")
    tied = [name for pair in before.all_tied_weights_keys.items() for name in pair]
    if shared := [name for name in tied if name.startswith(f"{stack}.")]:
        raise ValueError(f"layers of {type(before).__name__} share weights: {shared[0]}")
    settings = _compare_layers(before.get_submodule(stack), after.get_submodule(stack), stack, layers)
    return _Plan(shortened, stack, settings | _compare_rest(before, after, stack))


def _check_layers(config: Any, layers: Sequence[int]) -> None:
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    if config.is_encoder_decoder:
        raise ValueError(f"{type(config).__name__} is an encoder with a decoder: only decoders can be truncated")
    in_order = all(a < b for a, b in itertools.pairwise(layers))
    if not layers or not in_order or layers[0] < 0 or layers[-1] >= num_layers:
        raise ValueError(f"layers {list(layers)} have to be different, in order, and within 0..{num_layers - 1}")


def _shorten(config: Any, layers: Sequence[int]) -> None:
    """Adapt a text config: the number of layers, and everything that it lists layer by layer."""
    num_layers = config.num_hidden_layers
    for name, value in _lists(config):
        if len(value) == num_layers:
            setattr(config, name, [value[index] for index in layers])
    if isinstance(first := getattr(config, "max_window_layers", None), int):  # layers before it have no window
        config.max_window_layers = sum(index < first for index in layers)
    config.num_hidden_layers = len(layers)


def _lists(config: Any) -> list[tuple[str, Sequence[Any]]]:
    """Lists that may have an entry for each layer: not token ids, and nothing that every config has."""
    from transformers import PreTrainedConfig

    general = vars(PreTrainedConfig())
    return [
        (name, value)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and name not in general and not name.startswith("_") and "token" not in name
    ]


def _configs(model: Any) -> Iterator[Any]:
    """A model's text config, and the copies of it that modules of its decoder hold."""
    text = model.config.get_text_config(decoder=True)
    held = [getattr(module, "config", None) for module in model.get_decoder().modules()]
    found = {id(config): config for config in [text, *held] if isinstance(config, type(text))}
    yield from found.values()


def _find_stack(model: Any) -> str:
    """Dotted name of the outermost list under the decoder that has as many modules as there are layers."""
    decoder = model.get_decoder()
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    inside = {id(module) for module in decoder.modules()}
    found = [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    ]
    depth = min((name.count(".") for name in found), default=0)
    outermost = [name for name in found if name.count(".") == depth]
    if len(outermost) != 1:
        many = f"several lists of {num_layers} modules: {', '.join(outermost)}" if outermost else "no list of layers"
        raise ValueError(f"{type(model).__name__} has {many}")
    return outermost[0]


def _compare_layers(before: Any, after: Any, stack: str, layers: Sequence[int]) -> dict[Place, object]:
    """The numbers by which kept layers know their place.

    Raises:
        ValueError: if one differs from what is built in its place by anything else.
    """
    changed: dict[Place, object] = {}
    for place, index in enumerate(layers):
        _check_same(_structure(before[index]), _structure(after[place]), f"layer {index} in the place of layer {place}")
        old, new = _settings(before[index]), _settings(after[place])
        for (name, attribute), value in new.items():
            was = old.get((name, attribute))
            if type(was) is type(value) is int and (was, value) == (index, place):
                changed[".".join(filter(None, [stack, str(place), name])), attribute] = value
                old[name, attribute] = value
        _check_same(old, new, f"layer {index} in the place of layer {place}")
    return changed


def _compare_rest(before: Any, after: Any, stack: str) -> dict[Place, object]:
    """Settings outside the layers that follow from which layers there are.

    Raises:
        ValueError: if weights outside the layers go by how many layers there are.
    """
    inside = f"{stack}."
    weights, fewer = (
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith(inside)}
        for model in (before, after)
    )
    _check_same(weights, fewer, "what is outside its layers")
    old, new = _settings(before), _settings(after)
    return {
        (name, attribute): value
        for (name, attribute), value in new.items()
        if not name.startswith(inside) and old.get((name, attribute)) != value
    }


def _check_same(before: Mapping[Any, object], after: Mapping[Any, object], what: str) -> None:
    for key in {**before, **after}:
        was, becomes = (repr(found[key]) if key in found else "not there" for found in (before, after))
        if was != becomes:
            name = ".".join(filter(None, key)) if isinstance(key, tuple) else key
            raise ValueError(f"{what} would not be the same: {name or 'its class'} is {was} and would be {becomes}")


def _structure(layer: Any) -> dict[str, object]:
    """Classes of modules and shapes of their tensors, by name."""
    classes = {name: type(part).__name__ for name, part in layer.named_modules()}
    tensors = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
    return classes | {name: tuple(tensor.shape) for name, tensor in tensors}


def _settings(module: Any) -> dict[Place, object]:
    """Plain attributes of modules: what makes two of the same class and shape compute differently."""
    return {
        (name, attribute): tuple(value) if isinstance(value, list) else value  # a tuple is a list once it was in a file
        for name, part in module.named_modules()
        for attribute, value in vars(part).items()
        if not attribute.startswith("_") and isinstance(value, bool | int | float | str | list | tuple | None)
    }
