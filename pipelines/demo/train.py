"""Makes the bundled demo: a tiny Qwen3 model that rewrites dates as ISO 8601, and the prompts to label with it.

Run by hand (`python pipelines/demo/train.py`); nothing imports it. Data, tokenizer and weights all come from a seed,
so the demo needs no download. `--check` scores the saved model on the saved prompts without training.
"""

from __future__ import annotations

import argparse
import calendar
import datetime
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent

# One fixed instruction, so that every prompt opens with the same tokens and a prefix cache has something to share.
INSTRUCTION = "Write the date as ISO 8601 (YYYY-MM-DD).\nDate:"
SUFFIX = "\nISO:"
INVALID = "invalid"

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen2's split: every digit is a token of its own, and a word takes its leading space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FIRST_YEAR, LAST_YEAR = 1900, 2099
HELD_OUT_PERCENT = 6
CHAT_SHARE = 0.4
N_PROMPTS = 3000

# --------------------------------------------------------------------------------------------------------------------
# Dates as text
# --------------------------------------------------------------------------------------------------------------------

MONTHS = list(calendar.month_name)[1:]
WEEKDAYS = list(calendar.day_name)
ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINALS = [
    "zeroth",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
    "twenty-first",
    "twenty-second",
    "twenty-third",
    "twenty-fourth",
    "twenty-fifth",
    "twenty-sixth",
    "twenty-seventh",
    "twenty-eighth",
    "twenty-ninth",
    "thirtieth",
    "thirty-first",
]
CARRIERS = [
    "the meeting took place on {}, after a long delay",
    "the letter was signed on {}, in the presence of two witnesses",
    "our records show that she was born on {} in a small village by the sea",
    "the invoice was issued on {} and paid in full the same week",
    "the train left the old station on {}, early in the morning, with nobody on board",
    "according to the newspaper, the bridge was opened to traffic on {} by the mayor",
]


@dataclass(frozen=True)
class Day:
    """A day as written, which need not exist (30 February)."""

    year: int
    month: int
    day: int

    @property
    def valid(self) -> bool:
        """Whether the calendar has this day."""
        return self.day <= calendar.monthrange(self.year, self.month)[1]

    @property
    def answer(self) -> str:
        """What the model should say."""
        return f"{self.year:04d}-{self.month:02d}-{self.day:02d}" if self.valid else INVALID

    def weekday(self, rng: random.Random) -> str:
        """The day of the week; any will do for a day that does not exist."""
        if not self.valid:
            return rng.choice(WEEKDAYS)
        return WEEKDAYS[datetime.date(self.year, self.month, self.day).weekday()]


@dataclass(frozen=True)
class Example:
    """One date text with its answer; `key` is what the held-out split hashes."""

    prompt: str
    answer: str
    style: str
    key: str


