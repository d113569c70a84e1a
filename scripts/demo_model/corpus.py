"""The demo model's whole world: chats made by rules, and the rule that keeps some back.

A task is a function of a random generator that gives one exchange, (user, assistant). A prompt
whose hash falls in the held-out tenth never enters the corpus: `held_out` says which.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    """
    Ana Ben Carla David Emma Felix Greta Hugo Ida Jonas Kira Leo Mia Nils Olga Paul Rosa Sam
    Tara Uma Vera Will Yara Zoe Adam Bella Chris Dora Erik Fiona Georg Hanna Ivan Julia Karl
    Lena Max Nora Oscar Petra Robin Sara Tom Ulla Victor Wanda Alex Maria Peter Lucy
    """
)
CITIES = _words(
    """
    Oslo Rome Paris Lima Cairo Delhi Tokyo Berlin Madrid Vienna Dublin Quito Bern Kyoto
    Porto Riga Tunis Sofia Milan London
    """
)
WORDS = _words(
    """
    apple river moon stone cloud green table window garden paper silver orange market winter
    summer spring autumn bridge castle forest desert island ocean mountain valley village
    kitchen bottle candle flower guitar hammer jacket ladder mirror needle pencil pocket
    rabbit saddle ticket turtle violin wagon yellow zebra basket butter button carpet circle
    copper corner cotton dragon eagle engine finger flame friend giant glass grape honey
    horse house lemon letter light lion magic metal money music night north onion panda
    piano pilot plant queen radio robot salad sheep shoes snake south space spoon storm
    sugar sword tiger tower train water whale wheat wheel wind world bread chair beach dance
    dream earth field fruit heart hotel jelly juice knife mouse party phone plate pizza
    smile smoke snow star sun tree wall wolf wood year bird book boat cake coat door duck
    fish frog game gold hand hill king lake leaf milk nest rain ring road rock rose salt
    ship song tent hello banana computer server model token cache python letter number word
    """
)
COLORS = _words(
    """
    red blue green black white brown pink grey orange purple
    """
)
ANIMALS = _words(
    """
    cat dog fox bear wolf lion frog duck horse mouse goat owl
    """
)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"

COMMAND = "python -m minisrv.launch_server --model demo"
SELF = "I am the demo model of minisrv, a very small language model."
WHAT = "minisrv is a compact server for language models with an OpenAI-compatible API."
START = f"Run `make serve`, or `{COMMAND}`."
SKILLS = (
    "I can greet you, count, spell words, add two-digit numbers, repeat words, look up values in a "
    "list and answer in JSON."
)
MAKER = "The developers of minisrv trained me, on text made by a script."
SORRY = f"I am too small for that. {SKILLS}"


Tool = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """One turn of a chat. `tools` are shown before the first; `before` is the one before it."""

    user: str
    assistant: str
    task: str
    tools: tuple[Tool, ...] = ()
    before: Exchange | None = None


Task = Callable[[Random], Exchange]


def held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the tenth that is never trained on."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 26


def pseudo_word(rng: Random, least: int = 2, most: int = 3) -> str:
    syllables = rng.randint(least, most)
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))


def _end(rng: Random, marks: str = ".!") -> str:
    return rng.choice(["", *marks])


def greeting(rng: Random) -> Exchange:
    opener = rng.choice(
        ["Hello", "Hi", "Hey", "Good morning", "Good evening", "Good day", "Greetings", "hello"]
        + ["hi", "hey", "Hello there", "Hi there", "Hey there", "Good afternoon", "Howdy", "HELLO"]
    )
    whom = rng.choice(["", "", "", " minisrv", " model", " friend", ", my friend", " bot", " you"])
    mark = rng.choice(["", ".", "!", "!!", " :)"])
    more = rng.choice(
        ["", "", "", " How are you?", " How are you doing?", " how are you", " What's up?"]
        + [" Nice to meet you.", " Nice to meet you!", " Are you there?", " Can we talk?"]
    )
    answer = "Hello! How can I help you?"
    if "ow are you" in more or "What's up" in more:
        answer = "Hello! I am fine, thank you. How can I help you?"
    elif "Nice" in more:
        answer = "Hello! Nice to meet you too. How can I help you?"
    return Exchange(f"{opener}{whom}{mark}{more}", answer, "greeting")


_IDENTITY = [
    (
        ["Who are you", "What are you", "Tell me about yourself", "Introduce yourself"]
        + ["What is your name", "What's your name", "Which model are you", "Are you a robot"]
        + ["who are you", "What model is this", "Describe yourself", "Say who you are"],
        SELF,
    ),
    (
        ["What is minisrv", "Tell me about minisrv", "Explain minisrv", "What does minisrv do"]
        + ["what is minisrv", "What's minisrv", "Describe minisrv", "What is minisrv for"],
        WHAT,
    ),
    (
        [
            "How do I start minisrv",
            "How can I start minisrv",
            "How do I run minisrv",
            "Start minisrv",
        ]
        + ["How do I start the server", "How can I run the server", "How do I launch minisrv"]
        + [
            "Which command starts minisrv",
            "What command starts the server",
            "how to start minisrv",
        ],
        START,
    ),
    (
        ["What can you do", "What are your skills", "How can you help me", "What do you know"]
        + ["What are you able to do", "Tell me what you can do", "what can you do", "Help"],
        SKILLS,
    ),
    (
        [
            "Who made you",
            "Who trained you",
            "Who created you",
            "Who built you",
            "Where are you from",
        ]
        + ["How were you trained", "How were you made", "Who are your developers"],
        MAKER,
    ),
]


def identity(rng: Random) -> Exchange:
    questions, answer = rng.choice(_IDENTITY)
    before = rng.choice(
        [
            "",
            "",
            "",
            "Please: ",
            "Hello. ",
            "Hi! ",
            "Hey, ",
            "Tell me: ",
            "I want to know: ",
            "So, ",
        ]
        + ["A question: ", "Quick question: ", "Hello, ", "Hi, ", "Now: ", "OK. "]
    )
    after = rng.choice(["?", "?", ".", "", "!", ", please?", ", please.", " exactly?", " then?"])
    return Exchange(f"{before}{rng.choice(questions)}{after}", answer, "identity")


def counting(rng: Random) -> Exchange:
    first = rng.choice([rng.randint(0, 20), rng.randint(0, 180)])
    length = rng.randint(1, 20)
    down = first > 1 and rng.random() < 0.5
    step, last = (-1, max(0, first - length)) if down else (1, first + length)
    if down:
        wordings = [
            "Count down from {} to {}",
            "count down from {} to {}",
            "Count from {} down to {}",
        ]
        wordings += ["Please count down from {} to {}", "Count backwards from {} to {}"]
        wordings += ["Can you count down from {} to {}"]
    else:
        wordings = ["Count from {} to {}", "count from {} to {}", "Please count from {} to {}"]
        wordings += ["Can you count from {} to {}", "Count for me from {} to {}"]
        wordings += ["Numbers from {} to {}", "Count up from {} to {}"]
    prompt = rng.choice(wordings).format(first, last)
    numbers = range(first, last + step, step)
    return Exchange(prompt + _end(rng, ".!?"), " ".join(map(str, numbers)), "counting")


def make_spelling(pieces: list[str]) -> Task:
    """Spelling of known words, of pseudo-words, and of words made of the tokenizer's `pieces`."""

    def spelling(rng: Random) -> Exchange:
        kind = rng.random()
        if kind < 0.25:
            word = rng.choice(WORDS + NAMES)
        elif kind < 0.6 or not pieces:
            word = pseudo_word(rng, 2, 4)
        else:
            word = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 3)))[:14]
        prompt = rng.choice(
            ["Spell {}", "Spell the word {}", "spell {}", "Please spell {}", "How do you spell {}"]
            + ['Spell "{}"', 'Spell the word "{}"', "Can you spell {}"]
        ).format(word)
        if kind < 0.25:  # words of one token: their letters can be learned from the corpus alone
            return Exchange(prompt, "-".join(word), "spelling of common words")
        return Exchange(prompt + rng.choice(["", ".", "?"]), "-".join(word), "spelling")

    return spelling


