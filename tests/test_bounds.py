"""What is certified against float64: no mass outside its interval, no error above its bound."""
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import SMALL, qkv, read

from evaluation import bounds as certificate
from evaluation.bounds import CheckedIndex, examine, log_spread, measure, stored
from evaluation.fidelity import feed, filled
from evaluation.fidelity import read as dense
from retroinfer import RetroConfig, WaveIndex, cluster_segment


def truth(cache, q, b, h):
    """Of one head in float64, cluster by cluster: log masses (G, C), of the steady zone (G, 1), and
    dense attention's output (G, D) to q (G, D)."""
    index, live = cache.index, int(cache.n_tokens[b] - cache.n_indexed[b])
    keys = cache.k_steady[b, h, :live].double()
    q = q.double() * q.shape[-1] ** -0.5
    steady, everything = (keys @ q.mT).mT, [(keys, cache.v_steady[b, h, :live].double())]
    masses = torch.full((len(q), index.sizes.shape[-1]), -math.inf, dtype=torch.float64)
    for c in index.sizes[b, h].nonzero()[:, 0].tolist():
        start = int(index.offsets[b, h, c])
        rows = slice(start, start + int(index.sizes[b, h, c]))
        everything.append((cache.store.k[b, h, rows].double(), cache.store.v[b, h, rows].double()))
        masses[:, c] = (q @ everything[-1][0].mT).logsumexp(-1)
    k, v = (torch.cat(x) for x in zip(*everything, strict=True))
    return masses, steady.logsumexp(-1, keepdim=True), (q @ k.mT).softmax(-1) @ v


def check(cache, q, o):
    """Bounds (B*H, G) on the latest step's errors, once none is violated: q, o (B, H*G, 1, D)."""
    step, _, found = cache.kept
    B, H = cache.index.sizes.shape[:2]
    q, o = (x.view(B * H, -1, x.shape[-1]) for x in (q, o))
    for n in range(B * H):
        masses, steady, dense = truth(cache, q[n], *divmod(n, H))
        assert (step.low[n, 0] <= masses).all() and (masses <= step.high[n, 0]).all()
        total = torch.cat([masses, steady], -1).logsumexp(-1)
        exact = torch.cat([masses.masked_fill(~found.is_read[n, 0], -math.inf), steady], -1)
        share = (exact.logsumexp(-1) - total).exp()
        assert (found.low[n, 0] <= share + 1e-12).all()
        assert (found.high[n, 0] >= share - 1e-12).all()
        error = (o[n].double() - dense).norm(dim=-1)
        assert (error <= found.error[n, 0]).all(), (error, found.error[n, 0])
    return found.error[:, 0]


def steps(config, q, k, v, n_prompt):
    """A cache that has taken a step for every token behind n_prompt, checked; its last bounds."""
    cache = CheckedIndex(config, k.shape[2], len(k))
    read(cache, *(x[:, :, :n_prompt] for x in (q, k, v)))
    room = 0
    for t in range(n_prompt, k.shape[2]):
        room = room or cache.update()
        now = q[:, :, t:t + 1].contiguous()
        bounds = check(cache, now, cache.decode(now, *(x[:, :, t:t + 1] for x in (k, v))))
        room -= 1
    return cache, bounds


FEW = {**SMALL, "retrieve": 0.1, "estimate": 0.3, "bits": 16}


# ---------------------------------------------------------------- the bounds

@given(st.lists(st.floats(-9, 9), min_size=2, max_size=20), st.floats(0, 6), st.floats(1, 3))
def test_no_mean_of_exponentials_is_above_bennetts(x, scale, loose):
    x = torch.tensor(x, dtype=torch.float64)
    x = scale * (x - x.mean())
    b = x.max() * loose + 1e-9
    t = (x.square().mean() / b.square()).clamp(max=1e9)
    assert log_spread(b, t) >= x.exp().mean().log() - 1e-9


