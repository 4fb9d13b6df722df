"""What a request in OpenAI's form may say: everything is either done or refused by name, nothing is ignored.

Owns: the fields with their bounds, the errors, messages as the templates take them.
Not here: answers (openai_answers.py), HTTP (server.py). Field names and bounds are those of OpenAI's API
reference for chat completions and completions; top_k, min_p, repetition_penalty, stop_token_ids,
return_token_ids and chat_template_kwargs are those of vLLM's server.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from swift.template.types import Message

MAX_CHOICES = 128
MAX_STOPS = 16
# What this server cannot do, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": (),
    "functions": (),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """What went wrong, as OpenAI's clients read it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = {
            401: "authentication_error",
            429: "rate_limit_error",
            500: "server_error",
            503: "server_error",
        }
        self.body = {
            "error": {
                "message": message,
                "type": kind.get(status, "invalid_request_error"),
                "param": param,
                "code": code,
            }
        }


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nothing(cls, values: Any) -> Any:
        """null is how clients write what was not given."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class Function(_Strict):
    """A call that the model made earlier."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """One of them, with the name that its result refers to."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Function
    index: int = 0


class Part(_Strict):
    """A piece of a message; there are only texts."""

    type: str
    text: str = ""
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    video_url: Any = None


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] = ""
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    def to_message(self, place: str) -> Message:
        """As templates take it. Raises ApiError for what is no text; `place` names the message."""
        content = self.content
        if not isinstance(content, str):
            other = next((part.type for part in content if part.type != "text"), None)
            if other is not None:
                raise ApiError(400, f"{place} has a part of type {other}: this model reads text", param=place)
            content = "".join(part.text for part in content)
        if self.reasoning_content:
            content = f"<think>\n{self.reasoning_content}\n</think>\n\n{content}"
        message: Message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
        }
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        message |= {key: value for key, value in optional.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _read_call(call.function, place)}
                for call in self.tool_calls
            ]
        return message


def _read_call(function: Function, place: str) -> dict[str, Any]:
    try:
        return {"name": function.name, "arguments": json.loads(function.arguments or "{}")}
    except ValueError as error:
        raise ApiError(400, f"{place}: arguments of {function.name} are not JSON", param=place) from error


class StreamOptions(_Strict):
    include_usage: bool = False


class JsonSchema(_Strict):
    """What JSON has to look like; `strict` is always kept."""

    name: str = ""
    description: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool = True


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self

    @property
    def schema_(self) -> dict[str, Any] | None:
        """That the answer has to follow; None = any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class TemplateKwargs(_Strict):
    enable_thinking: bool | None = None


class SampledRequest(_Strict):
    """What both kinds of requests say."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] = []
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    # Who asks, for the books of a provider: no answer depends on them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in REFUSED.items():
            if values.get(name) is not None and values[name] not in neutral:
                raise ApiError(
                    400, f"{name} is not supported by this server; leave it out", param=name,
                    code="unsupported_parameter",
                )  # fmt: skip
        return {name: value for name, value in values.items() if name not in REFUSED}

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop))

    def check_stream(self) -> None:
        """Raises ApiError for settings of a stream where there is none."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")


class ChatRequest(SampledRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat(type="text")
    chat_template_kwargs: TemplateKwargs = TemplateKwargs()

    @property
    def limit(self) -> int | None:
        """Longest answer that was asked for, in tokens."""
        return self.max_completion_tokens or self.max_tokens

    def read_messages(self) -> list[Message]:
        """The conversation for a template; raises ApiError."""
        return [message.to_message(f"messages[{i}]") for i, message in enumerate(self.messages)]

    def read_tools(self) -> list[dict[str, Any]] | None:
        """Tools to show, None without any; raises ApiError."""
        for i, tool in enumerate(self.tools):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or "name" not in function:
                raise ApiError(
                    400, f"tools[{i}] has to be of type function, with a function that has a name",
                    param=f"tools[{i}]",
                )  # fmt: skip
        return self.tools if self.tools and self.tool_choice != "none" else None

    def forced_tools(self) -> list[dict[str, Any]]:
        """Those of which one has to be called, [] where none has to; raises ApiError."""
        if self.tool_choice in ("auto", "none"):
            return []
        wanted = self.tool_choice
        if isinstance(wanted, dict):
            wanted = wanted.get("function") or {}
            wanted = wanted.get("name") if isinstance(wanted, dict) else None
        found = [t for t in self.tools if self.tool_choice == "required" or t["function"]["name"] == wanted]
        if not found:
            names = ", ".join(tool["function"]["name"] for tool in self.tools) or "none"
            raise ApiError(
                400, f"tool_choice can be auto, none, required or a function of tools, which are: {names}",
                param="tool_choice",
            )  # fmt: skip
        return found

    def count_logprobs(self, most: int) -> int | None:
        """How many likely tokens to tell at each position; None = no log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        _check_logprobs("top_logprobs", self.top_logprobs or 0, most)
        return (self.top_logprobs or 0) if self.logprobs else None


class TextRequest(SampledRequest):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more texts, or lists of token ids; raises ApiError when nothing is asked."""
        prompts: Any = self.prompt
        if isinstance(prompts, str) or isinstance(next(iter(prompts), None), int):
            prompts = [prompts]
        if not prompts or not all(prompts):
            raise ApiError(400, "prompt is empty", param="prompt")
        return prompts

    def count_logprobs(self, most: int) -> int | None:
        _check_logprobs("logprobs", self.logprobs or 0, most)
        return self.logprobs


class EmbeddingRequest(_Strict):
    """Body of /v1/embeddings."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @property
    def conversations(self) -> list[list[Message]]:
        """Each text as what a user says, as the rows of a training were. Raises ApiError without any."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not texts:
            raise ApiError(400, "input is empty", param="input")
        return [[{"role": "user", "content": text}] for text in texts]


def _check_logprobs(name: str, asked: int, most: int) -> None:
    if asked > most:
        raise ApiError(400, f"{name} can be {most} at most, got {asked}", param=name)


def explain(errors: list[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's complaints as an error of ours."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    place = [part for part in first["loc"] if part != "body"]
    param = ""
    for part in place:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not known to this server", param=param, code="unknown_parameter")
    return ApiError(400, f"{param or 'the body'}: {first['msg']}", param=param or None)
