"""The vector-quantised cache: its codes, its scores, its anchors, and what it must equal."""
import functools
import json
import math

import oracle
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import CLOSE, LONG, generated, qkv, random_book, read

import antkv
import evaluation.antkv as study
import generate
from antkv import CHANNELS, AnchorCache, AnchorConfig, Codebook
from retroinfer import InputError, attend_causally

SHORT = {"sink": 2, "window": 8, "update": 16}


def make(capacity, batch=1, bits=2, D=16, **numbers):
    config = AnchorConfig(bits, **SHORT | numbers)
    return AnchorCache(config, capacity, batch, random_book(bits, D=D))


def known(cache, row=0):
    """All keys and values (1, H, T, D) as the cache has them."""
    n = int(cache.n_tokens[row])
    return list(cache.store.bring(row, 0, n, n))


# ---------------------------------------------------------------- codes

SHAPES = {"B": st.integers(1, 2), "H": st.integers(1, 3), "T": st.integers(1, 40),
          "c": st.sampled_from([2, 4, 8, 16, 32]), "seed": st.integers(0, 99)}


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_a_token_gets_the_nearest_codeword_of_each_group(B, H, T, c, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, H, T, 32, generator=g)
    words = torch.randn(B, H, 32 // c, 256, c, generator=g)
    codes = antkv.encode(x, words)
    assert codes.shape == (B, H, 32 // c, T) and codes.dtype == torch.uint8
    mine = (antkv.decode(codes, words) - x).unflatten(-1, (-1, c)).norm(dim=-1)     # (B, H, T, N)
    for n in range(32 // c):
        group = x[..., n * c:(n + 1) * c].double()
        best = torch.cdist(group, words[:, :, n].double()).amin(-1)
        torch.testing.assert_close(mine[..., n].double(), best, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_codewords_survive_a_round_trip(B, H, T, c, seed):
    g = torch.Generator().manual_seed(seed)
    words = torch.randn(B, H, 32 // c, 256, c, generator=g)
    codes = torch.randint(256, (B, H, 32 // c, T), generator=g).to(torch.uint8)
    assert torch.equal(antkv.encode(antkv.decode(codes, words), words), codes)


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_looking_up_is_reconstructing(B, H, T, c, seed):
    g = torch.Generator().manual_seed(seed)
    words = torch.randn(1, H, 32 // c, 256, c, generator=g)     # shared by the batch
    codes = torch.randint(256, (B, H, 32 // c, T), generator=g).to(torch.uint8)
    q, weights = (torch.randn(B, H, 3, n, generator=g) for n in (32, T))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(antkv.look_up(q, codes, words),
                               antkv.look_up_tiles(q, codes, words), **close)
    torch.testing.assert_close(antkv.mix_codes(weights, codes, words),
                               antkv.mix_tiles(weights, codes, words), **close)


# ---------------------------------------------------------------- codebooks

def weighted_error(x, words, weights):
    """Weighted mean squared error of tokens x (H, T, D)."""
    error = (antkv.decode(antkv.encode(x, words.float()), words.float()) - x).square().sum(-1)
    return float((error * weights).sum() / weights.sum())


@pytest.mark.parametrize("c", [2, 4, 8])
def test_weighted_codewords_lose_less_of_what_matters(c):
    """And more of the rest: the weights move the error, they do not make it vanish."""
    g = torch.Generator().manual_seed(c)
    x, weights = torch.randn(2, 2000, 16, generator=g), torch.rand(2, 2000, generator=g) ** 8
    even = torch.ones_like(weights)
    mine, plain = (antkv.fit_words(x, w, c) for w in (weights, even))
    assert weighted_error(x, mine, weights) < 0.9 * weighted_error(x, plain, weights)
    assert weighted_error(x, mine, even) > weighted_error(x, plain, even)


def test_a_codeword_is_the_weighted_mean_of_its_tokens():
    """Of 256 far clumps each gets one codeword, when a seed falls into each."""
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(1, 600, 8, generator=g), torch.rand(1, 600, generator=g) + 0.1
    words = antkv.fit_words(x, weights, 8, iterations=100).float()
    codes = antkv.encode(x, words)[0, 0].long()
    for m in codes.unique().tolist():
        w = weights[0, codes == m].double()[:, None]
        mean = (x[0, codes == m].double() * w).sum(0) / w.sum()
        torch.testing.assert_close(words[0, 0, m].double(), mean, rtol=2e-3, atol=2e-3)


def test_as_many_tokens_as_codewords_are_exact():
    x = torch.randn(2, 256, 16)
    words = antkv.fit_words(x, torch.rand(2, 256), 4).float()
    back = antkv.decode(antkv.encode(x, words), words)
    torch.testing.assert_close(back, x, rtol=2e-3, atol=2e-3)       # fp16


@pytest.mark.parametrize("bits", CHANNELS)
def test_fewer_bits_lose_more(bits):
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 1500, 32, generator=g)
    score, error = torch.ones(2, 1, 1500), {}
    for b in (bits, 4):
        book = antkv.fit_codebook(k, v, score, b)
        error[b] = weighted_error(k - book.centre[0], book.k[0], score[0])
    assert bits == 4 or error[bits] > 1.5 * error[4]


# ---------------------------------------------------------------- scores

def factors(q, k, v):
    """F^K and F^V (2, H, T) in float64 by loops, as antkv.propagation_factors states them."""
    H, T, D = k.shape[1:]
    G, Tq = q.shape[1] // H, q.shape[2]
    q, k, v = (x[0].double() for x in (q, k, v))
    found = torch.zeros(2, H, T, dtype=torch.float64)
    for h in range(H * G):
        for i in range(Tq):
            n = T - Tq + i + 1
            weights = (k[h // G, :n] @ q[h, i] / math.sqrt(D)).softmax(-1)
            far = (v[h // G, :n] - weights @ v[h // G, :n]).norm(dim=-1)
            found[0, h // G, :n] += weights * far * q[h, i].norm() / math.sqrt(D)
            found[1, h // G, :n] += weights
    return found


@settings(max_examples=12, deadline=None)
@given(T=st.integers(1, 40), Tq=st.integers(1, 40), first=st.integers(0, 39),
       G=st.integers(1, 3), seed=st.integers(0, 9))
def test_the_scores_are_those_of_float64(T, Tq, first, G, seed):
    Tq, first = min(T, Tq), min(first, T - 1)
    q, k, v = qkv(T, G=G, seed=seed)
    want, q = factors(q[:, :, T - Tq:], k, v), q[:, :, T - Tq:]
    mine, cheap = antkv.propagation_factors(q, k, v), antkv.anchor_scores(q, k, first)
    torch.testing.assert_close(mine.double(), want, rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(cheap.double(), want[1, :, first:], rtol=1e-4, atol=1e-5)


def test_blocks_of_queries_change_nothing(monkeypatch):
    q, k, v = qkv(90)
    whole, cheap = antkv.propagation_factors(q, k, v), antkv.anchor_scores(q, k)
    monkeypatch.setattr(antkv, "BLOCK", 7)
    torch.testing.assert_close(antkv.propagation_factors(q, k, v), whole, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(antkv.anchor_scores(q, k), cheap, **CLOSE)


def test_the_factors_are_the_derivative_of_attention():
    """An error of one key moves an output by F^K at most, if its query points along the error: the
    sum over i of |d o_i / d k_j along q_i| is F^K, by autograd. Likewise of one value."""
    T, D = 12, 8
    q, k, v = (x.double() for x in qkv(T, H=1, G=1, D=D))
    mask = torch.ones(T, T, dtype=torch.bool).tril()

    def outputs(k, v):
        x = (q[0, 0] @ k.mT / math.sqrt(D)).masked_fill(~mask, -math.inf)
        return x.softmax(-1) @ v                                            # (T, D)

    by_k, by_v = torch.autograd.functional.jacobian(outputs, (k[0, 0], v[0, 0]))   # (T, D, T, D)
    along = torch.einsum("iajd,id->ija", by_k, torch.nn.functional.normalize(q[0, 0], dim=-1))
    want = torch.stack([along.norm(dim=-1).sum(0), by_v.diagonal(dim1=1, dim2=3).mean(-1).sum(0)])
    mine = antkv.propagation_factors(q, k, v)[:, 0]
    torch.testing.assert_close(mine.double(), want, rtol=1e-3, atol=5e-3)


# ---------------------------------------------------------------- the cache

@settings(max_examples=10, deadline=None)
@given(bits=st.sampled_from([4, 2, 1]), steps=st.integers(1, 40), seed=st.integers(0, 9),
       lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3))
def test_all_anchors_are_dense(bits, lengths, steps, seed):
    """Whatever the lengths of a batch, and however many steps follow."""
    q, k, v = qkv(max(lengths) + steps, B=len(lengths), seed=seed)
    cache = make(max(lengths) + steps, len(lengths), bits, anchors=1.0)
    for b, n in enumerate(lengths):
        cache.prefill(*(x[b:b + 1, :, :n] for x in (q, k, v)), row=b)
    for t in range(steps):
        cache.update()
        now = [torch.stack([x[b, :, n + t] for b, n in enumerate(lengths)])[:, :, None]
               for x in (q, k, v)]
        o = cache.decode(*now)
    for b, n in enumerate(lengths):
        seen = [x[b:b + 1, :, :n + t + 1] for x in (k, v)]
        want = oracle.dense(q[b:b + 1, :, n + t:n + t + 1], *seen)
        torch.testing.assert_close(o[b:b + 1].double(), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(cache.n_anchors, cache.n_indexed)


@pytest.mark.parametrize("anchors", [0, 0.1])
def test_a_step_is_dense_attention_to_what_the_cache_holds(anchors):
    """So the codes, the anchors and the steady zone share one softmax, and none counts twice."""
    q, k, v = qkv(121)
    cache = make(121, anchors=anchors)
    generated(cache, *(x[:, :, :120] for x in (q, k, v)), 60)
    cache.update()
    o = cache.decode(*(x[:, :, 120:] for x in (q, k, v)))
    want = oracle.dense(q[:, :, 120:], *known(cache))
    torch.testing.assert_close(o.double(), want, rtol=1e-4, atol=1e-5)
    assert (o - oracle.dense(q[:, :, 120:], k, v)).abs().max() > 0.1


@settings(max_examples=15, deadline=None)
@given(bits=st.sampled_from([4, 2, 1]), share=st.floats(0, 1), n=st.integers(1, 60),
       seed=st.integers(0, 9))
def test_reading_tiles_is_looking_up(bits, share, n, seed):
    q, k, v = qkv(n + 1, B=2, seed=seed)
    cache = make(n + 1, 2, bits, anchors=share)
    read(cache, *(x[:, :, :n] for x in (q, k, v)))
    cache.update()
    live = torch.arange(cache.k_steady.shape[2]) < (cache.n_tokens - cache.n_indexed)[:, None]
    bias = torch.zeros_like(live, dtype=torch.float32).masked_fill(~live, -math.inf)
    steady = cache.k_steady, cache.v_steady, bias[:, None, None].expand(-1, 2, -1, -1)
    args = q[:, :, n].unflatten(1, (2, 3)), steady, cache.past(), cache.book
    tiles = antkv.attend(*args, antkv.look_up_tiles, antkv.mix_tiles)
    for mine, other in zip(antkv.attend(*args), tiles, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_merged_parts_are_one_softmax():
    """Attention to the codes and to what is exact, merged by the logarithms of their sums."""
    q, k, v = qkv(100)
    cache = make(100, anchors=0.1)
    cache.prefill(q, k, v)
    cache.update()
    query, past, n = q[:, :, -1].unflatten(1, (2, 3)), cache.past(), int(cache.n_indexed)
    live, m, (words_k, words_v, centre) = 100 - n, int(cache.n_anchors), cache.book_of(0)
    exact = [torch.cat([x[:, :, :live], y[:, :, :m]], 2) for x, y in (
        (cache.k_steady, cache.k_anchor), (cache.v_steady, cache.v_anchor))]
    coded = [antkv.decode(past.k[..., :n], words_k) + centre,
             antkv.decode(past.v[..., :n], words_v)]
    is_anchor = torch.zeros(1, 2, n, dtype=torch.bool).scatter_(2, past.anchors[..., :m].long(), 1)
    far = (query @ coded[0].mT).masked_fill(is_anchor[:, :, None], -math.inf)
    logits = [query @ exact[0].mT, far]
    outputs = [x.softmax(-1) @ y for x, y in zip(logits, (exact[1], coded[1]), strict=True)]
    share = torch.stack([x.logsumexp(-1) for x in logits]).softmax(0)[..., None]
    bias = torch.zeros(1, 2, 1, cache.k_steady.shape[2])
    bias[..., live:] = -math.inf
    one = antkv.attend(query, (cache.k_steady, cache.v_steady, bias), past, cache.book)[0]
    torch.testing.assert_close(share[0] * outputs[0] + share[1] * outputs[1], one, **CLOSE)


@settings(max_examples=15, deadline=None)
@given(chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_appending_is_encoding_at_once(chunks):
    """However tokens arrive, they get the same codes: those of encode over the whole text."""
    T = sum(chunks)
    q, k, v = qkv(T)
    cache, start = make(T, anchors=0), 0
    for n in chunks:
        cache.prefill(*(x[:, :, start:start + n] for x in (q, k, v)))
        start += n
    n = max(T - 10, 0)
    assert int(cache.n_indexed) == n
    book = cache.book_of(0)
    for codes, words, x in ((cache.store.k, book.k, k - book.centre), (cache.store.v, book.v, v)):
        assert torch.equal(codes[..., :n], antkv.encode(x, words)[..., 2:2 + n])
    k_known, v_known = known(cache)
    for mine, x in ((k_known, k), (v_known, v)):
        exact = torch.cat([torch.arange(min(T, 2)), torch.arange(2 + n, max(T, 2))])
        assert torch.equal(mine[:, :, exact], x[:, :, exact])


def test_steps_leave_the_state_that_a_prefill_leaves():
    """Codes, the window, and what is known of the scores of the window's tokens."""
    q, k, v = qkv(106)
    stepped, at_once = make(106, anchors=1.0), make(106, anchors=1.0)
    generated(stepped, q, k, v, 58)
    at_once.prefill(q, k, v)
    at_once.update()
    stepped.update()
    assert int(stepped.n_indexed) == int(at_once.n_indexed) == 96
    assert torch.equal(stepped.store.k, at_once.store.k)
    torch.testing.assert_close(stepped.k_steady[:, :, :10], at_once.k_steady[:, :, :10])
    mine, other = (cache.score[:, :, 2:] for cache in (stepped, at_once))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert (mine[..., :8] > 0).all() and not mine[..., 8:].any()


def test_the_share_of_anchors_is_kept_however_tokens_arrive():
    q, k, v = qkv(300)
    for n_prompt in (20, 150, 290):
        cache = make(300, anchors=0.05)
        generated(cache, q, k, v, n_prompt)
        assert int(cache.n_anchors) == math.ceil(0.05 * int(cache.n_indexed))
        ids = cache.anchors[..., :int(cache.n_anchors)]
        assert all(len(head.unique()) == len(head) for head in ids[0])


def test_the_anchors_are_the_tokens_that_would_lose_most():
    """One token that all queries look at, and whose value stands apart."""
    q, k, v = qkv(200, H=1, G=1)
    k[0, 0, 77], v[0, 0, 77] = 0, 5
    q[0, 0, 78:], k[0, 0, 77] = q[0, 0, 78:] * 0.1 + 2, 2.0
    cache = make(200, anchors=0.005)
    cache.book = Codebook(*(x[:, :1] for x in cache.given))
    cache.given = cache.book
    cache.prefill(q, k, v)
    assert int(cache.n_anchors) == 1 and cache.anchors[0, 0, 0] + 2 == 77


def test_sequences_of_a_ragged_batch_are_as_alone():
    q, k, v = qkv(130, B=3)
    together, lengths = make(130, 3, anchors=0.1), (90, 5, 37)
    for b, n in enumerate(lengths):
        together.prefill(*(x[b:b + 1, :, :n] for x in (q, k, v)), row=b)
    alone = [make(130, anchors=0.1) for _ in lengths]
    for b, n in enumerate(lengths):
        alone[b].prefill(*(x[b:b + 1, :, :n] for x in (q, k, v)))
    for t in range(40):
        for cache in (together, *alone):
            cache.update()
        now = [torch.stack([x[b, :, n + t] for b, n in enumerate(lengths)])[:, :, None]
               for x in (q, k, v)]
        o = together.decode(*now)
        for b, cache in enumerate(alone):
            mine = cache.decode(*(x[b:b + 1] for x in now))
            torch.testing.assert_close(mine, o[b:b + 1], **CLOSE)


def test_a_step_compiles_whole_and_never_again():
    torch._dynamo.reset()
    q, k, v = qkv(120)
    cache, plain = make(120, anchors=0.1), make(120, anchors=0.1)
    counter = torch._dynamo.testing.CompileCounter()
    cache.decode = torch.compile(cache.decode, backend=counter, fullgraph=True, dynamic=False)
    torch.testing.assert_close(generated(cache, q, k, v, 60), generated(plain, q, k, v, 60))
    assert counter.frame_count == 1


def test_a_cache_without_codebooks_makes_them_from_its_prompt():
    q, k, v = qkv(700, B=2)
    cache = AnchorCache(AnchorConfig(4, anchors=0, **SHORT), 700, 2)
    o = generated(cache, q, k, v, 690)
    want = oracle.dense(q[:, :, 690:], k, v)
    assert (o[:, :, 690:] - want).norm() < 0.35 * want.norm()
    score = antkv.anchor_scores(q[:1, :, :690], k[:1, :, :690], 2)[:, :680]
    book = antkv.fit_codebook(k[0, :, 2:682], v[0, :, 2:682], torch.stack([score, score]), 4)
    torch.testing.assert_close(cache.book.k[:1], book.k)
    assert not torch.equal(cache.book.k[0], cache.book.k[1])    # of each sequence its own


def test_true_bits_count_all_that_is_held():
    q, k, v = qkv(500)
    cache = make(500, bits=1, anchors=0.02)
    generated(cache, q, k, v, 490)
    n, m, D = int(cache.n_indexed), int(cache.n_anchors), 16
    assert (n, m) == (480, 10)
    codes = n * (D // 8 + D // 8) * 8                       # bits of a head
    exact = 16 * 2 * D * (m + 500 - n) + 32 * m + 32 * (500 - n)
    books = 2 * 256 * D * 16 + 32 * D
    assert cache.true_bits() == pytest.approx((codes + exact + books) / (2 * D * 500))
    assert cache.bytes_held(exact=2)["codebooks"] == 2 * books / 8
    assert cache.facts()["anchors"] == [10]
    assert sum(cache.nbytes().values()) >= sum(cache.bytes_held().values())


# ---------------------------------------------------------------- files and errors

def test_codebooks_survive_a_file(tmp_path):
    books = [random_book(1, seed=n) for n in range(3)]
    path = tmp_path / "books.safetensors"
    antkv.save_codebooks(path, books, {"model": "a"}, 1)
    for mine, other in zip(antkv.load_codebooks(path, {"model": "a"}, 1), books, strict=True):
        assert all(map(torch.equal, mine, other))


def test_a_flipped_bit_in_a_file_of_codebooks_is_refused(tmp_path):
    path = tmp_path / "books.safetensors"
    antkv.save_codebooks(path, [random_book(1)], {"model": "a"}, 1)
    raw = bytearray(path.read_bytes())
    raw[-1000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="damaged: they are not what was written"):
        antkv.load_codebooks(path, {"model": "a"}, 1)


def test_a_place_where_nothing_can_be_written_is_said(tmp_path):
    with pytest.raises(InputError, match="cannot write the codebooks"):
        antkv.save_codebooks(tmp_path / "no" / "file", [random_book(1)], {}, 1)


@pytest.mark.parametrize("model, bits, words", [
    ("b", 1, "were made with model a, here it is b"), ("a", 2, "with bits 1, here it is 2")])
def test_codebooks_of_another_model_are_refused(tmp_path, model, bits, words):
    path = tmp_path / "books.safetensors"
    antkv.save_codebooks(path, [random_book(1)], {"model": "a"}, 1)
    with pytest.raises(InputError, match=words):
        antkv.load_codebooks(path, {"model": model}, bits)


def test_a_file_that_holds_no_codebooks_is_refused(tmp_path):
    from safetensors.torch import save_file
    path = tmp_path / "other"
    with pytest.raises(InputError, match="cannot read the codebooks"):
        antkv.load_codebooks(path, {}, 1)
    path.write_bytes(b"short")
    with pytest.raises(InputError, match="damaged"):
        antkv.load_codebooks(path, {}, 1)
    for header, words in (({"format": "other"}, "holds no codebooks"),
                          ({"format": antkv.FORMAT, "fingerprint": "{"}, "damaged: their header")):
        save_file({"x": torch.zeros(1)}, path, header)
        with pytest.raises(InputError, match=words):
            antkv.load_codebooks(path, {}, 1)


@pytest.mark.parametrize("numbers, words", [
    ({"bits": 3}, "bits is 3: give one of 4, 2, 1, 0.75, 0.375"),
    ({"anchors": 1.5}, "anchors is 1.5: give a number between 0 and 1"),
    ({"window": 0}, "window is 0: at least 1 is needed"),
    ({"update": 0}, "update is 0: at least 1"), ({"sink": -1}, "sink is -1: at least 0")])
def test_numbers_out_of_range_are_refused(numbers, words):
    with pytest.raises(InputError, match=words):
        AnchorConfig(**numbers)


@pytest.mark.parametrize("n", [1, 100, 521])
def test_a_short_text_is_too_little_to_calibrate_on(n):
    """At once, and not when the first tokens leave the window."""
    cache = AnchorCache(AnchorConfig(2, **SHORT), 700)
    with pytest.raises(InputError, match=f"^{max(n - 10, 0)} tokens are too few .* 512 are needed"):
        cache.prefill(*qkv(n))
    AnchorCache(AnchorConfig(2, **SHORT), 700).prefill(*qkv(522))


def test_heads_that_do_not_split_are_refused():
    cache = AnchorCache(AnchorConfig(0.375), 700)
    with pytest.raises(InputError, match=r"in 0.375 bits: give one of 4, 2, 1, 0.75$"):
        cache.prefill(*qkv(600))


# ---------------------------------------------------------------- the evaluation

@pytest.fixture
def tiny(checkpoint):
    from model import load
    return load(checkpoint(**LONG), torch.float32, "cpu")


def listened(model, pieces):
    """Each layer's q, k, v of pieces of text, where antkv.placed puts them, piece by piece."""
    found = []

    def keep(*qkv):
        found.append(qkv)
        return attend_causally(*qkv)
    for ids, positions in antkv.placed(model, pieces):
        model(ids[None], positions, [keep] * len(model.layers))
    return [found[layer::len(model.layers)] for layer in range(len(model.layers))]


def test_codebooks_are_made_from_what_a_model_computes(tiny):
    model, _ = tiny
    pieces = torch.arange(600).view(2, 300) % 300 + 3
    heard = antkv.listen(model, pieces)
    for (k, v, score), parts in zip(heard, listened(model, pieces), strict=True):
        assert k.shape == v.shape == (2, 592, 16) and score.shape == (2, 2, 592)
        late = [[x[:, :, 4:] for x in theirs] for theirs in zip(*parts, strict=True)]
        for mine, theirs in zip((k, v), late[1:], strict=True):     # without the first 4 tokens
            torch.testing.assert_close(mine, torch.cat(theirs, 2)[0])
        want = [antkv.propagation_factors(*part) for part in parts]
        assert sum(x[1].sum() for x in want) == pytest.approx(2 * 2 * 2 * 300)  # a query gives 1
        torch.testing.assert_close(score, torch.cat([x[..., 4:] for x in want], 2))


def test_calibration_texts_lie_all_over_the_context(tiny):
    """What a model says of a text does not depend on where the text lies."""
    model, _ = tiny
    pieces = torch.arange(2400).view(12, 200) % 300 + 3
    places = [positions[0] for _, positions in antkv.placed(model, pieces)]
    assert all((x.diff() == 1).all() and x[0] >= 0 and x[-1] < 4096 for x in places)
    starts = torch.stack(places)[:, 0].sort().values
    assert starts[0] == 0 and starts.diff().max() < 4096 / 6 and starts[-1] > 4096 * 3 / 4
    one, other = (model(pieces[0][None], x[None], [attend_causally] * 2) for x in places[:2])
    assert (one - other).norm() < 1e-3 * one.norm()


def test_codebooks_know_keys_at_every_position(checkpoint, monkeypatch):
    """RoPE turns a key with its position: books of texts at the beginning do not know late ones.
    Those of real models have a large mean, which turns."""
    from model import load
    model, _ = load(checkpoint("qwen2", **LONG), torch.float32, "cpu")
    model.layers[0].self_attn.k_proj.bias.data.add_(2)
    dice, errors = torch.Generator().manual_seed(0), []
    pieces = torch.randint(3, 300, (9, 256), generator=dice)
    k, late = None, torch.arange(3700, 3956)[None]

    def keep(q, now, v):
        nonlocal k
        k = now
        return attend_causally(q, now, v)
    model(pieces[8][None], late, [keep, attend_causally])
    for golden in 0, antkv.GOLDEN:
        monkeypatch.setattr(antkv, "GOLDEN", golden)
        book = study.codebooks(antkv.listen(model, pieces[:8]), 2)[0]
        words = book.k.float()
        near = antkv.decode(antkv.encode(k - book.centre, words), words) + book.centre
        errors.append((near - k).square().mean())
    assert errors[1] < 0.7 * errors[0]


def test_a_step_of_a_model_is_one_graph(tiny):
    """Layers with codebooks of their own share one compiled body."""
    torch._dynamo.reset()
    counter, outputs = torch._dynamo.testing.CompileCounter(), []
    body = functools.partial(generate.step, run=generate.region())
    fast = torch.compile(body, backend=counter, fullgraph=True, dynamic=False)
    for step in (generate.eager_step, fast):
        caches = [AnchorCache(AnchorConfig(2, 0.1, **SHORT), 200, 1, random_book(2, seed=n))
                  for n in range(2)]
        generate.prefill(tiny[0], caches, [torch.arange(150) % 300 + 3])
        for t in range(20):
            for cache in caches:
                cache.update()
            logits = step(tiny[0], caches, torch.tensor([t + 5]))
        outputs.append(logits)
    torch.testing.assert_close(*outputs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["first", "prefill"])
def test_a_cache_that_loses_nothing_is_dense(tiny, mode, monkeypatch):
    """The baseline of 16 bits, and all tokens anchors. With few bits and none, much is lost."""
    monkeypatch.setattr(study, "SKIP", 64)
    model, _ = tiny
    ids, layers = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(0)), []

    def keep(*layer):
        layers.append(layer)
        return attend_causally(*layer)
    (_, hidden), = study.follow(model, ids, [keep] * 2, 0, 200)
    scores = [antkv.anchor_scores(q[:, :, :136], k[:, :, :136]) for q, k, _ in layers]
    case, kl = study.Case("code", ids, hidden, layers, scores), {}
    _, make, _ = next(study.baselines(model, AnchorConfig(), 200, []))
    for name, caches in (("16 bits", make()), *((share, [AnchorCache(
            AnchorConfig(1, share, window=16), 200, 1, random_book(1)) for _ in range(2)])
            for share in (0.0, 1.0))):
        row = study.measure(model, mode, case, caches, 64)
        kl[name] = row["kl"]
    assert abs(kl["16 bits"]) < 1e-5 and abs(kl[1.0]) < 1e-5 and kl[0.0] > 0.01
    want = -model.logits(hidden[136 if mode == "prefill" else 64:-1]).log_softmax(-1).gather(
        -1, ids[137 if mode == "prefill" else 65:, None]).mean()
    assert math.log(row["perplexity of dense"]) == pytest.approx(float(want), rel=1e-5)


def test_a_cache_that_is_told_its_scores_is_as_one_that_finds_them():
    """Of the prompt only: what follows is scored by itself."""
    layers, caches = [qkv(160, seed=seed) for seed in (0, 1)], []
    scores = [antkv.anchor_scores(q[:, :, :128], k[:, :, :128]) for q, k, _ in layers]
    case = study.Case("code", torch.arange(160), None, layers, scores)
    for kind in (AnchorCache, study.Told):
        caches.append([kind(AnchorConfig(1, 0.1, window=16), 160, 1, random_book(1))
                       for _ in layers])
    study.fill(caches[1], case, 128)
    for cache, (q, k, v) in zip(caches[0], layers, strict=True):
        cache.prefill(q[:, :, :128], k[:, :, :128], v[:, :, :128])
    for plain, told, layer in zip(*caches, layers, strict=True):
        rest = [x[:, :, 128:] for x in layer]
        torch.testing.assert_close(told.prefill(*rest), plain.prefill(*rest))
        assert torch.equal(told.anchors, plain.anchors) and torch.equal(told.score, plain.score)


def test_the_table_has_every_method_text_and_mode(checkpoint, tmp_path, monkeypatch, capsys):
    """Own codebooks only behind a prompt. 16 bits lose nothing, and codes a little."""
    dice = torch.Generator().manual_seed(0)
    monkeypatch.setattr(study, "SKIP", 64)
    monkeypatch.setattr(study, "calibration_pieces", lambda tokenizer, n: torch.randint(
        3, 300, (n, 400), generator=dice))
    monkeypatch.setattr(study.texts, "ids", lambda *_: torch.randint(
        3, 300, (700,), generator=dice))
    path, model = tmp_path / "rows.jsonl", checkpoint(head_dim=32, **LONG)
    assert study.main(["--model", str(model), "--length", "700", "--steps", "50", "--pieces", "2",
                       "--bits", "1", "--anchors", "0.01", "--texts", "code",
                       "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kl = {(row["method"], row["mode"]): row["kl"] for row in rows}
    assert len(kl) == len(rows) == 2 * 7 + 1 == capsys.readouterr().out.count("| code |")
    assert all(abs(x) < 1e-5 for (name, _), x in kl.items() if name == "16 bits")
    found = {name.split(" 1 bits")[0]: x for (name, mode), x in kl.items() if mode == "prefill"}
    assert 1e-5 < found["own codebooks"] < 1 and ("own codebooks 1 bits, 1.00% anchors",
                                                  "first") not in kl


def test_uniform_quantisation_loses_at_most_half_a_step():
    x = torch.randn(1, 2, 64, 32)
    for dim in (-2, -1):
        back, groups = study.uniform(x, 2, dim), x.unflatten(dim, (-1, study.GROUP))
        step = (groups.amax(dim, True) - groups.amin(dim, True)) / 3
        error = (back - x).abs().unflatten(dim, (-1, study.GROUP))
        assert (error <= step / 2 + 1e-6).all() and error.max() > 0.1
    assert len(study.uniform(x, 2, -2)[0, 0, :32, 0].unique()) <= 4
    assert len(study.uniform(x, 2, -1)[0, 0, 0].unique()) <= 4


@pytest.mark.parametrize("n", [1, 16, 48, 128])
def test_a_hadamard_rotation_spreads_each_channel_evenly(n):
    h, block = study.hadamard(n), n & -n                    # the largest power of 2 that divides n
    torch.testing.assert_close(h @ h.mT, torch.eye(n))
    assert torch.equal((h != 0).sum(1), torch.full((n,), block))
    torch.testing.assert_close(h[h != 0].abs(), torch.full((n * block,), block ** -0.5))


def test_clipping_2_bits_lowers_the_error_of_normal_numbers():
    for D in (64, 128):
        x = torch.randn(2000, D, generator=torch.Generator().manual_seed(0))
        errors = {clip: float((study.uniform(x, 2, -1, D, clip) - x).square().mean())
                  for clip in (0.5, study.CLIP, 0.75, 1)}
        assert min(errors, key=errors.get) == study.CLIP and errors[study.CLIP] < 0.7 * errors[1]


def test_rotations_are_orthogonal_and_even_out_what_queries_look_at(tiny):
    """In the rotated basis each channel of a key head's queries, and of its outputs, is as loud."""
    model, _ = tiny
    pieces = torch.arange(600).view(2, 300) % 300 + 3
    found, heard = study.fit_rotations(model, pieces), listened(model, pieces)
    for layer, rotations in enumerate(found):
        assert rotations.shape == (2, 2, 16, 16)            # keys and values, H, D, D
        torch.testing.assert_close(rotations @ rotations.mT, torch.eye(16).expand(2, 2, -1, -1),
                                   rtol=0, atol=1e-5)
        seen = zip(*((q, attend_causally(q, k, v)) for q, k, v in heard[layer]), strict=True)
        for r, x in zip(rotations, seen, strict=True):
            grouped = torch.cat(x, 2)[0].unflatten(0, (2, -1)).flatten(1, 2)    # (H, G*600, D)
            energy = (grouped @ r).square().mean(1)
            torch.testing.assert_close(energy, energy.mean(-1, keepdim=True).expand_as(energy),
                                       rtol=1e-3, atol=1e-6)


def test_rotated_2_bits_bear_a_loud_channel_that_no_query_looks_at():
    """Without rotation a key's loud channel sets the steps of all its other channels. 16 bits lose
    nothing, whatever the basis."""
    q, k, v = qkv(320, H=1, G=2, D=64)
    k[..., 5] *= 30
    q[..., 5] = 0
    sums = torch.stack([x[0].flatten(0, 1).mT @ x[0].flatten(0, 1) for x in (q, v)])
    turn = torch.linalg.eigh(sums).eigenvectors[:, None] @ study.hadamard(64)       # (2, 1, D, D)
    for mine, x in zip(study.rotated(16, 1, turn, k, v), (k, v), strict=True):
        torch.testing.assert_close(mine, x, rtol=0, atol=5e-3)

    def lost(keys):
        return (q @ (keys - k).mT).square().mean()
    assert lost(study.rotated(2, study.CLIP, turn, k, v)[0]) < 0.5 * lost(
        study.uniform(k, 2, -1, 64))


@pytest.mark.slow
def test_calibration_texts_are_no_evaluation_texts(smollm2):
    _, tokenizer, _ = smollm2
    pieces = study.calibration_pieces(tokenizer, 8)
    assert len(pieces) == 8 and all(len(ids) == study.PIECE for ids in pieces)
    assert not {"argparse", "tarfile", "subprocess", "zipfile"} & set(study.MODULES)


@pytest.mark.slow
def test_the_command_writes_codebooks_that_a_cache_takes(checkpoint, tmp_path, tiny, capsys):
    """Of this model and these bits, and of no other."""
    path, (model, tokenizer) = str(tmp_path / "books"), tiny
    args = ["--model", str(checkpoint(**LONG)), "--calibrate", path, "--bits", "4"]
    assert study.main([*args, "--pieces", "1", "--dtype", "float32"]) == 0
    assert "codebooks of 2 layers, 4 bits" in capsys.readouterr().out
    books = antkv.load_codebooks(path, study.origin(model, tokenizer), 4)
    caches = [AnchorCache(AnchorConfig(4), 300, 1, book) for book in books]
    ids = torch.arange(200) % 300 + 3
    mine = list(generate.generate(model, caches, [ids], 70, step=generate.eager_step))
    assert len(mine) == 70 and int(caches[0].n_indexed) > 100
    other = study.origin(model, tokenizer) | {"hidden_size": 65}
    with pytest.raises(InputError, match="made with hidden_size 64, here it is 65"):
        antkv.load_codebooks(path, other, 4)


def test_codebooks_replace_no_other_file(tmp_path, capsys):
    mine = tmp_path / "notes.txt"
    mine.write_text("my only copy")
    assert study.main(["--calibrate", str(mine)]) == 2
    assert "exists and is no codebook" in capsys.readouterr().err
    assert mine.read_text() == "my only copy"
