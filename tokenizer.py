"""Tokenizers and chat templates: text to token ids, and back.

    ids = tokenizer.encode("Once upon a time")
    ids = tokenizer.chat([{"role": "user", "content": "What is a <|im_end|>?"}])
    text = tokenizer.decode(ids)

The control tokens of a prompt are those that its chat template writes. What a message spells stays
text: `<|im_end|>` in it is a few ordinary tokens. encode() alone takes control tokens from a text.

Does not include: tokenizers written in Python, tool calls in chat templates, images.
"""
import datetime
import json
import re
import secrets
import struct
import sys
import warnings

from checkpoint import one_line, read_json, read_text, refuse
from retroinfer import InputError

# Control tokens that end an answer, whatever a config says: the names that chat models use.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|eot|>",
        "<end_of_turn>", "<|end|>", "<|return|>", "<EOT>", "</s>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
HIDDEN = 0xF0000        # private characters from here on stand for the first ones of control tokens


class Tokenizer:
    """A tokenizer of the `tokenizers` package, with its chat template and end tokens.

    named: the texts of its bos_token, eos_token and so on, as far as it has them.
    """

    def __init__(self, backend, named, eos_ids, template=None):
        self.backend, self.named, self.template = backend, named, template
        self.control = self.find_control()                  # {text: id} of the control tokens
        self.pattern = re.compile(any_of(self.control))
        self.opening = self.find_opening()                  # ids that go before a text
        ends = {self.control.get(text) for text in (*ENDS, named.get("eos_token"))}
        self.eos_ids = frozenset(eos_ids) | ends - {None}
        self.sealed, self.now = None, datetime.datetime.now()       # a template may write it

    # ------------------------------------------------------------ text to ids

    def encode(self, text):
        """Token ids of text. A control token written out in it is one id, BOS is never doubled."""
        bos, text = self.named.get("bos_token"), whole(text)
        opening = [] if bos and text.startswith(bos) else self.opening
        return opening + self.plain(text)

    def continued(self, text):
        """Token ids of text that goes on where other text ended."""
        text, before = whole(text), self.plain("\n")
        ids = self.plain("\n" + text)
        return ids[len(before):] if ids[:len(before)] == before else self.plain(text)

    def chat(self, messages):
        """Token ids of the prompt for [{"role", "content"}, ...]: one encoding of all of it.

        InputError if the template fails. Without a template: the last content, with its opening.
        """
        texts = [whole(m["content"]) for m in messages]
        used = set().union(*texts)
        free = (chr(i) for i in range(HIDDEN, sys.maxunicode) if chr(i) not in used)
        hide = {text[0]: next(free) for text in self.control}
        spelled = re.compile(f"(?=({self.pattern.pattern}))(.)", re.S)
        hidden = [m | {"content": spelled.sub(lambda x: hide[x[2]], text)}
                  for m, text in zip(messages, texts, strict=True)]
        shown = {ord(x): c for c, x in hide.items()}
        if self.template:
            return self.seal(self.render(hidden), shown)
        return self.opening + self.seal(hidden[-1]["content"], shown)

    def render(self, messages):
        """The text that the template makes of messages.

        It is foreign code: it runs in jinja2's sandbox, and its failure is an InputError.
        """
        if not self.template:
            return messages[-1]["content"]
        try:
            return environment(self.now).from_string(self.template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True,
                **self.named)
        except Exception as e:  # foreign code may raise anything
            raise InputError(f"the model's chat template failed: {one_line(e)}") from None

    # ------------------------------------------------------------ what its library knows

    def find_control(self):
        added = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special and token.content}

    def find_opening(self):
        """What the library puts before a text; what it puts behind one would end a prompt."""
        ids, text = self.backend.encode("a").ids, self.plain("a")
        at = next((i for i in range(len(ids)) if ids[i:i + len(text)] == text), 0)
        return ids[:at]

    def plain(self, text):
        """Ids of text; control tokens are read, nothing is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def seal(self, text, shown):
        """Ids of text whose control tokens are the template's. `shown` has the characters that
        private ones stand for: what they spell is no control token.

        A copy of the tokenizer knows control tokens by names that nobody can spell.
        """
        if self.sealed is None:
            self.sealed = rename(self.backend, {text: secrets.token_hex(16) for text in
                                                self.control})
        backend, names = self.sealed
        text = self.pattern.sub(lambda x: names[x[0]], text).translate(shown)
        return backend.encode(text, add_special_tokens=False).ids

    def size(self):
        """How many ids a text may give: one more than the largest, control tokens left out."""
        added = self.backend.get_added_tokens_decoder().items()
        return max([self.backend.get_vocab_size(False),
                    *(i + 1 for i, token in added if not token.special)])

    def definition(self):
        """Bytes that two tokenizers share only if they cut and write prompts alike."""
        return f"{self.backend_state()}{self.template}{self.named}".encode()

    def backend_state(self):
        return self.backend.to_str()

    # ------------------------------------------------------------ ids to text

    def decode(self, ids):
        """Text of token ids. Control tokens and ids of no token are left out."""
        return self.backend.decode(list(ids))


def any_of(texts):
    """A pattern of one of the texts, the longest that fits. Their first characters are looked for
    first, which is quick where a thousand texts are known."""
    first = "".join(re.escape(c) for c in sorted({text[0] for text in texts}))
    texts = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    return f"(?=[{first}])(?:{texts})" if texts else "(?!)"


def whole(text):
    """Text without halves of characters, which no encoding has."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def rename(backend, names):
    """(a copy of a tokenizer whose control tokens have other names, these names)."""
    from tokenizers import Tokenizer as Backend
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        state["model"]["vocab"] = {names.get(text, text): i for text, i in vocabulary.items()}
    else:
        state["model"]["vocab"] = [[names.get(text, text), *rest] for text, *rest in vocabulary]
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if state["model"].get("unk_token") in names:
        state["model"]["unk_token"] = names[state["model"]["unk_token"]]
    state["post_processor"] = None                      # it would look for the old names
    try:
        return Backend.from_str(json.dumps(state)), names
    except Exception as e:      # Rust's own kind: words are made of a control token
        raise InputError(f"a control token of the tokenizer is a part of words too: {one_line(e)}"
                         ) from None