def ordinal(n: int) -> str:
    """`3` -> `3rd`."""
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def below_hundred(n: int) -> str:
    """`94` -> `ninety-four`."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def year_words(year: int, rng: random.Random) -> str:
    """A year as it is said: `nineteen ninety-four`, `two thousand and eight`, `twenty twenty-one`."""
    century, rest = divmod(year, 100)
    if century == 20 and (rest < 10 or rng.random() < 0.3):
        joint = rng.choice([" and ", " "])
        return "two thousand" + (joint + below_hundred(rest) if rest else "")
    if rest == 0:
        return f"{below_hundred(century)} hundred"
    return f"{below_hundred(century)} {'oh ' if rest < 10 else ''}{below_hundred(rest)}"


def short_month(month: int, rng: random.Random) -> str:
    """`Mar`, sometimes `Mar.`; September is also `Sept`."""
    name = MONTHS[month - 1]
    short = "Sept" if month == 9 and rng.random() < 0.4 else name[:3]
    return short + ("." if month != 5 and rng.random() < 0.2 else "")


def any_month(month: int, rng: random.Random) -> str:
    """The month in full or short."""
    return MONTHS[month - 1] if rng.random() < 0.6 else short_month(month, rng)


def style_month_first(d: Day, rng: random.Random) -> str:
    """`March 5th, 2021`."""
    day = ordinal(d.day) if rng.random() < 0.6 else str(d.day)
    return f"{any_month(d.month, rng)} {day}{rng.choice([', ', ', ', ' '])}{d.year}"


def style_day_first(d: Day, rng: random.Random) -> str:
    """`5 Mar 2021`, `05-MAR-2021`."""
    if rng.random() < 0.3:
        return f"{d.day:02d}-{MONTHS[d.month - 1][:3]}-{d.year}"
    return f"{rng.choice([str(d.day), ordinal(d.day)])} {any_month(d.month, rng)} {d.year}"


def style_of(d: Day, rng: random.Random) -> str:
    """`the 3rd of May 1998`, `the third of May, 1998`."""
    day = rng.choice([ordinal(d.day), ORDINALS[d.day]])
    return f"the {day} of {any_month(d.month, rng)}{rng.choice([', ', ' '])}{d.year}"


def style_weekday(d: Day, rng: random.Random) -> str:
    """`Tuesday, 12 August 2008`, `Tue, August 12th, 2008`."""
    name = d.weekday(rng)
    name = name if rng.random() < 0.6 else name[:3]
    return f"{name}, {rng.choice([style_month_first, style_day_first])(d, rng)}"


def style_year_first(d: Day, rng: random.Random) -> str:
    """`2021/3/5`, `2021.03.05`, `20210305`: year first is month next."""
    if rng.random() < 0.2:
        return f"{d.year}{d.month:02d}{d.day:02d}"
    sep = rng.choice("/.-")
    wide = rng.random() < 0.5 and sep != "-"
    return f"{d.year}{sep}{d.month:02d}{sep}{d.day:02d}" if wide else f"{d.year}{sep}{d.month}{sep}{d.day}"


def style_numeric(d: Day, rng: random.Random) -> str:
    """`05.03.2021 (day first)`: these say which comes first, as nothing else would."""
    sep = rng.choice("/.-")
    wide = "02d" if rng.random() < 0.5 else "d"
    if rng.random() < 0.5:
        return f"{d.day:{wide}}{sep}{d.month:{wide}}{sep}{d.year} (day first)"
    return f"{d.month:{wide}}{sep}{d.day:{wide}}{sep}{d.year} (month first)"


def style_words(d: Day, rng: random.Random) -> str:
    """`the twelfth of June, nineteen ninety-four`: no digit at all."""
    month, day, year = MONTHS[d.month - 1], ORDINALS[d.day], year_words(d.year, rng)
    if rng.random() < 0.6:
        return f"the {day} of {month}, {year}"
    return f"{month} the {day}, {year}"


STYLES: dict[str, tuple[float, Callable[[Day, random.Random], str]]] = {
    "month_first": (1.5, style_month_first),
    "day_first": (1.5, style_day_first),
    "of": (1.5, style_of),
    "weekday": (1.5, style_weekday),
    "year_first": (1.0, style_year_first),
    "numeric": (1.5, style_numeric),
    "words": (2.5, style_words),
}


def random_day(rng: random.Random) -> Day:
    """Any day of the range; one in ten is at the edge of what exists, where the answer may be `invalid`."""
    year = rng.randint(FIRST_YEAR, LAST_YEAR)
    if rng.random() < 0.1:
        # Only days that fail whatever the year: the leap rule is not what this demo is about.
        month, day = rng.choice([(2, 28), (2, 30), (2, 31), (4, 31), (6, 31), (9, 31), (11, 31), (1, 31), (4, 30)])
        return Day(year, month, day)
    month = rng.randint(1, 12)
    return Day(year, month, rng.randint(1, calendar.monthrange(year, month)[1]))


def make_example(rng: random.Random) -> Example:
    """One random day in a random style, case and surrounding."""
    day = random_day(rng)
    (style,) = rng.choices(list(STYLES), [weight for weight, _ in STYLES.values()])
    text = STYLES[style][1](day, rng)
    # The split looks at the date alone, so a held-out date text is new in every case and every sentence.
    key = text.casefold()
    roll = rng.random()
    if roll < 0.1:
        text = text.upper()
    elif roll < 0.25:
        text = text.lower()
    roll = rng.random()
    if style != "numeric" and roll < 0.1:
        text = rng.choice(CARRIERS).format(text)
        style += "_in_sentence"
    elif style not in ("numeric", "year_first") and roll > 0.85:
        text = f"on {text}"
    return Example(f"{INSTRUCTION} {text}{SUFFIX}", day.answer, style, key)


def held_out(key: str) -> bool:
    """Whether this date text belongs to the prompts rather than to training; a hash, so it holds for any seed."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def examples(rng: random.Random, *, test: bool) -> Iterator[Example]:
    """An endless run of examples from one side of the split."""
    while True:
        example = make_example(rng)
        if held_out(example.key) is test:
            yield example


