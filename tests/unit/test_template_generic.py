"""The generic template on small tokenizers made here: ChatML-like templates with and without marks, and broken ones."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ossia.config.parts import TemplateOptions
from ossia.errors import OssiaError, UsageError
from ossia.template import LossWeights, load_template, parse_loss_scale
from ossia.template.harmony import REQUIRED_TOKENS
from ossia.template.messages import Conversation, Message, Reply, ToolCall
from ossia.template.options import template_from

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3: an empty think in the last answer, none in those before.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(chat_template: str | None, special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def trained(template, row):
    rendered = template.render(row)
    assert rendered.labels == rendered.input_ids
    assert len(rendered.input_ids) == len(rendered.loss_weights) == len(rendered.channels)
    pairs = zip(rendered.loss_weights, rendered.labels, strict=True)
    runs = [(weight, [label for _, label in group]) for weight, group in itertools.groupby(pairs, lambda p: p[0])]
    return [(weight, template.tokenizer.decode(labels)) for weight, labels in runs if weight]


ROW = Conversation(
    [Message("user", "q1"), Message("assistant", "a1"), Message("user", "问"), Message("assistant", "答😀")]
)


@pytest.mark.parametrize("source", [CHATML, MARKED])
@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("default", [(1.0, "a1<|im_end|>"), (1.0, "答😀<|im_end|>")]),
        ("last_round", [(1.0, "答😀<|im_end|>")]),
    ],
)
def test_answers_are_trained_with_their_end_token(source, scale, expected):
    template = load_template(make(source), loss=parse_loss_scale(scale))
    assert template.name == "generic"
    assert trained(template, ROW) == expected


@pytest.mark.parametrize("source", [CHATML, MARKED, FORGETS])
def test_base_all(source):
    template = load_template(make(source), loss=LossWeights("all"))
    assert set(template.render(ROW).loss_weights) == {1.0}


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_loss_of_a_message_overrides(source):
    template = load_template(make(source))
    row = Conversation(
        [
            Message("user", "q"),
            Message("assistant", "a", loss=0.0),
            Message("user", "q"),
            Message("assistant", "b", loss=3.0),
        ]
    )
    assert trained(template, row) == [(3.0, "b<|im_end|>")]
    with pytest.raises(OssiaError, match="only harmony"):
        template.render(Conversation([Message("user", "q", loss=1.0), Message("assistant", "a")]))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("default", [(1.0, "<think>\nhm\n</think>\n\na<|im_end|>")]),
        ("reasoning:0.5", [(0.5, "<think>\nhm\n</think>\n\n"), (1.0, "a<|im_end|>")]),
        ("final_only", [(1.0, "a<|im_end|>")]),
    ],
)
def test_reasoning_is_written_as_think_and_weighted(scale, expected):
    template = load_template(make(CHATML), loss=parse_loss_scale(scale))
    row = Conversation([Message("user", "q"), Message("assistant", "a", "hm")])
    assert trained(template, row) == expected
    assert {c for c in template.render(row).channels if c} == {"analysis", "final"}


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_empty_think_is_ignored_on_request(source):
    row = Conversation([Message("user", "q"), Message("assistant", "<think>\n\n</think>\n\na")])
    assert trained(load_template(make(source)), row) == [(1.0, "<think>\n\n</think>\n\na<|im_end|>")]
    ignoring = load_template(make(source), loss=parse_loss_scale("ignore_empty_think"))
    assert trained(ignoring, row) == [(1.0, "a<|im_end|>")]


def test_template_that_rewrites_history_is_refused_with_what_to_do():
    with pytest.raises(OssiaError, match=r"messages\[1\].*--loss_scale last_round.*generation"):
        load_template(make(FORGETS)).render(ROW)
    last = load_template(make(FORGETS), loss=parse_loss_scale("last_round"))
    assert trained(last, ROW) == [(1.0, "<think>\n\n</think>\n\n答😀<|im_end|>")]
    row = Conversation([Message("user", "q"), Message("assistant", "a", "hm")])
    assert trained(last, row) == [(1.0, "<think>\nhm\n</think>\n\na<|im_end|>")]


def test_prompt_is_the_start_of_the_row():
    template = load_template(make(CHATML), system="Be brief.")
    rendered = template.render(ROW)
    for i in (1, 3):
        prompt = template.prompt(ROW.messages[:i])
        assert rendered.input_ids[: len(prompt)] == prompt
    text = template.tokenizer.decode(rendered.input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq1")
    own = template.prompt([Message("developer", "Mine."), Message("user", "q")])
    assert template.tokenizer.decode(own).startswith("<|im_start|>system\nMine.<|im_end|>")


def test_calls_reach_the_template_with_arguments_as_an_object():
    template = load_template(make(CHATML))
    row = Conversation([Message("user", "q"), Message("assistant", "", tool_calls=(ToolCall("f", '{"a": "é"}'),))])
    assert trained(template, row) == [(1.0, '[f {"a": "é"}]<|im_end|>')]


def test_row_without_an_answer_has_no_loss():
    assert not any(load_template(make(CHATML)).render(Conversation([Message("user", "q")])).loss_weights)


def test_refusal_of_the_template_is_reported():
    template = load_template(make("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(OssiaError, match="roles must alternate"):
        template.render(ROW)


def test_end_of_turn_is_found_beside_eos():
    tokenizer = make(CHATML, special=("<|im_start|>", "<|im_end|>", "</s>"), eos="</s>")
    template = load_template(tokenizer)
    assert template.stop_ids == tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert template.pad_id == template.stop_ids[0]
    assert trained(template, ROW)[0] == (1.0, "a1<|im_end|>")


def streamed(template, ids):
    splitter = template.stream()
    pieces = [piece for token in ids for piece in splitter.push(token)] + splitter.flush()
    return [(channel, "".join(t for _, t in group)) for channel, group in itertools.groupby(pieces, lambda p: p[0])]


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("Hi 😀<|im_end|>", Reply("Hi 😀")),
        ("Hi", Reply("Hi", finished=False)),
        ("", Reply("", finished=False)),
        ("<think>\nhm 你\n</think>\n\nHi<|im_end|>more", Reply("Hi", "hm 你")),
        ("<think>cut of", Reply("", "cut of", finished=False)),
        ("<think>a </thin", Reply("", "a </thin", finished=False)),
        ("<think></think>Hi", Reply("Hi", finished=False)),
        ("a <think> b", Reply("a <think> b", finished=False)),
        ("<thin air", Reply("<thin air", finished=False)),
        ("<thi", Reply("<thi", finished=False)),
    ],
)
def test_parse_and_stream(text, reply):
    template = load_template(make(CHATML))
    ids = template.tokenizer.encode(text, add_special_tokens=False)
    assert template.parse(ids) == reply
    stops = [i for i, token in enumerate(ids) if token in template.stop_ids]
    shown = streamed(template, ids[: stops[0] + 1] if stops else ids)
    expected = [("analysis", reply.thinking), ("final", reply.content)]
    assert shown == [pair for pair in expected if pair[1]]


def test_prompt_that_opens_think_makes_the_reply_begin_in_it():
    source = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    template = load_template(make(source))
    ids = template.tokenizer.encode("hm</think>\nHi<|im_end|>", add_special_tokens=False)
    assert template.parse(ids) == Reply("Hi", "hm")


def test_stream_holds_back_bytes_of_a_character():
    template = load_template(make(CHATML))
    splitter = template.stream()
    ids = template.tokenizer.encode("é😀", add_special_tokens=False)
    assert len(ids) == 6
    assert [splitter.push(token) for token in ids] == [[], [("final", "é")], [], [], [], [("final", "😀")]]


# --- names of control tokens in messages

CHATML_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}{{ eos_token }}"
    "{% else %}<｜User｜>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
STYLES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "chatml, marked": (MARKED, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "qwen": (CHATML_THINKS, ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"], None, "<|im_end|>"),
    "llama": (LLAMA, ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<s>", "<|eot_id|>"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>"),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "phi": (PHI, ["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"], None, "<|end|>"),
    "deepseek": (DEEPSEEK, ["<|bos|>", "<|eos|>", "<｜User｜>", "<｜Assistant｜>"], "<|bos|>", "<|eos|>"),
}
LETTERS = {"<": "⟦", ">": "⟧", "[": "⟦", "]": "⟧"}
TEXTS = [
    "the",
    " answer",
    " is",
    "42",
    "\n",
    "\n\n",
    "  ",
    "你好",
    " é",
    "don't",
    "<|",
    "|>",
    "<",
    "[",
    "</",
    "user",
    "_end",
]


def trained_tokenizer(style, kind, renamed):
    """A tokenizer with merges; `renamed`: the control tokens have other names, with the same ids."""
    template, names, bos, eos = STYLES[style]
    backend = Tokenizer(models.BPE(unk_token=None, byte_fallback=kind == "sentencepiece"))
    corpus = [*TEXTS, *names, "the answer is 42 <|im_end|> <|im_start|>user\n the end |> user<", "<s> </s> [INST]"] * 3
    if kind == "sentencepiece":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [*map(chr, range(32, 127)), "\n", "⟦", "⟧", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=alphabet[-256:], initial_alphabet=alphabet[:-256])
    else:
        # As Llama 3 splits: the line breaks before a word are one piece.
        split = pre_tokenizers.Split(Regex(r"[^\r\n\w]?\w+| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet)
    backend.train_from_iterator(corpus, trainer)
    if kind == "sentencepiece":
        # What training needed as special tokens are ordinary bytes of the model.
        backend_ = Tokenizer(backend.model)
        backend_.pre_tokenizer, backend_.decoder = backend.pre_tokenizer, backend.decoder
        backend = backend_

    def name(token):
        return token if token is None or not renamed else "".join(LETTERS.get(c, c) for c in token)

    for token in names:
        template = template.replace(token, name(token))
    if renamed and style == "phi":
        template = template.replace("'<|'", "'⟦|'").replace("'|>'", "'|⟧'")
    special = [AddedToken(name(token), special=not token.endswith("call>"), normalized=False) for token in names]
    backend.add_tokens([token for token in special if not token.special])
    backend.add_special_tokens([token for token in special if token.special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=name(bos), eos_token=name(eos))
    tokenizer.chat_template = template
    return tokenizer


def words(rng, names):
    return "x" + "".join(rng.choices([*TEXTS, *names, *names], k=rng.randint(1, 12))) + "y"


def generated(rng, names, calls):
    messages = [Message("system", words(rng, names))] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        messages.append(Message("user", words(rng, names)))
        thinking = words(rng, names) if calls and rng.random() < 0.5 else None
        made = (
            (ToolCall("f", json.dumps({words(rng, names): [words(rng, names)]})),)
            if calls and rng.random() < 0.5
            else ()
        )
        messages.append(Message("assistant", words(rng, names), thinking, made))
    return Conversation(messages, [])


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("style", STYLES)
def test_names_of_control_tokens_in_messages_are_ordinary_text(style, kind):
    """The tokens are those of a tokenizer whose control tokens have other names, so that the messages name none."""
    ours, other = (load_template(trained_tokenizer(style, kind, renamed), "generic") for renamed in (False, True))
    assert ours.unguarded is None
    names = STYLES[style][1]
    control = set(ours.tokenizer.convert_tokens_to_ids(names))
    plain = Conversation([Message("user", "x"), Message("assistant", "y")])
    assert control & set(ours.render(plain).input_ids)
    for seed in range(60):
        row = generated(random.Random(seed), names, style == "qwen")
        assert ours.render(row) == other.render(row), seed
        assert ours.prompt(row.messages[:-1]) == other.prompt(row.messages[:-1]), seed


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("style", STYLES)
def test_ordinary_text_has_the_tokens_of_apply_chat_template(style, kind):
    template = load_template(trained_tokenizer(style, kind, False), "generic")
    for seed in range(20):
        row = generated(random.Random(seed), [], False)
        plain = [{"role": m.role, "content": m.content} for m in row.messages]
        ids = template.tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
        assert template.render(row).input_ids == ids


def test_tools_and_names_of_control_tokens_in_them_are_text_too():
    source = "{{ tools | tojson }}" + CHATML_THINKS
    special = ("<|im_start|>", "<|im_end|>")
    template = load_template(make(source, special=special))
    tools = [{"type": "function", "function": {"name": "f", "description": "ends <|im_end|>", "parameters": {}}}]
    messages = [Message("user", "q"), Message("assistant", "a"), Message("tool", "r<|im_end|>", name="f")]
    ids = template.prompt(messages, tools=tools)
    assert ids.count(template.stop_ids[0]) == 3
    assert "ends <|im_end|>" in template.tokenizer.decode(ids)


def test_think_tags_that_are_tokens_are_tokens_where_the_assistant_reasons():
    tokenizer = make(CHATML_THINKS, special=("<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    opened, closed = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    template = load_template(tokenizer, loss=parse_loss_scale("final_only"))
    for message in (
        Message("assistant", "a", "t"),
        Message("assistant", "<think>\nt\n</think>\n\na"),
        Message("assistant", "t\n</think>\n\na"),
    ):
        rendered = template.render(Conversation([Message("user", "what is </think> <think>?<|im_end|>"), message]))
        assert (rendered.input_ids.count(opened), rendered.input_ids.count(closed)) == (1, 1)
        assert tokenizer.decode(rendered.input_ids).endswith("assistant\n<think>\nt\n</think>\n\na<|im_end|>\n")
        assert trained(template, Conversation([Message("user", "<think>"), message])) == [(1.0, "a<|im_end|>")]


@pytest.mark.parametrize("source", [CHATML, CHATML_THINKS])
def test_an_answer_with_only_the_closing_tag_reasons_before_it(source):
    template = load_template(make(source), loss=parse_loss_scale("reasoning:0.5"))
    row = Conversation([Message("user", "q"), Message("assistant", "hm\n</think>\n\na")])
    assert trained(template, row) == [(0.5, "<think>\nhm\n</think>\n\n"), (1.0, "a<|im_end|>")]
    # Said to be none, it is text.
    row.messages[1].thinking = ""
    assert template.tokenizer.decode(template.render(row).input_ids).endswith(
        "assistant\nhm\n</think>\n\na<|im_end|>\n"
    )


def test_a_template_that_rewrites_messages_is_named_at_start(capsys):
    rewriting = make(CHATML.replace("{{ m.content }}", "{{ m.content.replace('<|im_end|>', '') }}"))
    template = template_from(rewriting, TemplateOptions(template="generic"))
    assert "rewrites the text of messages" in template.unguarded
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "template generic of memory" in said.err
    # What the template does with names is then left to it.
    assert trained(template, Conversation([Message("user", "<|im_end|>"), Message("assistant", "a")])) == [
        (1.0, "a<|im_end|>")
    ]

    template_from(make(CHATML), TemplateOptions(template="generic"))
    assert capsys.readouterr().err == ""


def test_a_tokenizer_that_has_no_other_way_to_write_a_name_is_named_at_start():
    letters = [(chr(i), -5.0) for i in range(32, 127)] + [("</s>", 0.0), ("\n", -5.0)]
    backend = Tokenizer(models.Unigram(letters, unk_id=0))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("</s>", "<s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    template = load_template(tokenizer)
    assert template.unguarded == "its tokenizer writes </s> for the letters of the name too"
    ids = template.render(Conversation([Message("user", "a<s></s>b"), Message("assistant", "c")])).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<s>")) == 2


def test_a_row_that_the_template_treats_by_its_names_is_refused():
    source = CHATML.replace("{{ m.content }}", "{{ m.content.split('<|pad|>')[0] if m.role == 'tool' else m.content }}")
    template = load_template(make(source, special=("<|im_start|>", "<|im_end|>", "<|pad|>")))
    assert template.unguarded is None
    messages = [Message("user", "q"), Message("tool", "a<|pad|>b", name="f")]
    with pytest.raises(OssiaError, match="names a control token"):
        template.prompt(messages)


# --- load_template and --loss_scale


def test_auto_takes_harmony_where_its_tokens_are():
    assert load_template(make(None, special=(*REQUIRED_TOKENS, "<|constrain|>"), eos="<|return|>")).name == "harmony"
    assert load_template(make(CHATML)).name == "generic"


def test_harmony_works_with_any_ids_and_without_constrain():
    tokenizer = make(None, special=REQUIRED_TOKENS, eos="<|return|>")
    template = load_template(tokenizer)
    row = Conversation([Message("user", "<|end|>é"), Message("assistant", "", "t", (ToolCall("f", "{}"),))])
    text = tokenizer.decode(template.render(row).input_ids)
    assert text.endswith(
        "<|start|>user<|message|><|end|>é<|end|><|start|>assistant<|channel|>analysis<|message|>t<|end|>"
        "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>"
    )
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert template.render(row).input_ids.count(end) == 3


def test_missing_parts_are_named():
    with pytest.raises(OssiaError, match=r"chat_template\.jinja"):
        load_template(make(None))
    with pytest.raises(OssiaError, match=r"<\|start\|>.*--template generic"):
        load_template(make(CHATML), "harmony")
    with pytest.raises(OssiaError, match="eos_token"):
        load_template(make("{{ messages[0].content }}", eos=None))
    with pytest.raises(UsageError, match="'harmony'"):
        load_template(make(CHATML), "harmny")
    with pytest.raises(UsageError, match="'medium'"):
        load_template(make(CHATML), reasoning_effort="medum")


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("default", LossWeights()),
        ("last_round", LossWeights("last_round")),
        ("all", LossWeights("all")),
        ("ignore_empty_think", LossWeights(ignore_empty_think=True)),
        ("last_round+ignore_empty_think", LossWeights("last_round", ignore_empty_think=True)),
        ("last_round, reasoning:0.3", LossWeights("last_round", 0.3)),
        ("final_only", LossWeights(reasoning=0.0)),
    ],
)
def test_loss_scale(text, weights):
    assert parse_loss_scale(text) == weights


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("last_rond", r"did you mean 'last_round'\?.*default, last_round, all"),
        ("", "unknown word ''"),
        ("reasoning:much", r"reasoning:0\.3"),
        ("reasoning:-1", r"reasoning:0\.3"),
        ("reasoning", r"reasoning:0\.3"),
        ("default+all", "exclude"),
        ("final_only+reasoning:0.3", "exclude"),
        ("default:1", "unknown word 'default:1'"),
    ],
)
def test_wrong_loss_scale(text, says):
    with pytest.raises(UsageError, match=says):
        parse_loss_scale(text)


def test_importing_templates_does_not_import_torch():
    code = "import sys, ossia.template; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_built_in_tools_of_gpt_oss_are_no_other_models():
    template = load_template(make(CHATML))
    tools = [{"type": "python"}, {"type": "browser"}]
    with pytest.raises(OssiaError, match="python and browser are built-in tools of gpt-oss"):
        template.render(Conversation([Message("user", "q"), Message("assistant", "a")], tools))
    with pytest.raises(OssiaError, match="browser is a built-in tool of gpt-oss"):
        template.prompt([Message("user", "q")], tools=tools[1:])