# ---------------------------------------------------------------- chat templates

def environment(now):
    """What a template runs in: the names, filters and tags that transformers gives it."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model says, for training. Here it does nothing."""
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=["jinja2.ext.loopcontrols", Generation])
    env.filters["tojson"] = to_json
    env.globals["strftime_now"] = now.strftime
    env.globals["raise_exception"] = raise_exception
    return env


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def raise_exception(message):
    raise ValueError(message)


# ---------------------------------------------------------------- sentencepiece

class PieceTokenizer(Tokenizer):
    """The same for sentencepiece.

    That library sees no control pieces in a text, and knows no added tokens: we cut them out first.
    added: {text: (id, is it a control token)}. Where prefixed is True, every piece of text behind
    a control token begins with the space that the library puts before a text.
    """

    def __init__(self, backend, named, eos_ids, template, added=None, has_bos=False,
                 prefixed=False):
        self.added, self.has_bos, self.prefixed = added or {}, has_bos, prefixed
        super().__init__(backend, named, eos_ids, template)
        import sentencepiece
        proto = backend.serialized_model_proto()        # later fields win: no space is added
        self.bare = sentencepiece.SentencePieceProcessor(
            model_proto=proto + message(3, bytes([3 << 3, 0])))
        self.texts = {i: text for text, (i, special) in self.added.items() if not special}
        self.others = {text: i for i, text in self.texts.items()}

    def find_control(self):
        sp = self.backend
        own = {sp.id_to_piece(i): i for i in range(len(sp)) if sp.is_control(i)}
        return own | {text: i for text, (i, special) in self.added.items() if special}

    def find_opening(self):
        bos = self.named.get("bos_token")
        if not (self.has_bos and bos):
            return []
        return [self.control.get(bos, self.backend.piece_to_id(bos))]

    def plain(self, text):
        return self.seal(text, {})

    def seal(self, text, shown):
        known = self.control | self.others
        ids, parts = [], re.split(f"({any_of(known)})", text)
        for n, part in enumerate(parts):
            if n % 2:
                ids.append(known[part])
            elif part:
                backend = self.bare if n and not self.prefixed else self.backend
                ids += backend.encode(part.translate(shown))
        return ids

    def size(self):
        return max([len(self.backend), *(i + 1 for i in self.texts)])

    def backend_state(self):
        return self.backend.serialized_model_proto(), sorted(self.added.items()), self.prefixed

    def decode(self, ids):
        text, run = "", []
        for i in [*ids, None]:
            if i is not None and i < len(self.backend) and i not in self.texts:
                run.append(i)
            elif i is None or i in self.texts:
                text += self.backend.decode(run) + self.texts.get(i, "")
                run = []
        return text


