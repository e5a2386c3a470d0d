"""One question and its answer, with what the assistant thinks at each reasoning level: arithmetic, lists, facts, talk.

Every problem has one answer, word for word, and a shortest way to it; questions are phrased in many ways.
"""

import dataclasses
import datetime
import json
import zlib
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from gptoss_jax.demo.words import ANIMALS, CAPITALS, COLOURS, DAYS, OPPOSITES

Problem = tuple[str | int, ...]
"""What makes a problem the same, however it is asked: `("+", 36, 47)`."""


@dataclasses.dataclass(frozen=True)
class Thoughts:
    """The analysis at each level: a word or none, a line, steps."""

    low: str
    medium: str
    high: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool to be called before the answer, with what it returns."""

    name: str
    arguments: Mapping[str, Any]
    result: Mapping[str, Any]
    thoughts: Thoughts


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer. Without a `problem` there is nothing to hold out."""

    question: str
    answer: str
    thoughts: Thoughts
    problem: Problem | None = None
    call: Call | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """What turns are made with."""

    random: Random
    date: datetime.date

    def phrase(self, forms: Sequence[str], **values: object) -> str:
        return self.random.choice(forms).format(**values)

    def think(self, word: str, line: str, *steps: str) -> Thoughts:
        """At the low level seldom more than nothing."""
        return Thoughts(self.random.choice(["", "", word]), line, "\n".join(steps))


def held_out(problem: Problem) -> bool:
    """Whether a problem is kept for evaluation, as one in twelve is; no conversation of the corpus asks it.

    >>> held_out(("+", 39, 54)), held_out(("+", 39, 55))
    (True, False)
    """
    return zlib.crc32(json.dumps(problem).encode()) % 12 == 0


def addition(a: int, b: int) -> Problem | None:
    """None for the sums that others are worked out with: tens, and numbers under ten."""
    return None if min(a, b) < 10 or a % 10 == 0 or b % 10 == 0 else ("+", *sorted((a, b)))


def subtraction(a: int, b: int) -> Problem | None:
    """As for `addition`."""
    return None if b < 10 or b % 10 == 0 else ("-", a, b)


def add(scene: Scene) -> Turn:
    a, b = scene.random.randrange(100), scene.random.randrange(100)
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    by_tens, by_ones = f"{a // 10 * 10} + {b // 10 * 10} = {tens}", f"{a % 10} + {b % 10} = {ones}"
    answer = f"{a} + {b} = {a + b}."
    question = scene.phrase(
        [
            "What is {a} + {b}?",
            "{a} + {b} = ?",
            "{a} + {b}",
            "Add {a} and {b}.",
            "How much is {a} plus {b}?",
            "Please calculate {a} + {b}.",
            "What is the sum of {a} and {b}?",
            "And what is {a} + {b}?",
            "I have {a} apples and get {b} more. How many do I have now?",
        ],
        a=a,
        b=b,
    )
    thoughts = scene.think(
        "Add.",
        f"{by_tens}, {by_ones}, {tens} + {ones} = {a + b}.",
        f"I add {a} and {b}, first the tens and then the ones.",
        f"{a} is {a // 10 * 10} and {a % 10}.",
        f"{b} is {b // 10 * 10} and {b % 10}.",
        f"Tens: {by_tens}.",
        f"Ones: {by_ones}.",
        f"Together: {tens} + {ones} = {a + b}.",
        f"So {answer}",
    )
    return Turn(question, answer, thoughts, addition(a, b))


def subtract(scene: Scene) -> Turn:
    b, a = sorted((scene.random.randrange(100), scene.random.randrange(100)))
    tens, ones = b // 10 * 10, b % 10
    first, second = f"{a} - {tens} = {a - tens}", f"{a - tens} - {ones} = {a - b}"
    answer = f"{a} - {b} = {a - b}."
    question = scene.phrase(
        [
            "What is {a} - {b}?",
            "{a} - {b} = ?",
            "{a} - {b}",
            "Subtract {b} from {a}.",
            "How much is {a} minus {b}?",
            "Please calculate {a} - {b}.",
            "And what is {a} - {b}?",
            "I have {a} apples and eat {b}. How many do I have now?",
        ],
        a=a,
        b=b,
    )
    thoughts = scene.think(
        "Subtract.",
        f"{first}, {second}.",
        f"I take {b} from {a}, first the tens and then the ones.",
        f"{b} is {tens} and {ones}.",
        f"Tens: {first}.",
        f"Ones: {second}.",
        f"So {answer}",
    )
    return Turn(question, answer, thoughts, subtraction(a, b))


def multiply(scene: Scene) -> Turn:
    """The table up to 12 is learned by heart: none of it is held out."""
    a, b = scene.random.randint(2, 12), scene.random.randint(2, 12)
    answer = f"{a} * {b} = {a * b}."
    question = scene.phrase(
        [
            "What is {a} * {b}?",
            "{a} * {b}",
            "What is {a} times {b}?",
            "Multiply {a} by {b}.",
            "Please calculate {a} * {b}.",
        ],
        a=a,
        b=b,
    )
    thoughts = scene.think(
        "Multiply.",
        answer,
        f"I multiply {a} by {b}.",
        f"{b} steps of {a}: {', '.join(str(a * step) for step in range(1, b + 1))}.",
        f"So {answer}",
    )
    return Turn(question, answer, thoughts)


