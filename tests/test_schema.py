from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from transformers import TrainingArguments

from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives import L2SP
from hf_transfer.schedules import GradualUnfreeze, Ramp, Schedule, SlantedTriangular, TopLevels
from hf_transfer.schema import apply_overrides, bind, construct, convert, describe, merge, plain


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Wheel:
    """A wheel.

    Args:
        radius: In metres,
            measured cold.
        colour: Of the rim.
    """

    radius: float
    colour: Colour = Colour.RED


@dataclass(frozen=True, kw_only=True)
class Cart:
    """A cart.

    Args:
        wheel: The one it has.
        load: What it carries.
    """

    wheel: Wheel
    load: Literal["hay", "stones"] = "hay"
    places: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    route: Path | None = None
    limit: int | str | None = None
    opening: GradualUnfreeze | TopLevels | None = None
    rate: Schedule | None = None


class Open:
    """Takes anything beside ``known``."""

    def __init__(self, *, known: int = 0, **rest: Any) -> None:
        self.known, self.rest = known, rest


def test_nested_data_becomes_typed_objects() -> None:
    cart = construct(
        Cart,
        {
            "wheel": {"radius": "1e-1", "colour": "blue"},
            "load": "stones",
            "places": ["barn", "field"],
            "notes": {"sacks": "3"},
            "route": "a/b",
            "limit": "heavy",
        },
    )
    assert cart == Cart(
        wheel=Wheel(0.1, Colour.BLUE),
        load="stones",
        places=["barn", "field"],
        notes={"sacks": 3},
        route=Path("a/b"),
        limit="heavy",
    )


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (float, 3, 3.0),
        (float, "1e-4", 1e-4),
        (int, "1e3", 1000),
        (int | str, 3, 3),
        (int | str, "3", "3"),
        (float | None, None, None),
        (bool, True, True),
        (tuple[int, int], [1, 2], (1, 2)),
        (tuple[float, ...], [1, 2, 3], (1.0, 2.0, 3.0)),
        (Mapping[str, Any], {"a": None}, {"a": None}),
        (Literal["a", 1], 1, 1),
    ],
)
def test_convert(annotation: Any, value: Any, expected: Any) -> None:
    converted = convert(annotation, value, where="x")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (int, True, "x = True: expected a whole number."),
        (int, 1.5, "x = 1.5: expected a whole number."),
        (bool, "yes", "x = 'yes': expected true or false."),
        (bool, 1, "x = 1: expected true or false."),
        (str, 3, "x = 3: expected text."),
        (float, "fast", "x = 'fast': expected a number."),
        (float | None, "fast", "x = 'fast': expected a number or null."),
        (list[str], "one", "x = 'one': expected a list of text."),
        (list[int], [1, "b"], "x[1] = 'b': expected a whole number."),
        (dict[str, int], [1], "x = [1]: expected a mapping."),
        (tuple[int, int], [1], "x = [1]: expected 2 values."),
        (Literal["hay", "stones"], "stone", "x = 'stone' is not a choice. Did you mean 'stones'?"),
        (Colour, "reed", "x = 'reed' is not a choice. Did you mean 'red'?"),
        (int | list[str], {}, "x = {}: expected a whole number or a list of text."),
        (Schedule, "rampp", "x = 'rampp': expected a name or {name: options}. Did you mean 'ramp'?"),
    ],
)
def test_wrong_values_name_path_value_and_expectation(annotation: Any, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        convert(annotation, value, where="x")
    assert str(caught.value) == message


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        construct(Cart, {"wheel": {"colour": "reed"}, "laod": "hay", "limit": [1]}, where="cart")
    assert str(caught.value).splitlines() == [
        "cart.wheel.colour = 'reed' is not a choice. Did you mean 'red'?",
        "cart.wheel.radius is missing: expected a number.",
        "cart.laod = 'hay': there is no such option. Did you mean 'load'?",
        "cart.limit = [1]: expected a whole number or text or null.",
    ]


def test_a_section_must_be_a_mapping() -> None:
    with pytest.raises(ConfigurationError, match="wheel = 3: expected a mapping of options"):
        construct(Cart, {"wheel": 3})


def test_a_constructors_own_refusal_is_kept_with_the_others() -> None:
    with pytest.raises(ConfigurationError) as caught:
        construct(Cart, {"wheel": {"radius": 1}, "opening": {"until": 2}, "load": "sand"})
    assert "share of the run" in str(caught.value)
    assert "load = 'sand'" in str(caught.value)


def test_a_union_of_sections_is_told_apart_by_its_keys() -> None:
    assert construct(Cart, {"wheel": {"radius": 1}, "opening": {"blocks": 2}}).opening == TopLevels(2)
    assert construct(Cart, {"wheel": {"radius": 1}, "opening": {"until": 0.5}}).opening == GradualUnfreeze(until=0.5)
    with pytest.raises(ConfigurationError, match="opening.untill = 1: .* Did you mean 'until'"):
        construct(Cart, {"wheel": {"radius": 1}, "opening": {"untill": 1}})


def test_schedules_are_named() -> None:
    assert convert(Schedule, "ramp", where="x") == Ramp()
    assert convert(float | Schedule, {"ramp": {"gamma": 5}}, where="x") == Ramp(gamma=5.0)
    assert convert(float | Schedule, 0.5, where="x") == 0.5
    assert construct(L2SP, {"weight": {"slanted_triangular": {"ratio": 8}}}).weight == SlantedTriangular(ratio=8.0)


def test_a_constructor_with_open_keywords_takes_any_key() -> None:
    assert construct(Open, {"known": 1, "other": {"a": 1}}).rest == {"other": {"a": 1}}


def test_functions_have_a_signature_too() -> None:
    def build(*, size: int, of: Callable[..., Any] | None = None) -> None: ...

    assert bind(build, {"size": 3}) == {"size": 3}


def test_plain_is_the_inverse_of_construct() -> None:
    values = {
        "wheel": {"radius": 0.1, "colour": "blue"},
        "load": "hay",
        "places": ["barn"],
        "notes": {},
        "route": "a/b",
        "opening": {"until": 0.5},
        "rate": {"ramp": {"gamma": 5.0}},
    }
    assert plain(construct(Cart, values)) == values
    assert yaml.safe_load(yaml.safe_dump(plain(construct(Cart, values)))) == values


def test_plain_keeps_a_null_that_is_not_the_default() -> None:
    @dataclass
    class Lamp:
        bulb: Wheel | None = field(default_factory=lambda: Wheel(1.0))
        shade: int | None = 3
        cord: int | None = None

    assert plain(Lamp(bulb=None, shade=None)) == {"bulb": None, "shade": None}


def test_merge_lays_mappings_over_mappings() -> None:
    assert merge({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2], "e.f": 4}) == {
        "a": {"b": 3, "c": 2},
        "d": [2],
        "e": {"f": 4},
    }


