"""Error bars against float64 loops: what is drawn, what is estimated, how often a bar holds."""
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import SMALL, generated, qkv, read

from app import cli
from error_bars import (
    EVENLY,
    ROUNDS,
    BoundedIndex,
    CheckedIndex,
    chances,
    draw,
    look,
    relative,
    terms,
    uniform,
    width,
)
from retroinfer import RetroConfig, WaveIndex, cluster_segment

FEW = RetroConfig(**SMALL | {"retrieve": 0.1, "estimate": 0.3})
CONFIGS = {"ours": FEW, "no values": RetroConfig(**SMALL | {"retrieve": 0.1, "values": 0.0}),
           "all values, 16 bits": RetroConfig(**SMALL | {"retrieve": 0.1, "values": 1.0,
                                                         "bits": 16}),
           "the paper's": RetroConfig(**SMALL | {
               "retrieve": 0.1, "values": 1.0, "bits": 16, "by_mass": False, "growth": 1.0,
               "channel_power": 0.0})}
KINDS = {
    "clumps": lambda k: k,
    "equal keys": lambda k: k[:, :, :1].expand_as(k),
    "opposite keys": lambda k: k[:, :, :1] * (1 - 2 * (torch.arange(k.shape[2]) % 2)[:, None]),
    "one needle": lambda k: torch.where((torch.arange(k.shape[2]) == 20)[:, None], 40 * k, k),
    "logits of thousands": lambda k: 300 * k,
    "tiny": lambda k: 1e-4 * k,
}


class Watched(CheckedIndex):
    """A checked index that keeps what its latest step left, and what was drawn."""

    def check(self, q, left, o):
        self.step = q, left, o
        return super().check(q, left, o)

    def draw(self, *args, **named):
        self.bars = super().draw(*args, **named)
        return self.bars


def dense(q, k, v):
    """Outputs (G, D) of one head in float64 loops: q (G, D), k and v (T, D)."""
    outputs = []
    for query in q.double():
        x = [float(query @ key) / math.sqrt(len(query)) for key in k.double()]
        w = [math.exp(y - max(x)) for y in x]
        outputs.append(sum(a * row for a, row in zip(w, v.double(), strict=True)) / sum(w))
    return torch.stack(outputs)


def truth(q, k, v):
    """dense for every head of the last token: (B, H, G, D) of q (B, H*G, T, D)."""
    B, H = k.shape[:2]
    q = q[:, :, -1].unflatten(1, (H, -1))
    return torch.stack([torch.stack([dense(q[b, h], k[b, h], v[b, h]) for h in range(H)])
                        for b in range(B)])


def checked(config, q, k, v, n_prompt, **named):
    cache = Watched(config, k.shape[2], len(k), **named)
    return cache, generated(cache, q, k, v, n_prompt)


def everything(left, b, h):
    """[(row, cell)] of all tokens that a head left out."""
    found = []
    for u, size in enumerate(left.sizes[b, h].tolist()):
        if (left.guess[b, h, :, u] > -math.inf).any():
            found += [(int(left.first[b, h, u]) + i, u) for i in range(int(size))]
    return found


# ---------------------------------------------------------------- what a step left out

@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_was_left_out_mends_the_output(config, kind):
    """A step's output and the terms of all tokens that it left out are dense attention's."""
    q, k, v = qkv(150)
    k = KINDS[kind](k).contiguous()
    cache, _ = checked(config, q, k, v, 148)
    scaled, left, out = cache.step
    for h, want in enumerate(truth(q, k, v)[0]):
        tokens = everything(left, 0, h)
        rows, cells = torch.tensor(tokens).T if tokens else torch.zeros(2, 0, dtype=torch.int64)
        drawn = [x.expand(1, 2, -1) for x in (rows, cells, torch.ones(len(rows)).double())]
        delta, _ = terms(left, drawn, scaled, cache.index, cache.store.tensors(), out)
        wrong = (out[0, h] + delta[0, h] - want).norm(dim=-1) / want.norm(dim=-1)
        assert wrong.max() < (1e-2 if kind == "logits of thousands" else 1e-4), wrong
        if kind == "clumps":
            assert (out[0, h] - want).norm() > 1e-2             # there was something to mend