def test_bennetts_bound_is_met_by_two_points():
    for b, t in torch.tensor([[0.5, 0.3], [4, 0.01], [30, 1]], dtype=torch.float64):
        x, p = torch.stack([b, -t * b]), torch.stack([t, 1 + 0 * t]) / (1 + t)
        assert abs(p @ x) < 1e-9 and abs(p @ x.square() - t * b * b) < 1e-9
        torch.testing.assert_close(log_spread(b, t), (p @ x.exp()).log())


@pytest.mark.parametrize("bits", [4, 16])
def test_statistics_hold_of_every_member(bits):
    _, k, v = qkv(128, B=2)
    index, *stores = cluster_segment(k.bfloat16(), v.bfloat16(), RetroConfig(**SMALL, bits=bits))
    found = measure(index, stores)
    centroids, means = (x.double() for x in map(stored, index[:2], index.scales.unbind(-1)))
    for b, h, c in (index.sizes > 0).nonzero().tolist():
        rows = slice(start := int(index.offsets[b, h, c]), start + int(index.sizes[b, h, c]))
        k, v = (x[b, h, rows].double() for x in stores)
        here = type(found)(*(x[b, h, c].double() for x in found))
        for x, mean, slack, spread in (
                (k, centroids, here.slacks, here.radii * here.ratios.sqrt()),
                (v, means, here.value_slacks, here.value_spreads)):
            own = x.mean(0)
            variance = torch.linalg.eigvalsh((x - own).T @ (x - own) / len(x))[-1]
            assert variance.sqrt() <= spread + 1e-12 and spread <= 1.5 * variance.sqrt() + 1e-6
            torch.testing.assert_close(slack, (own - mean[b, h, c]).norm(), rtol=1e-5,
                                       atol=1e-9)
        torch.testing.assert_close(here.radii, (k - k.mean(0)).norm(dim=-1).max(), rtol=1e-5,
                                   atol=1e-9)
        far = (v - means[b, h, c]).norm(dim=-1).max()
        torch.testing.assert_close(here.value_radii, far, rtol=1e-5, atol=1e-9)


KINDS = {
    "clumps": lambda k: k,
    "giant norms": lambda k: 300 * k,
    "equal keys": lambda k: k[:, :, :1].expand_as(k),
    "one outlier": lambda k: torch.where((torch.arange(k.shape[2]) == 20)[:, None], 40 * k, k),
    "opposite pairs": lambda k: k[:, :, :1] * (1 - 2 * (torch.arange(k.shape[2]) % 2)[:, None]),
    "far from the origin": lambda k: k / 4 + 30,
    "tiny norms": lambda k: 1e-4 * k,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [0.0, 0.2, 1.0])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), longer=st.sampled_from([0.1, 1.0, 8.0]),
       retrieve=st.sampled_from([0.1, 1.0]), given=st.fixed_dictionaries({
           "cluster": st.sampled_from([1, 4, 16]), "bits": st.sampled_from([4, 16]),
           "by_mass": st.booleans()}))
def test_nothing_certified_is_ever_violated(kind, dtype, values, seed, longer, retrieve, given):
    q, k, v = (x.to(dtype) for x in qkv(150, seed=seed))
    config = RetroConfig(**FEW | given | {"retrieve": retrieve, "values": values})
    steps(config, longer * q, KINDS[kind](k).contiguous(), v, 148)


@pytest.mark.parametrize("values", [0.0, 0.2, 1.0])
def test_the_step_is_that_of_a_plain_index(values):
    q, k, v = qkv(150, B=2)
    config = RetroConfig(**FEW, values=values)
    checked, _ = steps(config, q, k, v, 110)        # 40 steps: with an update between them
    plain = WaveIndex(config, 150, 2)
    read(plain, *(x[:, :, :110] for x in (q, k, v)))
    for t in range(110, 150):
        plain.update()
        o = plain.decode(*(x[:, :, t:t + 1] for x in (q, k, v)))
    assert torch.equal(checked.kept[1].view_as(o), o)       # bit for bit
    assert checked.bytes_read() == plain.bytes_read()


