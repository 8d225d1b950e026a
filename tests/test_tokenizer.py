"""Tokenizers give the ids of the libraries they stand for; templates render as in transformers."""
import pytest
import sentencepiece
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors

from model import load

TEXTS = {
    "prose": "It was the best of times, it was the worst of times; it's what they'd SAID.",
    "digits": "In 1984, 3.14159 of 1,000,000 on 2024-01-31 at 10:45.",
    "spaces before digits": "a  5\n\n7\t8   42 \n 9",
    "other numbers": "x² + ½, Ⅳ, ٣٤, \uff11\uff12",
    "accents": "Ça va? naïve Ångström, cafe\u0301 (combining)",
    "scripts": "日本語のテキスト 한국어 العربية Россия हिन्दी",
    "emoji": "🙂👩‍👩‍👧‍👦 🇩🇪👍🏽!",
    "code": "def f(x):\n    return x**2  # ok\n\n\tif (a == b): print({'k': [1, 2]})\r\n",
    "whitespace": " \n\n  \t x \r\n  \u00a0\u3000 ",
    "odd characters": "\x00\x7f\u200b\ufeff\ufffd",
    "nothing": "",
}
CONVERSATION = [{"role": "system", "content": "Answer in one word."},
                {"role": "user", "content": " Größe \"of\" <b>5 & 6</b>?\n"},
                {"role": "assistant", "content": "11"},
                {"role": "user", "content": "7 & 8?"}]
QUESTION = CONVERSATION[-1:]


@pytest.fixture
def directory(editable):
    """directory(**settings): a tokenizer.json directory whose tokenizer_config.json has them."""
    def make(**settings):
        path = editable()
        tiny.edit(path / "tokenizer_config.json", **settings)
        return path
    return make


def tokenizer_of(path):
    return load(path, torch.float32, "cpu")[1]


# ---------------------------------------------------------------- the default model's tokenizer

@pytest.fixture(scope="module")
def smol(smollm2):
    return smollm2[1]


@pytest.fixture(scope="module")
def converted(smollm2):
    """What transformers makes of the GGUF file: GPT-2's rule, digits not split off first."""
    file = smollm2[2]
    return tiny.transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def original(converted):
    """The same vocabulary and merges behind SmolLM2's own rule: single digits, then GPT-2's."""
    tokenizer = Tokenizer.from_str(converted.backend_tokenizer.to_str())
    digits, gpt2 = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    return tokenizer


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_smollm2_ids_are_the_original_ones(smol, original, text):
    assert smol.encode(text) == original.encode(text).ids


GLUED = ["spaces before digits", "other numbers"]  # where transformers leaves the original rule
SAME = [name for name in TEXTS if name not in GLUED]


@pytest.mark.parametrize("text", [TEXTS[name] for name in SAME], ids=SAME)
def test_smollm2_ids_are_those_of_transformers(smol, converted, text):
    assert smol.encode(text) == converted(text)["input_ids"]


@pytest.mark.parametrize("text", [TEXTS[name] for name in GLUED], ids=GLUED)
def test_transformers_alone_glues_a_number_to_the_space_before_it(smol, converted, text):
    assert smol.encode(text) != converted(text)["input_ids"]


def test_smollm2_keeps_spaces_apart_from_the_digit_after_them(smol):
    assert [smol.decode([i]) for i in smol.encode("a  5")] == ["a", "  ", "5"]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_smollm2_decodes_what_it_encodes(smol, text):
    assert smol.decode(smol.encode(text)) == text


FRAGMENTS = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "5", "²", "42", "a", "the", "'s", "'LL", "é",
             "e\u0301", "🙂", "日本", "_", "::", "<|im_end|>", "<|im_start|>user", "<|endoftext|>",
             "<repo_name>", "<|", "|>"]
ANYTHING = st.text(st.characters(max_codepoint=0xFFFF, codec="utf-8"), max_size=4)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(FRAGMENTS) | ANYTHING, max_size=9).map("".join))
def test_smollm2_ids_are_the_original_ones_for_any_text(smol, original, text):
    assert smol.encode(text) == original.encode(text).ids
    assert smol.decode(smol.encode(text)) == original.decode(original.encode(text).ids)


