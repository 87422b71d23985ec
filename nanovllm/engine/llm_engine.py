"""The engine's loop: scheduler, executor and output processor joined. `LLM` and `AsyncLLM` are its two front doors."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Sized
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.executor import create_executor
from nanovllm.engine.model_input import build_model_input, order_batch
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.poison import Poison
from nanovllm.engine.scheduler import ScheduledSequence, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.errors import UserError
from nanovllm.outputs import RequestOutput, error_output
from nanovllm.preflight import check_model
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.log import get_logger
from nanovllm.utils.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sized[int]


class EngineStats(NamedTuple):
    """Counters since the engine started, and its state now (`kv_usage`: part of the KV blocks held by sequences)."""

    num_running: int
    num_waiting: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int
    kv_usage: float


class LLMEngine:
    """One model and everything in flight on it.

    Args:
        model: local directory or hub id; options: fields of `EngineConfig`.

    Raises:
        UserError: an unknown option, or a model that cannot run; nothing has been loaded then.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = EngineConfig.create(model, **options)
        self.poison = Poison.from_environment()
        self.model_config = check_model(self.config)
        positions = self.model_config.rope.max_position(self.model_config.max_position_embeddings)
        self.max_model_len = min(self.config.max_model_len, positions)
        self.tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(self.config)
        self.executor = create_executor(self.config, self.model_config, self.max_model_len)
        get_logger(__name__).info("%s: %s", self.config.model, self.executor.summary)
        self._start_empty()
        self.counter = itertools.count()
        self.steps = self.prompt_tokens = self.generated_tokens = self.cached_tokens = 0

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that can run, in tokens: it leaves room to generate one, and fits the KV pool."""
        return min(self.max_model_len - 1, self._pool_tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens the tokenizer adds by itself."""
        if self.tokenizer is None:
            raise UserError(f"{self.config.model} has no tokenizer; give prompts as token ids")
        token_ids: list[int] = self.tokenizer.encode(text)
        return token_ids

    def make_sequence(self, prompt: Prompt, params: SamplingParams) -> Sequence | RequestOutput:
        """Tokenize and check one request, on any thread; an output with `error` where it cannot run."""
        problem = params.problem()
        if problem:
            return error_output(problem)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                return error_output("the model has no tokenizer; give the prompt as token ids")
            try:
                token_ids = self.encode(prompt)
            except Exception as error:  # the tokenizer's own: a lone surrogate is no text
                return error_output(f"the prompt cannot be tokenized: {error}")
        elif isinstance(prompt, Iterable):
            token_ids = list(prompt)
        else:
            return error_output(f"the prompt is {prompt!r}; it must be a string or a list of token ids")
        problem = self._prompt_problem(token_ids) or self._params_problem(params)
        if problem:
            return error_output(problem, len(token_ids))
        room = min(self.max_model_len - len(token_ids), self._pool_tokens - len(token_ids) + 1)
        seq_id = next(self.counter)
        if self.poison:
            self.poison.look(seq_id, prompt)
        seed = params.seed
        if seed is None:
            seed = xxhash.xxh64_intdigest(seq_id.to_bytes(8, "little"), seed=self.config.seed) >> 1
        return Sequence(seq_id, token_ids, params, min(params.max_tokens, room), seed)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence from `make_sequence`."""
        self.prompt_tokens += seq.num_prompt_tokens
        self.scheduler.add(seq)

    def abort(self, seq: Sequence) -> None:
        """Stop working on an unfinished sequence."""
        self.scheduler.finish(seq, "error")
        self.output_processor.forget(seq)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished, or a step still runs."""
        return self.scheduler.has_work or bool(self.in_flight)

    def step(self) -> list[tuple[Sequence, RequestOutput]]:
        """Launch one step and read the one before (with `async_scheduling` off: this one); the sequences that finished.

        Raises:
            EngineDeadError: a rank died; this engine cannot be used any more.
        """
        batch = order_batch(self.scheduler.schedule())
        if batch:
            self.in_flight.append(batch)
            if self.poison:
                self.poison.strike(batch)
            self.executor.launch(build_model_input(batch))
            self.steps += 1
        # Nothing to launch: what is in flight must come first.
        if self.in_flight and (not batch or len(self.in_flight) > self.config.async_scheduling):
            return self._collect()
        return []

    def _collect(self) -> list[tuple[Sequence, RequestOutput]]:
        """Read the oldest step in flight and apply the stop rules to its tokens."""
        tokens = self.executor.collect()
        finished: list[tuple[Sequence, RequestOutput]] = []
        sampled = [item.seq for item in self.in_flight.popleft() if item.samples]
        for seq, token_id in zip(sampled, tokens, strict=True):
            seq.num_pending -= 1
            if seq.status is SequenceStatus.FINISHED:  # sampled before it was known that the sequence ends
                continue
            self.generated_tokens += 1
            reason = self.output_processor.append(seq, token_id)
            if reason is not None:
                self.scheduler.finish(seq, reason)
                self.cached_tokens += seq.num_cached_tokens
                finished.append((seq, self.output_processor.output(seq)))
        return finished

    def ids_in_step(self) -> set[int]:
        """Ids of the sequences in steps that have begun and not ended: where the engine died, the ones that may have done it."""
        return {item.seq.seq_id for batch in self.in_flight for item in batch}

    def stats(self) -> EngineStats:
        """Counters and state; cheap enough for every second."""
        total = len(self.block_manager.blocks)
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=self.scheduler.num_preemptions,
            kv_usage=1 - self.block_manager.num_free_blocks / total,
        )

    def exit(self) -> None:
        """Free the model and end its child processes."""
        self.executor.shutdown()

    def abandon(self) -> None:
        """Drop everything in flight, after an exception (Ctrl-C, say) cut a step short.

        The prefix cache goes too: it may promise blocks that were never computed. Several ranks end: they may be in the
        middle of a step, and their next answer would be taken for that of another.
        """
        if self.config.tensor_parallel_size > 1:
            self.exit()
        self.executor.discard()
        self._start_empty()

    def _start_empty(self) -> None:
        self.block_manager = BlockManager(
            self.executor.num_kvcache_blocks, self.config.kvcache_block_size, self.config.enable_prefix_caching
        )
        # The batch of each step that was launched and not read yet.
        self.in_flight: deque[list[ScheduledSequence]] = deque()
        self.scheduler = Scheduler(self.config.max_num_seqs, self.config.max_num_batched_tokens, self.block_manager)
        self.output_processor = OutputProcessor(self.tokenizer, self.model_config.eos_token_ids)

    @property
    def _pool_tokens(self) -> int:
        return len(self.block_manager.blocks) * self.config.kvcache_block_size

    def _prompt_problem(self, token_ids: list[int]) -> str | None:
        if not token_ids:
            return "the prompt is empty; it must have at least one token"
        vocab_size = self.model_config.vocab_size
        # Three passes in C for plain integers; the exact check is a hundred times slower.
        plain = {*map(type, token_ids)} == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size
        wrong = [] if plain else [t for t in token_ids if not isinstance(t, Integral) or not 0 <= t < vocab_size]
        if wrong:
            return f"the prompt holds {wrong[0]!r}, which is not a token id of this model (0 to {vocab_size - 1})"
        if len(token_ids) >= self.max_model_len:
            return (
                f"the prompt has {len(token_ids)} tokens, the most is {self.max_model_len - 1} "
                f"(max_model_len={self.max_model_len} less one to generate)"
            )
        if len(token_ids) > self._pool_tokens:
            return f"the prompt has {len(token_ids)} tokens, the KV cache holds {self._pool_tokens}"
        return None

    def _params_problem(self, params: SamplingParams) -> str | None:
        if params.stop_strings and self.tokenizer is None:
            return "stop strings need a tokenizer and the model has none; use stop_token_ids"
        return None
