"""A conversation: prompts and turns as tokens, and the caches that read and answer them.

    writer = Writer(tokenizer, raw=False, device="cpu")
    head, tail = writer.prompt(text, "Who keeps the light?")        # token ids (T,)
    session = Session(model, lambda: WaveIndex(RetroConfig(), 8192), sampler(), compiled_step)
    session.read([torch.cat([head, tail])])
    said, = session.answer(100, stream(tokenizer))
    session.read([writer.turn("Since when?", said)])                # nothing is read again
"""
import sys
import time
from contextlib import contextmanager

import torch

from app.threads import Threads
from generate import CHUNK, decode, prefill

MARK = "\u2063cut here\u2063"     # where a rendered prompt is cut in two; never tokenised


class Writer:
    """Prompts and turns as token ids (T,), the way the model's chat template writes them."""

    def __init__(self, tokenizer, raw, device):
        self.tokenizer, self.raw, self.device = tokenizer, raw, device

    def prompt(self, text, question):
        """(the text and what stands before it, what stands after it). An index holds the first."""
        question = f"\n\n{question}" if question else ""
        text = text if self.raw else text.rstrip()
        head, _, tail = self.render(("user", text + MARK + question)).partition(MARK)
        return self.tensor(self.tokenizer.encode(head)), self.continued(tail)

    def turn(self, text, said):
        """A turn after an answer of tokens `said`. It begins with the answer's last token, which
        no cache holds yet."""
        last = [token for token in said[-1:] if token not in self.tokenizer.eos_ids]
        tail = self.render(("user", ""), ("assistant", MARK), ("user", text)).rpartition(MARK)[2]
        return torch.cat([self.tensor(last), self.continued(tail)])

    def render(self, *messages):
        if self.raw:
            return messages[-1][1]
        return self.tokenizer.chat([{"role": role, "content": text} for role, text in messages])

    def continued(self, text):
        return self.tensor(self.tokenizer.ids(text, add_special_tokens=False))

    def tensor(self, ids):
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


class Session:
    """A batch of sequences, read and answered turn by turn in one set of caches, and timed."""

    def __init__(self, model, make_cache, pick, step, chunk=CHUNK):
        self.model, self.caches = model, [make_cache() for _ in model.layers]
        self.pick, self.step, self.chunk, self.threads = pick, step, chunk, Threads()
        self.n_read = self.n_said = [0] * len(self.caches[0].n_tokens)      # tokens, by sequence
        self.prefill_seconds = 0.0
        self.steps = []                                     # (tokens, seconds) of each step

    def read(self, prompts):
        """Append a prompt (T,) to each sequence."""
        start = time.perf_counter()
        n_chunks = sum(-(-len(p) // self.chunk) for p in prompts)
        with self.threads, progress(self.model, n_chunks, self.threads):
            self.logits = prefill(self.model, self.caches, prompts, self.chunk)
        self.prefill_seconds += time.perf_counter() - start
        self.n_read = [n + len(p) for n, p in zip(self.n_read, prompts, strict=True)]

    def answer(self, n_tokens, show=lambda tokens: None):
        """Up to n_tokens tokens after each sequence, a list for each, with their end tokens.

        After every token show is called with the first sequence's tokens. If it returns True, the
        answer ends.
        """
        found = decode(self.model, self.caches, self.logits, n_tokens, self.pick, self.step)
        said = [[] for _ in self.logits]
        n_before, clock = 0, time.perf_counter()
        with self.threads:
            for token in found:
                for tokens, t in zip(said, token.tolist(), strict=True):
                    if not tokens or tokens[-1] not in self.model.config.eos_ids:
                        tokens.append(t)
                n = sum(map(len, said))
                if n_before:                                    # the first token takes no step
                    self.steps.append((n - n_before, time.perf_counter() - clock))
                    self.threads.end_piece()
                if show(said[0]):
                    break
                n_before, clock = n, time.perf_counter()
        self.n_said = [n + len(tokens) for n, tokens in zip(self.n_said, said, strict=True)]
        return said

    def record(self):
        """A list to which every token picked from now on adds its logits (B, V)."""
        logits, pick = [], self.pick

        def remember(x):
            logits.append(x)
            return pick(x)
        self.pick = remember
        return logits

    def room(self):
        """Tokens that still fit behind every sequence."""
        return self.caches[0].capacity - int(self.caches[0].n_tokens.max())

    def speed(self):
        """Tokens a second, without the first step, which compiles. 0 if there was no other."""
        steps = self.steps[1:]
        if not steps:
            return 0.0
        return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


@contextmanager
def progress(model, n_chunks, threads):
    """A bar on standard error that moves with every layer of the prefill. A layer is a piece of
    work for `threads`."""
    from tqdm import tqdm

    def end_layer(*_):
        bar.update()
        threads.end_piece()

    with tqdm(total=len(model.layers) * n_chunks, desc="prefill", unit="layer", leave=False) as bar:
        hooks = [layer.register_forward_hook(end_layer) for layer in model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def stream(tokenizer):
    """A function that prints what each new token adds, as soon as its characters are complete."""
    shown = ""

    def show(tokens):
        nonlocal shown
        text = tokenizer.decode(tokens)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    return show


def turns():
    """The lines of standard input that are not empty. At a terminal each has a prompt, > ."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()