def test_smollm2_special_tokens_are_one_id_each_and_not_decoded(smol):
    ids = smol.encode("<|im_start|>user\nHi<|im_end|>\n<|endoftext|>")
    assert ids[0] == 1 and ids[-1] == 0 and ids.count(2) == 1 and 3 <= len(ids) <= 7
    assert smol.decode(ids) == "user\nHi\n"


def test_smollm2_ends_at_im_end(smol):
    assert isinstance(smol.eos_ids, frozenset)
    assert 2 in smol.eos_ids and smol.eos_ids <= {0, 2}  # <|endoftext|> may end it too


@pytest.mark.parametrize("messages", [CONVERSATION, QUESTION],
                         ids=["with system", "without system"])
def test_smollm2_chat_is_that_of_transformers(smol, converted, messages):
    theirs = converted.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert smol.render(messages) == theirs
    assert theirs.endswith("<|im_end|>\n<|im_start|>assistant\n")


# ---------------------------------------------------------------- tokenizer.json

@pytest.fixture(scope="module")
def bpe(checkpoint):
    return tokenizer_of(checkpoint())


@pytest.mark.parametrize("text", [*TEXTS.values(), "<|im_start|>the cat<|im_end|>"],
                         ids=[*TEXTS, "special tokens"])
def test_tokenizer_json_ids_are_those_of_its_library(bpe, text):
    assert bpe.encode(text) == tiny.bpe().encode(text).ids
    assert bpe.decode(bpe.encode(text)) == tiny.bpe().decode(tiny.bpe().encode(text).ids)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_tokenizer_json_decodes_what_it_encodes(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_what_a_tokenizer_json_says_of_truncation_and_padding_is_ignored(bpe, editable):
    path = editable()
    tokenizer = Tokenizer.from_str(tiny.bpe().to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(path / "tokenizer.json"))
    for text in ("a", TEXTS["prose"]):
        assert tokenizer_of(path).encode(text) == bpe.encode(text)


def with_bos(path):
    """Give the directory's tokenizer.json a post-processor that puts token 0 in front."""
    tokenizer = Tokenizer.from_str(tiny.bpe().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny.SPECIALS[0]} $A", special_tokens=[(tiny.SPECIALS[0], 0)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_bos_is_added_only_by_a_post_processor(bpe, directory):
    path = with_bos(directory(bos_token=tiny.SPECIALS[0]))
    assert tokenizer_of(path).encode("the cat") == [0, *bpe.encode("the cat")]
    assert tokenizer_of(path).decode([0, *bpe.encode("the cat")]) == "the cat"
    assert 0 not in bpe.encode("the cat")


def test_a_chat_that_writes_bos_does_not_double_it(directory):
    template = "{{ bos_token }}{{ messages[-1]['content'] }}"
    path = with_bos(directory(bos_token=tiny.SPECIALS[0], chat_template=template))
    tokenizer = tokenizer_of(path)
    assert tokenizer.encode(tokenizer.render(QUESTION)) == tokenizer.encode("7 & 8?")


NAMED = {0, 2}      # <|endoftext|> and <|im_end|> end an answer wherever a tokenizer has them
ENDS = {"one": ({"eos_token_id": 5}, {"eos_token_id": 5}, {5}),
        "several in generation_config.json": ({"eos_token_id": 5},
                                              {"eos_token_id": [6, 7]}, {6, 7}),
        "several in config.json": ({"eos_token_id": [6, 7]}, None, {6, 7}),
        "generation_config.json says nothing": ({"eos_token_id": 6}, {}, {6})}


@pytest.mark.parametrize("config, generation, ids", ENDS.values(), ids=ENDS)
def test_end_tokens_are_those_of_the_checkpoint(editable, config, generation, ids):
    path = editable()
    tiny.edit(path / "config.json", **config)
    (path / "generation_config.json").unlink()
    if generation is not None:
        tiny.edit(path / "generation_config.json", **generation)
    model, tokenizer = load(path, torch.float32, "cpu")
    assert tokenizer.eos_ids == model.config.eos_ids == NAMED | ids


def test_the_end_token_of_the_tokenizer_ends_an_answer_too(directory):
    """Of the tokenizer's settings, although config.json names another one."""
    path = directory(eos_token="<|im_start|>")
    assert tokenizer_of(path).eos_ids == {1} | NAMED


# ---------------------------------------------------------------- sentencepiece

@pytest.fixture(scope="module")
def library():
    return sentencepiece.SentencePieceProcessor(model_proto=tiny.sentencepiece_model())


@pytest.fixture(params=["tokenizer.model", "GGUF"])
def pieces(request, editable, tmp_path):
    """pieces(add_bos): the same sentencepiece tokenizer out of either kind of checkpoint."""
    def make(add_bos):
        if request.param == "GGUF":
            meta = tiny.gguf_pieces() | {"tokenizer.ggml.add_bos_token": add_bos}
            file = tiny.write_gguf(tmp_path / "model.gguf", tiny.random_model(), meta=meta)
            return tokenizer_of(file)
        path = editable()
        (path / "tokenizer.json").unlink()
        (path / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
        tiny.edit(path / "tokenizer_config.json",
                  add_bos_token=add_bos, bos_token="<s>", eos_token="</s>", legacy=True)
        return tokenizer_of(path)
    return make


def test_sentencepiece_ids_are_those_of_its_library(pieces, library):
    tokenizer = pieces(False)
    for text in TEXTS.values():
        assert tokenizer.encode(text) == library.encode(text), text


def test_sentencepiece_decodes_what_it_encodes(pieces):
    tokenizer = pieces(False)
    for text in TEXTS.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_adds_bos_where_its_config_says_so(pieces, library):
    assert pieces(True).encode("the cat") == [1, *library.encode("the cat")]


def test_sentencepiece_special_tokens_are_one_id_each_and_not_decoded(pieces, library):
    tokenizer = pieces(False)
    ids = tokenizer.encode("<s>the cat</s>")
    assert ids == [1, *library.encode("the cat"), 2]
    assert tokenizer.decode(ids) == "the cat"


# ---------------------------------------------------------------- GGUF

LATER = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {"default": None, "gpt-2": None, "smollm": r"\p{N}", "qwen2": LATER % "",
          "llama-bpe": LATER % "{1,3}"}


def cut_by(pre):
    """A reference tokenizer whose text is cut by the rule that GGUF calls `pre`."""
    reference = Tokenizer.from_str(tiny.bpe(cut=False).to_str())
    split = [pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")] if SPLITS[pre] else []
    gpt2 = pre in ("default", "gpt-2", "smollm")
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)])
    return reference


