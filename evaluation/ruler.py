"""RULER's 13 tasks, generated offline with the original's seeds and formats, scored as it scores.

    niah  (8)   needles in noise, in essays or among other needles: find the value of a key
    vt          a chain of assignments in noise: name all variables that hold a value
    cwe, fwe    lists of words: name those that occur most often
    qa    (2)   a question, its paragraphs among others: SQuAD, HotpotQA

    samples = generate("niah_single_2", lambda text: len(tokenizer.encode(text)), 4096, n=10)
    prompt = ask("niah_single_2", samples[0], chat)
    points = score("niah_single_2", answer, samples[0]["outputs"])          # 0 to 100

The original has two dialects. "old" (2024; nvidia-long-context-eval, RetroInfer's fork) searches
for the size of a haystack step by step and keeps the answer prefix in the input; "new" bisects,
repeats essays, and keeps the prefix apart, for it follows the chat template. A sample depends on
the tokenizer, through the search. Every draw happens in the original's order, even its slips, so
that the same seed gives the same bytes. tests/test_ruler.py says for which tasks this is checked.

Essays, questions and word lists are read from installed packages (requirements-eval.txt).

Does not include: `remove_newline_tab`, model templates inside the prompt (ask() adds the chat
template), haystacks beyond the essays' 525,448 words as the old dialect draws them, and the longer
English word list of the new cwe above 16K tokens (pairs of words stand in for it).
Hsieh et al., RULER, COLM 2024 (arXiv 2404.06654).
"""
import itertools
import math
import random
import re
import string
import uuid
from dataclasses import dataclass

import numpy as np

from evaluation import texts
from retroinfer import InputError

SEED = 42
TRIES = 200                 # the original tries without end
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int).tolist()      # per cent of the text
INSTRUCTION = ("Answer the question based on the given documents. Only give me the answer and do "
               "not output any other words.")


@dataclass(frozen=True)
class Family:
    """What tasks of one kind share: the words around a context, tokens to generate, the metric."""
    template: str
    prefix: str             # how the answer begins: given to the model, not asked of it
    n_answer: int
    metric: str = "all"     # mean over the references found, or "part": whether any is


FAMILIES = {
    "niah": Family(
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
        "memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are "
        "all the special magic {type_needle_v} for {query} mentioned in the provided text?",
        " The special magic {type_needle_v} for {query} mentioned in the provided text are", 128),
    "vt": Family(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
        "above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
        "variables are assigned the value {query}, they are: ", 30),
    "cwe": Family(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most "
        "common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:", 120),
    "fwe": Family(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words. {context}\nQuestion: Do not provide any "
        "explanation. Please ignore the dots '....'. What are the three most frequently appeared "
        "words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words "
        "are:", 50),
    "qa": Family(
        f"{INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{INSTRUCTION}\n\n"
        "Question: {query}", " Answer:", 32, "part"),
}


@dataclass(frozen=True)
class Task:
    """One task: its family and what the family leaves open."""
    family: str
    haystack: str = ""      # niah: noise, essay or needle (nothing but other needles)
    key: str = "words"      # words, numbers or uuids
    value: str = "numbers"
    n_keys: int = 1         # needles of other keys among them
    n_values: int = 1
    n_queries: int = 1
    dataset: str = ""       # qa: squad or hotpotqa


TASKS = {
    "niah_single_1": Task("niah", "noise"),
    "niah_single_2": Task("niah", "essay"),
    "niah_single_3": Task("niah", "essay", value="uuids"),
    "niah_multikey_1": Task("niah", "essay", n_keys=4),
    "niah_multikey_2": Task("niah", "needle"),
    "niah_multikey_3": Task("niah", "needle", key="uuids", value="uuids"),
    "niah_multivalue": Task("niah", "essay", n_values=4),
    "niah_multiquery": Task("niah", "essay", n_keys=4, n_queries=4),
    "vt": Task("vt"), "cwe": Task("cwe"), "fwe": Task("fwe"),
    "qa_1": Task("qa", dataset="squad"), "qa_2": Task("qa", dataset="hotpotqa"),
}


# ---------------------------------------------------------------- generators

class TooShort(ValueError):
    """No sample of the task is as short as the length that was given."""


