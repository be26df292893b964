"""Votability signs on a set of prose and a set of tasks: a probe's answer alone is not enough."""

from __future__ import annotations

import time

import pytest

from discovery.answers import Answer, parse_kind, read_answer
from proxy.environment.votability import LONGEST, asks_for_answer, is_votable, works_towards_answer

PROSE = [  # question, start of a branch's reply, answer of a probe that leads into a box
    ("Write a short story about a dragon.", "Once upon a time, 3 dragons lived in a cave.", "3"),
    ("Write a poem about the number 7.", "Seven stars, seven seas,\nseven sisters in the breeze", "7"),
    ("Summarise the French Revolution.", "In 1789 the Bastille fell. By 1799 Napoleon ruled.", "1789"),
    ("Write a Python function that adds two numbers.", "```python\ndef add(a, b):\n    return a + b\n```", "a+b"),
    ("Give me 5 tips for better sleep.", "1. Go to bed at 10.\n2. Avoid screens.\n3. Read.", "5"),
    ("Translate to French: I have 2 cats.", "J'ai 2 chats.", "2"),
    ("Hello! How are you today?", "I am fine, thank you. What can I do for you?", "1"),
    ("Explain how rain forms.", "Water evaporates and rises 2-3 km, cools and falls as drops.", "B"),
    ("What do you think about pineapple on pizza?", "It divides people. Some love it.", "A"),
    ("Draft an email to 12 colleagues about the party on 3/4.", "Dear all,\nthe party is on 3/4 at 18:30.", "12"),
    ("Tell me a joke.", "Why did 6 fear 7? Because 7 8 9.", "789"),
    ("Plan a trip to Rome.", "Day 1: the Colosseum, 9:00-12:00. Day 2: the Vatican.", "2"),
    ("Describe your perfect day.", "I wake at 7 and have 2 coffees.", "7"),
    ("Why is the sky blue?", "Blue light has a shorter wavelength, 450 nm, and scatters more.", "450"),
]
TASKS = [
    ("What is 12 + 15?", "12 plus 15", "27"),
    ("How many apples are left if Tom eats 3 of 8?", "<think>Tom has", "5"),
    ("Solve 2x + 3 = 7.", "<think>Okay", "2"),
    ("Find the area of a triangle with base 4 and height 6.", "<think>So", "12"),
    (r"Evaluate $\frac{3}{4} + \frac{1}{4}$.", "<think>", "1"),
    ("Which of the following is prime?\nA. 4\nB. 5", "Let me see", "B"),
    ("A train leaves at 9 and drives 100 km at 50 km/h. When does it arrive?", "It takes 100 / 50 = 2 hours", "11"),
    ("The sum of two integers is 10 and their product 21. What are they?", "<think>", "3, 7"),
    ("Please put your final answer in a box. Janet has ducks.", "<think>", "18"),
    ("Weng earns $12 an hour. Yesterday she worked 50 minutes. How much did she earn?", "<think>", "10"),
    ("What is the remainder when 7^100 is divided by 5?", "<think>", "1"),
    ("Pick one: (A) the sun (B) the moon", "<think>", "A"),
    ("Simplify the square root of 12.", "<think>", r"2\sqrt{3}"),
    ("Joe is twice as old as Ann, who is ten.", r"So Joe is $2 \times 10 = 20$", "20"),
]


def probed(answer: str) -> Answer | None:
    return read_answer(f"The final answer is \\boxed{{{answer}}}", parse_kind("auto"))


def test_tasks_are_votable_and_prose_is_not() -> None:
    wrong = [
        question for question, text, answer in PROSE if is_votable(asks_for_answer(question), text, probed(answer))
    ]
    missed = [
        question for question, text, answer in TASKS if not is_votable(asks_for_answer(question), text, probed(answer))
    ]
    assert (wrong, missed) == ([], [])


def test_a_probe_answer_that_is_a_mere_word_does_not_count() -> None:
    assert not is_votable(True, "2 + 2 = 4", None)
    assert not is_votable(True, "2 + 2 = 4", probed(r"\text{a short story}"))


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("the total = 7 so far", "7", True),
        ("the total = 70 so far", "7", False),
        ("the total = 7.5 so far", "7", False),
        ("there were 7 of them", "7", False),
        ("it is **7** in all, which equals 7.", "7", True),
        ("x = y", "y", False),
        ("12 * 3", "7", True),
        ("from 2019-2021 and 24/7", "7", False),
        ("```\nx = 2 * 3\n```", "7", False),
        ("the answer is near", "7", True),
    ],
)
def test_a_branch_s_own_text_is_a_sign(text: str, answer: str, expected: bool) -> None:
    assert is_votable(False, text, probed(answer)) is expected


def test_signs_are_searched_at_the_end_of_long_texts() -> None:
    assert not works_towards_answer("2 + 2 = 4" + "x" * LONGEST)
    assert works_towards_answer("x" * 10 * LONGEST + "2 + 2 = 4")
    assert not asks_for_answer("How many?" + "x" * LONGEST)


@pytest.mark.parametrize(
    ("question", "is_asked"),
    [
        ("Pick.\n  (a) sun\n\n \tb) moon", True),
        ("Pick.\nA.\nthe sun\nB.\nthe moon", True),
        ("Pick.\nA. \nA.\nB. moon", True),  # the second A has no text, the first has
        ("Pick.\nA.\nB. moon", False),
        ("Pick.\nB. moon\nA. sun", False),
        ("Pick.\nA. " + "sun " * 500 + "\nB. moon", False),
        ("Pick.\nA. " + "sun " * 490 + "\nB. moon", True),
        ("Pick (A)(B)", False),
        ("Pick (a) sun (A)(b)", True),
        ("Pick (A) " + "sun " * 125 + "(B)", False),
        ("Pick (A) " + "sun " * 120 + "(B)", True),
    ],
)
def test_options_are_a_label_a_with_text_before_a_label_b(question: str, is_asked: bool) -> None:
    assert asks_for_answer(question) is is_asked


@pytest.mark.parametrize("unit", ["A." + "\n" * 10, "\n" * 8 + "A. ", "(A)", "(A", "\n" * 9, "(A) \n"])
def test_many_option_labels_are_searched_in_linear_time(unit: str) -> None:
    def cost(text: str) -> float:
        """Return processor seconds, which do not depend on the machine's load."""
        costs = []
        for _ in range(3):
            started = time.process_time()
            asks_for_answer(text)
            costs.append(time.process_time() - started)
        return min(costs)

    assert cost((unit * LONGEST)[:LONGEST]) < 25 * cost(("so be it " * LONGEST)[:LONGEST])
