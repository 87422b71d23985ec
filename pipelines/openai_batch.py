"""OpenAI's batch format (`format: openai_batch`): JSONL of requests in, as `vllm run-batch` takes them, JSONL of answers out.

A line is `{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}`. `inputs` reads lines as the columns of
`BATCH_SCHEMA`, `requests` asks for a row's prompt and parameters here, and `batch_results` writes the answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nanovllm import UserError
from nanovllm.utils.chat import ChatRenderer, Message
from pipelines.inputs import BATCH_SCHEMA
from pipelines.job import PromptConfig
from pipelines.prompts import Prompt, Rendered, check_prompt_value, read_messages, render_chat
from pipelines.row_values import RowError, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Endpoint = Literal["chat", "completions"]
ENDPOINTS: dict[str, Endpoint] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}

# Fields of a body that are sampling parameters by the same name: OpenAI's, and those that vLLM adds.
_SAME = {
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "max_tokens",
    "min_p",
    "min_tokens",
    "n",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "temperature",
    "thinking_budget",
    "top_k",
    "top_p",
}
BODY_PARAMETERS = frozenset(_SAME | {"logprobs"})
# Fields that change nothing of an answer.
_IGNORED = {
    "cache_salt",
    "guided_decoding_backend",
    "include_reasoning",
    "metadata",
    "model",  # the job has one model; answers repeat what the body says
    "parallel_tool_calls",
    "priority",
    "prompt_cache_key",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# What is not done here may be said to be off.
_OFF: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "length_penalty": (1,),
    "spaces_between_special_tokens": (True,),
    "tool_choice": ("none", "auto"),
}
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_OF_CHAT = {
    "add_generation_prompt",
    "chat_template_kwargs",
    "continue_final_message",
    "max_completion_tokens",
    "messages",
    "reasoning_effort",
    "top_logprobs",
}


class BatchRequest(NamedTuple):
    """A request as its line says.

    Attributes:
        endpoint: of its `url`.
        body: its body, without nulls.
        parameters: of sampling, that the body sets; not checked yet.
    """

    endpoint: Endpoint
    body: dict[str, Any]
    parameters: dict[str, Any]


class BatchRequests:
    """Reads the requests of one job.

    Args:
        config: the chat template and its variables; those of a body come on top.

    Attributes:
        columns: input columns that are read.
    """

    columns = tuple(BATCH_SCHEMA.names)

    def __init__(self, config: PromptConfig) -> None:
        self._config = config
        self._chat: ChatRenderer | None = None
        self._no_chat = ""

    def attach(self, tokenizer: PreTrainedTokenizerBase | None, model: str) -> None:
        """Make ready to render for a model. One without a chat template still takes completions.

        Raises:
            UserError: the job's chat template is wrong.
        """
        try:
            self._chat = ChatRenderer(
                tokenizer,
                model,
                chat_template=self._config.chat_template,
                template_variables=self._config.chat_template_kwargs,
            )
        except UserError as error:
            if self._config.chat_template is not None:
                raise
            self._no_chat = str(error)

    def read(self, row: Mapping[str, object]) -> BatchRequest:
        """The request of a row of `BATCH_SCHEMA`.

        Raises:
            RowError: it is none, or asks for what is not done here.
        """
        body = _body(row)
        endpoint = _endpoint(row)
        return BatchRequest(endpoint, body, _parameters(endpoint, body))

    def source(self, row: Mapping[str, object]) -> str | TokenIds | list[Message]:
        """What the prompt of a row is made of: text, token ids, or a conversation.

        Raises:
            RowError: it is no request, or has no usable prompt.
        """
        request = self.read(row)
        if request.endpoint == "chat":
            return read_messages(request.body.get("messages"))
        prompt = self._text_prompt(request.body)
        return prompt.text if isinstance(prompt, Rendered) else prompt

    def prompt(self, request: BatchRequest) -> Prompt:
        """The prompt of a request.

        Raises:
            RowError: there is none that can be used, or the chat template refuses it.
        """
        body = request.body
        if request.endpoint == "completions":
            return self._text_prompt(body)
        if self._chat is None:
            raise RowError(self._no_chat)
        return render_chat(self._for_body(body), read_messages(body.get("messages")))

    def _for_body(self, body: Mapping[str, Any]) -> ChatRenderer:
        assert self._chat is not None
        variables = body.get("chat_template_kwargs", {})
        if not isinstance(variables, dict):
            raise RowError("chat_template_kwargs must be an object")
        options = {
            name: body[name]
            for name in ("add_generation_prompt", "continue_final_message", "reasoning_effort")
            if name in body
        }
        if not variables and not options:
            return self._chat
        try:
            return self._chat.with_variables(**variables, **options)
        except (UserError, TypeError) as error:
            raise RowError(str(error)) from None

    def _text_prompt(self, body: Mapping[str, Any]) -> Prompt:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise RowError(f"prompt holds {len(prompt)} prompts; write a request for each")
            prompt = prompt[0]
        checked = check_prompt_value(prompt)
        if isinstance(checked, str) and body.get("add_special_tokens") is False:
            return Rendered(checked, "prompt cannot be tokenized")
        return checked


def _body(row: Mapping[str, object]) -> dict[str, Any]:
    text = row["body"]
    if not isinstance(text, str):
        raise RowError("the request has no body")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"the line is not JSON: {error}") from None
    if row["custom_id"] is None:
        raise RowError("the line is no request with a custom_id, which must be a string")
    if not isinstance(body, dict):
        raise RowError("the body must be an object")
    return {name: value for name, value in body.items() if value is not None}


def _endpoint(row: Mapping[str, object]) -> Endpoint:
    if row["method"] != "POST":
        raise RowError(f"method {row['method']!r}: must be 'POST'")
    endpoint = ENDPOINTS.get(str(row["url"]))
    if endpoint is None:
        raise RowError(f"url {row['url']!r}: must be one of {', '.join(ENDPOINTS)}")
    return endpoint


def _parameters(endpoint: Endpoint, body: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters of a body, under their names here."""
    found = {name: value for name, value in body.items() if name in _SAME}
    known = _SAME | _IGNORED | set(_GUIDED) | {"logprobs", "response_format", "add_special_tokens"}
    known |= _OF_CHAT if endpoint == "chat" else {"prompt"}
    for name, value in body.items():
        if name not in known and value not in (False, [], {}, "") and value not in _OFF.get(name, ()):
            raise RowError(f"{name}={_short(value)} in the body is not supported; leave it out")
    if "max_completion_tokens" in body and endpoint == "chat":
        found["max_tokens"] = body["max_completion_tokens"]
    logprobs = _logprobs(endpoint, body)
    if logprobs is not None:
        found["logprobs"] = logprobs
    form = _form(body)
    if form is not None:
        found["structured_outputs"] = form
    return found


