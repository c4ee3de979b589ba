"""Tokenizers of every kind, trained on the spot: how they begin and end texts, and mark spaces."""

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "What is 1 plus 1? The answer is 2.", "I do not know it.", "[user] hi [assistant] hello",
    "\n\nHuman: What? \n\nAssistant: The other one.",
]  # fmt: skip
CHAT = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if thinking %}<think>{% endif %}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
SPECIAL = ["<pad>", "<s>", "</s>"]


def _model(kind, normalizer, pre_tokenizer, decoder):
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoder
    options = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    alphabet = (
        pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else list('abcXYZ[]{}":,/<>▁\n')
    )
    options["initial_alphabet"] = alphabet
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(unk_token="<pad>", **options)
    else:
        trainer = trainers.BpeTrainer(**options)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _bytes():
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _model("bytes", None, plain, decoders.ByteLevel())


def _legacy():
    """As of Llama 2: a space before every text, and before what follows a special token."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _model("pieces", normalizer, None, decoders.Metaspace())


def _metaspace(scheme):
    pre = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    return _model("unigram", None, pre, decoders.Metaspace(prepend_scheme=scheme))


# How a tokenizer is made, and what its post-processor puts around a text.
KINDS = {
    "bytes": (_bytes, "$A"),
    "bytes-bos": (_bytes, "<s> $A"),
    "bytes-bos-eos": (_bytes, "<s> $A </s>"),
    "legacy-bos": (_legacy, "<s> $A"),
    "legacy-bos-eos": (_legacy, "<s> $A </s>"),
    "metaspace-always": (lambda: _metaspace("always"), "<s> $A"),
    "metaspace-first": (lambda: _metaspace("first"), "<s> $A"),
    "metaspace-never": (lambda: _metaspace("never"), "$A </s>"),
}


def make(kind, template=CHAT):
    """A tokenizer of this kind."""
    build, around = KINDS[kind]
    tokenizer = build()
    special = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = template
    return made