@pytest.fixture
def gguf_tokenizer(tmp_path):
    """gguf_tokenizer(metadata): the tokenizer of a GGUF file of this metadata."""
    def make(meta):
        file = tiny.write_gguf(tmp_path / "model.gguf", tiny.random_model(), meta=meta)
        return tokenizer_of(file)
    return make


@pytest.mark.parametrize("pre", SPLITS)
def test_gguf_cuts_text_by_the_rule_it_names(gguf_tokenizer, pre):
    tokenizer = gguf_tokenizer(tiny.gguf_tokenizer(cut=False) | {"tokenizer.ggml.pre": pre})
    for text in [*TEXTS.values(), *tiny.UNCUT, "<|im_start|>the cat<|im_end|>"]:
        ids = cut_by(pre).encode(text).ids
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == cut_by(pre).decode(ids), text


def test_every_rule_that_cuts_text_shows_in_the_ids():
    shown = {pre: str([cut_by(pre).encode(text).ids for text in tiny.UNCUT]) for pre in SPLITS}
    assert shown["default"] == shown["gpt-2"]
    assert len(set(shown.values())) == len(SPLITS) - 1


@pytest.mark.parametrize("pre, whole", [("llama-bpe", True), ("qwen2", False)])
def test_only_llama_takes_a_known_word_whole_without_merges(gguf_tokenizer, bpe, pre, whole):
    meta = tiny.gguf_tokenizer()
    meta["tokenizer.ggml.merges"] = meta["tokenizer.ggml.merges"][:1]
    tokenizer = gguf_tokenizer(meta | {"tokenizer.ggml.pre": pre})
    assert bpe.encode(" the") == [meta["tokenizer.ggml.tokens"].index("\u0120the")]
    assert (tokenizer.encode(" the") == bpe.encode(" the")) is whole