class Generator:
    """Samples of a task: finds the size of a haystack that fits, then draws at that size.

    count(text) is the tokens of a text; draw(size, index) gives a prompt and its answers.
    """
    step, cap, shrinks = 10, math.inf, True

    def __init__(self, name, count, length, dialect="new", seed=SEED, reserve=0):
        self.name, self.task, self.count = name, TASKS[name], count
        self.family, self.is_old, self.seed = FAMILIES[self.task.family], dialect == "old", seed
        self.is_short, self.limit = length < 4096, length - reserve
        self.random, self.numpy = random.Random(seed), np.random.RandomState(seed)
        self.template = self.family.template + self.family.prefix
        self.n_answer, self.example = self.family.n_answer, ""      # vt: solved, it comes first
        self.prepare()

    def prepare(self):
        """What a family draws or reads before its first sample."""

    def shuffle(self, items):
        """Shuffles in place. Every list is shuffled with the same seed, as in the original."""
        random.Random(self.seed).shuffle(items)

    def tail(self, answers):
        """The text behind a prompt that the old search counts too."""
        return f" {answers}"

    def tokens(self, text):
        """Tokens of a sample: its prompt, the solved example, and those to generate."""
        return self.count(text) + (self.count(self.example) if self.example else 0) + self.n_answer

    def size(self):
        return self.size_by_steps() if self.is_old else self.size_by_bisection()

    def size_by_steps(self):
        size, total = self.step, self.tokens("")
        while total < self.limit:
            text, answers = self.draw(size)
            total = self.tokens(text + self.tail(answers))
            if total > self.limit:
                return size - self.step
            size += self.step
            if size > self.cap:
                return self.cap
        return size

    def size_by_bisection(self):
        low = best = self.step
        high = max(self.highest(self.count(self.draw(low)[0]) / low), 2 * low)
        while low <= high:
            middle = (low + high) // 2
            if self.tokens(self.draw(middle)[0]) <= self.limit:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    def highest(self, tokens_a_unit):
        return int(self.limit / tokens_a_unit * 3)

    def fit(self, size, index):
        """(prompt, answers, tokens) of a sample that fits. Draws smaller ones until then."""
        for _ in range(TRIES):
            try:
                text, answers, length = self.sample(size, index)
            except ValueError:              # it would draw more than there is: too long
                length = math.inf
            if length <= self.limit:
                return text, answers, length
            if self.shrinks and size > self.step:
                size -= self.step
        self.need(False)

    def need(self, is_possible):
        if not is_possible:
            raise TooShort(f"{self.name} has no sample of at most {self.limit:,} tokens: give more")

    def sample(self, size, index):
        text, answers = self.draw(size, index)
        return text, answers, self.count(text) + self.n_answer

    def samples(self, n, start=0):
        """Yields n dicts with the original's fields. The first question of qa is number `start`."""
        size = self.size()
        for index in range(n):
            yield self.record(index, *self.fit(size, index + start))

    def record(self, index, text, answers, length):
        if self.is_old:
            return {"index": index, "input": text, "outputs": answers, "length": length}
        cut = text.rfind(self.family.prefix[:10])
        return {"index": index, "input": text[:cut], "outputs": answers, "length": length,
                "length_w_model_temp": length, "answer_prefix": text[cut:]}


