"""From a prompt and its parameters to sequences: tokenizing, checks, and what each asks of the sampler. On any thread."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import threading
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Sized
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from nanovllm.config import EngineConfig
from nanovllm.engine.grammar import GrammarCompiler
from nanovllm.engine.labels import Path, label_paths, label_scores, normalized
from nanovllm.engine.reasoning import Constraint, ReasoningGate, ThinkTags
from nanovllm.engine.request_group import RequestGroup
from nanovllm.engine.row_sampling import RowSampling, has_wishes
from nanovllm.engine.sequence import TOKEN, Sequence
from nanovllm.errors import UserError
from nanovllm.models.config import ModelConfig
from nanovllm.outputs import RequestOutput, error_output
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sized[int]

# Threads that fill masks: half of the host's, as others tokenize, and no more than pay for 256 rows.
MOST_MASK_THREADS = 16


class RequestMaker:
    """Makes the sequences of one engine.

    Args:
        tokenizer: None where the model has none; prompts are then token ids.
        max_model_len: longest sequence; num_kvcache_blocks: of the pool.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        max_model_len: int,
        num_kvcache_blocks: int,
    ) -> None:
        self._config = config
        self._vocab_size = model_config.vocab_size
        self._eos_token_ids = tuple(model_config.eos_token_ids)
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._pool_tokens = num_kvcache_blocks * config.kvcache_block_size
        self._adapters = sorted(config.lora_adapters)
        self._counter = itertools.count()
        self._lock = threading.Lock()
        self._grammars: GrammarCompiler | None = None
        self._tags: ThinkTags | None = None

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that can run, in tokens: it leaves room to generate one, and fits the KV pool."""
        return min(self._max_model_len - 1, self._pool_tokens)

    @property
    def grammars(self) -> GrammarCompiler:
        """The compiler of grammars, made when it is first needed.

        Raises:
            UserError: the model has no tokenizer, or llguidance is missing or cannot read it.
        """
        with self._lock:
            if self._grammars is None:
                threads = max(1, min(MOST_MASK_THREADS, (os.cpu_count() or 1) // 2))
                tokenizer = self._with_tokenizer("structured_outputs")
                self._grammars = GrammarCompiler(tokenizer, self._vocab_size, self._eos_token_ids, threads)
            return self._grammars

    @property
    def think_tags(self) -> ThinkTags | None:
        """The marks of a model that was said to think first; None for others."""
        return self._tags_of_tokenizer() if self._config.reasoning else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens the tokenizer adds by itself."""
        token_ids: list[int] = self._to_encode().encode(text)
        return token_ids

    def encode_batch(self, texts: Sized[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them where special tokens are added, on all cores at once.

        Raises:
            UserError: the model has no tokenizer.
            Exception: of the tokenizer's own kinds, for all texts where it refuses one.
        """
        return encode_texts(self._to_encode(), texts, add_special_tokens)

    def make(self, prompt: Prompt, params: SamplingParams) -> Sequence | RequestOutput:
        """The request's first sequence, whose `members` are all of them; an output with `error` where it cannot run."""
        problem = params.problem()
        if problem:
            return error_output(problem)
        if isinstance(prompt, str):
            if self._tokenizer is None:
                return error_output("the model has no tokenizer; give the prompt as token ids")
            try:
                given: Sized[int] | npt.NDArray[Any] = self.encode(prompt)
            except Exception as error:  # the tokenizer's own: a lone surrogate is no text
                return error_output(f"the prompt cannot be tokenized: {error}")
        elif isinstance(prompt, Iterable):
            given = prompt if isinstance(prompt, (list, array, np.ndarray)) else list(prompt)
        else:
            return error_output(f"the prompt is {prompt!r}; it must be a string or a list of token ids")
        try:
            token_ids = self._tokens(given)
        except UserError as error:
            return error_output(str(error), len(given))
        problem = self._prompt_problem(token_ids) or self._params_problem(params) or self._adapter_problem(params)
        if problem:
            return error_output(problem, len(token_ids))
        try:
            if params.labels is not None:
                return self._score_labels(token_ids, params)
            members = [self._sample(token_ids, params, number) for number in range(params.n)]
        except UserError as error:
            return error_output(str(error), len(token_ids))
        return RequestGroup(members, _join_samples).first if len(members) > 1 else members[0]

    def _sample(self, token_ids: array[int], params: SamplingParams, number: int) -> Sequence:
        """Sample `number` of a prompt."""
        room = min(self._max_model_len - len(token_ids), self._pool_tokens - len(token_ids) + 1)
        seq_id = next(self._counter)
        seed = params.seed
        if seed is None:
            seed = xxhash.xxh64_intdigest(seq_id.to_bytes(8, "little"), seed=self._config.seed) >> 1
        elif number:
            seed = xxhash.xxh64_intdigest(number.to_bytes(8, "little"), seed=seed) >> 1
        max_new_tokens = min(params.max_tokens, room)
        extra = self._extra(token_ids, params)
        return Sequence(seq_id, token_ids, params, max_new_tokens, seed, extra, self._adapter(params))

    def _extra(self, token_ids: array[int], params: SamplingParams) -> RowSampling | None:
        """What the sampler must know of a sequence; None where there is nothing.

        Raises:
            UserError: what is asked for cannot be done.
        """
        if not has_wishes(params):
            return None
        scored: dict[int, list[int]] = {}
        if params.prompt_logprobs is not None:
            scored = {position: [token] for position, token in enumerate(token_ids[1:])}
        stop_ids = () if params.ignore_eos else self._eos_token_ids
        extra = RowSampling(
            params,
            self._vocab_size,
            self._bad_words(params.bad_words or ()),
            [*stop_ids, *(params.stop_token_ids or ())],
            self._constraint(token_ids, params),
            scored,
        )
        return extra if extra.samples_differently or scored else None

    def _constraint(self, token_ids: array[int], params: SamplingParams) -> Constraint | None:
        """A structure, a budget for thinking, or both."""
        structure = params.structure
        if structure is None and params.thinking_budget is None:
            return None
        tags = self._tags_of_tokenizer()
        state = tags.prompt_state(token_ids)
        # Without being told, only marks that are tokens of their own count: a user may write about such marks.
        thinks = state != "closed" if self._config.reasoning else state == "open" and len(tags.start_ids) == 1
        if params.thinking_budget is not None and not thinks and state != "closed":
            raise UserError("thinking_budget is for models that think first: set the engine option reasoning=True")
        inner = None if structure is None else self.grammars.compile(structure).start()
        if not thinks:
            return inner
        return ReasoningGate(tags, token_ids, inner, params.thinking_budget, self._vocab_size, self._eos_token_ids)

    def _score_labels(self, token_ids: array[int], params: SamplingParams) -> Sequence:
        """Sequences from which the probability of every label follows."""
        labels = self._label_ids(params.labels or ())
        members: list[Sequence] = []
        nodes: list[tuple[Path, dict[int, list[int]]]] = label_paths(labels)
        one_token = dataclasses.replace(params, labels=None, max_tokens=1, min_tokens=0, temperature=0, stop=None)
        for path, asked in nodes:
            whole = token_ids + self._tokens(path)
            problem = self._prompt_problem(whole)
            if problem:
                raise UserError(f"with its labels {problem}")
            scored = {len(token_ids) - 1 + depth: ids for depth, ids in asked.items()}
            extra = RowSampling(one_token, self._vocab_size, scored=scored)
            members.append(Sequence(next(self._counter), whole, one_token, 1, 0, extra, self._adapter(params)))

        def combine(members: list[Sequence], outputs: list[RequestOutput]) -> RequestOutput:
            found: dict[tuple[Path, int], float] = {}
            for (path, asked), member in zip(nodes, members, strict=True):
                assert member.extra is not None
                for depth, ids in asked.items():
                    logprobs = member.extra.scores[len(token_ids) - 1 + depth].logprobs
                    found.update({(path[:depth], token): value for token, value in zip(ids, logprobs, strict=True)})
            scores = label_scores(labels, found)
            label = max(scores, key=scores.__getitem__)
            output = outputs[0].copy()
            output["num_input_tokens"] = len(token_ids)
            output["text"], output["finish_reason"] = label, "stop"
            output["token_ids"], output["num_generated_tokens"] = [], 0  # scored, not generated
            output["label"], output["label_logprob"] = label, scores[label]
            output["label_probs"] = normalized(scores)
            return output

        return RequestGroup(members, combine).first

    def _label_ids(self, labels: Sized[str]) -> dict[str, list[int]]:
        """Tokens of each label. Where one is the beginning of another, all end with the end-of-sequence token."""
        tokenizer = self._with_tokenizer("labels")
        ids: dict[str, list[int]] = {label: tokenizer.encode(label, add_special_tokens=False) for label in labels}
        texts: dict[tuple[int, ...], str] = {}
        for label, tokens in ids.items():
            if not tokens:
                raise UserError(f"the label {label!r} has no tokens")
            if tuple(tokens) in texts:
                raise UserError(f"the labels {texts[tuple(tokens)]!r} and {label!r} are the same tokens")
            texts[tuple(tokens)] = label
        if any(tuple(tokens[:depth]) in texts for tokens in ids.values() for depth in range(1, len(tokens))):
            if not self._eos_token_ids:
                raise UserError("one label is the beginning of another, and the model has no end-of-sequence token")
            ids = {label: [*tokens, self._eos_token_ids[0]] for label, tokens in ids.items()}
        return ids

    def _bad_words(self, words: Iterable[str]) -> list[list[int]]:
        """Token ids of each word as it begins a text and as it follows a space, where that is as many tokens and another first one."""
        found: list[list[int]] = []
        for word in words:
            tokenizer = self._with_tokenizer("bad_words")
            bare = tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            if bare:
                found.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                found.append(spaced)
        return found

    def _tags_of_tokenizer(self) -> ThinkTags:
        with self._lock:
            if self._tags is None:
                self._tags = ThinkTags.of(self._with_tokenizer("reasoning"))
            return self._tags

    def _to_encode(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise UserError(f"{self._config.model} has no tokenizer; give prompts as token ids")
        return self._tokenizer

    def _with_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise UserError(f"{what} needs a tokenizer and the model has none")
        return self._tokenizer

    def _tokens(self, given: Sized[int] | npt.NDArray[Any]) -> array[int]:
        """Tokens as an array of their own. In an array that is given nothing is done for each of them in Python.

        Raises:
            UserError: something in it is no token id of this model.
        """
        values: Any = np.asarray(given) if isinstance(given, array) else given
        if isinstance(values, np.ndarray) and (values.ndim != 1 or values.dtype.kind not in "iu"):
            values = values.tolist()
        with contextlib.suppress(TypeError, OverflowError):  # of something that is no integer, or a large one
            numbers = values if isinstance(values, np.ndarray) else np.asarray(array(TOKEN, values))
            if not numbers.size or (numbers.min() >= 0 and numbers.max() < self._vocab_size):
                return array(TOKEN, numbers.astype(np.int32, copy=False).tobytes())
        most = self._vocab_size - 1
        wrong = next(value for value in values if not isinstance(value, Integral) or not 0 <= int(value) <= most)
        shown = wrong.item() if isinstance(wrong, np.generic) else wrong
        raise UserError(f"the prompt holds {shown!r}, which is not a token id of this model (0 to {most})")

    def _prompt_problem(self, token_ids: array[int]) -> str | None:
        if not token_ids:
            return "the prompt is empty; it must have at least one token"
        if len(token_ids) >= self._max_model_len:
            return (
                f"the prompt has {len(token_ids)} tokens, the most is {self._max_model_len - 1} "
                f"(max_model_len={self._max_model_len} less one to generate)"
            )
        if len(token_ids) > self._pool_tokens:
            return f"the prompt has {len(token_ids)} tokens, the KV cache holds {self._pool_tokens}"
        return None

    def _adapter(self, params: SamplingParams) -> int:
        return -1 if params.lora_adapter is None else self._adapters.index(params.lora_adapter)

    def _adapter_problem(self, params: SamplingParams) -> str | None:
        name = params.lora_adapter
        if name is None or name in self._adapters:
            return None
        known = ", ".join(map(repr, self._adapters)) or "none"
        return f"lora_adapter={name!r}: must be one of the engine's lora_adapters ({known})"

    def _params_problem(self, params: SamplingParams) -> str | None:
        if params.stop_strings and self._tokenizer is None:
            return "stop strings need a tokenizer and the model has none; use stop_token_ids"
        for name, ids in (("allowed_token_ids", params.allowed_token_ids), ("logit_bias", params.logit_bias)):
            wrong = [token for token in ids or () if int(token) >= self._vocab_size]
            if wrong:
                return f"{name} holds {wrong[0]!r}, which is not a token id of this model (0 to {self._vocab_size - 1})"
        return None


def _join_samples(members: list[Sequence], outputs: list[RequestOutput]) -> RequestOutput:
    """The output of a request with several samples."""
    whole = outputs[0].copy()
    whole["outputs"] = outputs
    whole["num_generated_tokens"] = sum(output["num_generated_tokens"] for output in outputs)
    return whole