def test_examples(seed: int) -> list[Example]:
    """The distinct held-out prompts of the demo."""
    found: dict[str, Example] = {}
    for example in examples(random.Random(f"test-{seed}"), test=True):
        found.setdefault(example.prompt, example)
        if len(found) == N_PROMPTS:
            break
    return list(found.values())


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------------------------


def train_tokenizer(train: list[Example], vocab_size: int) -> Tokenizer:
    """A byte-level BPE over the date texts only.

    The instruction is left out on purpose: repeated in every row, it would be merged into a handful of tokens, and
    the shared prefix would be too short to fill a KV block.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [e.prompt[len(INSTRUCTION) : -len(SUFFIX)] for e in train]
    # The role names and the one answer that is a word should not be spelt out letter by letter.
    texts += [INVALID, "user", "assistant", "ISO"] * 200
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def shared_length(rows: list[list[int]]) -> int:
    """How many leading tokens all rows have in common."""
    return next(i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)


def chat_text(prompt: str) -> str:
    """What the chat template renders for one user message with the generation prompt."""
    return f"{IM_START}user\n{prompt}{IM_END}\n{IM_START}assistant\n"


def save_tokenizer(tokenizer: Tokenizer, out: Path, max_length: int) -> None:
    """Writes tokenizer.json and a tokenizer_config.json that transformers 4.x and 5.x both read.

    Written by hand because `save_pretrained` of 5.x names a class that 4.x does not have.
    """
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [IM_START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def make_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3 in miniature; heads x head_dim and hidden differ, as they do in the real small ones."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            # Small models learn this much sooner from larger weights than the usual 0.02.
            initializer_range=0.08,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(IM_END),
            pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        )
    )


@dataclass
class Batch:
    """Right-padded rows without the prefix they share; labels are -100 except on the answer."""

    prefix: list[int]
    ids: torch.Tensor
    labels: torch.Tensor


def encode(tokenizer: Tokenizer, train: list[Example], chat: bool) -> tuple[list[int], list[tuple[list[int], int]]]:
    """The shared prefix, and per example the ids after it (prompt, answer, end of turn) with the prompt's length."""
    end: int = tokenizer.token_to_id(IM_END)  # type: ignore[assignment]
    prompts = [chat_text(e.prompt) if chat else e.prompt for e in train]
    # Encoded apart, as in generation: the answer must not change how the prompt's end is split.
    heads = [e.ids for e in tokenizer.encode_batch(prompts, add_special_tokens=False)]
    tails = [e.ids for e in tokenizer.encode_batch([e.answer for e in train], add_special_tokens=False)]
    shared = shared_length(heads)
    rows = [(head[shared:] + tail + [end], len(head) - shared) for head, tail in zip(heads, tails, strict=True)]
    return heads[0][:shared], rows