def _logprobs(endpoint: Endpoint, body: Mapping[str, Any]) -> Any:
    if endpoint == "completions":
        return body.get("logprobs")
    wanted, top = body.get("logprobs", False), body.get("top_logprobs")
    if not isinstance(wanted, bool):
        raise RowError(f"logprobs={_short(wanted)}: must be true or false; top_logprobs says how many")
    if top and not wanted:
        raise RowError("top_logprobs needs logprobs=true")
    return (top or 0) if wanted else None


def _form(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The form of the output that a body asks for; at most one of the ways to say so."""
    forms: list[tuple[str, Any]] = [(name, {key: body[name]}) for name, key in _GUIDED.items() if name in body]
    if "structured_outputs" in body:
        forms.append(("structured_outputs", body["structured_outputs"]))
    response_format = body.get("response_format")
    if response_format is not None:
        form = _response_format(response_format)
        if form is not None:
            forms.append(("response_format", form))
    if len(forms) > 1:
        raise RowError(f"{forms[0][0]} and {forms[1][0]} are both given; leave one out")
    return forms[0][1] if forms else None


def _response_format(given: object) -> dict[str, Any] | None:
    kind = given.get("type") if isinstance(given, Mapping) else given
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        assert isinstance(given, Mapping)
        described = given.get("json_schema")
        schema = described.get("schema") if isinstance(described, Mapping) else None
        if schema is None:
            raise RowError("response_format of type json_schema has no json_schema.schema")
        return {"json": schema}
    raise RowError(f"response_format {_short(kind)}: its type must be text, json_object or json_schema")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
