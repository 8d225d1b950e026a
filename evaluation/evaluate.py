"""How far from dense attention: perplexity, KL, every head's error and mass, against bytes read.

    python -m evaluation.evaluate           # or: make evaluate. Quick: four texts of 4,096 tokens
    python -m evaluation.evaluate --full    # 4,096 and 8,192 tokens, more budgets, RULER: hours

Texts (texts.py), needles hidden in essays and, with --full, RULER's tasks (ruler.py) go through
dense attention and, from the same keys and values, through every method (fidelity.py): the paper's
settings, ours, sink and window, the truly best tokens (an oracle: finding them is not counted), and
pages ranked by a bound (Quest, arXiv 2406.10774); those that have a budget, at the bytes of ours.

Each result is a line of JSON in the file of results. The first line of this file has the command,
the versions and the settings. The same command continues a run that was stopped, or that --minutes
ended: it measures what the file does not have. With --parts it measures one part only. In the end
it prints tables of all results so far, and draws plots beside the file.
"""
import functools
import hashlib
import json
import math
import platform
import random
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from app.command import Parser, run_command
from app.settings import parse_settings
from evaluation import answers, fidelity, kept, ruler, texts
from evaluation.tables import report
from model import DEFAULT_NAME, load
from retroinfer import InputError, RetroConfig

ROOT = Path(__file__).parent.parent
QUICK = {"lengths": [4096], "steps": 32, "shares": [0.08, 0.12], "errors": False,
         "needle_lengths": [4096], "depths": [10, 50, 90], "ruler_lengths": [], "ruler_samples": 0}
FULL = {"lengths": [4096, 8192], "steps": 128, "shares": [0.06, 0.08, 0.12, 0.2, 0.3],
        "errors": True, "needle_lengths": [2048, 4096, 8192], "depths": [0, 20, 40, 60, 80, 100],
        "ruler_lengths": [2048, 4096, 8192], "ruler_samples": 10}


# ---------------------------------------------------------------- prompts with an answer

def needle_prompt(tokenizer, length, depth, seed):
    """Ids of essays with a needle, its question and answer; its positions; length of the answer."""
    dice = random.Random(f"{seed}, {length}, {depth}")
    key, value = dice.choice(texts.word_pairs()), str(dice.randint(10**6, 10**7 - 1))
    needle = ruler.NEEDLE.format(type_needle_v="numbers", key=key, value=value)
    niah = ruler.FAMILIES["niah"]
    head, tail = (niah.template + niah.prefix).split("{context}")
    head, tail = (x.format(type_needle_v="numbers", query=key) for x in (head, tail))
    before, after, answer = (tokenizer.encode(x) for x in (head, tail, f" {value}"))
    needle = tokenizer.encode(f" {needle}")
    room = length - sum(map(len, (before, after, answer, needle)))
    hay = tokenizer.encode(" ".join(texts.sentences(length)))[:room]
    start = len(before) + len(hay) * depth // 100
    ids = (before + hay)[:start] + needle + (before + hay)[start:] + after + answer
    return torch.tensor(ids), torch.arange(start, start + len(needle)), len(answer)


def ruler_points(model, tokenizer, name, sample, methods):
    """{method: score} for one sample. The prompt is read once for all methods."""
    prompt = ruler.ask(name, sample, lambda x: tokenizer.render([{"role": "user", "content": x}]))
    ids = torch.tensor(tokenizer.encode(prompt))
    n_answer = ruler.FAMILIES[ruler.TASKS[name].family].n_answer
    caches = answers.side_by_side(model, methods, len(ids) + n_answer)
    found = answers.answer(model, tokenizer, methods, caches, ids, n_answer)
    return {method: ruler.score(name, text, sample["outputs"]) for method, text in found.items()}


# ---------------------------------------------------------------- cells of the results

class Results:
    """A file of results: a first line that says how they were made, then one line for each."""

    def __init__(self, path, header):
        self.path, self.cells = path, {}
        lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[0])["settings"] != header["settings"]:
            raise InputError(f"{path} was made by other code or settings: remove it, or give --out")
        self.header = json.loads(lines[0]) if lines else header
        for line in lines[1:]:
            self.cells |= json.loads(line)
        path.parent.mkdir(exist_ok=True, parents=True)  # a line without its end is measured again
        lines = lines or [json.dumps(header)]
        path.write_text("\n".join(lines) + "\n", "utf-8")

    def add(self, key, value):
        self.cells[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: value}) + "\n")


