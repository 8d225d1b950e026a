"""A conversation: prompts and turns as tokens, and the caches that read and answer them.

    writer = Writer(tokenizer, raw=False, device="cpu")
    ids = writer.prompt(text, "Who keeps the light?")               # (T,)
    session = Session(model, lambda: WaveIndex(RetroConfig(), 8192), sampler(), compiled_step)
    session.read([ids])
    said, = session.answer(100, Stream(tokenizer))
    session.read([writer.turn("Since when?", said)])                # nothing is read again
"""
import sys
import time
from contextlib import contextmanager

import torch

from app.threads import Threads
from generate import CHUNK, decode, prefill
from retroinfer import InputError

OTHERS = (None, "1?", "What", "é", "“")     # questions that begin in unlike ways


class Writer:
    """Prompts and turns as token ids (T,), the way the model's chat template writes them.

    n_embedded: how many tokens the model embeds.
    """

    def __init__(self, tokenizer, raw, device, n_embedded=None):
        self.tokenizer, self.raw, self.device = tokenizer, raw, device
        self.n_embedded = n_embedded

    def prompt(self, text, question=None):
        """A text, and a question about it. InputError if they give no tokens."""
        if not (ids := self.ids(text, question)):
            raise InputError("the prompt gives no tokens: the tokenizer knows none of its letters, "
                             "or the chat template writes nothing")
        return self.tensor(ids)

    def head(self, text, question=None):
        """What the prompts of a text begin with, whatever is asked. An index holds it.

        Tokens at the text's end that a question changes do not belong to it.
        """
        asked = self.ids(text, question)
        n = min(n_same(asked, self.ids(text, other)) for other in OTHERS)
        return self.tensor(asked[:n])

    def ids(self, text, question):
        """The token ids of prompt(), a list."""
        question = f"\n\n{question}" if question else ""
        if self.raw:
            return self.tokenizer.encode(text + question)
        return self.chat(text.rstrip() + question)

    def turn(self, text, said):
        """A turn after an answer of tokens `said`. It begins with the answer's last token, which
        no cache holds yet.

        A template may do anything with an answer. So two conversations are rendered that differ in
        their answers. The turn is what both end with, without what stands before an answer.
        """
        last = [token for token in said[-1:] if token not in self.tokenizer.eos_ids]
        if self.raw or not self.tokenizer.template:
            return self.tensor(last + self.tokenizer.continued(text))
        one, other = (self.chat("x", answer, text) for answer in ("1", "z"))
        n = n_same(one[::-1], other[::-1])
        begin = max(len(one) - n, n_same(one, self.chat("x")))
        return self.tensor(last + one[begin:])

    def chat(self, *contents):
        """Token ids of a conversation in which user and assistant take turns."""
        roles = ("user", "assistant") * len(contents)
        return self.tokenizer.chat([{"role": role, "content": text}
                                    for role, text in zip(roles, contents, strict=False)])

    def tensor(self, ids):
        """Token ids (T,). InputError for one that the model does not embed."""
        n = self.n_embedded
        if n and max(ids, default=0) >= n:
            raise InputError(f"the prompt has token {max(ids)}, the model embeds {n:,} tokens: the "
                             "chat template writes a control token that this model does not have")
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


def n_same(a, b):
    """How many elements of two lists are the same, from their beginning."""
    return next((n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]),
                min(len(a), len(b)))


class Session:
    """A batch of sequences, read and answered turn by turn in one set of caches, and timed."""

    def __init__(self, model, make_cache, pick, step, chunk=CHUNK):
        self.model, self.caches = model, [make_cache() for _ in model.layers]
        self.pick, self.step, self.chunk = pick, step, chunk
        self.threads = Threads(model.embed_tokens.weight.dtype)
        self.n_read = self.n_said = [0] * len(self.caches[0].n_tokens)      # tokens, by sequence
        self.prefill_seconds = 0.0
        self.steps = []                                     # (tokens, seconds) of each step

    def spread(self, batch):
        """Go on with `batch` sequences that begin as the one that was restored does."""
        if batch > 1:
            from app.questions import spread
            for cache in self.caches:
                spread(cache, batch)
            self.n_read = self.n_said = [0] * batch

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
        from tqdm import tqdm
        for cache in tqdm(self.caches, desc="index", unit="layer", leave=False, delay=1):
            cache.update()                          # a graph over the keys takes minutes
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


class Stream:
    """Prints an answer while it grows, each character as soon as it is complete."""

    def __init__(self, tokenizer):
        self.tokenizer, self.shown = tokenizer, ""

    def __call__(self, tokens):
        self.show(self.tokenizer.decode(tokens).rstrip("\ufffd"))

    def end(self, tokens):
        """All that is left of the answer, with a character that its end cut, and a new line."""
        self.show(self.tokenizer.decode(tokens))
        print(flush=True)

    def show(self, text):
        """What text has behind the text shown, or behind what both begin with: bytes that are no
        character may change what stood before them."""
        if not self.shown.startswith(text):
            print(text[n_same(text, self.shown):], end="", flush=True)
            self.shown = text


def turns():
    """The lines of standard input that are not empty. At a terminal each has a prompt, > ."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")         # a letter of another encoding ends no chat
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()
