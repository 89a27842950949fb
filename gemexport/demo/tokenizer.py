"""A small tokenizer in Gemma's style, trained on the spot: BPE over the whole text, "▁" for a space, bytes as fallback.

It has what makes Gemma's tokenizer hard to convert: runs of newlines and of spaces as tokens of their own, every pair
that makes up a token as a merge (as tokenizers that come from SentencePiece have), and tokens that no text contains.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gemexport.formats.gemma.families import FAMILIES
from gemexport.formats.gemma.families.family import Wording

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
RUNS = [("\n", 1, 8), ("▁", 2, 8)]
LONGEST_PIECE = 16
LEAST_ROOM = 200  # twice the printable ASCII characters, which are always in

# Pieces of text to count pairs in. The languages are those of which a tokenizer that is off by a byte makes a mess.
CORPUS = """\
The quick brown fox jumps over the lazy dog, and then it does the same thing again because nobody told it to stop.
A tokenizer turns a text into numbers, and the model turns numbers into other numbers; at the end there is a text again.
When the weights of a model are rounded, the question is not how small they get, but whether the answers stay the same.
She said that the train would leave at a quarter past nine, but the clock in the station had stopped the night before.
There are many ways to measure the distance between two models, and most of them will tell you something that matters.
Water boils at one hundred degrees; the higher you climb, the sooner it does. In the mountains, tea is never very hot.
What is the capital of France? The capital of France is Paris. What is the capital of Italy? It is Rome.
First you read the instructions, then you open the box, then you find out that one of the parts has been left out.
On 14 July 2025 the price was 1,299.00 dollars; a year later it was 3,141.59, and in the end 27.18 with 95% off!
Die Straße führt über den Fluss, und dahinter liegt das alte Haus, in dem niemand mehr wohnt. Schöne Grüße aus Köln!
Wer einmal lügt, dem glaubt man nicht, auch wenn er dann die Wahrheit spricht; so sagt man, und so ist es auch.
Le café est déjà fermé, mais la boulangerie d'à côté est ouverte jusqu'à huit heures. Où est-ce que vous habitez ?
L'été dernier, nous avons visité le château et mangé des crêpes près de la forêt; c'était très agréable.
El niño comió una manzana mientras su hermana leía un libro. ¿Dónde está la estación? ¡Qué buen día hace hoy!
Perché non vieni con noi al mare? La città è più bella di sera, quando la gente esce a passeggiare.
A menina não sabia que o avião já tinha partido; então ficou à espera até ao amanhecer.
Zażółć gęślą jaźń, powiedział nauczyciel, i wszyscy zaczęli się śmiać. Příliš žluťoučký kůň úpěl ďábelské ódy.
Быстрая коричневая лиса прыгает через ленивую собаку. Мы не знаем, что будет завтра, но сегодня всё хорошо.
Η γλώσσα είναι ένα παιχνίδι, και οι κανόνες του αλλάζουν κάθε μέρα. Το νερό είναι καλό.
يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. أين تقع المكتبة من هنا؟
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। यह क्या है?
今天天气很好,我们去公园散步。中国的首都是北京。你好,世界!人人生而自由,在尊严和权利上一律平等。
今日はとても天気がいいです。日本の首都は東京です。すべての人間は生まれながらにして自由です。ありがとう。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 안녕하세요, 오늘은 날씨가 좋습니다.
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน Mọi người sinh ra đều được tự do và bình đẳng.
🙂 😊 🎉 🚀 👍 ❤ — “quoted” ‘text’ … 1/2 = 50 % → a ≤ b ≠ c × d ± 2 °C © 2026 €10 £20
def fibonacci(n: int) -> list[int]:
    values = [0, 1]
    for i in range(2, n):
        values.append(values[i - 1] + values[i - 2])
    return values[:n]

if __name__ == "__main__":
    print(fibonacci(10))