@pytest.mark.parametrize("kind", ["clumps", "one needle"])
def test_a_sum_over_draws_is_on_average_the_sum_over_all_tokens(kind):
    q, k, v = qkv(150)
    cache, _ = checked(FEW, q, KINDS[kind](k).contiguous(), v, 148)
    _, left, _ = cache.step
    n, m = 200, 64
    counts = torch.zeros(left.sizes.shape, dtype=torch.float64)
    for i in range(n):
        rows, cells, factor = draw(left, uniform((1, 2, m), torch.tensor([7]), torch.tensor([i])))
        first, size = (x.gather(-1, cells) for x in (left.first, left.sizes))
        assert ((rows >= first) & (rows < first + size))[factor > 0].all()
        counts.scatter_add_(-1, cells, factor)
    is_left = left.guess.amax(2) > -math.inf
    share = chances(left)
    want = left.sizes.double() * is_left
    # a cell that is drawn with chance p in each of n m draws: deviation over mean 1 / sqrt(n m p)
    off = (counts / n - want).abs() / want.clamp(min=1)
    assert (off <= 5 / (n * m * share.clamp(min=1e-9)).sqrt())[is_left].all()
    assert (counts[~is_left] == 0).all()


def test_no_token_is_out_of_reach():
    """Each has at least EVENLY of what it had if all were drawn alike, however little its cluster
    seems to weigh."""
    q, k, v = qkv(300)
    cache, _ = checked(FEW, 9 * q, k, v, 298)
    _, left, _ = cache.step
    share, is_left = chances(left), left.guess.amax(2) > -math.inf
    least = EVENLY * left.sizes / (left.sizes * is_left).sum(-1, keepdim=True)
    assert (share >= least * 0.999)[is_left].all() and left.guess[is_left[:, :, None].expand_as(
        left.guess)].min() < -30
    torch.testing.assert_close(share.sum(-1), torch.ones(1, 2, dtype=torch.float64))


@given(seed=st.integers(0, 10**6), longer=st.floats(0, 4))
@settings(max_examples=10, deadline=None)
def test_an_estimated_mass_never_exceeds_the_true_one(seed, longer):
    """Jensen's inequality, eq. 3 of the paper, for each cluster and query."""
    q, k, v = (x.double() for x in qkv(64, G=2, seed=seed))
    index, k, _ = cluster_segment(k, v, CONFIGS["the paper's"])
    q = longer * q.view(1, 2, -1, 16)                                       # (1, H, 2 * 64, D)
    guess = q @ index.centroids.mT + index.sizes.log()[:, :, None]
    for h in range(2):
        spans = zip(index.offsets[0, h].tolist(), index.sizes[0, h].int().tolist(), strict=True)
        for c, (first, n) in enumerate(spans):
            true = (q[0, h] @ k[0, h, first:first + n].mT).logsumexp(-1)
            assert (guess[0, h, :, c] <= true + 1e-4).all()


# ---------------------------------------------------------------- bars

@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), config=st.sampled_from(list(CONFIGS.values())),
       longer=st.sampled_from([0.0, 0.1, 1.0, 30.0]), draws=st.sampled_from([1, 2, 64]))
def test_bars_are_finite(kind, seed, config, longer, draws):
    q, k, v = qkv(120, seed=seed)
    cache, o = checked(config, longer * q, KINDS[kind](k).contiguous(), v, 118, draws=draws)
    widths = cache.widths[cache.widths >= 0]
    assert o.isfinite().all() and widths.isfinite().all() and len(widths) == 12


@pytest.mark.parametrize("config", [FEW, CONFIGS["all values, 16 bits"]], ids=["few", "values"])
def test_bars_hold_as_often_as_they_promise(config):
    """Clumps of normal keys: terms of a draw have a variance, so the theory holds."""
    q, k, v = qkv(460, H=4, D=32, spread=0.5)
    cache, o = Watched(config, 460, seed=3), None
    read(cache, *(x[:, :, :400] for x in (q, k, v)))
    holds = []
    for t in range(400, 460):
        cache.update()
        o = cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v))).view(4, 3, 32)
        x = torch.einsum("hgd,htd->hgt", q[0, :, t].view(4, 3, 32), k[0, :, :t + 1]).double()
        want = (x / math.sqrt(32)).softmax(-1) @ v[0, :, :t + 1].double()
        off = (o - want).norm(dim=-1) / o.norm(dim=-1)
        holds.append(off <= relative(width(cache.bars, cache.z), o[None])[0])
    share = torch.stack(holds).double().mean()
    assert 0.93 <= share <= 0.995, share