def batches(tokenizer: Tokenizer, train: list[Example], batch_size: int, rng: random.Random) -> list[Batch]:
    """Batches of one form (raw or chat) and near-equal length, in random order."""
    n_chat = round(len(train) / batch_size * CHAT_SHARE) * batch_size
    pad = tokenizer.token_to_id(END_OF_TEXT)
    found: list[Batch] = []
    for chat, part in ((True, train[:n_chat]), (False, train[n_chat:])):
        prefix, rows = encode(tokenizer, part, chat)
        rows.sort(key=lambda row: len(row[0]))
        for start in range(0, len(rows), batch_size):
            group = rows[start : start + batch_size]
            width = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), width), pad)
            labels = torch.full((len(group), width), -100)
            for i, (row, prompt_length) in enumerate(group):
                ids[i, : len(row)] = torch.tensor(row)
                # labels[t] is the token that follows ids[t].
                labels[i, prompt_length - 1 : len(row) - 1] = torch.tensor(row[prompt_length:])
            found.append(Batch(prefix, ids, labels))
    rng.shuffle(found)
    return found


def batch_loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Cross-entropy on the answers.

    The prefix is more than half of a prompt and the same in all rows, so it goes through the model once and its keys
    and values are repeated; gradients flow back through the repeat.
    """
    cache = DynamicCache()
    ids, labels = batch.ids.to(model.device), batch.labels.to(model.device)
    prefix = torch.tensor([batch.prefix], device=model.device)
    model.model(input_ids=prefix, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(ids))
    # Padding stands on the right, where the causal mask hides it. The vocabulary is projected only where there is a
    # loss.
    hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    wanted = labels != -100
    return F.cross_entropy(model.lm_head(hidden[wanted]), labels[wanted])


def fit(model: Qwen3ForCausalLM, data: list[Batch], lr: float) -> None:
    """Trains in place, one step per batch: AdamW, linear warm-up, cosine to zero."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    keep = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    steps = len(data)
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    started = time.perf_counter()
    total = 0.0
    for step, batch in enumerate(data, start=1):
        loss = batch_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step:5d}/{steps}  loss {total / 50:.5f}  {time.perf_counter() - started:.0f} s", flush=True)
            total = 0.0


def save_model(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes a plain Hugging Face model directory, weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # 4.x reads torch_dtype and rope_theta, 5.x writes dtype and rope_parameters; carry both spellings.
    config.pop("dtype", None)
    config["torch_dtype"] = "bfloat16"
    config["rope_theta"] = 10000.0
    config.pop("rope_parameters", None)
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
    end, pad = tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, out, model.config.max_position_embeddings)


# --------------------------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answer_all(model: Any, tokenizer: Any, prompts: list[str], batch_size: int = 250) -> tuple[list[str], list[float]]:
    """Greedy answers, and for each the smallest gap between the best and the second logit over its tokens."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts, margins = [""] * len(prompts), [0.0] * len(prompts)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        inputs = tokenizer(
            [prompts[i] for i in index],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        result = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=16,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = result.sequences[:, inputs["input_ids"].shape[1] :]
        top = torch.stack(result.logits, dim=1).float().topk(2, dim=-1).values
        # A finished row is padded while others go on; those steps say nothing about it.
        is_end = torch.isin(new, torch.tensor(model.generation_config.eos_token_id)).int()
        after = is_end.cumsum(1) > is_end
        gaps = (top[..., 0] - top[..., 1]).masked_fill(after, math.inf).amin(1)
        for i, text, gap in zip(index, tokenizer.batch_decode(new, skip_special_tokens=True), gaps, strict=True):
            texts[i], margins[i] = text.strip(), float(gap)
    return texts, margins


def check(model_dir: Path, parquet: Path) -> float:
    """Scores the saved model on the saved prompts in every form and precision; returns the lowest accuracy."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    table = pq.read_table(parquet).to_pydict()
    prompts, answers = table["prompt"], table["answer"]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    lengths = [len(row) for row in ids]
    print(
        f"{len(prompts)} prompts, {min(lengths)} / {sum(lengths) / len(lengths):.1f} / {max(lengths)} tokens "
        f"(min / mean / max), {shared_length(ids)} shared by all; {answers.count(INVALID)} answers are '{INVALID}'"
    )
    lowest = 1.0
    for dtype in (torch.float32, torch.bfloat16):
        # torch_dtype= and dtype= are the same thing in 4.x and 5.x; .to() does without either.
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir).to(dtype).eval()
        for form, texts in (("raw", prompts), ("chat", chats)):
            got, margins = answer_all(model, tokenizer, texts)
            wrong = [i for i, (g, a) in enumerate(zip(got, answers, strict=True)) if g != a]
            accuracy = 1 - len(wrong) / len(answers)
            lowest = min(lowest, accuracy)
            ranked = sorted(margins)
            print(
                f"{dtype!s:15s} {form:5s} accuracy {accuracy:.4%} ({len(wrong)} wrong)  logit margin "
                f"min {ranked[0]:.2f}, 1st percentile {ranked[len(ranked) // 100]:.2f}, "
                f"median {ranked[len(ranked) // 2]:.2f}"
            )
            for i in wrong[:5]:
                print(f"    id {table['id'][i]}: {prompts[i]!r} -> {got[i]!r}, not {answers[i]!r}")
    return lowest