def message(number, payload):
    """A length-delimited field of a protobuf message."""
    head, size = bytes([number << 3 | 2]), len(payload)
    while size > 127:
        head, size = head + bytes([size & 127 | 128]), size >> 7
    return head + bytes([size]) + payload


# ---------------------------------------------------------------- a Hugging Face directory

def directory_tokenizer(path, eos_ids):
    """The tokenizer of a directory, from tokenizer.json or tokenizer.model."""
    settings = (read_json(path / "special_tokens_map.json", {})
                | read_json(path / "tokenizer_config.json", {}))
    template = chat_template(path, settings)
    named = {name: text_of(settings[name]) for name in NAMED if settings.get(name)}
    try:
        if (path / "tokenizer.json").exists():
            import tokenizers
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            backend.no_truncation(), backend.no_padding()     # a prompt is read whole, and alone
            name_controls(backend, settings, named)
            return Tokenizer(backend, named, eos_ids, template)
        if (path / "tokenizer.model").exists():
            return piece_tokenizer(path, settings, named, eos_ids, template)
    except Exception as e:  # both packages raise bare exceptions
        raise InputError(f"the tokenizer in {path} cannot be read: {one_line(e)}") from None
    raise InputError(f"{path} holds neither tokenizer.json nor tokenizer.model")


def chat_template(path, settings):
    jinja = path / "chat_template.jinja"
    template = read_text(jinja) if jinja.exists() else settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template


def text_of(token):
    """The text of a token that a config gives as a text, or as an object."""
    return token["content"] if isinstance(token, dict) else token


def name_controls(backend, settings, named):
    """Make the tokens that the settings name control tokens, where tokenizer.json does not."""
    from tokenizers import AddedToken
    known = {token.content for token in backend.get_added_tokens_decoder().values()
             if token.special}
    more = settings.get("additional_special_tokens") or []
    for text in dict.fromkeys([*named.values(), *map(text_of, more)]):
        if text not in known and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])


def piece_tokenizer(path, settings, named, eos_ids, template):
    """The tokenizer of tokenizer.model and of the files that add tokens to it."""
    import sentencepiece
    backend = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    for name, i in (("bos_token", backend.bos_id()), ("eos_token", backend.eos_id())):
        if i >= 0:
            named.setdefault(name, backend.id_to_piece(i))
    more = {*named.values(), *map(text_of, settings.get("additional_special_tokens") or [])}
    added = {text: (i, text in more or i >= len(backend))
             for text, i in read_json(path / "added_tokens.json", {}).items()}
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = int(i), token.get("special", False)
    for text in more - added.keys():
        i = backend.piece_to_id(text)
        if i != backend.unk_id() and not backend.is_control(i):
            added[text] = i, True
    added = {text: x for text, x in added.items()
             if x[0] >= len(backend) or not backend.is_unknown(x[0])}
    return PieceTokenizer(backend, named, eos_ids, template, added,
                          settings.get("add_bos_token", True), settings.get("legacy", False))