def test_nothing_left_leaves_nothing_uncertain():
    q, k, v = qkv(150)
    config = RetroConfig(**SMALL | {"retrieve": 1.0, "values": 1.0})
    cache, _ = checked(config, q, k, v, 140)
    widths = cache.widths[cache.widths >= 0]
    assert len(widths) == 60 and widths.max() < 1e-4
    short, _ = checked(FEW, *(x[:, :, :20] for x in (q, k, v)), 15)     # nothing is indexed
    assert short.widths.max() < 1e-4


def test_one_token_left_is_found_and_mends_all():
    q, k, v = qkv(150)
    config = RetroConfig(**SMALL | {"cluster": 1, "bits": 16, "values": 1.0, "estimate": 0.0,
                                    "min_retrieve": 127, "retrieve": 0.0})
    cache, o = checked(config, q, k, v, 149)
    n_left = [len(everything(cache.step[1], 0, h)) for h in range(2)]
    assert n_left == [1, 1], n_left
    out = o[0, :, -1].view(2, 3, 16)
    torch.testing.assert_close((out + cache.bars.correction[0]), truth(q, k, v)[0], rtol=1e-4,
                               atol=1e-5)
    assert cache.bars.deviation.max() < 1e-6


def test_a_needle_that_no_draw_finds_is_not_in_the_bar():
    """What the theory does not promise: a token that has nearly all mass, in a cluster that seems
    to have none. Draws rarely find it, and then no bar knows of it."""
    q, k, v = qkv(700, H=1, G=1)
    cache = Watched(FEW, 700)
    read(cache, *(x[:, :, :690] for x in (q, k, v)))
    cache.update()
    row = int(cache.index.offsets[0, 0, 50])            # behind the index's back
    query, state, found = q[:, :, 690:691], cache.n_tokens.clone(), []
    cache.store.k[0, 0, row], cache.store.v[0, 0, row] = 30 * query[0, 0, 0], 9.0
    for seed in range(40):
        cache.n_tokens.copy_(state)
        cache.seed.fill_(seed)
        o = cache.decode(query, k[:, :, 690:691], v[:, :, 690:691])
        miss = (o - cache.store.v[0, 0, row]).norm()
        found.append(bool(miss <= width(cache.bars, cache.z)))
    _, left, _ = cache.step
    chance = float(1 - (1 - chances(left)[0, 0, 50] / left.sizes[0, 0, 50]) ** cache.draws)
    assert 0 < chance < 0.5 and sum(found) / 40 <= chance + 0.25, (sum(found), chance)


# ---------------------------------------------------------------- a checked step is the same step

@pytest.mark.parametrize("values", [0.2, 1.0])
def test_the_answer_is_that_of_a_plain_index_to_the_last_bit(values):
    q, k, v = qkv(150, B=2)
    config = RetroConfig(**SMALL | {"retrieve": 0.1, "values": values})
    cache, o = checked(config, q, k, v, 110)            # 40 steps, with an update between them
    assert torch.equal(o, generated(WaveIndex(config, 150, 2), q, k, v, 110))
    assert cache.bytes_read() == WaveIndex.bytes_read(cache)


def test_draws_follow_the_seed_and_not_the_batch():
    q, k, v = qkv(150, B=2)
    both, again, other, alone = (checked(FEW, *x, 140, seed=s)[0].widths for x, s in (
        ((q, k, v), 5), ((q, k, v), 5), ((q, k, v), 6), ([y[1:] for y in (q, k, v)], 5)))
    assert torch.equal(both, again) and not torch.equal(both, other)
    torch.testing.assert_close(both[1:], alone)