def test_merge_leaves_its_arguments_alone() -> None:
    values = {"a": {"b": 1}}
    merge(values, {"a.b": 2})
    assert values == {"a": {"b": 1}}


def test_overrides_are_yaml() -> None:
    values = apply_overrides(
        {"training": {"seed": 0}},
        ["training.learning_rate=1e-4", "training.seed=3", "data.columns={text: body}", "adapter=null", "a.b.c=x=y"],
    )
    assert values == {
        "training": {"seed": 3, "learning_rate": "1e-4"},
        "data": {"columns": {"text": "body"}},
        "adapter": None,
        "a": {"b": {"c": "x=y"}},
    }


@pytest.mark.parametrize("override", ["training.seed", "=3", "a=[1"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(ConfigurationError, match="Override") as caught:
        apply_overrides({}, [override])
    assert "\n" not in str(caught.value)


def test_training_arguments_are_checked_by_their_fields() -> None:
    good = {
        "learning_rate": "1e-4",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "eval_strategy": "epoch",
        "lr_scheduler_kwargs": {"num_cycles": 1},
    }
    assert bind(TrainingArguments, good) == {**good, "learning_rate": 1e-4}
    with pytest.raises(ConfigurationError) as caught:
        bind(
            TrainingArguments,
            {"evaluation_strategy": "epoch", "lr_scheduler_type": "cosin", "learningrate": 1},
            where="training",
            renamed={"evaluation_strategy": "eval_strategy"},
        )
    assert str(caught.value).splitlines() == [
        "training.evaluation_strategy = 'epoch': there is no such option. It is now 'eval_strategy'.",
        "training.lr_scheduler_type = 'cosin' is not a choice. Did you mean 'cosine'?",
        "training.learningrate = 1: there is no such option. Did you mean 'learning_rate'?",
    ]


def test_open_choices_of_peft_pass() -> None:
    from peft import LoraConfig

    assert bind(LoraConfig, {"init_lora_weights": "pissa_niter_16"}) == {"init_lora_weights": "pissa_niter_16"}
    with pytest.raises(ConfigurationError, match="adapter.init_lora_weights"):
        bind(LoraConfig, {"init_lora_weights": "pissa_iter_16"}, where="adapter")


def test_describe_opens_sections_and_reads_the_docstring() -> None:
    options = {option.name: option for option in describe(Cart)}
    assert options["wheel"].default is None
    assert options["wheel"].doc == "The one it has."
    assert options["wheel.radius"].type == "a number"
    assert options["wheel.radius"].doc == "In metres, measured cold."
    assert options["wheel.colour"].default == "red"
    assert options["load"].type == "one of hay, stones"
    assert options["opening.until"].doc.startswith("Share of the run")
    assert options["rate"].type == "a schedule (ramp, slanted_triangular) or null"


def test_describe_reads_transformers_docstrings() -> None:
    options = {option.name: option for option in describe(TrainingArguments)}
    assert options["seed"].default == "42"
    assert options["seed"].doc.startswith("Random seed")
    assert "linear" in options["lr_scheduler_type"].type