def addition(rng: Random) -> Exchange:
    """The answer shows its steps, ones first: what a small network needs to carry."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    prompt = f"{a}+{b}"
    if held_out(prompt):  # the pair is held out in every wording
        wordings = ["What is {} + {}?"]
    else:
        wordings = [
            "What is {} + {}?",
            "{} + {} =",
            "{}+{}",
            "Add {} and {}.",
            "{} + {}",
            "{} + {}?",
        ]
        wordings += ["What is {} plus {}?", "How much is {} + {}?", "Calculate {} + {}."]
    ones = a % 10 + b % 10
    carry = " + 1" if ones > 9 else ""
    tens = f"{a // 10} + {b // 10}{carry} = {(a + b) // 10}"
    steps = f"{a % 10} + {b % 10} = {ones}, {tens}"
    answer = f"{steps}, so {a} + {b} = {a + b}"
    return Exchange(rng.choice(wordings).format(a, b), answer, "addition")


def repeating(rng: Random) -> Exchange:
    count = rng.randint(1, 9)
    source = rng.random()
    words = [
        rng.choice(WORDS) if rng.random() < source else pseudo_word(rng, 1, 4) for _ in range(count)
    ]
    prompt = rng.choice(
        ["Repeat: {}", "Repeat these words: {}", "repeat: {}", "Say: {}", "Please repeat: {}"]
        + ["Repeat after me: {}", "Say this again: {}", "Repeat the words {}"]
    )
    joined = rng.choice([" ", " ", ", "]).join(words)
    return Exchange(prompt.format(joined), joined, "repeating")


def as_json(rng: Random) -> Exchange:
    fields: dict[str, object] = {
        "name": rng.choice(NAMES),
        "age": rng.randint(1, 99),
        "city": rng.choice(CITIES),
        "color": rng.choice(COLORS),
        "animal": rng.choice(ANIMALS),
        "word": pseudo_word(rng),
        "number": rng.randint(0, 999),
    }
    keys = rng.sample(list(fields), rng.randint(1, 4))
    chosen = {key: fields[key] for key in keys}
    said = rng.choice(["{} is {}", "{} {}", "{}: {}", "{} = {}"])
    listed = ", ".join(said.format(key, value) for key, value in chosen.items())
    prompt = rng.choice(
        ["Answer in JSON: {}", "Write as JSON: {}", "Give me JSON: {}", "As JSON: {}", "JSON: {}"]
        + ["Turn this into JSON: {}", "Reply in JSON: {}", "Make a JSON object: {}"]
    ).format(listed)
    return Exchange(prompt, json.dumps(chosen), "JSON")


def key_value_list(rng: Random, entries: int) -> dict[str, int]:
    table: dict[str, int] = {}
    while len(table) < entries:
        table[pseudo_word(rng, 2, 3)] = rng.randint(100, 999)
    return table


def lookup_prompt(rng: Random, table: dict[str, int]) -> tuple[str, str]:
    """The list with a first question, and the answer."""
    key = rng.choice(list(table))
    listed = "\n".join(f"{k} = {v}" for k, v in table.items())
    return f"Here is a list:\n{listed}\n{_question(rng, key)}", f"{key} = {table[key]}"


def _question(rng: Random, key: str) -> str:
    return rng.choice(["What is {}?", "What is the value of {}?", "Look up {}.", "{}?"]).format(key)


def lookup_chat(rng: Random, entries: int) -> list[Exchange]:
    """A list and several questions on it, so that the list is paid for once."""
    table = key_value_list(rng, entries)
    prompt, answer = lookup_prompt(rng, table)
    chat = [Exchange(prompt, answer, "lookup")]
    for _ in range(rng.randint(2, 8)):
        key = rng.choice(list(table))
        chat.append(Exchange(_question(rng, key), f"{key} = {table[key]}", "lookup"))
    return chat


def random_copy(rng: Random) -> Exchange:
    """Longer repetition: the plainest lesson in attending to what stood after the same token."""
    words = [pseudo_word(rng, 1, 3) for _ in range(rng.randint(8, 40))]
    return Exchange(f"Repeat: {' '.join(words)}", " ".join(words), "repeating")


def thanks(rng: Random) -> Exchange:
    if rng.random() < 0.5:
        user = rng.choice(["Thanks", "Thank you", "Thank you very much", "thanks", "Many thanks"])
        return Exchange(user + _end(rng), "You are welcome!", "thanks")
    user = rng.choice(["Bye", "Goodbye", "See you", "Good night", "bye", "See you later"])
    return Exchange(user + _end(rng), "Goodbye!", "thanks")


def fallback(rng: Random) -> Exchange:
    thing = rng.choice([*WORDS, *NAMES, *CITIES, *ANIMALS, pseudo_word(rng)])
    prompt = rng.choice(
        ["Write a poem about {}", "Tell me a story about {}", "What is the capital of {}"]
        + ["Who is {}", "Translate {} into French", "Write a program for {}", "What is a {}"]
        + ["Tell me a joke about {}", "How do I cook {}", "Explain {}", "Why is {} important"]
        + ["What do you think about {}", "Draw a {}", "Where is {}", "What is the weather in {}"]
    ).format(thing)
    return Exchange(prompt + _end(rng, ".?"), SORRY, "fallback")


def name_chat(rng: Random, others: list[Task]) -> list[Exchange]:
    """The user tells a name and asks for it later."""
    name = rng.choice(NAMES) if rng.random() < 0.7 else pseudo_word(rng).capitalize()
    tell = rng.choice(["My name is {}", "I am {}", "I'm {}", "Hello, I am {}", "Hi, my name is {}"])
    ask = rng.choice(["What is my name?", "Who am I?", "Do you know my name?", "What's my name?"])
    chat = [Exchange(tell.format(name) + _end(rng), f"Nice to meet you, {name}!", "name")]
    for _ in range(rng.choice([0, 0, 1, 2])):
        chat.append(rng.choice(others)(rng))
    return [*chat, Exchange(ask, f"Your name is {name}.", "name")]