def test_an_index_that_was_saved_has_the_same_bars():
    q, k, v = qkv(150)
    first, second = (Watched(FEW, 150) for _ in "ab")
    read(first, *(x[:, :, :139] for x in (q, k, v)))
    second.restore({name: x.clone() for name, x in first.state(0).items()})
    for cache in (first, second):
        read(cache, *(x[:, :, 139:140] for x in (q, k, v)))
    for t in range(140, 150):
        for cache in (first, second):
            cache.update()
            cache.decode(*(x[:, :, t:t + 1] for x in (q, k, v)))
    assert torch.equal(first.widths, second.widths) and first.widths.max() > 0


def test_uniform_numbers_fill_their_parts_evenly():
    u = uniform((50, 3, 8), torch.tensor([0]), torch.arange(50))            # (B, H, m)
    part = torch.arange(8)
    assert ((u * 8).floor() == part).all()
    inside = (u * 8 - part).flatten().sort().values
    assert (inside - torch.linspace(0, 1, len(inside))).abs().max() < 0.05
    assert len(inside.unique()) == len(inside)


@pytest.mark.parametrize("make", [lambda *a: CheckedIndex(FEW, *a),
                                  lambda *a: BoundedIndex(0.05, 0.05, FEW, *a)],
                         ids=["checked", "bounded"])
@pytest.mark.parametrize("how", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_checked_step_is_one_graph(make, how):
    q, k, v = qkv(150, B=2)
    plain, compiled = make(150, 2), make(150, 2)
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    for cache in (plain, compiled):
        read(cache, *(x[:, :, :120] for x in (q, k, v)))
    step = torch.compile(compiled.decode, backend=how, fullgraph=True, dynamic=False)
    for t in range(120, 150):                           # with an update between them
        now = [x[:, :, t:t + 1] for x in (q, k, v)]
        plain.update(), compiled.update()
        torch.testing.assert_close(step(*now), plain.decode(*now), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.widths, plain.widths, rtol=1e-2, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------- acting on bars

def test_a_bounded_index_mends_what_misses_its_target():
    q, k, v = qkv(420, H=4, D=32, spread=0.5)
    v = v + 3
    bounded, plain = BoundedIndex(0.04, 0.05, FEW, 420), WaveIndex(FEW, 420)
    wrong = {}
    want = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, 400:], *(x.repeat_interleave(3, 1) for x in (k, v)),
        attn_mask=torch.ones(20, 420, dtype=torch.bool).tril(400))
    for cache in (bounded, plain):
        o = generated(cache, q, k, v, 400)[:, :, 400:]
        wrong[cache] = ((o - want).norm(dim=-1) / want.norm(dim=-1))[0]     # (H*G, T)
    slots = torch.arange(401, 421) % bounded.widths.shape[-1]
    met = (bounded.widths[0].flatten(0, 1)[:, slots] <= 0.04)
    assert wrong[bounded].quantile(0.9) < 0.8 * wrong[plain].quantile(0.9)
    assert met.double().mean() > 0.2
    assert (wrong[bounded][met] <= 0.04).double().mean() >= 0.95
    outputs, n_met, _ = bounded.counts.tolist()
    assert outputs == 240 and n_met == met.sum()


@pytest.mark.parametrize("error, draws", [(0.999, ROUNDS[0]), (1e-9, sum(ROUNDS))])
def test_rounds_end_when_all_is_well_or_at_the_cap(error, draws):
    q, k, v = qkv(150)
    v = v + 3
    cache = BoundedIndex(error, 0.5, FEW, 150)
    o = generated(cache, q, k, v, 145)
    assert cache.counts[2] == draws * 2 * 5
    if error > 0.9:
        assert torch.equal(o[:, :, 145:], generated(WaveIndex(FEW, 150), q, k, v, 145)[:, :, 145:])


def test_facts_say_what_the_widths_say():
    q, k, v = qkv(150)
    cache, _ = checked(FEW, q, k, v, 145)
    assert "bars" not in Watched(FEW, 150).__dict__
    bars, w = cache.facts()["bars"], cache.widths[cache.widths >= 0].view(6, 5)
    assert bars["heads"] == w.median(-1).values.tolist()
    assert bars["median"] == pytest.approx(float(w.median()))
    assert bars["bytes"] == 2 * 64 * (2 * 16 * 4 + 8)       # heads, draws, key and value, a mean


