"""LongBench's tasks in English and code, from a person's own copy, beside dense attention.

    python -m evaluation.longbench DIR --tasks hotpotqa qasper --samples 20

DIR is searched for <task>.jsonl, one question a line, and for dataset2prompt.json and
dataset2maxlen.json: the data and the configuration as they are published. A prompt that is longer
than --length loses its middle. The tasks in RAW are asked without a chat template, and those in
FIRST_LINE are scored on the first line of an answer. All this is what the published code does.

A prompt is read once for all methods, and all answer greedily. Metrics: F1 over words, ROUGE-L (the
package rouge), accuracy by class, share of the numbers that are right, and edit similarity of the
first line of code (rapidfuzz).

Does not include: tasks in Chinese, whose words need a segmenter.
Bai et al., LongBench, ACL 2024 (arXiv 2308.14508).
"""
import json
import re
import string
from collections import Counter
from pathlib import Path

import torch

from app.command import Parser, run_command
from bench.timing import positive, table
from evaluation import texts
from evaluation.answers import NAMES, answer, methods, side_by_side
from evaluation.many import HEAD, rows
from model import DEFAULT_NAME, load
from retroinfer import InputError

RAW = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
FIRST_LINE = {"trec", "triviaqa", "samsum"}
FIELDS = {"input": str, "context": str, "answers": list}    # of a question


# ---------------------------------------------------------------- metrics, 0 to 1

def words(text):
    """The words of a text in lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(answer, truth, sample):
    """F1 of two bags of words."""
    mine, theirs = words(answer), words(truth)
    n_same = (Counter(mine) & Counter(theirs)).total()
    return 2 * n_same / (len(mine) + len(theirs)) if n_same else 0.0


def rouge_l(answer, truth, sample):
    """F of the longest common subsequence of words."""
    texts.package("rouge", "rouge==1.0.1")
    from rouge import Rouge
    if not (answer.strip(" .\n") and truth.strip(" .\n")):
        return 0.0
    return Rouge().get_scores([answer], [truth])[0]["rouge-l"]["f"]


def classes(answer, truth, sample):
    """One over the number of classes that an answer names, if the true class is among them.

    A class whose name is a part of the true one's name does not count.
    """
    named = [name for name in sample["all_classes"] or [] if name in answer]
    named = [name for name in named if name == truth or name not in truth]
    return 1 / len(named) if truth in named else 0.0


def numbers(answer, truth, sample):
    """The share of the numbers in an answer that are the number of the truth."""
    found = re.findall(r"\d+", answer)
    wanted = re.findall(r"\d+", truth)[0]
    return found.count(wanted) / len(found) if found else 0.0


def code_line(answer, truth, sample):
    """Edit similarity of the truth and the first line of an answer that is no comment or fence."""
    texts.package("rapidfuzz", "rapidfuzz==3.14.6")
    from rapidfuzz.fuzz import ratio
    lines = answer.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(ratio(line, truth)) / 100


METRICS = {f1: ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique",
                "triviaqa"),
           rouge_l: ("gov_report", "qmsum", "multi_news", "samsum"), classes: ("trec",),
           numbers: ("passage_count", "passage_retrieval_en"), code_line: ("lcc", "repobench-p")}
METRIC = {task: metric for metric, tasks in METRICS.items() for task in tasks}


def score(task, answer, sample):
    """0 to 100: the best over the sample's true answers."""
    if task in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    return 100 * max(METRIC[task](answer, truth, sample) for truth in sample["answers"])


# ---------------------------------------------------------------- a person's copy

def find(directory, name):
    """The path of a file somewhere below a directory. InputError if there is none."""
    found = sorted(directory.rglob(name))
    if not found:
        raise InputError(f"{directory} has no {name}")
    return found[0]


def read_json(path):
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read as JSON: {e}") from None


def read_samples(path, n):
    """The first n questions of a file. InputError names a line that is none."""
    lines = path.read_text("utf-8", "replace").rstrip("\n").split("\n")
    samples = []
    for number, line in enumerate(lines[:n], 1):
        try:
            sample = json.loads(line)
            is_right = all(isinstance(sample[name], kind) for name, kind in FIELDS.items())
        except (ValueError, KeyError, TypeError):
            is_right = False
        if not is_right or not sample["answers"]:
            raise InputError(f"line {number} of {path} is no question with {', '.join(FIELDS)}")
        samples.append({"all_classes": None, **sample})
    return samples


def prompt(tokenizer, task, template, sample, length):
    """Ids of a sample's prompt, in at most `length` tokens: the middle is left out."""
    text = template.format(**sample)
    if task in RAW:
        return cut(tokenizer.encode(text), length)
    frame = len(tokenizer.chat([{"role": "user", "content": ""}]))
    ids = tokenizer.encode(text)
    if len(ids) + frame > length:
        text = tokenizer.decode(cut(ids, length - frame))
    return cut(tokenizer.chat([{"role": "user", "content": text}]), length)


def cut(ids, n):
    """The first and the last half of n ids, or all of them if they are fewer."""
    return ids if len(ids) <= n else ids[:n // 2] + ids[len(ids) - (n - n // 2):]


# ---------------------------------------------------------------- command line

def measure(args):
    templates = read_json(find(args.directory, "dataset2prompt.json"))
    n_answers = read_json(find(args.directory, "dataset2maxlen.json"))
    samples = {task: read_samples(find(args.directory, f"{task}.jsonl"), args.samples)
               for task in args.tasks}
    if missing := [task for task in args.tasks if task not in templates or task not in n_answers]:
        raise InputError(f"the configuration in {args.directory} does not have {missing[0]}")
    model, tokenizer = load(args.model, torch.float32, "cpu")
    made = methods(args.methods)
    length = min(args.length or model.config.context, model.config.context)
    for task in args.tasks:
        points = {name: [] for name in made}
        for sample in samples[task]:
            ids = torch.tensor(prompt(tokenizer, task, templates[task], sample,
                                      length - n_answers[task]))
            caches = side_by_side(model, made, len(ids) + n_answers[task])
            said = answer(model, tokenizer, made, caches, ids, n_answers[task])
            for name, text in said.items():
                points[name].append(score(task, text, sample))
        print(table(HEAD, list(rows({task: points}))), end="\n\n", flush=True)


def parse_args(argv):
    parser = Parser(prog="python -m evaluation.longbench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="LongBench's data and configuration")
    add("--model", default=DEFAULT_NAME, help="name, directory or .gguf file")
    add("--tasks", nargs="+", choices=METRIC, default=["hotpotqa"], metavar="TASK",
        help=f"of {', '.join(METRIC)}")
    add("--samples", type=positive, default=20, help="the first ones of each task")
    add("--length", type=positive, help="tokens of a prompt and its answer (default: the context)")
    add("--methods", nargs="+", choices=NAMES, default=NAMES[:2], help="beside dense attention")
    return parser.parse_args(argv)


def main(argv=None):
    """The exit status."""
    return run_command("longbench", lambda: measure(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
