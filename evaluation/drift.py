"""Long generation: does a method get worse with every token that it has generated?

    python -m evaluation.drift --out results/drift.json             # SmolLM2: about 15 minutes

Forced: the true text goes on for thousands of tokens behind a prompt, and each method reads them
one by one. So a layer's keys and values carry the errors of all earlier steps. The table has the
mean KL to dense attention in windows of 512 steps.

Free: each method writes its own text behind the prompt, drawn at temperature 1 with the same seeds
and without end tokens.
Dense attention then says how likely each text is: nats a token, in windows. A text that dense
attention itself wrote is the control.
"""
from pathlib import Path

import torch

from app.command import Parser, run_command
from bench.timing import positive, table, where, write_json
from evaluation import fidelity, kept, texts
from evaluation.answers import SideBySide, methods
from generate import decode, eager_step, sampler
from model import DEFAULT_NAME, DenseCache, load
from retroinfer import InputError


def means(values, window):
    """The mean of each full window of values."""
    full = len(values) // window * window
    return torch.tensor(values[:full]).view(-1, window).mean(-1).tolist()


def forced(model, case, window):
    """{method: KL to dense in each window of the case's steps}."""
    found = {}
    for name, make in methods().items():
        caches = fidelity.caches_of(case, make, case.T)
        found[name] = means(fidelity.forced(model, case, caches)["kl"], window)
    return found


def free(model, case, n_tokens, n_seeds, window):
    """{method: nats a token, in each window, that dense attention gives to what it wrote}."""
    made = methods()
    rows = [fidelity.caches_of(case, make, n_tokens + 1)
            for make in made.values() for _ in range(n_seeds)]
    caches = [SideBySide(layer) for layer in zip(*rows, strict=True)]
    draws = [sampler(temperature=1.0, seed=seed) for seed in range(n_seeds)]

    ends = torch.tensor(sorted(model.config.eos_ids))

    def pick(logits):                           # the rows of a method lie together
        logits = logits.index_fill(-1, ends, -torch.inf)
        drawn = [draw(logits[seed::n_seeds]) for seed, draw in enumerate(draws)]
        return torch.stack(drawn, 1).flatten()
    for cache in caches:
        cache.update()
    first = case.ids[case.n].expand(n_seeds * len(made))
    logits = eager_step(model, caches, first)
    written = torch.stack(list(decode(model, caches, logits, n_tokens, pick, eager_step)), 1)
    nats = [means(likelihood(model, case, row), window) for row in written]
    groups = zip(made, torch.tensor(nats).view(len(made), n_seeds, -1), strict=True)
    return {name: rows.mean(0).tolist() for name, rows in groups}


def likelihood(model, case, ids):
    """Nats of each of ids (n,) behind the case's prompt and first token, by dense attention."""
    caches = fidelity.caches_of(case, DenseCache, len(ids))
    attends = [cache.prefill for cache in caches]
    before = torch.cat([case.ids[case.n:case.n + 1], ids[:-1]])
    hidden = fidelity.follow(model, before, case.n, attends)
    return fidelity.distances(model, hidden, hidden, ids)["nll"]


def parse_args(argv):
    parser = Parser(prog="python -m evaluation.drift", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_NAME, help="name, directory or .gguf file")
    add("--text", choices=texts.KINDS, default="prose")
    add("--prompt", type=positive, default=4094, help="tokens read before the first step")
    add("--steps", type=positive, default=4096, help="forced steps")
    add("--tokens", type=positive, default=2000, help="tokens of each free text")
    add("--seeds", type=positive, default=4, help="free texts of each method")
    add("--window", type=positive, default=512, help="steps of which a mean is shown")
    add("--keep", metavar="DIR", help="keep there what dense attention makes of a text")
    add("--out", type=Path, help="results, as JSON")
    return parser.parse_args(argv)


def drift(args):
    model, tokenizer = load(args.model, torch.float32, "cpu")
    length = args.prompt + args.steps + 1
    if length > model.config.context:
        raise InputError(f"{length:,} tokens, the model's context is {model.config.context:,}: "
                         "give fewer --steps")
    if args.window > min(args.steps, args.tokens):
        raise InputError(f"--window is {args.window}: give at most --steps and --tokens")
    ids = texts.ids(tokenizer, args.text, "final", length)
    case, = kept.cases(model, tokenizer, ids, [length], args.steps, args.keep)
    settings = {name: x for name, x in vars(args).items() if name not in ("keep", "out")}
    found = {"machine": where("quality only"), "settings": settings,
             "forced": forced(model, case, args.window),
             "free": free(model, case, args.tokens, args.seeds, args.window)}
    for part, title in (("forced", "KL to dense"), ("free", "nats a token, by dense attention")):
        rows = [[name, *(f"{x:.4f}" for x in row)] for name, row in found[part].items()]
        ends = range(args.window, args.window * len(rows[0]), args.window)
        print(table([f"{part}: {title}", *(f"to {end:,}" for end in ends)], rows), end="\n\n")
    if args.out:
        write_json(args.out, found)


def main(argv=None):
    """The exit status."""
    return run_command("drift", lambda: drift(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