def test_look_is_the_step_that_was_taken():
    """Its denominator is that of the step: with no value left out, a step's own weights."""
    q, k, v = qkv(150)
    cache, _ = checked(CONFIGS["the paper's"], q, k, v, 149)
    scaled, left, _ = cache.step
    n = int(cache.n_tokens - cache.n_indexed)
    steady = cache.k_steady, cache.v_steady, torch.zeros(1, 2, 1, cache.k_steady.shape[2])
    steady[2][..., n:] = -math.inf
    again = look(scaled, steady, cache.index, cache.store.tensors(), cache.budget(), cache.method)
    torch.testing.assert_close(again.total, left.total)
    C = cache.index.sizes.shape[-1]
    assert (left.counted[..., C:] == -math.inf).all()       # all values were read
    estimated = (left.counted[..., :C] > -math.inf).sum(-1)
    assert (estimated == int(cache.budget().ranked - cache.budget().retrieve)).all()
    assert ((left.guess == -math.inf) <= (left.counted == -math.inf)).all()


# ---------------------------------------------------------------- the command line

@pytest.fixture
def answer(capsys, tmp_path, checkpoint):
    """answer(*flags): (status, standard output, standard error) of the command line."""
    path = tmp_path / "prompt.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log. " * 40, "utf-8")
    model = checkpoint(max_position_embeddings=4096)

    def answer(*flags):
        status = cli.main(["--prompt-file", str(path), "--backend", "eager", "--dtype", "float32",
                           "--model", str(model), "--max-new-tokens", "6", *flags])
        return status, *capsys.readouterr()
    return answer


def test_check_says_what_json_says_and_changes_no_word(answer):
    status, out, err = answer("--check", "--json")
    text, facts = out.rstrip().rsplit("\n", 1)
    bars = json.loads(facts)["bars"]
    assert status == 0 and answer()[1].rstrip() == text
    assert len(bars["median"]) == 2 and 0 < bars["median"][0] < bars["p95"][0]
    assert bars["worst"]["median"] >= max(bars["median"]) and bars["bytes_a_step"] > 0
    card = err[err.index("bars "):]
    assert " ".join(f"{100 * x:.2g}" for x in bars["median"]) in card
    assert f"layer {bars['worst']['layer']}, head {bars['worst']['head']}" in card


def test_max_err_counts_what_met_it(answer):
    status, out, err = answer("--max-err", "0.9", "--delta", "0.5", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert status == 0 and f"{facts['bars']['met']:.1%} of the outputs met --max-err 0.9" in err
    strict = json.loads(answer("--max-err", "1e-9", "--json")[1].splitlines()[-1])
    assert facts["bars"]["met"] > strict["bars"]["met"] == 0
    assert facts["bars"]["bytes_a_step"] < strict["bars"]["bytes_a_step"]


def test_a_batch_is_bounded_too(answer, tmp_path):
    (tmp_path / "more.txt").write_text("the dog sat on the mat. " * 30, "utf-8")
    for n in (1, 2):            # 2 and 3 sequences; the model has two kv heads
        status, _, err = answer(*["--prompt-file", str(tmp_path / "more.txt")] * n,
                                  "--max-err", "0.3")
        assert status == 0 and "of the outputs met --max-err 0.3" in err


@pytest.mark.parametrize("flags, words", [
    (["--check", "--offload"], "leave out --offload"),
    (["--max-err", "0.1", "--offload"], "leave out --offload"),
    (["--check", "--method", "graph"], "--check goes with --method wave"),
    (["--max-err", "0"], "between 0 and 1"), (["--max-err", "nan"], "between 0 and 1"),
    (["--delta", "0.1"], "--delta goes with --max-err"),
    (["--max-err", "0.1", "--delta", "1e-16"], "between 1e-09 and 1"),
    (["--max-err", "0.1", "--delta", "1"], "between 1e-09 and 1")])
def test_what_cannot_be_checked_is_one_line(answer, flags, words):
    status, out, err = answer(*flags)
    assert status == 2 and not out and words in err and len(err.splitlines()) == 1