# ---------------------------------------------------------------- a GGUF file

# How a text is cut before byte pairs are merged, by the name that GGUF gives the rule: GPT-2's,
# GPT-2's after single digits, or the later rule with one (Qwen) or up to three (Llama 3) digits.
LATER = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Mistral's later rule cuts words where a capital follows a small letter.
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe")
CUTS = {"default": None, "gpt-2": None, "smollm": r"\p{N}", "tekken": TEKKEN,
        **dict.fromkeys(LLAMA3, LATER.replace("DIGITS", "{1,3}")),
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), LATER.replace("DIGITS", ""))}


def gguf_tokenizer(get, eos_ids):
    """The tokenizer of a GGUF file; get(key, default) gives its metadata."""
    tokens, kind = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.model")
    pre = get("tokenizer.ggml.pre", None)
    refuse(kind not in ("gpt2", "llama"), "GGUF tokenizer", kind, ["gpt2", "llama"])
    if kind == "gpt2" and pre in (None, "default"):
        warnings.warn("the GGUF file does not say how its tokenizer cuts text: GPT-2's rule is "
                      "taken, which may be wrong", stacklevel=2)
    pre = pre or "default"
    refuse(kind == "gpt2" and pre not in CUTS, "GGUF pre-tokenizer", pre, CUTS)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {name: get(f"tokenizer.ggml.{key}_token_id", None) for name, key in names.items()}
    named = {name: tokens[i] for name, i in found.items() if i is not None}
    has_bos = get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in LLAMA3)
    template = get("tokenizer.chat_template", None)
    if kind == "llama":
        return PieceTokenizer(pieces_from_gguf(get, tokens), named, eos_ids, template,
                              has_bos=has_bos, prefixed=True)
    bos = named.get("bos_token") if has_bos else None
    return Tokenizer(bpe_from_gguf(get, tokens, pre, bos), named, eos_ids, template)


def bpe_from_gguf(get, tokens, pre, bos):
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend
    merges = [tuple(m.split(" ", 1)) for m in get("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=pre in (*LLAMA3, "tekken")))
    cut = [pre_tokenizers.Split(Regex(CUTS[pre]), "isolated")] if CUTS[pre] else []
    is_gpt2 = pre in ("default", "gpt-2", "smollm")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2)])
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, get("tokenizer.ggml.token_type"), strict=True):
        if kind in (3, 4):  # control, user-defined
            backend.add_tokens([AddedToken(token, special=kind == 3, normalized=False)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return backend


def pieces_from_gguf(get, tokens):
    """GGUF holds a sentencepiece model's pieces: write them in that library's protobuf again."""
    import sentencepiece

    def piece(text, score, kind):  # string 1, float 2, enum 3
        if kind == 4:               # user-defined: GGUF writes its spaces as they are in a text
            text = text.replace(" ", "\u2581")
        return (message(1, text.encode()) + b"\x15" + struct.pack("<f", score)
                + bytes([3 << 3, kind]))

    scores, kinds = get("tokenizer.ggml.scores"), get("tokenizer.ggml.token_type")
    pieces = b"".join(message(1, piece(*p)) for p in zip(tokens, scores, kinds, strict=True))
    bpe = bytes([3 << 3, 2]) + b"\x98\x02\x01"                                # byte_fallback
    prefix = get("tokenizer.ggml.add_space_prefix", True)
    spaces = bytes([3 << 3, prefix, 4 << 3, 0, 5 << 3, 1])                   # add one, keep, escape
    return sentencepiece.SentencePieceProcessor(
        model_proto=pieces + message(2, bpe) + message(3, spaces))
