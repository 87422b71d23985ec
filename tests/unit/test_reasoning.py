"""Thinking blocks: where they end, what follows them, and how the text is split. Tags of one token and of several."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.engine.grammar import GrammarCompiler, GrammarState
from nanovllm.engine.reasoning import PromptState, ReasoningGate, ThinkTags, split_reasoning, split_token_ids
from nanovllm.errors import UserError
from nanovllm.structured_outputs import StructuredOutputsParams
from tests.models import write_tokenizer

EOS = (2, 0)
VOCAB = 330
Gate = Callable[..., ReasoningGate]


@pytest.fixture(scope="module", params=["one token a tag", "special tokens", "several tokens a tag"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if request.param != "several tokens a tag":
        special = request.param == "special tokens"
        tokenizer.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in ("<think>", "</think>")])
    return tokenizer


@pytest.fixture(scope="module")
def tags(tokenizer: PreTrainedTokenizerBase) -> ThinkTags:
    return ThinkTags.of(tokenizer)


@pytest.fixture(scope="module")
def answer(tokenizer: PreTrainedTokenizerBase) -> Callable[[], GrammarState]:
    return GrammarCompiler(tokenizer, VOCAB, EOS).compile(StructuredOutputsParams(choice=["yes", "no"])).start


@pytest.fixture
def gate(tokenizer: PreTrainedTokenizerBase, tags: ThinkTags) -> Gate:
    def make(prompt: str, inner: GrammarState | None, budget: int | None = None) -> ReasoningGate:
        return ReasoningGate(tags, tokenizer.encode(prompt), inner, budget, VOCAB, EOS)

    return make


def allowed(state: ReasoningGate) -> list[int]:
    mask = np.full((VOCAB + 31) // 32, 0x5A5A5A5A, np.int32)
    state.fill_mask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def take(state: ReasoningGate, token_ids: list[int]) -> None:
    """Accept tokens that the masks allow."""
    for token_id in token_ids:
        assert token_id in allowed(state)
        assert state.accept(token_id)


def follow(state: ReasoningGate) -> list[int]:
    """Take what is forced; the tokens."""
    taken = []
    while forced := state.forced_tokens():
        for token_id in forced:
            assert allowed(state) == [token_id]
            assert state.accept(token_id)
        taken += forced
    return taken


TURN = "<|im_start|>user\nis it so?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        (TURN, "absent"),
        (TURN + "<think>\n", "open"),
        (TURN + "<think>", "open"),
        (TURN + "<think>\nLet me see", "open"),
        (TURN + "<think>\n\n</think>\n\n", "closed"),
        (TURN + "<think>I thought.</think>", "closed"),
        (TURN + '<think></think>\n\n{"a', "closed"),  # the answer has been begun, too
        (TURN + "</think>\n\n", "closed"),
        (TURN + "<think>a</think>b<think>", "open"),
        # What stands in other turns does not count, whoever wrote it.
        ("<|im_start|>user\nwhat does <think> mean?<|im_end|>\n<|im_start|>assistant\n", "absent"),
        ("<|im_start|>user\n</think>\n\n<|im_end|>\n<|im_start|>assistant\n<think>\n", "open"),
        ("<|im_start|>assistant\n<think>x</think>y<|im_end|>\n" + TURN, "absent"),
        ("<|im_start|>assistant\n<think>x<|im_end|>\n" + TURN + "<think>\n\n</think>\n\n", "closed"),
        ("plain text", "absent"),
        ("plain text <think>", "open"),
        ("", "absent"),
    ],
)
def test_what_the_prompt_says(tokenizer: PreTrainedTokenizerBase, tags: ThinkTags, prompt: str, state: str) -> None:
    assert tags.prompt_state(tokenizer.encode(prompt)) == state


def test_tags_of_a_tokenizer(tokenizer: PreTrainedTokenizerBase, tags: ThinkTags) -> None:
    assert tokenizer.decode(tags.start_ids) == "<think>" and tokenizer.decode(tags.end_ids) == "</think>"
    assert tokenizer.decode(tags.separator_ids) == "\n\n"
    assert tags.special_ids == {0, 1, 2}
    other = ThinkTags.of(tokenizer, "[THINK]", "[/THINK]")
    assert tokenizer.decode(other.end_ids) == "[/THINK]"
    with pytest.raises(UserError, match="a think tag is empty"):
        ThinkTags.of(tokenizer, "<think>", "")


@pytest.mark.parametrize("prompt", [TURN, TURN + "<think>\n"])
def test_the_grammar_starts_after_the_thinking(
    tokenizer: PreTrainedTokenizerBase, tags: ThinkTags, answer: Any, gate: Gate, prompt: str
) -> None:
    state = gate(prompt, answer())
    rng = random.Random(0)
    for _ in range(50):
        free = allowed(state)
        assert free == [i for i in range(len(tokenizer)) if i not in EOS], "anything but the end of the sequence"
        assert state.needs_mask and state.thinking
        assert not (state.is_complete or state.is_stopped or state.is_finished or state.forced_tokens())
        assert not state.accept(rng.choice(EOS))
        take(state, [rng.choice([i for i in free if i not in (*tags.end_ids, *tags.start_ids)])])
    assert state.num_thinking_tokens == 50
    take(state, list(tags.end_ids))
    assert not state.thinking and not state.is_complete
    assert tuple(follow(state)) == tags.separator_ids, "and the empty line that models write there"
    expected = answer()
    mask = np.zeros((VOCAB + 31) // 32, np.int32)
    expected.fill_mask(mask)
    assert allowed(state) == np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    take(state, tokenizer.encode("n"))
    assert tokenizer.decode(follow(state)) == "o"
    assert state.is_complete and state.is_stopped and set(allowed(state)) == set(EOS)
    take(state, [EOS[1]])
    assert state.is_finished


def test_a_closed_block_starts_the_grammar_at_once(tokenizer: PreTrainedTokenizerBase, answer: Any, gate: Gate) -> None:
    state = gate(TURN + "<think>\n\n</think>\n\n", answer(), 0)
    assert not state.thinking and state.mask_state is state.inner
    take(state, tokenizer.encode("y"))
    assert tokenizer.decode(follow(state)) == "es" and state.is_complete
    free = gate(TURN + "<think>\n\n</think>\n\n", None, 0)
    assert not free.needs_mask and not free.forced_tokens() and free.is_complete


@pytest.mark.parametrize("budget", [1, 7])
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("prompt", [TURN, TURN + "<think>\n"])
def test_the_budget_of_thinking_tokens(
    tokenizer: PreTrainedTokenizerBase,
    tags: ThinkTags,
    answer: Any,
    gate: Gate,
    budget: int,
    constrained: bool,
    prompt: str,
) -> None:
    state = gate(prompt, answer() if constrained else None, budget)
    for _ in range(budget):
        assert state.thinking and not state.forced_tokens() and state.needs_mask == constrained
        take(state, tokenizer.encode("b"))
    assert state.needs_mask and state.forced_tokens() == list(tags.end_ids)
    assert not state.accept(tokenizer.encode("b")[0]), "now only the end tag may come"
    assert state.forced_tokens() == list(tags.end_ids)
    after = tags.separator_ids if constrained else ()
    assert tuple(follow(state)) == tags.end_ids + after
    assert not state.thinking and state.num_thinking_tokens == budget
    assert state.needs_mask == constrained
    if not constrained:
        assert allowed(state) == list(range(VOCAB)) and state.is_complete
        take(state, [5, 6, EOS[0]])
        assert state.is_finished


def test_no_thinking_at_all(tokenizer: PreTrainedTokenizerBase, answer: Any, gate: Gate) -> None:
    """The empty block as templates write it."""
    assert tokenizer.decode(follow(gate(TURN, answer(), 0))) == "<think>\n\n</think>\n\n"
    assert tokenizer.decode(follow(gate(TURN + "<think>\n", answer(), 0))) == "</think>\n\n"


def test_a_budget_that_is_not_reached_changes_nothing(
    tokenizer: PreTrainedTokenizerBase, tags: ThinkTags, gate: Gate
) -> None:
    state = gate(TURN, None, 20)
    take(state, tokenizer.encode("<think>hm</think>"))
    assert not state.thinking and not state.forced_tokens() and not state.needs_mask
    take(state, tokenizer.encode("b" * 40 + "</think>"))
    assert not state.forced_tokens()


def test_the_end_of_a_sequence_in_its_thinking(tokenizer: PreTrainedTokenizerBase, gate: Gate) -> None:
    state = gate(TURN, None, 100)
    take(state, [*tokenizer.encode("hm"), EOS[1]])
    assert state.is_finished and not state.is_complete


def test_a_part_of_the_end_tag_is_not_the_end(tokenizer: PreTrainedTokenizerBase, tags: ThinkTags, gate: Gate) -> None:
    if len(tags.end_ids) == 1:
        pytest.skip("the tag is one token")
    state = gate(TURN, None)
    take(state, list(tags.end_ids[:-1]))
    take(state, [*tokenizer.encode("x"), tags.end_ids[-1]])
    assert state.thinking
    take(state, [*tags.end_ids[:2], *tags.end_ids])
    assert not state.thinking


SPLITS: list[tuple[str, PromptState, str, str]] = [
    ("<think>\nI see.\n</think>\n\nyes", "absent", "I see.", "yes"),
    ("\n<think>I see.</think>yes ", "absent", "I see.", "yes "),
    ("I see.\n</think>\n\nyes", "open", "I see.", "yes"),
    ("I see.\n</think>\n\nyes", "absent", "I see.", "yes"),  # its template has put the start tag elsewhere
    ("<think>I see. But", "absent", "I see. But", ""),
    ("I see. But", "open", "I see. But", ""),
    ("I see. But", "absent", "", "I see. But"),  # a model that does not think has answered
    ("I see. But", "closed", "", "I see. But"),
    ("\n\nyes</think>", "closed", "", "yes</think>"),
    ("<think>a</think>b<think>c</think>d", "absent", "a", "b<think>c</think>d"),
    ("a <think> b</think>c", "open", "a <think> b", "c"),
    ("<think></think>", "absent", "", ""),
    ("<think>\n\n</think>\n\n", "absent", "", ""),
    ("", "open", "", ""),
    ("", "absent", "", ""),
]


@pytest.mark.parametrize(("text", "prompt_state", "reasoning", "answer_text"), SPLITS)
def test_split(
    tokenizer: PreTrainedTokenizerBase,
    tags: ThinkTags,
    text: str,
    prompt_state: PromptState,
    reasoning: str,
    answer_text: str,
) -> None:
    assert split_reasoning(text, tags, prompt_state) == (reasoning, answer_text)
    if text.startswith("\n<"):
        return  # token ids keep whitespace, which would stand before the tag
    parts = split_token_ids(tokenizer.encode(text), tags, prompt_state)
    first, second = (tokenizer.decode(part) for part in parts)
    assert (first.strip(), second.lstrip()) == (reasoning, answer_text)


def test_the_gate_and_the_split_agree(
    tokenizer: PreTrainedTokenizerBase, tags: ThinkTags, answer: Any, gate: Gate
) -> None:
    """What is generated under a gate is split into its block and an answer that satisfies the grammar."""
    for seed in range(60):
        rng = random.Random(seed)
        prompt = TURN + rng.choice(["", "<think>\n", "<think>\n\n</think>\n\n"])
        budget = rng.choice([0, 1, 5, 30])
        state, ids = gate(prompt, answer(), budget), []
        while not state.is_finished:
            ids.append(rng.choice(allowed(state)))
            assert state.accept(ids[-1])
        assert ids[-1] in EOS and state.num_thinking_tokens <= budget
        reasoning, answered = split_token_ids(ids[:-1], tags, state.prompt_state)
        assert tokenizer.decode(answered).strip() in ("yes", "no")
        assert len(reasoning) <= budget + len(tags.separator_ids)
