"""Reading request bodies: from the bytes of a stranger to a request for a policy replica, or an ApiError."""

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

from pydantic import BaseModel, PrivateAttr, ValidationError
from ray.serve.llm import openai_api_models
from starlette.requests import Request
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.renderers.params import TokenizeParams

from sampo_ray.serve.errors import ApiError, from_validation
from sampo_ray.serve.middleware.limits import Limits
from sampo_ray.serve.requests import constraints

REFUSED_FIELDS = (
    # These would change the prompt format that the policy is trained in,
    "chat_template",
    "chat_template_kwargs",
    "documents",
    # load data that the user names or brings,
    "prompt_embeds",
    "media_io_kwargs",
    "mm_processor_kwargs",
    # or reach into the engine.
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "priority",
)

MAX_COMPLETIONS = 256
"""Completions that one request may ask for, over all its prompts: what an engine works on at once."""
MAX_ITEMS = {"stop": 16, "stop_token_ids": 64, "bad_words": 64, "logit_bias": 1024, "logprob_token_ids": 64}
"""Entries of fields that cost the engine time for each token."""


@dataclass(frozen=True)
class PromptLimit(TokenizeParams):
    """vLLM's treatment of a request's prompts, and a limit on their tokens, where those are known."""

    max_prompt_tokens: int = 0

    def apply_post_tokenization(self, tokenizer: Any, prompt: Any) -> Any:
        prompt = super().apply_post_tokenization(tokenizer, prompt)
        count = len(prompt.get("prompt_token_ids", ()))
        if count > self.max_prompt_tokens:
            message = f"prompt: more than the {self.max_prompt_tokens} tokens that this endpoint takes"
            raise VLLMValidationError(message, parameter="prompt", value=count)
        return prompt


class _Limited(BaseModel):
    """Limits that travel with a request to where its prompt becomes tokens."""

    _max_prompt_tokens: int | None = PrivateAttr(None)
    _max_tokens: int | None = PrivateAttr(None)  # of each completion, where the request names no number itself

    def build_tok_params(self, model_config: Any) -> TokenizeParams:
        params = super().build_tok_params(model_config)  # type: ignore[misc]
        limit = self._max_prompt_tokens
        return params if limit is None else PromptLimit(**vars(params), max_prompt_tokens=limit)

    def to_sampling_params(self, max_tokens: int, *rest: Any) -> Any:
        return super().to_sampling_params(self._bounded(max_tokens), *rest)  # type: ignore[misc]

    def to_beam_search_params(self, max_tokens: int, *rest: Any) -> Any:
        return super().to_beam_search_params(self._bounded(max_tokens), *rest)  # type: ignore[misc]

    def _bounded(self, max_tokens: int) -> int:
        return max_tokens if self._max_tokens is None else min(max_tokens, self._max_tokens)


class ChatCompletionRequest(_Limited, openai_api_models.ChatCompletionRequest):
    """A chat request as it travels to a policy replica."""


class CompletionRequest(_Limited, openai_api_models.CompletionRequest):
    """A completion request as it travels to a policy replica."""


PolicyRequest = TypeVar("PolicyRequest", ChatCompletionRequest, CompletionRequest)

HARMLESS = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}

# vLLM's validators compare raw values and take them apart before their types are checked.
WRONG_TYPES = (TypeError, AttributeError, KeyError, OverflowError, RecursionError)


async def read(request: Request, kind: type[PolicyRequest], max_bytes: int) -> PolicyRequest:
    """The request's body as `kind`, within the limits of `request.state`. Raises ApiError (4xx)."""
    body = decode(await _bytes(request, max_bytes))
    body = {field: value for field, value in body.items() if field in kind.model_fields}
    _refuse_early(body)
    parsed = _validated(body, kind)
    if _completions(parsed) > MAX_COMPLETIONS:
        field = "n" if (parsed.n or 1) > 1 else "prompt"
        message = f"{field}: asks for {_completions(parsed)} completions, more than the {MAX_COMPLETIONS} of a request"
        raise ApiError(400, message, param=field)
    limits: Limits | None = getattr(request.state, "limits", None)
    if limits is not None:
        _limit_tokens(parsed, body, limits)
    if limits is not None and limits.tokens_per_minute and parsed.stream:
        request.state.meter.hide_usage = _ask_for_usage(parsed)
    return parsed


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's body as a JSON object; an empty body is an empty one. Raises ApiError (4xx)."""
    raw = await _bytes(request, max_bytes)
    return decode(raw) if raw else {}


def _refuse_early(body: dict[str, Any]) -> None:
    """What must be refused before validation, which would compile it, or describe every one of 100,000 mistakes."""
    for field in REFUSED_FIELDS:
        if body.get(field) is not None:
            raise ApiError(400, f"{field}: not accepted by this endpoint; leave it out", param=field)
    constraints.check(body)
    for field, most in MAX_ITEMS.items():
        count = len(body[field]) if isinstance(body.get(field), list | dict) else 0
        if count > most:
            raise ApiError(400, f"{field}: {count} are more than the {most} that this endpoint takes", param=field)
    if not _is_prompt(body.get("prompt", "")):
        message = "prompt: must be text, a list of token ids, or a list of several such"
        raise ApiError(400, message, param="prompt")
    if not _is_ids(body.get("allowed_token_ids") or []):
        raise ApiError(400, "allowed_token_ids: must be a list of token ids", param="allowed_token_ids")


