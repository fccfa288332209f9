"""OpenAI's requests as they travel to a policy replica: vLLM's models, with the endpoint's limits on tokens."""

from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, JsonValue, PrivateAttr, ValidationError
from ray.serve.llm import openai_api_models
from starlette.requests import Request
from vllm.config import ModelConfig
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.renderers.params import TokenizeParams
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.tokenizers import TokenizerLike

from sampo_ray.serve.errors import ApiError, from_engine, from_validation
from sampo_ray.serve.middleware.limits import Limits, TokenCounter
from sampo_ray.serve.requests.json_body import check_constraints, decode, read_bytes, refused

TOOLS_OFF = "this endpoint calls no tools; its operator turns them on with serve.tools"
REFUSED_FIELDS = (
    *("chat_template", "chat_template_kwargs", "documents"),  # would change the prompt format of training
    *("prompt_embeds", "media_io_kwargs", "mm_processor_kwargs"),  # load data that the user names or sends
    *("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "priority"),  # reach into the engine
    "logprob_token_ids",  # vLLM 0.29 drops the `logprobs` of all other requests in the batch
    *("functions", "function_call"),  # OpenAI's former names of tools and tool_choice, which vLLM would overlook
)
MAX_COMPLETIONS = 256  # of one request over all its prompts: as many as an engine works on at once
# Entries of fields that cost the engine time for each token.
MAX_ITEMS = {"stop": 16, "stop_token_ids": 64, "bad_words": 64, "logit_bias": 1024}
# vLLM's validators compare and take apart raw values before their types are checked.
_WRONG_TYPES = (TypeError, AttributeError, KeyError, OverflowError, RecursionError)


@dataclass(frozen=True)
class PromptLimit(TokenizeParams):
    """vLLM's parameters for tokenizing a prompt, and a limit on the prompt's tokens."""

    max_prompt_tokens: int = 0

    def apply_post_tokenization(self, tokenizer: TokenizerLike | None, prompt: TokensPrompt) -> TokensPrompt:
        prompt = super().apply_post_tokenization(tokenizer, prompt)
        if (count := len(prompt.get("prompt_token_ids", ()))) > self.max_prompt_tokens:
            message = f"prompt: more than the {self.max_prompt_tokens} tokens that this endpoint takes"
            raise VLLMValidationError(message, parameter="prompt", value=count)
        return prompt


class _Limited(BaseModel):
    """Limits that are sent with a request to the replica, where its prompt is tokenized."""

    _max_prompt_tokens: int | None = PrivateAttr(None)
    _max_tokens: int | None = PrivateAttr(None)  # of each completion, for a request that does not set it

    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        params, limit = super().build_tok_params(model_config), self._max_prompt_tokens  # type: ignore[misc]
        return params if limit is None else PromptLimit(**vars(params), max_prompt_tokens=limit)

    def to_sampling_params(self, max_tokens: int, *rest: object) -> SamplingParams:
        return super().to_sampling_params(self._bounded(max_tokens), *rest)  # type: ignore[misc]

    def to_beam_search_params(self, max_tokens: int, *rest: object) -> BeamSearchParams:
        return super().to_beam_search_params(self._bounded(max_tokens), *rest)  # type: ignore[misc]

    def _bounded(self, max_tokens: int) -> int:
        return max_tokens if self._max_tokens is None else min(max_tokens, self._max_tokens)


class ChatCompletionRequest(_Limited, openai_api_models.ChatCompletionRequest):
    """A chat request as it is sent to a policy replica."""


class CompletionRequest(_Limited, openai_api_models.CompletionRequest):
    """A completion request as it is sent to a policy replica."""


PolicyRequest = TypeVar("PolicyRequest", ChatCompletionRequest, CompletionRequest)
AnyRequest = ChatCompletionRequest | CompletionRequest


async def read_request(request: Request, kind: type[PolicyRequest], max_bytes: int) -> PolicyRequest:
    """The request's body as `kind`, within the limits of `request.state`. Raises ApiError (4xx)."""
    sent = decode(await read_bytes(request, max_bytes))
    _check_raw(sent)
    body = {field: value for field, value in sent.items() if field in kind.model_fields}
    parsed = validated(body, kind)
    if (count := _completions(parsed)) > MAX_COMPLETIONS:
        field = "n" if (parsed.n or 1) > 1 else "prompt"
        raise refused(field, f"asks for {count} completions, more than the {MAX_COMPLETIONS} of a request")
    limits: Limits | None = getattr(request.state, "limits", None)
    if limits is not None:
        _limit_tokens(parsed, body, limits)
        if limits.tokens_per_minute and parsed.stream:
            _count_stream(parsed, request.state.token_counter)
    return parsed


def _count_stream(request: AnyRequest, counter: TokenCounter) -> None:
    """Has the stream's tokens counted: by its usage or, as long as that has not come, by its events."""
    request.stream_interval = None  # one event a token
    if request.stream_options is None or not request.stream_options.include_usage:
        request.stream_options = StreamOptions(include_usage=True)
        counter.hide_usage = True


def _check_raw(body: dict[str, JsonValue]) -> None:
    """Checks before validation, which would compile constraints and describe every one of 100,000 mistakes."""
    for field in REFUSED_FIELDS:
        if body.get(field) is not None:
            raise ApiError(400, f"{field}: not accepted by this endpoint; leave it out", param=field)
    check_constraints(body)
    for field, most in MAX_ITEMS.items():
        value = body.get(field)
        if isinstance(value, list | dict) and len(value) > most:
            raise refused(field, f"{len(value)} are more than the {most} that this endpoint takes")
    if not _is_prompt(body.get("prompt")):
        raise refused("prompt", "must be text, a list of token ids, or a list of several such")
    if not _is_ids(body.get("allowed_token_ids") or []):
        raise refused("allowed_token_ids", "must be a list of token ids")


def _is_prompt(prompt: JsonValue) -> bool:
    if not isinstance(prompt, list):
        return prompt is None or isinstance(prompt, str)
    return _is_ids(prompt) or all(isinstance(item, str) for item in prompt) or all(map(_is_ids, prompt))


def _is_ids(tokens: JsonValue) -> bool:
    return isinstance(tokens, list) and all(type(token) is int and 0 <= token < 1 << 31 for token in tokens)


def validated(body: dict[str, JsonValue], kind: type[PolicyRequest]) -> PolicyRequest:
    """`body` as `kind`. Raises ApiError (400), naming the field and never its value."""
    if issubclass(kind, ChatCompletionRequest):
        _check_messages(body.get("messages"))
    try:
        parsed = kind.model_validate(body)
        if isinstance(parsed, ChatCompletionRequest):
            _read_iterators(parsed)
        return parsed
    except ValidationError as error:
        raise from_validation(error) from None
    except VLLMClientError as error:
        message = Exception.__str__(error)  # VLLMClientError.__str__ adds the value
        raise from_engine(400, message, getattr(error, "parameter", None)) from None
    except _WRONG_TYPES:
        field = _wrong_field(body, kind)
        raise ApiError(400, f"{field or 'body'}: has a value of the wrong type", param=field) from None


def without_tools(request: ChatCompletionRequest) -> None:
    """Makes a request one without tools if it forbids to call them. ApiError (400) where it needs an endpoint that has
    them: many chat templates leave tools, calls and results out without a word.
    """
    if request.tools and request.tool_choice != "none":
        raise refused("tools", TOOLS_OFF)
    for position, message in enumerate(request.messages):
        if message.get("role") == "tool" or message.get("tool_calls"):
            raise refused(f"messages[{position}]", TOOLS_OFF)
    request.tools = None


def _check_messages(messages: JsonValue) -> None:
    if not isinstance(messages, list) or not messages:
        raise refused("messages", "must be a list of at least one message")
    for position, message in enumerate(messages):
        field = f"messages[{position}]"
        if not isinstance(message, dict):
            raise refused(field, "must be an object with role and content")
        if not isinstance(message.get("role"), str):
            raise refused(f"{field}.role", "must be a string")
        content = message.get("content")
        if not _is_text(content) and not (content is None and message.get("tool_calls")):
            raise refused(f"{field}.content", "must be text, or a list of parts of type 'text'")


def _is_text(content: JsonValue) -> bool:
    if isinstance(content, list):
        return all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
    return isinstance(content, str)


def _read_iterators(request: ChatCompletionRequest) -> None:
    """Replaces pydantic's lazy iterators by lists: they cannot be pickled, and check their items only when read."""
    for message in request.messages:
        for field in ("content", "tool_calls"):
            if message.get(field) is not None and not isinstance(message[field], str):
                message[field] = list(message[field])


def _completions(request: AnyRequest) -> int:
    prompt = getattr(request, "prompt", None)
    prompts = len(prompt) if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)) else 1
    return max(1, prompts) * (request.n or 1)


def _limit_tokens(request: AnyRequest, body: dict[str, JsonValue], limits: Limits) -> None:
    """Sets the endpoint's token limits on the request. ApiError (400) if it asks for more."""
    request._max_prompt_tokens = limits.max_prompt_tokens
    if (most := limits.max_answer_tokens) is None:
        return
    completions = _completions(request)
    field = "max_completion_tokens" if getattr(request, "max_completion_tokens", None) is not None else "max_tokens"
    asked = None if body.get(field) is None else getattr(request, field)
    if asked is None and completions <= most:
        request._max_tokens = most // completions
    elif (asked or 1) * completions > most:
        times = f" for each of {completions} completions" if completions > 1 else ""
        raise refused(field, f"{asked or 1}{times} is more than the {most} tokens of an answer here")


def _wrong_field(body: dict[str, JsonValue], kind: type[PolicyRequest]) -> str | None:
    """The first field whose type is wrong in an otherwise valid request."""
    required = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    for field in body:
        try:
            kind.model_validate({**required, field: body[field]})
        except _WRONG_TYPES:
            return field
        except (ValidationError, VLLMClientError):
            pass
    return None
