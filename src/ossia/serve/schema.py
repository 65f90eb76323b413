"""Bodies of requests. Unknown fields are ignored; those that are known and would change the answer are refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ossia.serve.errors import bad

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Stop = Annotated[str, Field(min_length=1, max_length=500)]
Stops = Stop | Annotated[list[Stop], Field(max_length=16)] | None
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)] | None
Count = Annotated[int, Field(ge=1, le=2**31)] | None
Temperature = Annotated[float, Field(ge=0, le=2)] | None
TopP = Annotated[float, Field(gt=0, le=1)] | None
Choices = Annotated[int, Field(ge=1, le=128)] | None
TopLogprobs = Annotated[int, Field(ge=0, le=20)] | None
Effort = Literal["low", "medium", "high"] | None

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
}


class Body(BaseModel):
    """Base of all: no conversions between types, no infinities."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are not done here, and the values with which they change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        for name, harmless in cls.refused.items() if isinstance(values, dict) else ():
            value = values.get(name)
            if value is not None and value not in harmless:
                raise bad(f"{name} is not supported here; leave it out", name, "unsupported_parameter")
        return values


class ContentPart(Body):
    """One piece of a message's content; text is the only kind that is read."""

    type: str
    text: str | None = None
    refusal: str | None = None


Content = str | list[ContentPart] | None


class FunctionCall(Body):
    """A call as the model wrote it."""

    name: Name
    arguments: str = ""


class ToolCallBody(Body):
    """One call of an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message of a conversation."""

    refused: ClassVar = {"function_call": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool of a chat."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class ChatToolChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A schema that the answer follows."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Body):
    """Extras of a stream."""

    include_usage: bool | None = None


class ChatRequest(Body):
    """The body of /v1/chat/completions."""

    refused: ClassVar = {
        **_NEUTRAL,
        "functions": ([],),
        "function_call": ("none",),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "web_search_options": (),
        "best_of": (1,),
    }

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    max_completion_tokens: Count = None
    temperature: Temperature = None
    top_p: TopP = None
    n: Choices = None
    stop: Stops = None
    seed: Seed = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs = None
    reasoning_effort: Effort = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChatToolChoice | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = None


class CompletionRequest(Body):
    """The body of /v1/completions: plain text or token ids go on."""

    refused: ClassVar = {**_NEUTRAL, "suffix": ("",), "best_of": (1,)}

    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    temperature: Temperature = None
    top_p: TopP = None
    n: Choices = None
    stop: Stops = None
    seed: Seed = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    ignore_eos: bool | None = None


class InputItem(Body):
    """One item of the input of a response: a message, a call, its result, or reasoning."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content = None
    name: str | None = None
    arguments: str | None = None
    call_id: str | None = None
    output: Content = None
    summary: list[ContentPart] | None = None


class ResponsesTool(Function):
    """A tool of a response."""

    type: str


class ResponsesToolChoice(Body):
    """The one function that must be called."""

    type: str
    name: str | None = None


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """How the answer's text is written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Body):
    """How much the model reasons."""

    effort: Effort = None
    summary: str | None = None


class ResponsesRequest(Body):
    """The body of /v1/responses."""

    refused: ClassVar = {
        **_NEUTRAL,
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "prompt": (),
        "truncation": ("disabled",),
    }

    model: str | None = None
    input: str | list[InputItem]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Count = None
    temperature: Temperature = None
    top_p: TopP = None
    top_logprobs: TopLogprobs = None
    include: list[str] | None = None
    seed: Seed = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