# --------------------------------------------------------------------------------------------------------------------
# The prompts in the forms of other jobs
# --------------------------------------------------------------------------------------------------------------------


def save_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def conversations(test: list[Example]) -> list[dict[str, Any]]:
    """Every tenth prompt as a conversation: the date alone, for a job that brings instruction and template."""
    return [
        {"id": i, "messages": [{"role": "user", "content": date_text(test[i].prompt)}], "answer": test[i].answer}
        for i in range(0, len(test), 10)
    ]


def date_text(prompt: str) -> str:
    """The date of a prompt as it is written there."""
    return prompt.removeprefix(INSTRUCTION).removesuffix(SUFFIX).strip()


def batch_requests(test: list[Example]) -> list[dict[str, Any]]:
    """Every twentieth prompt as a request to OpenAI's batch API: chats, and a completion every fourth time."""
    rows = []
    for number, i in enumerate(range(0, len(test), 20)):
        body: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 16}
        if number % 4 == 3:
            url, body["prompt"] = "/v1/completions", test[i].prompt
        else:
            url, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": test[i].prompt}]
        rows.append({"custom_id": f"date-{i}", "method": "POST", "url": url, "body": body})
    return rows


# --------------------------------------------------------------------------------------------------------------------


def build(out: Path, steps: int, batch_size: int, lr: float, seed: int, vocab_size: int, device: str) -> None:
    """Generates the data, trains, and writes `out/model/` and the prompts in all their forms."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    test = test_examples(seed)
    source = examples(random.Random(f"train-{seed}"), test=False)
    train = [next(source) for _ in range(steps * batch_size)]
    assert {e.key for e in test}.isdisjoint(e.key for e in train), "a held-out date text is in the training set"
    assert {e.prompt for e in test}.isdisjoint(e.prompt for e in train), "a held-out prompt is in the training set"
    print(f"{len(train)} training examples, {len(test)} held out, {time.perf_counter() - started:.0f} s")

    tokenizer = train_tokenizer(train[:20000], vocab_size)
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, vocabulary {tokenizer.get_vocab_size()}")
    fit(model.to(device), batches(tokenizer, train, batch_size, random.Random(f"fit-{seed}")), lr)

    out.mkdir(parents=True, exist_ok=True)
    save_model(model.cpu(), tokenizer, out / "model")
    columns = {
        "id": pa.array(range(len(test)), pa.int64()),
        "prompt": pa.array([e.prompt for e in test], pa.string()),
        "answer": pa.array([e.answer for e in test], pa.string()),
        "style": pa.array([e.style for e in test], pa.string()),
    }
    pq.write_table(pa.table(columns), out / "prompts.parquet")
    save_lines(out / "conversations.jsonl", conversations(test))
    save_lines(out / "requests.jsonl", batch_requests(test))
    print(f"made in {time.perf_counter() - started:.0f} s")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="where model/ and prompts.parquet go (default: here)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where to train; the saved model was trained on cuda")
    parser.add_argument("--check", action="store_true", help="only score what is in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    if not args.check:
        build(args.out, args.steps, args.batch_size, args.lr, args.seed, args.vocab_size, args.device)
    lowest = check(args.out / "model", args.out / "prompts.parquet")
    if lowest < 0.995:
        raise SystemExit(f"accuracy {lowest:.4%} is below 99.5 %")


if __name__ == "__main__":
    main()
