"""What a request returns: a plain dict, so that programs written for nano-vllm run unchanged."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict

FinishReason = Literal["stop", "length", "error"]


class Logprob(NamedTuple):
    """Of one token: natural logarithm of its probability, its rank (1: the likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None


# Of one token position, by id: first the token that is there, then as many of the likeliest as were asked for.
TokenLogprobs = dict[int, Logprob]


class _Always(TypedDict):
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_input_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    logprobs: list[TokenLogprobs] | None
    error: str | None


class RequestOutput(_Always, total=False):
    """One finished request. The keys of `SamplingParams` options are there where the option was used.

    Keys:
        text: the generated text, special tokens left out, cut before a stop string; "" where the model has no tokenizer.
        token_ids: every generated token, the end-of-sequence token included.
        finish_reason: "stop" (end-of-sequence, stop string or stop token), "length" or "error".
        num_input_tokens: tokens of the prompt.
        num_generated_tokens: `len(token_ids)`, of all samples where there are several.
        num_cached_tokens: prompt tokens whose KV came from the prefix cache instead of being computed.
        logprobs: of every generated token; None unless `logprobs` asked for them.
        error: None, or one line that says why the request could not run.
        prompt_logprobs: of every prompt token; None for the first, which follows nothing.
        outputs: with `n` above 1 the outputs of all samples; the keys beside it are the first one's.
        reasoning_text: what a thinking model wrote between its marks; `text` is then what follows.
        parsed: with `structured_outputs`, the text if it has the form asked for (JSON compacted), else None.
        label, label_logprob, label_probs: with `labels`, the likeliest, the logarithm of its probability as a continuation of the
            prompt, and each one's probability where one of them must come.
    """

    prompt_logprobs: list[TokenLogprobs | None]
    outputs: list[RequestOutput]
    reasoning_text: str | None
    parsed: str | None
    label: str | None
    label_logprob: float | None
    label_probs: dict[str, float] | None


def error_output(message: str, num_input_tokens: int = 0) -> RequestOutput:
    """The output of a request that could not run."""
    return RequestOutput(
        text="",
        token_ids=[],
        finish_reason="error",
        num_input_tokens=num_input_tokens,
        num_generated_tokens=0,
        num_cached_tokens=0,
        logprobs=None,
        error=message,
    )
