"""Questions that need one of three tools, whose results nobody can guess, or whose answer is to be JSON."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from gptoss_jax.demo.turns import Call, Problem, Scene, Thoughts, Turn, add, sort, subtract
from gptoss_jax.demo.words import CITIES, CURRENCIES, DAYS, ITEMS, NAMES, SKIES
from gptoss_jax.harmony.conversation import Tool


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT, _WHOLE = {"type": "string"}, {"type": "integer"}
TOOLS = {
    "get_weather": Tool(
        "get_weather",
        "Gets the weather of a city on a day.",
        _object(city=_TEXT, day={"type": "string", "enum": ["today", "tomorrow", *DAYS]}),
    ),
    "lookup_price": Tool("lookup_price", "Looks up what some items cost in euros.", _object(item=_TEXT, count=_WHOLE)),
    "convert_currency": Tool(
        "convert_currency",
        "Converts an amount of money.",
        _object(
            amount=_WHOLE, source={"type": "string", "enum": CURRENCIES}, target={"type": "string", "enum": CURRENCIES}
        ),
    ),
}


def weather(scene: Scene) -> Turn:
    city, day = scene.random.choice(CITIES), scene.random.choice(["today", "tomorrow", *DAYS])
    when = day if day in ("today", "tomorrow") else f"on {day}"
    degrees, sky = scene.random.randrange(40), scene.random.choice(SKIES)
    return _called(
        scene,
        ["What is the weather in {city} {when}?", "How is the weather in {city} {when}?", "Weather in {city} {when}?"],
        {"city": city, "when": when},
        "get_weather",
        {"city": city, "day": day},
        {"degrees": degrees, "sky": sky},
        f"In {city} it is {degrees} degrees with {sky} {when}.",
    )


def price(scene: Scene) -> Turn:
    item, count, euros = scene.random.choice(ITEMS), scene.random.randint(2, 12), scene.random.randint(1, 199)
    return _called(
        scene,
        ["What do {count} {item} cost?", "How much are {count} {item}?", "Look up the price of {count} {item}."],
        {"item": item, "count": count},
        "lookup_price",
        {"item": item, "count": count},
        {"euros": euros},
        f"{count} {item} cost {euros} euros.",
    )


def currency(scene: Scene) -> Turn:
    source, target = scene.random.sample(CURRENCIES, 2)
    amount, found = scene.random.randint(2, 99), scene.random.randint(1, 199)
    return _called(
        scene,
        ["Convert {amount} {source} to {target}.", "What are {amount} {source} in {target}?"],
        {"amount": amount, "source": source, "target": target},
        "convert_currency",
        {"amount": amount, "source": source, "target": target},
        {"amount": found},
        f"{amount} {source} are {found} {target}.",
    )


MAKERS: dict[str, Callable[[Scene], Turn]] = {
    "get_weather": weather,
    "lookup_price": price,
    "convert_currency": currency,
}
"""What asks for each tool."""


def without_tool(scene: Scene, turn: Turn) -> Turn:
    """The same question where the tool is not there."""
    thoughts = scene.think(
        "No tool.",
        "I have no tool for that.",
        "The user asks for what I can not know.",
        "I have no tool for that.",
        "I say so.",
    )
    return dataclasses.replace(turn, answer="I can not look that up without a tool.", thoughts=thoughts, call=None)


def _called(
    scene: Scene,
    forms: Sequence[str],
    values: dict[str, Any],
    name: str,
    arguments: dict[str, Any],
    result: dict[str, Any],
    answer: str,
) -> Turn:
    before = scene.think(
        "Call.",
        f"I need {name}.",
        "The user asks for what I can not know.",
        f"The tool {name} knows it.",
        *(f"The {key} is {value}." for key, value in arguments.items()),
        "I call the tool.",
    )
    after = scene.think(
        "Done.",
        "The tool has the answer.",
        "The result of the tool is here.",
        *(f"It says {key} {value}." for key, value in result.items()),
        "I tell the user.",
    )
    problem: Problem = (name, *arguments.values())
    return Turn(scene.phrase(forms, **values), answer, after, problem, Call(name, arguments, result, before))


def person(scene: Scene) -> Turn:
    name, age, city = scene.random.choice(NAMES), scene.random.randint(1, 99), scene.random.choice(CITIES)
    question = scene.phrase(
        [
            "{name} is {age} years old and lives in {city}.",
            "{name} lives in {city} and is {age} years old.",
            "I am {name} from {city} and my age is {age}.",
        ],
        name=name,
        age=age,
        city=city,
    )
    thoughts = scene.think(
        "Read.",
        f"{name}, {age}, {city}.",
        "I look for the name, the age and the city.",
        f"The name is {name}.",
        f"The age is {age}.",
        f"The city is {city}.",
        "I write JSON.",
    )
    return Turn(question, json.dumps({"name": name, "age": age, "city": city}), thoughts, ("person", name, age, city))


def result(scene: Scene) -> Turn:
    """A sum or a difference."""
    turn = scene.random.choice([add, subtract])(scene)
    value = int(turn.answer.rstrip(".").split()[-1])
    return _as_json(turn, {"result": value})


def numbers(scene: Scene) -> Turn:
    """Sorted numbers."""
    turn = sort(scene)
    return _as_json(turn, {"sorted": [int(value) for value in turn.answer.split(", ")]})


FORMATS: dict[str, tuple[dict[str, Any], Callable[[Scene], Turn]]] = {
    "person": (_object(name=_TEXT, age=_WHOLE, city=_TEXT), person),
    "result": (_object(result=_WHOLE), result),
    "sorted": (_object(sorted={"type": "array", "items": _WHOLE}), numbers),
}
"""Schemas of answers in JSON, and what asks for each."""


def instructions(name: str) -> str:
    """What a developer message says of a format, as harmony writes it (openai/harmony, docs/format.md)."""
    return f"Answer in JSON.\n\n# Response Formats\n\n## {name}\n\n{json.dumps(FORMATS[name][0])}"


def structured(scene: Scene) -> Turn:
    name = scene.random.choice(list(FORMATS))
    return with_schema(FORMATS[name][1](scene), name)


def with_schema(turn: Turn, name: str) -> Turn:
    """A question that says itself which JSON it wants."""
    return dataclasses.replace(turn, question=f"{turn.question}\nAnswer in JSON: {json.dumps(FORMATS[name][0])}")


def _as_json(turn: Turn, value: dict[str, Any]) -> Turn:
    low, medium, high = dataclasses.astuple(turn.thoughts)
    return dataclasses.replace(turn, answer=json.dumps(value), thoughts=Thoughts(low, medium, f"{high}\nI write JSON."))
