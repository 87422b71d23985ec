"""The engine's loop: scheduler, executor and output processor joined. `LLM` and `AsyncLLM` are its two front doors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Sized
from typing import TYPE_CHECKING, Any, NamedTuple

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.executor import create_executor
from nanovllm.engine.model_input import build_model_input, order_batch
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.poison import Poison
from nanovllm.engine.request_maker import Prompt, RequestMaker
from nanovllm.engine.row_sampling import SamplingInput, build_sampling_input, note_logprobs
from nanovllm.engine.scheduler import ScheduledSequence, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.stats import EngineStats
from nanovllm.outputs import RequestOutput
from nanovllm.preflight import check_model
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.log import get_logger
from nanovllm.utils.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.engine.ranks import RankLauncher
    from nanovllm.engine.reasoning import Constraint


class Flight(NamedTuple):
    """A step that was launched and not read yet. `settled`: ids of sequences whose sampled token does not count."""

    batch: list[ScheduledSequence]
    settled: set[int]


class LLMEngine:
    """One model and everything in flight on it.

    Args:
        model: local directory or hub id; options: fields of `EngineConfig`.
        launcher: makes the ranks of tensor parallelism; None: as child processes.

    Raises:
        UserError: an unknown option, or a model that cannot run; nothing has been loaded then.
    """

    def __init__(self, model: str, *, launcher: RankLauncher | None = None, **options: Any) -> None:
        self.config = EngineConfig.create(model, **options)
        self.poison = Poison.from_environment()
        self.model_config = check_model(self.config)
        positions = self.model_config.rope.max_position(self.model_config.max_position_embeddings)
        self.max_model_len = min(self.config.max_model_len, positions)
        self.tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(self.config)
        self.executor = create_executor(self.config, self.model_config, self.max_model_len, launcher)
        get_logger(__name__).info("%s: %s", self.config.model, self.executor.summary)
        self.requests = RequestMaker(
            self.config, self.model_config, self.tokenizer, self.max_model_len, self.executor.num_kvcache_blocks
        )
        self._start_empty()
        self.steps = self.prompt_tokens = self.generated_tokens = self.cached_tokens = 0

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that can run, in tokens: it leaves room to generate one, and fits the KV pool."""
        return self.requests.max_prompt_len

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens the tokenizer adds by itself."""
        return self.requests.encode(text)

    def encode_batch(self, texts: Sized[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, on all cores at once. Where the tokenizer refuses one it raises for all.

        Args:
            add_special_tokens: as `encode` does; without for text that holds them, as chat templates write it.
        """
        return self.requests.encode_batch(texts, add_special_tokens)

    def make_sequence(self, prompt: Prompt, params: SamplingParams) -> Sequence | RequestOutput:
        """Tokenize and check one request, on any thread; an output with `error` where it cannot run.

        A request of several sequences (samples, labels) is its first one: `step` returns that one when all have ended.
        """
        made = self.requests.make(prompt, params)
        if self.poison and isinstance(made, Sequence):
            self.poison.look(made.seq_id, self._as_text(prompt))
        return made

    def _as_text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False))

    def add(self, seq: Sequence) -> None:
        """Queue a sequence from `make_sequence`."""
        for member in seq.members:
            self.prompt_tokens += member.num_prompt_tokens
            self.scheduler.add(member)

    def abort(self, seq: Sequence) -> None:
        """Stop working on an unfinished request."""
        for member in seq.members:
            if member.status is not SequenceStatus.FINISHED:
                self.scheduler.finish(member, "error")
            self.output_processor.forget(member)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished, or a step still runs."""
        return self.scheduler.has_work or bool(self.in_flight)

    def step(self) -> list[tuple[Sequence, RequestOutput]]:
        """Launch one step and read the one before (with `async_scheduling` off: this one); the requests that finished.

        Raises:
            EngineDeadError: a rank died; this engine cannot be used any more.
        """
        batch = order_batch(self.scheduler.schedule())
        finished: list[tuple[Sequence, RequestOutput]] = []
        if batch:
            self.in_flight.append(Flight(batch, set()))
            if self.poison:
                self.poison.strike(batch)
            asked = build_sampling_input(batch, self.model_config.vocab_size)
            self.executor.launch(build_model_input(batch, asked is not None))
            if asked is not None:
                if any(item.samples and item.seq.extra and item.seq.extra.needs_tokens for item in batch):
                    # What may come next depends on the tokens of the step before, which ends now; the device goes on with this one.
                    while len(self.in_flight) > 1:
                        finished += self._collect()
                    asked = self._constrain(asked, finished)
                self.executor.sample(asked)
            self.steps += 1
        # Nothing to launch: what is in flight must come first.
        if self.in_flight and (not batch or len(self.in_flight) > self.config.async_scheduling):
            finished += self._collect()
        return finished

    def _constrain(self, asked: SamplingInput, finished: list[tuple[Sequence, RequestOutput]]) -> SamplingInput:
        """Add to `asked` what the tokens so far rule out in the step launched last, and go on at once where they leave one way."""
        batch, settled = self.in_flight[-1]
        forced = self._worthwhile_forced_tokens(batch)
        masked: list[tuple[Constraint, int]] = []  # of rows that ask for nothing else
        limited: list[tuple[Constraint, int]] = []
        bans: list[tuple[int, int]] = []
        sampling = among_logits = -1
        for seq, _, _, samples in batch:
            sampling += samples
            extra = seq.extra
            if extra is None or not samples or not extra.samples_differently:
                continue
            among_logits += extra.needs_logits
            if seq.status is SequenceStatus.FINISHED:
                continue
            constraint = extra.constraint
            if seq.seq_id in forced:
                settled.add(seq.seq_id)
                seq.num_pending -= 1
                seq.on_device = False  # it knows neither the last token nor how many there are
                for token_id in forced[seq.seq_id]:
                    if self._append(seq, token_id, finished):
                        break
            elif constraint is not None and constraint.needs_mask:
                if extra.needs_logits:
                    limited.append((constraint, among_logits))
                else:
                    masked.append((constraint, sampling))
            bans += [(among_logits, token) for token in extra.banned_next(seq.token_ids, seq.num_prompt_tokens)]
        # The copies of the step before to the device are done, as its tokens have come back.
        masks = self.executor.mask_buffer(len(masked) + len(limited))
        if len(masks):
            self.requests.grammars.fill_masks([constraint for constraint, _ in masked + limited], masks)
        return asked.with_grammar(masks, [row for _, row in masked], [row for _, row in limited], bans)

    def _worthwhile_forced_tokens(self, batch: list[ScheduledSequence]) -> dict[int, list[int]]:
        """What the grammars of a batch leave no choice about, by sequence id; nothing where sampling it token by token is faster."""
        cost = self.executor.chunk_cost
        # To ask takes the host some microseconds a sequence, and many seldom gain by it at once.
        if cost and len(batch) > 32 and self.steps % 4:
            return {}
        forced: dict[int, list[int]] = {}
        for seq, _, _, samples in batch:
            constraint = seq.extra.constraint if seq.extra is not None else None
            if constraint is None or not samples or seq.status is SequenceStatus.FINISHED:
                continue
            if seq.params.logprobs is None:
                room = seq.max_new_tokens - seq.num_generated_tokens - 1
                if len(tokens := constraint.forced_tokens()[:room]) > 1:
                    forced[seq.seq_id] = tokens
        saved = sum(len(tokens) - 1 for tokens in forced.values())
        return forced if saved >= cost * len(batch) else {}

    def _collect(self) -> list[tuple[Sequence, RequestOutput]]:
        """Read the oldest step in flight and apply the stop rules to its tokens."""
        result = self.executor.collect()
        finished: list[tuple[Sequence, RequestOutput]] = []
        batch, settled = self.in_flight.popleft()
        note_logprobs(batch, result)
        sampled = [item.seq for item in batch if item.samples]
        for seq, token_id in zip(sampled, result.tokens, strict=True):
            if seq.seq_id in settled:
                continue
            seq.num_pending -= 1
            if seq.status is not SequenceStatus.FINISHED:  # else: sampled before it was known that the sequence ends
                self._append(seq, token_id, finished)
        return finished

    def _append(self, seq: Sequence, token_id: int, finished: list[tuple[Sequence, RequestOutput]]) -> bool:
        """Add a token to `seq`; whether that ends it. What is finished with it is added to `finished`."""
        self.generated_tokens += 1
        reason = self.output_processor.append(seq, token_id)
        if reason is None:
            return False
        self.scheduler.finish(seq, reason)
        self.cached_tokens += seq.num_cached_tokens
        own = self.output_processor.output(seq)
        output = own if seq.group is None else seq.group.finished(seq, own)
        if output is not None:
            finished.append((seq.members[0], output))
        return True

    def ids_in_step(self) -> set[int]:
        """Ids of the sequences in steps that have begun and not ended: where the engine died, the ones that may have done it."""
        return {item.seq.members[0].seq_id for flight in self.in_flight for item in flight.batch}

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
        self.in_flight: deque[Flight] = deque()
        self.scheduler = Scheduler(self.config.max_num_seqs, self.config.max_num_batched_tokens, self.block_manager)
        self.output_processor = OutputProcessor(
            self.tokenizer, self.model_config.eos_token_ids, self.requests.think_tags
        )