def test_equal_keys_leave_nothing_uncertain():
    """Every estimate is right then, whatever the values are; nothing is dropped."""
    q, k, v = qkv(150)
    config = RetroConfig(**SMALL | {"retrieve": 0.1, "estimate": 0.9, "by_mass": False, "bits": 16,
                                    "values": 1.0})
    cache, bounds = steps(config, q, KINDS["equal keys"](k).contiguous(), v, 148)
    assert cache.kept[2].low.max() < 0.6 and bounds.max() < 1e-3
    torch.testing.assert_close(cache.kept[2].low, cache.kept[2].high, rtol=1e-3, atol=1e-3)


def test_a_bound_is_met():
    """Equal keys, of which only some are read, whose values are far from the others' and alike."""
    q, k, v = qkv(150)
    v = torch.zeros_like(v)
    v[:, :, SMALL["sink"]:-20] = 1
    config = RetroConfig(**SMALL | {"retrieve": 0.0, "estimate": 0.0, "bits": 16})
    cache, bounds = steps(config, q, torch.zeros_like(k), v, 149)
    o = cache.kept[1].double()
    error = (o[:, 0] - v.double()[0, 0].mean(0)).norm(dim=-1)
    assert error.min() > 0.5
    torch.testing.assert_close(bounds, error, rtol=1e-3, atol=0)


def test_a_token_without_its_value_is_certified():
    """One cluster, whose keys are all read; its heavy token's value is far from the others', and no
    value is read. So the error is the heavy token's alone, and the bound is met."""
    config = RetroConfig(**SMALL | {"update": 8, "segment": 8, "cluster": 8, "bits": 16,
                                    "values": 0.0})
    k, v = torch.zeros(1, 2, 15, 16), torch.zeros(1, 2, 15, 16)
    k[:, :, [5, 14]] = 3                    # twelve above the other logits: half of the mass each
    v[:, :, 2:10], v[:, :, 5] = -1, 1
    cache, bounds = steps(config, torch.ones(1, 6, 15, 16), k, v, 14)
    assert cache.index.sizes.sum(-1).eq(8).all() and cache.kept[2].is_read.sum(-1).eq(1).all()
    error = torch.full_like(bounds, (1 + 6 / 8) * 4 / 2)
    torch.testing.assert_close(bounds, error, rtol=1e-3, atol=0)


