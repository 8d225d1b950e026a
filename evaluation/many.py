"""Many needles, one reading: RULER's multi-key and multi-query tasks with enough questions to tell.

    python -m evaluation.many --length 4096 --questions 60
    python -m evaluation.many --length 4096 --needles uuids
    python -m evaluation.many --model qwen2.5-coder-1.5b --length 8192 --questions 12 \
        --methods ours paper qcivf --out results/many-qwen.json

RULER asks one question of a text, and reading the text takes nearly all of the time. Here a text of
nothing but needles (niah_multikey_2) is read once. Each question then asks for one needle
(multi-key) or for four (multi-query), behind a copy of the caches. With --needles uuids, keys and
values are random identifiers (niah_multikey_3), and a question asks for one. Wording and score are
RULER's.

The table has the mean score of each method, and its difference to dense with a 95 % interval, for
which questions are drawn again. All questions share one text: the interval does not cover others.
"""
import copy
import random
import uuid
from pathlib import Path

import torch
from tqdm import tqdm

from app.command import Parser, run_command
from bench.timing import positive, table, where, write_json
from evaluation import ruler, texts
from evaluation.answers import NAMES, answer, methods, side_by_side
from evaluation.tables import interval
from generate import prefill
from model import DEFAULT_NAME, load
from retroinfer import InputError

TASKS = {"numbers": {"niah_multikey_2": 1, "niah_multiquery": 4},      # needles that are asked for
         "uuids": {"niah_multikey_3": 1}}
HEAD = ["task", "method", "score", "minus dense", "95 % interval"]
N_ANSWER = 64                                               # tokens: four numbers and their keys


def needles(n, kind):
    """{key: value} of n needles: made-up words and seven digits, or two identifiers."""
    dice = random.Random(ruler.SEED)
    if kind == "numbers":
        keys = dice.sample(texts.word_pairs(), n)
        return {key: str(dice.randint(10**6, 10**7 - 1)) for key in keys}
    return {identifier(dice): identifier(dice) for _ in range(n)}


def identifier(dice):
    return str(uuid.UUID(int=dice.getrandbits(128), version=4))


def prompt(tokenizer, hidden, keys, kind):
    """Ids of a prompt that hides the needles `hidden` and asks for the values of `keys`."""
    niah = ruler.FAMILIES["niah"]
    lines = [ruler.NEEDLE.format(type_needle_v=kind, key=k, value=v) for k, v in hidden.items()]
    query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    words = {"type_needle_v": kind, "query": query, "context": "\n".join(lines)}
    chat = tokenizer.render([{"role": "user", "content": niah.template.format(**words)}])
    return tokenizer.encode(chat + niah.prefix.format(**words))


def fit(tokenizer, length, kind):
    """As many needles as a prompt of at most `length` tokens holds."""
    def size(n):
        asked = list(needles(max(TASKS[kind].values()), kind))
        return len(prompt(tokenizer, needles(n, kind), asked, kind))

    few, many = size(8), size(40)
    n = int((length - few) / (many - few) * 32) + 8
    while n >= 8 and size(n) + N_ANSWER > length:
        n -= 1
    if n < 8:
        raise InputError(f"{length} tokens hold fewer than 8 needles: give more --length")
    return needles(n, kind)


def questions(tokenizer, hidden, n, kind):
    """Yield (task, ids, answers) of n questions of each task."""
    dice = random.Random(ruler.SEED + 1)
    for task, n_keys in TASKS[kind].items():
        for _ in range(n):
            keys = dice.sample(list(hidden), n_keys)
            ids = prompt(tokenizer, hidden, keys, kind)
            yield task, torch.tensor(ids), [hidden[k] for k in keys]


def n_shared(rows):
    """How many first tokens all of the ids in `rows` have in common."""
    shortest = min(map(len, rows))
    is_same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(0)
    return int(is_same.long().cumprod(0).sum())


def measure(args):
    model, tokenizer = load(args.model, getattr(torch, args.dtype), "cpu")
    if args.length > model.config.context:
        raise InputError(f"{args.length:,} tokens, the model's context is "
                         f"{model.config.context:,}: give a smaller --length")
    hidden = fit(tokenizer, args.length, args.needles)
    asked = list(questions(tokenizer, hidden, args.questions, args.needles))
    prompts, made = [ids for _, ids, _ in asked], methods(args.methods)
    n, capacity = n_shared(prompts), max(map(len, prompts)) + N_ANSWER
    caches = side_by_side(model, made, capacity)
    prefill(model, caches, [prompts[0][:n]])
    scores = {task: {name: [] for name in made} for task in TASKS[args.needles]}
    for task, ids, truths in tqdm(asked, unit="question"):
        said = answer(model, tokenizer, made, copy.deepcopy(caches), ids[n:], N_ANSWER)
        for name, text in said.items():
            scores[task][name].append(ruler.score(task, text, truths))
    print(table(HEAD, list(rows(scores))))
    if args.out:
        facts = {"machine": where("quality only"), "model": str(args.model), "dtype": args.dtype,
                 "tokens": n, "needles": len(hidden), "scores": scores}
        write_json(args.out, facts)


def rows(scores):
    """Yield the rows behind HEAD of scores {task: {method: points of each question}}."""
    for task, found in scores.items():
        for name, points in found.items():
            mean, low, high = interval(
                [[a - b for a, b in zip(points, found["dense"], strict=True)]], 0)
            yield [task, name, f"{sum(points) / len(points):.1f}", f"{mean:+.1f}",
                   f"{low:+.1f} to {high:+.1f}"]


def parse_args(argv):
    parser = Parser(prog="python -m evaluation.many", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_NAME, help="name, directory or .gguf file")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    add("--length", type=positive, default=4096, help="tokens of a prompt and its answer")
    add("--needles", choices=TASKS, default="numbers")
    add("--questions", type=positive, default=60, help="of each task")
    add("--methods", nargs="+", choices=NAMES, default=NAMES[:2], help="beside dense attention")
    add("--out", type=Path, help="results, as JSON")
    return parser.parse_args(argv)


def main(argv=None):
    """The exit status."""
    return run_command("many", lambda: measure(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