def _is_prompt(prompt: Any) -> bool:
    if not isinstance(prompt, list):
        return prompt is None or isinstance(prompt, str)
    return _is_ids(prompt) or all(isinstance(each, str) for each in prompt) or all(_is_ids(each) for each in prompt)


def _is_ids(tokens: Any) -> bool:
    return isinstance(tokens, list) and all(type(token) is int and 0 <= token < 1 << 31 for token in tokens)


def decode(raw: bytes) -> dict[str, Any]:
    """JSON object of finite numbers and encodable text; anything else is an ApiError (400)."""
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant, parse_float=_finite)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text, and no tokenizer takes it
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"body: not valid JSON: {error.msg.lower()} at {where}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "body: nested too deeply", code="invalid_json") from None
    except UnicodeError:
        raise ApiError(400, "body: not valid Unicode text", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"body: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "body: must be a JSON object", code="invalid_json")
    return body


async def _bytes(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(
        413, f"body: larger than {max_bytes} bytes, which is all this endpoint takes", code="body_too_large"
    )
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 20 or int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _validated(body: dict[str, Any], kind: type[PolicyRequest]) -> PolicyRequest:
    if issubclass(kind, ChatCompletionRequest):
        _check_messages(body.get("messages"))
    try:
        parsed = kind.model_validate(body)
        if isinstance(parsed, ChatCompletionRequest):
            _settle(parsed)
        return parsed
    except ValidationError as error:
        raise from_validation(error) from None
    except VLLMClientError as error:
        message = Exception.__str__(error)  # its own form adds the value
        raise ApiError(400, message, param=getattr(error, "parameter", None)) from None
    except WRONG_TYPES:
        field = _culprit(body, kind)
        raise ApiError(400, f"{field or 'body'}: has a value of the wrong type", param=field) from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages: must be a list of at least one message", param="messages")
    for position, message in enumerate(messages):
        field = f"messages[{position}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{field}: must be an object with role and content", param=field)
        if not isinstance(message.get("role"), str):
            raise ApiError(400, f"{field}.role: must be a string", param=f"{field}.role")
        content = message.get("content")
        if not _is_text(content) and not (content is None and message.get("tool_calls")):
            wanted = "must be text, or a list of parts of type 'text'"
            raise ApiError(400, f"{field}.content: {wanted}", param=f"{field}.content")


def _is_text(content: Any) -> bool:
    if isinstance(content, list):
        return all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
    return isinstance(content, str)


def _settle(request: ChatCompletionRequest) -> None:
    """Draws out pydantic's lazy iterators, which could not travel to a replica; their checks happen only now."""
    for message in cast(list[dict[str, Any]], request.messages):
        for field in ("content", "tool_calls"):
            if message.get(field) is not None and not isinstance(message[field], str):
                message[field] = list(message[field])


def _completions(request: ChatCompletionRequest | CompletionRequest) -> int:
    prompt = getattr(request, "prompt", None)
    prompts = len(prompt) if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)) else 1
    return max(1, prompts) * (request.n or 1)


def _limit_tokens(request: ChatCompletionRequest | CompletionRequest, body: dict[str, Any], limits: Limits) -> None:
    """Holds the request to the endpoint's limits on tokens. ApiError (400) when it asks for more."""
    request._max_prompt_tokens = limits.max_prompt_tokens
    most, completions = limits.max_answer_tokens, _completions(request)
    if most is None:
        return
    field = "max_completion_tokens" if getattr(request, "max_completion_tokens", None) is not None else "max_tokens"
    asked = None if body.get(field) is None else getattr(request, field)
    if asked is None and completions <= most:
        request._max_tokens = most // completions
    elif (asked or 1) * completions > most:
        times = f" for each of {completions} completions" if completions > 1 else ""
        raise ApiError(
            400, f"{field}: {asked or 1}{times} is more than the {most} tokens of an answer here", param=field
        )


def _ask_for_usage(request: ChatCompletionRequest | CompletionRequest) -> bool:
    """Makes a stream end with its usage, by which tokens are counted; whether the client had not asked for that."""
    if request.stream_options is not None and request.stream_options.include_usage:
        return False
    request.stream_options = StreamOptions(include_usage=True)
    return True


def _culprit(body: dict[str, Any], kind: type[PolicyRequest]) -> str | None:
    """The field whose type is wrong by itself."""
    for field in body:
        try:
            kind.model_validate({**HARMLESS, field: body[field]})
        except WRONG_TYPES:
            return field
        except (ValidationError, VLLMClientError):
            pass
    return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