@dataclass
class Run:
    """What is measured, on which model, and where results go."""
    model: torch.nn.Module
    tokenizer: object
    settings: dict
    results: Results
    wanted: list | None = None                              # methods; None: all, at all budgets
    keep: Path | None = None                                # where what dense reads is kept
    samples: dict = field(default_factory=dict)             # of RULER, by task and length

    @property
    def config(self):                                       # of ours
        return RetroConfig(**self.settings.get("config", {}))

    def add(self, key, value):
        self.results.add(key, value)
        print(key, file=sys.stderr)

    def left(self, key, names):
        return [name for name in names if f"{key}/{name}" not in self.results.cells]

    def named(self, n, steps, case=None):
        methods = fidelity.named_methods(n, steps, case)
        methods["ours"] = functools.partial(fidelity.wave, self.config)
        return {name: make for name, make in methods.items() if name in (self.wanted or methods)}

    def at_budgets(self, length, steps, case=None):
        """{name: function that makes its cache} of the named methods, and of all at each budget."""
        n = length - steps - 1
        made = {f"named/{name}": make for name, make in self.named(n, steps, case).items()}
        for share in [] if self.wanted else self.settings["shares"]:
            made |= {f"{share}/{name}": make for name, make in fidelity.methods_at(
                share * 2 * n, n, steps, case).items()}
        return made

    def jobs(self, parts):
        """Yield functions, each of which measures some results that the file does not have yet."""
        have = self.settings
        if "texts" in parts:
            for kind in have["kinds"]:
                yield functools.partial(text_cells, self, kind)
        if "needles" in parts:
            for length in have["needle_lengths"]:
                for depth in have["depths"]:
                    yield functools.partial(needle_cells, self, length, depth)
        if "ruler" in parts:                                # a sample of every task, then the next
            for i in range(have["ruler_samples"]):
                for length in have["ruler_lengths"]:
                    for name in ruler.TASKS:
                        yield functools.partial(ruler_cell, self, name, length, i)


def text_cells(run, kind):
    """Measures on a text of this kind, at each length. Dense attention reads the longest once."""
    steps, lengths = run.settings["steps"], run.settings["lengths"]
    if not any(run.left(f"dense/{kind}/{n}", run.at_budgets(n, steps)) for n in lengths):
        return
    ids = texts.ids(run.tokenizer, kind, run.settings["half"], max(lengths))
    for case in kept.cases(run.model, run.tokenizer, ids, lengths, steps, run.keep):
        key = f"dense/{kind}/{len(case.ids)}"
        made = run.at_budgets(len(case.ids), steps, case)
        for name in run.left(key, made):
            cell = fidelity.against_dense(run.model, case, made[name])
            if name.startswith("named/") or run.settings["errors"]:
                cell |= fidelity.by_head(case, made[name])
            run.add(f"{key}/{name}", cell)


def needle_cells(run, length, depth):
    methods, key, case = run.named(length, 8), f"needle/{length}/{depth}", None
    for name in run.left(key, methods):
        if case is None:
            ids, needle, n_answer = needle_prompt(run.tokenizer, length, depth,
                                                  run.settings["seed"])
            case = fidelity.read(run.model, ids, n_answer)
            methods = run.named(length, 8, case)
        answer = torch.tensor(fidelity.against_dense(run.model, case, methods[name])["nll"])
        run.add(f"{key}/{name}", {"answer": answer.neg().exp().mean().item(),
                                  **fidelity.needle_mass(case, methods[name], needle)})


def ruler_cell(run, name, length, i):
    n, key, tokenizer = run.settings["ruler_samples"], f"ruler/{name}/{length}", run.tokenizer
    if not run.left(key, [str(i)]) or f"{key}/none" in run.results.cells:
        return
    if (name, length) not in run.samples:
        empty = len(tokenizer.chat([{"role": "user", "content": ""}]))
        try:
            run.samples[name, length] = ruler.generate(
                name, lambda text: len(tokenizer.encode(text)), length, n,
                run.settings["dialect"], reserve=empty)
        except ruler.TooShort as e:         # the shortest documents of qa_2 are more than 2,048
            return run.add(f"{key}/none", str(e))
    methods, sample = answers.methods(config=run.config), run.samples[name, length][i]
    run.add(f"{key}/{i}", ruler_points(run.model, tokenizer, name, sample, methods))