def test_gguf_adds_bos_where_it_says_so(gguf_tokenizer, bpe):
    tokenizer = gguf_tokenizer({"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("the cat") == [0, *bpe.encode("the cat")]


def test_gguf_carries_its_template_and_end_token(gguf_tokenizer):
    template = "{{ messages[0]['content'] }}{{ eos_token }}"
    tokenizer = gguf_tokenizer({"tokenizer.chat_template": template})
    assert tokenizer.render(QUESTION) == "7 & 8?<|im_end|>"
    assert tokenizer.eos_ids == NAMED


# ---------------------------------------------------------------- chat templates

TEMPLATES = {
    "one line": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
                "{{ '<|im_end|>\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "indented blocks": """
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{ m.content | trim }}
    {% else %}
    [{{ m.role | upper }}]
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
assistant:
{% endif %}""",
    "first and last token": "{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}",
    "namespace": "{% set n = namespace(count=0) %}{% for m in messages %}"
                 "{% set n.count = n.count + 1 %}{% endfor %}{{ n.count }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}"
                     "{{ m.content }}{% endfor %}",
    "undefined tools": "{% if tools %}tools{% endif %}{{ messages[0].content }}",
    "the year": "{{ strftime_now('%Y') }} {{ messages[0].content }}",
}


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_renders_as_in_transformers(directory, template, place):
    tokens = {"bos_token": tiny.SPECIALS[0], "eos_token": tiny.SPECIALS[2]}
    theirs = tiny.transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.bpe(), chat_template=template, **tokens)
    if place == "tokenizer_config.json":
        path = directory(**tokens, chat_template=template)
    else:
        path = directory(**tokens)
        (path / place).write_text(template, encoding="utf-8")
    for messages in (CONVERSATION, QUESTION):
        assert tokenizer_of(path).render(messages) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True)


def test_the_template_file_wins_over_the_config(directory):
    path = directory(chat_template="old")
    (path / "chat_template.jinja").write_text("new")
    assert tokenizer_of(path).render(QUESTION) == "new"


def test_the_default_of_several_templates_is_taken(directory):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert tokenizer_of(directory(chat_template=named)).render(QUESTION) == "plain"


def test_special_tokens_may_be_objects(directory):
    path = directory(eos_token={"content": "<|im_end|>", "lstrip": False, "special": True},
                     chat_template="{{ eos_token }}")
    assert tokenizer_of(path).render(QUESTION) == "<|im_end|>"


def test_without_a_template_chat_is_the_last_message_unchanged(bpe):
    last = " {{ as }} it\n is "
    assert bpe.render([*QUESTION, {"role": "user", "content": last}]) == last


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "the clock's owner": "{{ strftime_now.__self__.year }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "loop's internals": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "changed messages": "{{ messages.append(1) }}",
    "endless range": "{% for i in range(10 ** 9) %}{% endfor %}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_a_template_cannot_leave_its_sandbox(directory, template):
    tokenizer = tokenizer_of(directory(chat_template=template))
    with pytest.raises(ValueError) as refusal:
        tokenizer.render(QUESTION)
    assert "template" in str(refusal.value) and "\n" not in str(refusal.value)


FAILURES = {"raise_exception": ("{{ raise_exception('Roles must\nalternate') }}",
                                "Roles must alternate"),
            "syntax": ("{% for m in messages %}\n{{ m", "template"),
            "undefined name": ("{{ nothing.at.all }}", "nothing"),
            "type": ("{{ 1 + messages }}", "template")}


@pytest.mark.parametrize("template, fact", FAILURES.values(), ids=FAILURES)
def test_a_failing_template_is_one_line(directory, template, fact):
    path = directory(chat_template=template)
    with pytest.raises(ValueError) as refusal:
        tokenizer_of(path).render(QUESTION)
    assert fact in str(refusal.value) and "\n" not in str(refusal.value)
