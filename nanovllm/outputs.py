"""What a request returns: a plain dict, so that programs written for nano-vllm run unchanged."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

FinishReason = Literal["stop", "length", "error"]


class RequestOutput(TypedDict):
    """One finished request.

    Keys:
        text: the generated text, special tokens left out, cut before a stop string; "" where the model has no tokenizer.
        token_ids: every generated token, the end-of-sequence token included.
        finish_reason: "stop" (end-of-sequence, stop string or stop token), "length" or "error".
        num_input_tokens: tokens of the prompt.
        num_generated_tokens: `len(token_ids)`.
        num_cached_tokens: prompt tokens whose KV came from the prefix cache instead of being computed.
        logprobs: None unless log-probabilities were asked for.
        error: None, or one line that says why the request could not run.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_input_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    logprobs: list[Any] | None
    error: str | None


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