for (int i = 0; i < n; i++) { total += values[i] * weights[i]; }
SELECT name, price FROM items WHERE price > 100 ORDER BY name;
{"name": "gemma", "layers": 35, "hidden_size": 1536, "tie_word_embeddings": true}
<div class="note"><p>Hello, <b>world</b>!</p></div>
https://example.com/path?query=value&other=1#fragment
"""


def _runs() -> list[str]:
    return [character * count for character, first, last in RUNS for count in range(first, last + 1)]


def _learn(size: int, text: str) -> tuple[list[str], list[str]]:
    """Merged pieces in the order they were learned, and single characters, about `size` together."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    # The trainer breaks ties between rare characters by chance, so the alphabet is chosen here.
    count = Counter(text.replace(" ", "▁"))
    alphabet = {chr(code) for code in range(33, 127)}
    alphabet |= set(sorted(count, key=lambda character: (-count[character], character))[: size // 2 - len(alphabet)])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Pieces are learned within words, as SentencePiece does; only runs cross that border, and those come by hand.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁{2,}|\n+|▁?[^▁\n]+|▁"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        limit_alphabet=len(alphabet),
        initial_alphabet=sorted(alphabet),
        min_frequency=1,
        max_token_length=LONGEST_PIECE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    vocab: dict[str, int] = json.loads(tokenizer.to_str())["model"]["vocab"]
    pieces = [piece for piece in sorted(vocab, key=vocab.__getitem__) if piece not in _runs()]
    return [piece for piece in pieces if len(piece) > 1], [piece for piece in pieces if len(piece) == 1]


def vocabulary(size: int, wording: Wording, text: str = CORPUS) -> list[str]:
    """`size` tokens, pieces learned on `text`; a token's id is its place.

    Raises ValueError when `size` has no room for the fixed ones.
    """
    fixed = [*SPECIAL, *wording.turn, *wording.markup]
    fixed += [*_runs(), *(f"<0x{byte:02X}>" for byte in range(256))]
    room = size - len(fixed)
    if room < LEAST_ROOM:
        raise ValueError(f"a vocabulary of {size} tokens has no room for text; use at least {len(fixed) + LEAST_ROOM}")
    merged, characters = _learn(room, text)
    tokens = [*fixed, *merged, *characters][:size]
    return [*tokens, *(f"<unused{i}>" for i in range(size - len(tokens)))]


def silent_ids(tokens: Iterable[str]) -> list[int]:
    """Ids of the tokens that a sensible model hardly ever says: special ones, single bytes and unused ones."""
    quiet = {*SPECIAL, *(token for family in FAMILIES for token in (*family.wording.turn, *family.wording.markup))}
    return [
        i
        for i, token in enumerate(tokens)
        if token in quiet or token.startswith(("<0x", "<unused")) or not token.strip("\n▁")
    ]


def _merges(tokens: list[str]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that makes up a token, in the order of what it makes, the longest left half first."""
    known = {token for token in tokens if not token.startswith("<0x")}
    for token in tokens:
        if token in SPECIAL or token.startswith(("<|", "<0x", "<unused")) or token.endswith("|>"):
            continue
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in known and token[cut:] in known:
                yield token[:cut], token[cut:]


def _added(tokens: list[str], wording: Wording) -> list[dict[str, Any]]:
    special = {*SPECIAL[:4], *wording.turn}
    plain = {SPECIAL[4], *wording.markup}
    if wording.adds_runs:
        # "▁▁" as an added token never matches: text has spaces there.
        plain |= set(_runs())
    return [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": token in special,
        }
        for i, token in enumerate(tokens)
        if token in special or token in plain or token.startswith("<unused")
    ]  # fmt: skip


def tokenizer_json(size: int, wording: Wording, text: str = CORPUS) -> dict[str, Any]:
    """A whole tokenizer.json, laid out as Gemma's."""
    tokens = vocabulary(size, wording, text)
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, wording),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [tokens.index("<bos>")], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in _merges(tokens)],
        },
    }  # fmt: skip


def chat_template(wording: Wording) -> str:
    """A Jinja template that lays out turns as the family's models were trained on."""
    start, end = wording.turn
    return (
        "{{ bos_token }}"
        "{%- for message in messages -%}"
        "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        f"{{{{ '{start}' + role + '\\n' + message['content'] | trim + '{end}\\n' }}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ '{start}model\\n' }}}}{{%- endif -%}}"
    )


def write(folder: Path, size: int, wording: Wording, text: str = CORPUS) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json, pieces learned on `text`; returns the vocabulary."""
    tokenizer = tokenizer_json(size, wording, text)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "chat_template": chat_template(wording),
        "clean_up_tokenization_spaces": False,
        "eos_token": wording.eos,
        "mask_token": "<mask>",
        "model_max_length": 4096,
        "pad_token": "<pad>",
        "padding_side": "left",
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
    return list(tokenizer["model"]["vocab"])