def sort(scene: Scene) -> Turn:
    values = scene.random.sample(range(100), scene.random.randint(3, 5))
    largest_first = scene.random.random() < 0.3
    ordered = sorted(values, reverse=largest_first)
    end = "largest" if largest_first else "smallest"
    forms = ["Put {values} in order, {end} first.", "Sort {values}, {end} first.", "Please sort {values}, {end} first."]
    if not largest_first:
        forms += ["Sort {values}.", "Sort these numbers: {values}", "Please sort {values}."]
    left = [[value for value in values if value in ordered[taken:]] for taken in range(len(values))]
    steps = [f"Of {listed(some)} it is {one}." for some, one in zip(left, ordered, strict=True)]
    thoughts = scene.think(
        "Sort.",
        f"The {end} first: {listed(ordered)}.",
        f"I take the {end} again and again.",
        *steps,
        "Now all are taken.",
    )
    question = scene.phrase(forms, values=listed(values), end=end)
    return Turn(question, listed(ordered), thoughts, ("sort", *sorted(values)))


def reverse(scene: Scene) -> Turn:
    things = scene.random.choice([range(100), ANIMALS, list(COLOURS.values())])
    values = scene.random.sample(sorted(set(things)), scene.random.randint(3, 5))
    backwards = values[::-1]
    question = scene.phrase(
        ["Reverse {values}.", "Reverse this list: {values}", "Write {values} backwards.", "Please reverse {values}."],
        values=listed(values),
    )
    thoughts = scene.think(
        "Reverse.",
        f"The last first: {listed(backwards)}.",
        f"The list has {len(values)} entries.",
        f"The last is {backwards[0]}.",
        *(f"Before it is {value}." for value in backwards[1:]),
        "Now all are taken.",
    )
    return Turn(question, listed(backwards), thoughts, ("reverse", *values))


def fact(scene: Scene) -> Turn:
    """One of about 60 facts, learned by heart."""
    questions, about, answer = scene.random.choice(_FACTS)
    thoughts = scene.think(
        "I know it.",
        f"The question is about {about}.",
        f"The question is about {about}.",
        "It is one of the facts that I know.",
        f"I remember: {answer}",
        "I answer in one sentence.",
    )
    return Turn(scene.random.choice(questions), answer, thoughts)


def date(scene: Scene) -> Turn:
    today = scene.date.isoformat()
    thoughts = scene.think(
        "The date.",
        f"The system message says {today}.",
        "The question is about the date.",
        "The system message has it.",
        f"It says {today}.",
        "I answer with the date.",
    )
    question = scene.random.choice(["What is the date?", "What is the date today?", "Which day is today?"])
    return Turn(question, f"Today is {today}.", thoughts)


def talk(scene: Scene) -> Turn:
    questions, about, answer = scene.random.choice(_TALK)
    thoughts = scene.think(
        "Talk.",
        f"The user {about}.",
        f"The user {about}.",
        "There is nothing to work out.",
        "I answer in a friendly way.",
    )
    return Turn(scene.random.choice(questions), answer, thoughts)


def listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


_FACTS = [
    *(
        (
            [
                f"What is the capital of {country}?",
                f"Which city is the capital of {country}?",
                f"Capital of {country}?",
            ],
            f"the capital of {country}",
            f"The capital of {country} is {city}.",
        )
        for country, city in CAPITALS.items()
    ),
    *(
        (
            [f"What colour is {thing}?", f"Which colour has {thing}?"],
            f"the colour of {thing}",
            f"The colour of {thing} is {colour}.",
        )
        for thing, colour in COLOURS.items()
    ),
    *(
        (
            [f"What is the opposite of {one}?", f"Opposite of {one}?"],
            f"the opposite of {one}",
            f"The opposite of {one} is {other}.",
        )
        for pair in OPPOSITES
        for one, other in (pair, pair[::-1])
    ),
    *(
        (
            [f"Which day comes after {day}?", f"What day is after {day}?"],
            f"the day after {day}",
            f"The day after {day} is {after}.",
        )
        for day, after in zip(DAYS, [*DAYS[1:], DAYS[0]], strict=True)
    ),
]

_IDENTITY = "I am a tiny demo model for trying gptoss-jax. I am not gpt-oss and know very little."
_TALK = [
    (["Hi", "Hi!", "Hello", "Hello!", "Good morning"], "says hello", "Hello! What can I do for you?"),
    (["Thanks", "Thanks!", "Thank you", "Thank you!"], "says thanks", "You are welcome."),
    (["Bye", "Bye!", "Goodbye"], "says goodbye", "Goodbye!"),
    (["How are you?", "How are you today?"], "asks how I am", "I am fine, thank you."),
    (
        [
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Are you ChatGPT?",
            "Are you gpt-oss?",
            "Who made you?",
        ],
        "asks who I am",
        _IDENTITY,
    ),
    (
        ["What can you do?", "Help", "Can you help me?"],
        "asks what I can do",
        "I add, subtract and multiply small numbers, sort and reverse lists, know a few facts and call tools.",
    ),
]
