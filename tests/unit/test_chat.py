"""Conversations through chat templates: `LLM.chat` and the renderer behind it, against `transformers`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm import LLM, SamplingParams, UserError
from nanovllm.utils.chat import ChatError, ChatRenderer
from tests.models import make_model

TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick fox"}]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(chat_model_dir: Path) -> Iterator[LLM]:
    llm = LLM(str(chat_model_dir), kvcache_block_size=16, num_kvcache_blocks=64, max_model_len=200)
    yield llm
    llm.exit()


@pytest.fixture(scope="module")
def tokenizer(chat_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model_dir)


def bos_model(path: Path) -> Path:
    """A model whose tokenizer puts a BOS before every text, and whose template writes one too, as Llama 3's do."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    make_model(path, tokenizer=True)
    inner = Tokenizer.from_file(str(path / "tokenizer.json"))
    bos = inner.token_to_id("<|endoftext|>")
    inner.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)])
    inner.save(str(path / "tokenizer.json"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["bos_token"] = "<|endoftext|>"
    config["chat_template"] = "{{ bos_token }}" + config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_bos_comes_once(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bos_model(tmp_path / "model"))
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.encode("the fox")[0] == bos  # the danger is real
    ids = ChatRenderer(tokenizer, "m").token_ids(TURNS)
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_renders_what_transformers_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatRenderer(tokenizer, "m", template_variables={"enable_thinking": False})
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert "<think>" in expected
    assert chat.text(TURNS) == expected
    assert chat.token_ids(TURNS) == tokenizer.encode(expected, add_special_tokens=False)
    loud = chat.with_variables(enable_thinking=True)
    assert "<think>" not in loud.text(TURNS)
    assert chat.text(TURNS) == expected


def test_parts_and_nulls(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatRenderer(tokenizer, "m", chat_template="{{ messages | tojson }}")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat.text([{"role": "user", "content": parts, "name": None}]) == chat.text(
        [{"role": "user", "content": "one\ntwo"}]
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages are str, not a list"),
        ([], "messages are empty"),
        (["hello"], "message 1 is str"),
        ([{"content": "x"}], "message 1 has no role"),
        ([{"role": "user"}], "message 1 (role 'user') has no content"),
        ([{"role": "user", "content": None}], "message 1 (role 'user') has no content"),
        ([TURNS[0], {"role": "user", "content": 3}], "the content of message 2 is int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}], "a part of type 'image_url'"),
    ],
)
def test_no_conversations(tokenizer: PreTrainedTokenizerBase, messages: object, message: str) -> None:
    with pytest.raises(ChatError) as caught:
        ChatRenderer(tokenizer, "m").token_ids(messages)
    assert message in str(caught.value)


def test_a_template_of_ones_own(llm: LLM, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}{{ ending }}"
    (one,) = llm.chat(TURNS, GREEDY, use_tqdm=False, chat_template=plain, chat_template_kwargs={"ending": "then"})
    (same,) = llm.chat(TURNS, GREEDY, use_tqdm=False, chat_template=plain, ending="then")
    (text,) = llm.generate(["be brief\nthe quick fox\nthen"], GREEDY, use_tqdm=False)
    assert one["token_ids"] == same["token_ids"] == text["token_ids"]
    assert one["num_input_tokens"] == text["num_input_tokens"]


def test_the_last_message_goes_on(llm: LLM, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [TURNS[1], {"role": "assistant", "content": "jumps"}]
    (out,) = llm.chat(turns, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
    expected = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    assert expected.endswith("jumps")
    assert out["num_input_tokens"] == len(tokenizer.encode(expected))


def test_one_bad_conversation_harms_no_other(llm: LLM) -> None:
    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{{ m.content }}{% endfor %}"
    conversations: list[list[dict[str, Any]]] = [TURNS, [{"role": "tool", "content": "x"}], [{"role": "user"}], TURNS]
    few = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (1, 2, 3, 4)]
    outputs = llm.chat(conversations, few, use_tqdm=False, chat_template=strict)
    assert [output["num_generated_tokens"] for output in outputs] == [1, 0, 0, 4]
    assert outputs[1]["error"] is not None and "no tools here" in outputs[1]["error"]
    assert outputs[2]["error"] == "message 1 (role 'user') has no content"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": "{% for m in messages %}"}, "the chat template is not Jinja"),
        ({"continue_final_message": True}, "do not go together"),
        ({"template_variables": {"tokenize": False}}, "chat_template_kwargs has 'tokenize'"),
    ],
)
def test_refused(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatRenderer(tokenizer, "m", **options)


def test_a_model_without_a_template_takes_one(chat_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(chat_model_dir, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(model)
    with pytest.raises(UserError, match="no chat template; give one"):
        ChatRenderer(tokenizer, "m")
    assert ChatRenderer(tokenizer, "m", chat_template="{{ messages[0].content }}!").text(TURNS) == "be brief!"


def test_a_template_cannot_leave_its_sandbox(tokenizer: PreTrainedTokenizerBase) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ChatError, match="refuses"):
        ChatRenderer(tokenizer, "m", chat_template=escape).text(TURNS)