class Needles(Generator):
    def prepare(self):
        self.step = 500 if self.task.haystack == "essay" else 5 if self.is_short else 25
        self.cap = len(texts.essay_words()) if self.task.haystack == "essay" else math.inf

    def tail(self, answers):
        return " ".join(answers)

    def invent(self, kind):
        """A random word, number or uuid."""
        if kind == "words":
            return self.random.choice(texts.word_pairs())
        if kind == "numbers":
            return str(self.random.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def needle(self, key, value):
        return NEEDLE.format(type_needle_v=self.task.value, key=key, value=value)

    def draw(self, size, index=0):
        t = self.task
        hidden = {}                                                 # key: its values
        for _ in range(t.n_keys):
            key = self.invent(t.key)
            hidden[key] = [self.invent(t.value) for _ in range(t.n_values)]
        needles = [self.needle(key, value) for key, values in hidden.items() for value in values]
        self.shuffle(needles)
        hide = self.hide_in_essays if t.haystack == "essay" else self.hide_in_lines
        context = hide(needles, size)
        keys = self.random.sample(list(hidden), t.n_queries)
        query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
        template, kind = self.template, t.value
        if t.n_queries * t.n_values == 1:
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            kind = kind[:-1]
        text = template.format(type_needle_v=kind, context=context, query=query)
        return text, [value for key in keys for value in hidden[key]]

    def hide_in_essays(self, needles, n_words):
        found = texts.sentences(n_words)
        depths = self.random.sample(DEPTHS, len(needles))
        cuts = [0, *sorted(int(len(found) * (depth / 100)) for depth in depths), len(found)]
        parts = []
        for i, (start, end) in enumerate(itertools.pairwise(cuts)):
            parts += [" ".join(found[start:end]), *needles[i:i + 1]]
        return " ".join(parts)

    def hide_in_lines(self, needles, n_lines):
        lines = [NOISE] * n_lines
        if self.task.haystack == "needle":
            lines = [self.needle(self.invent(self.task.key), self.invent(self.task.value))
                     for _ in range(n_lines)]
        places = sorted(self.random.sample(range(n_lines), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def record(self, index, text, answers, length):
        made = super().record(index, text, answers, length)
        if not self.is_old:                 # its index is where the first answer stands
            made["index"] = made["input"].find(answers[0])
            made["token_position_answer"] = self.count(made["input"][:made["index"]])
        return made


class Chain(Generator):
    hops = 4

    def prepare(self):
        """Make the example, of at most 500 tokens, that stands solved before every question."""
        self.shrinks, limit, self.limit, self.step = not self.is_old, self.limit, 500, 5
        if self.is_old:
            self.template = self.template.replace("assigned the value {query}, they",
                                                  "assgined the value {query}, they")
        else:
            self.n_answer = 0
        text, answers, _ = self.fit(self.size(), 0)
        self.example = f"{text} {' '.join(answers)}" + ("\n\n" if self.is_old else "\n")
        self.limit, self.n_answer = limit, self.family.n_answer
        self.step = 5 if self.is_short and not self.is_old else 10

    def invent(self, k):
        return "".join(self.random.choices(string.ascii_uppercase, k=k))

    def draw(self, size, index=0):
        names = [self.invent(5 if self.example else 3) for _ in range(self.hops + 1)]
        is_fixed = not (self.example or self.is_old)
        value = "12345" if is_fixed else str(self.numpy.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
        lines = self.noise(size)
        for i, place in enumerate(sorted(self.random.sample(range(len(lines)), len(chain)))):
            lines.insert(place + i, chain[i])
        context = (" " if self.is_old else "\n").join(lines).replace(". \n", ".\n")
        text = self.template.format(context=context, query=value, num_v=self.hops + 1)
        return text, names

    def noise(self, n):
        if not self.is_old:
            return [NOISE] * n
        if n > self.hops + 1:
            return [NOISE + "\n"] * n
        return [part + "." if part.strip() else part for part in (NOISE + "\n").split(".")] * n

    def sample(self, size, index):
        text, answers = self.draw(size, index)
        length = self.tokens(text)                      # of the example before it changes (old)
        if self.example and self.is_old:
            text = f" {self.other_example()}\n\n{text}"
        elif self.example:
            text = f"{self.other_example()}\n{text}"
            length = self.count(text) + self.n_answer
        return text, answers, length

    def other_example(self):
        """The solved example with new names, and a new value if the dialect asks for it."""
        text = self.example
        for name in self.example.split()[-self.hops - 1:]:
            text = text.replace(name, self.invent(len(name)))
        if not self.is_old:
            text = text.replace("12345", str(self.numpy.randint(10000, 99999)))
        return text


class CommonWords(Generator):
    def prepare(self):
        self.words = list(texts.single_words())
        self.shuffle(self.words)
        self.cap = len(self.words)

    def tail(self, answers):
        return " " + numbered(answers)

    def highest(self, tokens_a_unit):
        return self.limit

    def listing(self, n_words, n_common, n_rare):
        """A shuffled list in which ten of the words stand n_common times; and those ten."""
        words = self.words if n_words <= self.cap else texts.word_pairs()
        chosen = self.random.sample(words, n_words)
        listed = chosen[:10] * n_common + chosen[10:] * n_rare
        self.shuffle(listed)
        return self.template.format(context=numbered(listed)), chosen[:10]

    def draw(self, size, index=0):
        solved, common = self.listing(*((20, 3, 1) if self.is_short else (40, 10, 3)))
        text, answers = self.listing(size, *((6, 1) if self.is_short else (30, 3)))
        return f"{solved}{'' if self.is_old else ' '}{numbered(common)}\n{text}", answers


def numbered(words):
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class FrequentWords(Generator):
    def prepare(self):
        self.limit -= 0 if self.is_old else self.n_answer   # old prompts may leave it no room
        self.step = self.limit // 32
        self.need(self.limit >= 200)                        # four words to count

    def size(self):
        vocabulary, size = self.vocabulary(), self.limit // 6
        while self.count(self.coded(vocabulary, size)) < self.limit:
            size += self.step
        return size - self.step

    def vocabulary(self):
        n = self.limit // 50

        def invent():
            return "".join(self.random.choices(string.ascii_lowercase, k=6))

        words = [invent() for _ in range(n)]
        while len(set(words)) < n:
            words.append(invent())
        words = sorted(set(words))
        self.shuffle(words)
        return ["...", *words[1:]]

    def coded(self, vocabulary, n_words):
        """The word of rank k occurs n k^-2 / zeta(2) times; the first is to be ignored."""
        counts = n_words * np.arange(1, len(vocabulary) + 1) ** -2.0 / (math.pi**2 / 6)
        words = [w for w, n in zip(vocabulary, counts.astype(int), strict=True) for _ in range(n)]
        self.shuffle(words)
        return self.template.format(context=" ".join(words))

    def fit(self, size, index):
        vocabulary = self.vocabulary()
        while (n := self.count(text := self.coded(vocabulary, size))) > self.limit:
            size -= self.step
            self.need(size > 0)
        return text, vocabulary[1:4], n + self.n_answer


class Questions(Generator):
    def prepare(self):
        self.docs, self.questions = texts.questions(self.task.dataset)
        self.cap = len(self.docs)

    def samples(self, n, start=0):
        if start + n > len(self.questions):
            raise InputError(f"{self.name} has {len(self.questions):,} questions, "
                             f"not {start + n:,}")
        return super().samples(n, start)

    def draw(self, size, index=0):
        question, answers, own, more = self.questions[index]
        n_others = size - len(own) - len(more)
        if size >= len(self.docs):
            chosen = (list(range(len(self.docs))) * -(-size // len(self.docs)))[:size]
        elif n_others > 0:
            near = {*own, *more}
            others = [i for i in range(len(self.docs)) if i not in near]
            chosen = own + more + self.random.sample(others, n_others)
        else:
            chosen = own + self.random.sample(more, size - len(own))
        shown = [self.docs[i] for i in chosen]
        self.shuffle(shown)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(shown, 1))
        return self.template.format(context=context, query=question), answers


GENERATORS = {"niah": Needles, "vt": Chain, "cwe": CommonWords, "fwe": FrequentWords,
              "qa": Questions}


def generate(name, count, length, n, dialect="new", start=0, **options):
    """n samples (dicts, the original's JSONL fields) of task `name` in at most `length` tokens.

    count(text) says how many tokens a text has. start: number of the first question (qa). options:
    seed (42 plus the number of a chunk), reserve (tokens of a chat template). Raises InputError for
    an unknown task or dialect, a missing package (it names the command that installs the package),
    and more questions than there are, and TooShort.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}: give one of {', '.join(TASKS)}")
    if dialect not in ("old", "new"):
        raise ValueError(f"dialect {dialect!r}: give old or new")
    generator = GENERATORS[TASKS[name].family](name, count, length, dialect, **options)
    return list(generator.samples(n, start))


def ask(name, sample, chat=lambda text: text):
    """The prompt of a sample: its input as a chat message, and how the answer begins."""
    if "answer_prefix" in sample:
        return chat(sample["input"]) + sample["answer_prefix"]
    cut = sample["input"].rfind(FAMILIES[TASKS[name].family].prefix[:10])
    return chat(sample["input"][:cut]) + sample["input"][cut:]


# ---------------------------------------------------------------- scores

def score(name, prediction, references):
    """0 to 100: how many references the prediction contains, as the task counts. Ignores case."""
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    found = [reference.lower() in text for reference in references]
    every = FAMILIES[TASKS[name].family].metric == "all"
    return 100 * (sum(found) / len(found) if every else max(found))