# ---------------------------------------------------------------- command line

def settings_of(args):
    """All that the results depend on. A file holds results of one such dict only."""
    settings = (FULL if args.full else QUICK) | {
        "seed": args.seed, "half": args.half, "dialect": args.dialect, "model": args.model,
        "dtype": args.dtype, "kinds": args.kinds}
    for name in ("lengths", "needle_lengths", "ruler_lengths"):
        settings[name] = list(args.lengths or settings[name]) if settings[name] else []
    settings |= {} if args.steps is None else {"steps": args.steps}
    if given := parse_settings(args.set):
        if not args.methods:
            raise InputError("other methods have the bytes of the default: give --methods ours")
        RetroConfig(**given)                                # or a line that says what is wrong
        settings["config"] = given
    source = b"".join((ROOT / name).read_bytes()
                      for name in ("retroinfer.py", "model.py", "evaluation/fidelity.py",
                                   "evaluation/texts.py"))
    return settings | {"code": hashlib.sha256(source).hexdigest()[:12]}


def own_file(settings):
    """Where results of these settings go, if no --out is given."""
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    return ROOT / "runs" / f"evaluate-{name}.jsonl"


def parse_args(argv):
    parser = Parser(prog="python -m evaluation.evaluate",
                    description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--full", action="store_true", help="all lengths, budgets and RULER")
    add("--model", default=DEFAULT_NAME, help="name, directory or .gguf file")
    add("--dtype", choices=["float32", "bfloat16"], default="float32",
        help="bfloat16 for RULER only: it rounds more than a method loses")
    add("--lengths", type=int, nargs="+", help="tokens of a text, its steps among them")
    add("--kinds", nargs="+", choices=texts.KINDS, default=list(texts.FOUR), help="of texts")
    add("--steps", type=int, help="tokens fed one by one behind each text")
    add("--half", choices=["final", "choose"], default="final",
        help="choose: other texts, to choose a setting on")
    add("--dialect", choices=["new", "old"], default="new", help="of RULER")
    add("--seed", type=int, default=0, help="of needles and intervals")
    add("--parts", nargs="+", choices=["texts", "needles", "ruler"], help="only these now",
        default=["texts", "needles", "ruler"])
    add("--methods", nargs="+", choices=fidelity.named_methods(2048, 32),
        help="only these, and no budgets")
    add("--keep", type=Path, metavar="DIR", help="keep there what dense attention makes of a text")
    add("--minutes", type=float, default=math.inf, help="begin nothing after so many")
    add("--out", type=Path, help="results (default: a file in runs/, for these settings alone)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="numbers of ours, with --methods")
    return parser.parse_args(argv)


def evaluate(args):
    settings, shortest = settings_of(args), 1024
    if args.dtype != "float32" and args.parts != ["ruler"]:
        raise InputError("bfloat16 rounds more than a method loses: give --parts ruler with it")
    if min(settings["lengths"]) < shortest:
        raise InputError(f"a text of {min(settings['lengths']):,} tokens is nearly all in the "
                         f"exact window: give --lengths of {shortest:,} or more")
    if not 1 <= settings["steps"] <= shortest // 4:
        raise InputError(f"--steps is {settings['steps']}: give 1 to {shortest // 4}")
    model, tokenizer = load(args.model, dtype=getattr(torch, args.dtype), device="cpu")
    longest = max(n for x in ("lengths", "needle_lengths", "ruler_lengths") for n in settings[x])
    if longest > model.config.context:
        raise InputError(f"{longest:,} tokens, the model's context is {model.config.context:,}: "
                         "give smaller --lengths")
    out = args.out or own_file(settings)
    command = shlex.join(["python", "-m", "evaluation.evaluate", *sys.argv[1:]])
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    results = Results(out, {"command": command, "versions": versions, "settings": settings})
    end, late = time.monotonic() + 60 * args.minutes, False
    for job in Run(model, tokenizer, settings, results, args.methods, args.keep).jobs(args.parts):
        late = late or time.monotonic() > end
        if not late:
            job()
    report(results, settings, out)
    print(f"evaluate: all results are in {out}", file=sys.stderr)
    if late:
        print("evaluate: the time is over; the same command goes on here", file=sys.stderr)


def main(argv=None):
    """The exit status."""
    status = run_command("evaluate", lambda: evaluate(parse_args(argv)))
    if status == 130:
        print("evaluate: stopped; the same command goes on here", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
