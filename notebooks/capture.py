"""Real queries, keys and values: the default model reads a text of examples/ and answers.

Made once (a minute, 265 or 400 MB) into the ignored folder notebooks/.cache, then only opened.

    from capture import captured
    text = captured()                   # or captured("expedition"), a longer text
    q, k, v = text.layer(12)            # (1, H*G, T, D), (1, H, T, D), (1, H, T, D), RoPE applied
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from generate import eager_step, generate
from model import DEFAULT_PACKAGE, DenseCache, ModelConfig, load

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
N_ANSWER = 24                           # more than the answer needs: it ends by itself


@dataclass(frozen=True)
class Capture:
    """What one reading left behind. The last token of the answer was never fed: it has no key."""
    config: ModelConfig
    n_parameters: int
    pieces: list                        # the text of each of the T tokens
    n_prompt: int                       # the tokens before the answer
    q: torch.Tensor                     # (layers, H*G, T, D) fp16
    k: torch.Tensor                     # (layers, H, T, D) fp16
    v: torch.Tensor                     # (layers, H, T, D) fp16

    def layer(self, n):
        """q (1, H*G, T, D), k and v (1, H, T, D) of layer n in fp32, rounded to fp16 before."""
        return tuple(x[n:n + 1].float() for x in (self.q, self.k, self.v))

    def find(self, phrase):
        """Positions of the tokens of the phrase, where the text says it first, as a range."""
        before, found, _ = "".join(self.pieces).partition(phrase)
        if not found:
            raise ValueError(f"the text does not say {phrase!r}")
        ends = torch.tensor([len(piece) for piece in self.pieces]).cumsum(0)
        first, last = len(before), len(before) + len(phrase) - 1
        return range(int((ends <= first).sum()), int((ends <= last).sum()) + 1)


class Recorder(DenseCache):
    """A dense cache that keeps the queries too."""

    def prefill(self, q, k, v, row=0):
        self.queries = [q]
        return super().prefill(q, k, v, row)

    def decode(self, q, k, v):
        self.queries.append(q)
        return super().decode(q, k, v)

    forward = decode


def captured(name="lighthouse"):
    """The Capture of a text of examples/, made when it is not there yet."""
    text = (EXAMPLES / f"{name}.txt").read_bytes()
    key = hashlib.sha256(text + DEFAULT_PACKAGE.encode()).hexdigest()[:8]
    file = HERE / ".cache" / f"{key}.pt"
    if not file.exists():
        facts = read_text(text.decode())
        file.parent.mkdir(exist_ok=True)
        torch.save(facts, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)      # whole or not at all
    facts = torch.load(file, mmap=True)
    config = ModelConfig(**facts["config"] | {"eos_ids": frozenset(facts["config"]["eos_ids"])})
    return Capture(**facts | {"config": config})


def read_text(text):
    """The fields of a Capture, as plain values: one prefill and a greedy answer."""
    model, tokenizer = load(dtype=torch.float32, device="cpu")
    ids = tokenizer.chat([{"role": "user", "content": text}])
    caches = [Recorder(len(ids) + N_ANSWER) for _ in model.layers]
    answer = torch.cat(list(generate(model, caches, [torch.tensor(ids)], N_ANSWER,
                                     step=eager_step))).tolist()
    T = int(caches[0].n_tokens[0])

    def stack(tensors):
        return torch.cat([x[:, :, :T] for x in tensors]).half()

    return {"config": vars(model.config) | {"eos_ids": sorted(model.config.eos_ids)},
            "n_parameters": sum(p.numel() for p in model.parameters()),
            "pieces": [tokenizer.backend.decode([i], skip_special_tokens=False)
                       for i in (ids + answer)[:T]],
            "n_prompt": len(ids), "q": stack(torch.cat(c.queries, 2) for c in caches),
            "k": stack(c.k for c in caches), "v": stack(c.v for c in caches)}
