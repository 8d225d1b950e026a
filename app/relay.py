"""The first word at once: steps are eager until compiled ones are ready, and pay.

torch.compile needs seconds for a step, and half a minute where nothing is in its cache. A compiled
step is then faster than an eager one. So an answer begins with eager steps. Beside them step.cpp is
compiled. For a long answer a child process compiles the same step of a model of the same shape.
This fills Inductor's cache on the disk. When the child has ended, and enough of the answer is left,
this process compiles the step too, from that cache.

    relay = Relay(spec, n_tokens)       # a step, as generate.eager_step is one
    session = Session(model, make_cache, pick, relay)
    print(relay.words())                # what took the steps, and why

If nothing compiles here, the answer is eager to its end, and words() says why.
"""
import atexit
import hashlib
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import generate
from generate import COMPILE, compiled_step, eager_step, reason
from model import Llama, ModelConfig, make_caches
from retroinfer import PLAIN, InputError, RetroConfig, WaveIndex

ROOT = Path(__file__).parent.parent
LONG = 200          # tokens of an answer from which compiling may pay
LOADING = 8.0       # seconds that compiling takes with a filled cache
GAIN = 0.5          # share of an eager step's time that a compiled one saves at least
TITLES = {"generate": "PyTorch", "kernels": "Triton", "native.step": "native/step.cpp"}


@dataclass(frozen=True)
class Spec:
    """What the graph of a step depends on."""
    model: ModelConfig
    dtype: torch.dtype
    config: RetroConfig
    capacity: int
    batch: int


class Relay:
    """A step, eager first. n_tokens: of an answer, or of each of many."""

    def __init__(self, spec, n_tokens, is_chat=False):
        self.n_left, self.is_chat = n_tokens, is_chat
        self.hot, self.problem = PLAIN._replace(attend=generate.attend), None
        self.is_ready = self.is_over = False
        self.n_steps = self.n_eager = 0
        self.child, self.has_begun = None, threading.Event()
        atexit.register(self.close)
        is_long = is_chat or n_tokens >= LONG
        self.worker = threading.Thread(target=self.prepare, args=(spec, is_long), daemon=True)
        self.worker.start()

    def __call__(self, model, caches, tokens):
        if not self.is_over and self.is_ready and self.pays():
            self.is_over = True
        for cache in caches:
            cache.hot = self.hot
        self.n_steps += 1
        self.has_begun.set()
        if self.is_over:
            try:
                return compiled_step(model, caches, tokens)
            except torch._dynamo.exc.TorchDynamoException as e:     # nothing has run yet
                self.is_over = self.is_ready = False
                self.problem = f"compiling failed: {reason(str(e))}"
        start = time.perf_counter()
        logits = eager_step(model, caches, tokens)
        self.n_eager, self.seconds = self.n_eager + 1, time.perf_counter() - start
        return logits

    def pays(self):
        """Whether compiled steps would save more seconds of this answer than loading them takes."""
        n_left = self.n_left if self.is_chat else self.n_left - self.n_steps
        return self.n_eager and n_left * self.seconds * GAIN > LOADING

    def prepare(self, spec, is_long):
        """In a thread: compile step.cpp, and let a child compile a whole step behind the prefill,
        which needs all cores."""
        self.hot, self.problem = best_hot(spec)
        self.has_begun.wait()
        if not is_long:
            return
        if not stamp(spec).exists() and (problem := self.compile_beside(spec)):
            self.problem = self.problem or problem
            return
        self.is_ready = True

    def compile_beside(self, spec):
        """Let a child compile a step. What went wrong, in a line; None if nothing did."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.child = subprocess.Popen(
            [sys.executable, "-m", "app.relay"], env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, said = self.child.communicate(pickle.dumps(spec))
        if self.child.returncode:
            return f"compiling failed: {reason(said.decode(errors='replace'))}"
        return None

    def close(self):
        """End the child, if it is still at work."""
        if self.child and self.child.poll() is None:
            self.child.kill()

    def words(self):
        """What took the steps."""
        attend = TITLES[self.hot.attend.__module__]
        n_compiled = self.n_steps - self.n_eager
        how = f"{self.n_eager} eager steps" + f", {n_compiled} compiled" * bool(n_compiled)
        words = f"{attend} on cpu, {torch.get_num_threads()} threads, {how}"
        return f"{words}; {self.problem}" if self.problem else words


def best_hot(spec):
    """The fastest hot functions of a CPU, ready to run, and why they are no faster, if so."""
    try:
        from native.step import attend, prepare
        prepare(spec.dtype, spec.config, spec.model.head_dim)
        return PLAIN._replace(attend=attend), None
    except (InputError, ImportError) as e:
        return PLAIN._replace(attend=generate.attend), str(e)


def stamp(spec):
    """The file that says that Inductor's cache holds this step. It lies in that cache."""
    sources = [path.read_bytes() for path in (*ROOT.glob("*.py"), *ROOT.glob("native/*"))
               if path.is_file()]
    facts = spec, COMPILE, torch.__version__, os.environ.get("CXX"), platform.processor()
    digest = hashlib.sha256(b"".join(sources) + repr(facts).encode()).hexdigest()
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()     # torch sets it
    return Path(folder) / f"retroinfer-step-{digest[:16]}"


def compile_step(spec):
    """Compile the step of a model of this shape, with weights that are never filled."""
    with torch.device("meta"):
        model = Llama(spec.model)
    state = {name: torch.empty(x.shape, dtype=spec.dtype) for name, x in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    if spec.model.tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.eval().requires_grad_(False)
    hot, _ = best_hot(spec)
    like = torch.empty(1, spec.model.num_key_value_heads, 0, spec.model.head_dim, dtype=spec.dtype)
    caches = make_caches(spec.model, lambda: WaveIndex(spec.config, spec.capacity, spec.batch, hot),
                         spec.capacity, spec.batch)
    for cache in caches:
        cache.allocate(like)
        cache.is_in_store = [False] * spec.batch        # a ring has no store, and does not care
    compiled_step(model, caches, torch.zeros(spec.batch, dtype=torch.int64))
    stamp(spec).touch()


if __name__ == "__main__":
    compile_step(pickle.load(sys.stdin.buffer))