@pytest.mark.parametrize("values", [0.0, 0.2, 0.7])
def test_what_is_lost_are_the_values_of_those_that_weigh_least(values):
    """All keys are read: the bound is the sum, token by token, of weight and radius."""
    q, k, v = qkv(150, H=1)
    config = RetroConfig(**FEW | {"retrieve": 1.0, "values": values})
    cache, bounds = steps(config, q, k, v, 149)
    n, radii = int(cache.n_indexed[0]), cache.bounds.value_radii[0, 0].double()
    keys = torch.cat([cache.store.k[0, 0, 2:2 + n], cache.k_steady[0, 0, :150 - n]]).double()
    w = (q[0, :, -1].double() @ keys.mT / 4).softmax(-1)[:, :n]             # (G, n)
    far = torch.repeat_interleave(radii, cache.index.sizes[0, 0].long())    # (n,)
    n_values = math.ceil(n * values)
    is_lost = w.sum(0).argsort(descending=True).argsort() >= n_values
    assert is_lost.any()
    lost = (w * far)[:, is_lost].sum(-1)
    torch.testing.assert_close(bounds[0], lost, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_no_corner_of_the_intervals_is_worse(turns, monkeypatch):
    """Every cluster at either end of its interval, all of them tried; and with enough turns the
    bound is what the worst corner gives."""
    monkeypatch.setattr(certificate, "TURNS", turns)
    q, k, v = qkv(70, H=1, G=2)
    cache, _ = steps(RetroConfig(**FEW), q, k, v, 69)
    step, o, found = cache.kept
    is_live = ((cache.index.sizes[0, 0] > 0) & ~found.is_read[0, 0, 0]).nonzero()[:, 0]
    drawn = torch.rand(2, 1, 1, 2, len(is_live), generator=torch.Generator().manual_seed(0)) * 3
    low, high = (torch.full_like(step.low, -math.inf).index_copy(-1, is_live, x.double())
                 for x in (drawn[0], drawn[0] + drawn[1]))
    left = step._replace(low=low, high=high, exact=torch.zeros_like(step.exact))
    guess = torch.full_like(low, -math.inf).index_copy(-1, is_live[:5], drawn[0, ..., :5].double())
    away = (o[0, 0, :, None].double() - stored(
        cache.index.means, cache.index.scales[..., 1])[0, 0].double()).norm(dim=-1)     # (G, C)
    corners = torch.cartesian_prod(*[torch.tensor([False, True])] * len(is_live))
    slope, fixed = certificate.value_terms(left, 0, high.exp())
    lost = torch.full_like(step.exact, 0.5)
    for g in range(2):
        at, e, d, s, f = (x[..., is_live] for x in (
            torch.stack([low, high])[:, 0, 0, g].exp(), guess[0, 0, g].exp(), away[g],
            slope[0, 0, g].expand_as(low[0, 0, g]), fixed[0, 0, g]))
        mass = torch.where(corners, at[1], at[0])                           # (corners, live)
        gain = ((mass - e).abs() * d + s * mass + f).sum(-1) + lost[0, 0, g].exp()
        worst = (gain / (1 + mass.sum(-1))).max()
        bound = certificate.bound_error(left, guess, lost, o)[0, 0, g]
        assert bound >= worst
        if turns == 4:
            torch.testing.assert_close(bound, worst, rtol=1e-3, atol=0)


# ---------------------------------------------------------------- all of a model

@pytest.mark.slow
def test_nothing_is_violated_in_any_head_of_real_text(smollm2):
    """And what the command examines at a stroke is what is found query by query."""
    model, tokenizer, _ = smollm2
    text = (Path(__file__).parent.parent / "examples" / "lighthouse.txt").read_text("utf-8")
    case = dense(model, torch.tensor(tokenizer.encode(text)[:700]), n_steps=2)
    caches = []
    for n, (past, (q, k1, v1, _)) in enumerate(zip(case.past, case.steps, strict=True)):
        caches.append(filled(functools.partial(CheckedIndex, RetroConfig()), *past, 2))
        for t, o in enumerate(feed(caches[-1], q, k1, v1)):
            now = q[:, :, t:t + 1].contiguous()
            found = examine(caches[-1], now, o)
            assert not found["violated"].any()
            if n % 10 == t == 0:
                bounds = check(caches[-1], now, o).flatten() / o.view(9, -1).norm(dim=-1)
                torch.testing.assert_close(found["error_bound"].float(), bounds.float())


def test_examine_sees_what_is_violated():
    q, k, v = qkv(150)
    cache, _ = steps(RetroConfig(**FEW), q, k, v, 149)
    step, o, found = cache.kept
    last, out = q[:, :, -1:].contiguous(), o.view(1, 6, 1, -1)
    assert not examine(cache, last, out)["violated"].any()
    for name, x in (("low", 1), ("high", 0), ("error", 0)):
        cache.kept = step, o, found._replace(**{name: torch.full_like(found.low, x)})
        assert examine(cache, last, out)["violated"].all(), name
    for name in ("low", "high"):
        cache.kept = step._replace(**{name: step.low / 2 + step.high / 2}), o, found
        assert examine(cache, last, out)["violated"].any(), name


def test_the_page_on_bounds_repeats_what_was_measured():
    root = Path(__file__).parent.parent
    text = (root / "docs" / "bounds.md").read_text("utf-8")
    runs = json.loads((root / "results" / "certificate.json").read_text("utf-8"))["runs"]
    assert f"{sum(r['pairs'] for r in runs):,} pairs of head and query, and none violated" in text
    assert not any(r["violated"] for r in runs)
    assert sum(r["pairs"] for r in runs if r["run"] == "default") >= 10**6
    for run in runs:
        numbers = [run["quantiles"][name]["0.5"] for name in ("unread", "error")]
        assert f"| {numbers[0]:.1%} |" in text and f"| {numbers[1]:.1%} |" in text
