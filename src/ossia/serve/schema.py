"""Bodies of requests. What clients of other servers send and is not done here is refused by name, with the way out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, Tag

from ossia.serve.fields import Body, No, Other, kinds, wrong
from ossia.template.messages import BUILTIN_CALLS

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CalledName = Annotated[str, Field(pattern=r"^\S+$", max_length=512)]
"""Any name that a model can have written, dots included: what was given out is taken back."""
Stop = Annotated[str, Field(min_length=1, max_length=500)]
Stops = Stop | Annotated[list[Stop], Field(max_length=16)] | None
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)] | None
Count = Annotated[int, Field(ge=1, le=2**31)] | None
Temperature = Annotated[float, Field(ge=0, le=2)] | None
TopP = Annotated[float, Field(gt=0, le=1)] | None
Choices = Annotated[int, Field(ge=1, le=128)] | None
TopLogprobs = Annotated[int, Field(ge=0, le=20)] | None
Builtins = list[Literal["python", "browser"]] | None
Schema = dict[str, Any]

_NEAREST_EFFORT = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}


def _known_effort(value: Any) -> Any:
    if isinstance(value, str) and value in _NEAREST_EFFORT:
        raise wrong("", f"is {value!r}; gpt-oss reasons at low, medium or high: write {_NEAREST_EFFORT[value]!r}")
    return value


Effort = Annotated[Literal["low", "medium", "high"], BeforeValidator(_known_effort)] | None

_BOOKKEEPING = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"client_metadata", "request_id", "priority", "cache_salt", "cache_prompt", "id_slot", "timings_per_token"}
    | {"return_progress", "keep_alive", "provider", "session_id", "usage", "guided_decoding_backend"}
    | {"spaces_between_special_tokens"}
)
"""Who asks, what is kept, cached, routed or counted: OpenAI's and those of vLLM, llama.cpp, Ollama, OpenRouter."""

_FORM = "write response_format of type json_schema, or structured_outputs with json, choice or regex"
_SAMPLING = {
    "frequency_penalty": No((0,)),
    "presence_penalty": No((0,)),
    "repetition_penalty": No((1,)),
    "repeat_penalty": No((1,)),
    "length_penalty": No((1,)),
    "dry_multiplier": No((0,)),
    "logit_bias": No(({}, [])),
    "top_k": No((0, -1)),
    "top_a": No((0,)),
    "min_p": No((0,)),
    "typical_p": No((1,)),
    "tfs_z": No((1,)),
    "top_n_sigma": No((-1,)),
    "xtc_probability": No((0,)),
    "dynatemp_range": No((0,)),
    "mirostat": No((0,)),
    "mirostat_mode": No((0,)),
    "min_tokens": No((0,)),
    "n_predict": No((-1,), "write max_tokens"),
    "stop_token_ids": No(([],), "write the texts into stop"),
    "bad_words": No(([],)),
    "allowed_token_ids": No(),
    "logits_processors": No(([],)),
    "use_beam_search": No((False,)),
    "early_stopping": No((False,)),
    "best_of": No((1,)),
    "skip_special_tokens": No((True,)),
    "include_stop_str_in_output": No((False,)),
    "truncate_prompt_tokens": No((-1,), "send a shorter prompt"),
    "prompt_logprobs": No((False,)),
    "return_tokens_as_token_ids": No((False,)),
    "return_token_ids": No((False,)),
    "vllm_xargs": No(({},)),
    "extra_body": No(({},), "the openai client sends what is in it beside the other fields; do the same"),
}
_DIALOGUE = {
    "functions": No(([],), "write tools"),
    "chat_template": No((), "the model's own is used"),
    "documents": No(([],), "write them into a message"),
    "add_generation_prompt": No((True,)),
    "continue_final_message": No((False,), "an answer always begins anew"),
    "echo": No((False,)),
    "enable_thinking": No((True,), "gpt-oss always reasons; write reasoning_effort 'low' for less"),
    "thinking": No(
        (True, {"type": "enabled"}, {"type": "adaptive"}),
        "gpt-oss always reasons; write reasoning_effort for more or less",
    ),
    "thinking_budget": No((), "write reasoning_effort"),
    "guided_grammar": No((), _FORM),
    "guided_whitespace_pattern": No((), _FORM),
    "grammar": No(("",), _FORM),
    "json_schema": No(({},), _FORM),
    "transforms": No(([],)),
    "plugins": No(([],)),
    "models": No(([],), "write one model"),
    "suffix": No(("",)),
}


# --- contents


class TextPart(Body):
    """Text of a message."""

    harmless: ClassVar = frozenset(
        {"annotations", "logprobs", "cache_control", "prompt_cache_breakpoint", "id", "index", "parsed"}
    )

    type: Literal["text", "input_text", "output_text"] = "text"
    text: str


class RefusalPart(Body):
    """A refusal, which an assistant said."""

    type: Literal["refusal"]
    refusal: str


class ReasoningPart(Body):
    """Reasoning of an assistant; its text has one of four names."""

    harmless: ClassVar = frozenset({"id", "index", "signature", "format", "status"})
    refused: ClassVar = {"summary": No(([],), "write text"), "encrypted_content": No((), "it cannot be read here")}

    type: Literal["reasoning", "reasoning_text", "summary_text", "thinking"]
    text: str | None = None
    thinking: str | None = None
    reasoning: str | None = None


class OtherPart(Other):
    """A part that is no text."""

    takes: ClassVar = "only text is read here"


_PARTS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "<text>"),
    "refusal": "<refusal>",
    **dict.fromkeys(("reasoning", "reasoning_text", "summary_text", "thinking"), "<reasoning>"),
}
ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[ReasoningPart, Tag("<reasoning>")]
    | Annotated[OtherPart, Tag("<other>")],
    kinds("type", _PARTS, absent="text"),
]
Content = str | list[ContentPart] | None


# --- messages of chats


class FunctionCall(Body):
    """A call as the model wrote it."""

    harmless: ClassVar = frozenset({"parsed_arguments"})

    name: CalledName
    arguments: str = ""


class ToolCallBody(Body):
    """One call of an assistant's message."""

    harmless: ClassVar = frozenset({"index", "extra_content", "provider_specific_fields"})

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class OtherToolCall(Other):
    """A call of another kind."""

    takes: ClassVar = "calls of type function are read here, of built-in tools too"


AnyToolCall = Annotated[
    Annotated[ToolCallBody, Tag("<function>")] | Annotated[OtherToolCall, Tag("<other>")],
    kinds("type", {"function": "<function>"}, absent="function"),
]

_MESSAGE = frozenset({"id", "index", "status", "cache_control", "created", "created_at"})
_NAMED = _MESSAGE | {"name"}
"""The chat format has no place for the name of a speaker."""
_NO_CALLS = {"tool_calls": No(([],), "only the assistant calls")}


class InstructionMessage(Body):
    """What the developer says."""

    harmless: ClassVar = _NAMED
    refused: ClassVar = _NO_CALLS

    role: Literal["system", "developer"]
    content: str | list[ContentPart]


class UserMessage(Body):
    """What the user says."""

    harmless: ClassVar = _NAMED
    refused: ClassVar = _NO_CALLS

    role: Literal["user"]
    content: str | list[ContentPart]


class ReasoningDetail(Body):
    """Reasoning as OpenRouter (`reasoning_details`) and LiteLLM (`thinking_blocks`) give it out, one piece."""

    harmless: ClassVar = frozenset({"id", "index", "format", "signature"})

    type: Literal["reasoning.text", "reasoning.summary", "reasoning.encrypted", "thinking", "redacted_thinking"]
    text: str | None = None
    summary: str | None = None
    thinking: str | None = None
    data: str | None = None


class AssistantMessage(Body):
    """What the model said: reasoning, text, calls. Reasoning goes by several names; two that differ are an error."""

    harmless: ClassVar = _NAMED | {"annotations", "parsed", "provider_specific_fields"}
    refused: ClassVar = {
        "audio": No(),
        "images": No(([],)),
        "prefix": No((False,), "an answer always begins anew"),
        "tool_call_id": No((), "only a message of role tool answers a call"),
    }

    role: Literal["assistant"]
    content: Content = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    reasoning_details: list[ReasoningDetail] | None = None
    thinking_blocks: list[ReasoningDetail] | None = None
    tool_calls: list[AnyToolCall] | None = None
    function_call: FunctionCall | None = None


class ToolMessage(Body):
    """What a tool answered."""

    harmless: ClassVar = _MESSAGE
    refused: ClassVar = _NO_CALLS

    role: Literal["tool"]
    content: str | list[ContentPart]
    tool_call_id: str | None = None
    name: CalledName | None = None


class FunctionMessage(Body):
    """The older form of a tool's answer."""

    harmless: ClassVar = _MESSAGE

    role: Literal["function"]
    name: CalledName
    content: str | list[ContentPart]


class OtherMessage(Other):
    """A message of nobody who speaks here."""

    by: ClassVar = "role"
    takes: ClassVar = "it takes system, developer, user, assistant, tool or function"


_ROLES = {
    **dict.fromkeys(("system", "developer"), "<instructions>"),
    **{role: f"<{role}>" for role in ("user", "assistant", "tool", "function")},
}
ChatMessage = Annotated[
    Annotated[InstructionMessage, Tag("<instructions>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")]
    | Annotated[FunctionMessage, Tag("<function>")]
    | Annotated[OtherMessage, Tag("<other>")],
    kinds("role", _ROLES),
]


# --- tools

_OURS = 'functions are supported here, and gpt-oss\'s own {"type": "python"} and {"type": "browser"}'
_GIVEN_BACK = "its calls are given back, for the client to carry out"
_PYTHON = f'write {{"type": "python"}}, gpt-oss\'s own; {_GIVEN_BACK}'
_BROWSER = f'write {{"type": "browser"}}, gpt-oss\'s own; {_GIVEN_BACK}'
_WEB = ("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11", "browser_search")
_INSTEAD = {"code_interpreter": _PYTHON, **dict.fromkeys(_WEB, _BROWSER)}


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    harmless: ClassVar = frozenset({"cache_control"})

    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    """A function of a chat."""

    harmless: ClassVar = frozenset({"cache_control"})
    refused: ClassVar = dict.fromkeys(
        ("name", "description", "parameters", "strict"), No((), "in chats it stands inside of function")
    )

    type: Literal["function"]
    function: Function


class BuiltinTool(Body):
    """A tool that gpt-oss knows from its training."""

    type: Literal["python", "browser"]


class OtherTool(Other):
    """A tool that other servers carry out."""

    takes: ClassVar = f"only {_OURS}"
    instead: ClassVar = _INSTEAD


_TOOLS = {"function": "<function>", **dict.fromkeys(BUILTIN_CALLS, "<builtin>")}
ChatTool = Annotated[
    Annotated[Tool, Tag("<function>")]
    | Annotated[BuiltinTool, Tag("<builtin>")]
    | Annotated[OtherTool, Tag("<other>")],
    kinds("type", _TOOLS),
]


class NamedFunction(Body):
    """The name of a function."""

    name: str


class FunctionChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class OtherChoice(Other):
    """Another way to choose."""

    takes: ClassVar = "it takes function, python or browser"
    instead: ClassVar = _INSTEAD


Word = Literal["none", "auto", "required"]
ChatToolChoice = Annotated[
    Annotated[FunctionChoice, Tag("<function>")]
    | Annotated[BuiltinTool, Tag("<builtin>")]
    | Annotated[OtherChoice, Tag("<other>")],
    kinds("type", _TOOLS),
]


# --- forms of answers


class JsonSchema(Body):
    """A schema that the answer follows. The answer is held to it whatever `strict` says; the model is not shown it."""

    harmless: ClassVar = frozenset({"name", "description", "strict"})

    schema_: Schema | None = Field(None, alias="schema")


class ResponseFormat(Body):
    """The form of the answer. `schema` beside the type is how llama.cpp and others write it."""

    harmless: ClassVar = frozenset({"name", "strict"})

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(None, alias="schema")


class StructuredOutputs(Body):
    """vLLM's way to ask for a form."""

    harmless: ClassVar = frozenset({"disable_fallback", "disable_any_whitespace"})
    refused: ClassVar = {
        "grammar": No((), _FORM),
        "structural_tag": No((), _FORM),
        "whitespace_pattern": No(),
        "disable_additional_properties": No((False,), "write additionalProperties into the schema"),
    }

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


class StreamOptions(Body):
    """Extras of a stream."""

    harmless: ClassVar = frozenset({"include_obfuscation"})
    refused: ClassVar = {"continuous_usage_stats": No((False,), "the last chunk counts, with include_usage")}

    include_usage: bool | None = None


# --- requests


class TemplateKwargs(Body):
    """What vLLM and llama.cpp hand to a chat template."""

    refused: ClassVar = {
        "model_identity": No((), "it is an option of the server, --model_identity"),
        **{name: _DIALOGUE[name] for name in ("enable_thinking", "thinking", "documents")},
        **{name: _DIALOGUE[name] for name in ("add_generation_prompt", "continue_final_message")},
    }

    reasoning_effort: Effort = None
    builtin_tools: Builtins = None


class ChatReasoning(Body):
    """OpenRouter's way to say how much the model reasons; `exclude` leaves the reasoning out of the answer."""

    harmless: ClassVar = frozenset({"summary"})
    refused: ClassVar = {
        "enabled": No((True,), "gpt-oss always reasons; write effort 'low' for less"),
        "max_tokens": No((), "write effort"),
    }

    effort: Effort = None
    exclude: bool | None = None


class ChatRequest(Body):
    """The body of /v1/chat/completions."""

    # One call a turn is all that gpt-oss makes, and a prediction only hastens an answer.
    harmless: ClassVar = _BOOKKEEPING | {"parallel_tool_calls", "prediction"}
    refused: ClassVar = {
        **_SAMPLING,
        **_DIALOGUE,
        "function_call": No(("none", "auto"), "write tool_choice"),
        "audio": No(),
        "modalities": No((["text"],)),
        "web_search_options": No((), _BROWSER),
        "verbosity": No(("medium",), "gpt-oss has no such setting; ask for it in a message"),
        "reasoning_format": No(("parsed", "auto", "deepseek"), "write include_reasoning"),
        "prompt": No((), "write messages"),
        "input": No((), "write messages"),
        "instructions": No((), "write a message of role developer"),
        "max_output_tokens": No((), "write max_completion_tokens"),
        "text": No((), "write response_format"),
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
    reasoning: ChatReasoning | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    tools: list[ChatTool] | None = None
    builtin_tools: Builtins = None
    tool_choice: Word | ChatToolChoice | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_choice: list[str] | None = None
    guided_regex: str | None = None
    ignore_eos: bool | None = None


_CHATS_ONLY = No((), "it is for chats")


class CompletionRequest(Body):
    """The body of /v1/completions: plain text or token ids go on."""

    harmless: ClassVar = _BOOKKEEPING
    refused: ClassVar = {
        **_SAMPLING,
        "suffix": No(("",)),
        "add_special_tokens": No((True,), "send token ids"),
        **dict.fromkeys(("response_format", "structured_outputs", "guided_json", "guided_choice"), _CHATS_ONLY),
        **dict.fromkeys(("guided_regex", "guided_grammar", "grammar", "json_schema"), _CHATS_ONLY),
        **dict.fromkeys(("tools", "tool_choice", "reasoning_effort", "reasoning", "messages"), _CHATS_ONLY),
        "max_completion_tokens": No((), "write max_tokens"),
        "top_logprobs": No((), "write logprobs, which is a number here"),
    }

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


# --- responses

_ITEM = frozenset({"id", "status", "created_by", "index"})


class MessageItem(Body):
    """A message. `phase` tells what an assistant said before it went on from what it ended with."""

    harmless: ClassVar = _ITEM | {"name"}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    phase: Literal["commentary", "final_answer"] | None = None


class ReasoningItem(Body):
    """Reasoning; `summary` is read where there is no `content`."""

    harmless: ClassVar = _ITEM | {"format", "signature"}

    type: Literal["reasoning"]
    content: Content = None
    summary: list[ContentPart] | None = None
    encrypted_content: str | None = None


class CallItem(Body):
    """A call."""

    harmless: ClassVar = _ITEM | {"parsed_arguments"}

    type: Literal["function_call"]
    call_id: str
    name: CalledName
    arguments: str


class ResultItem(Body):
    """What a function returned."""

    harmless: ClassVar = _ITEM | {"name"}

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]


class OtherItem(Other):
    """An item that other servers make."""

    takes: ClassVar = "messages, reasoning, function_call and function_call_output are read here"
    instead: ClassVar = {"item_reference": "nothing is stored here; send the item itself"}


_ITEMS = {kind: f"<{kind}>" for kind in ("message", "reasoning", "function_call", "function_call_output")}
InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[ResultItem, Tag("<function_call_output>")]
    | Annotated[OtherItem, Tag("<other>")],
    kinds("type", _ITEMS, absent="message"),
]


class ResponsesTool(Function):
    """A function of a response."""

    refused: ClassVar = {"function": No((), "in responses its name and parameters stand beside type")}

    type: Literal["function"]


AnyResponsesTool = Annotated[
    Annotated[ResponsesTool, Tag("<function>")]
    | Annotated[BuiltinTool, Tag("<builtin>")]
    | Annotated[OtherTool, Tag("<other>")],
    kinds("type", _TOOLS),
]


class ResponsesFunctionChoice(Body):
    """The one function that must be called."""

    refused: ClassVar = {"function": No((), "in responses its name stands beside type")}

    type: Literal["function"]
    name: str


ResponsesToolChoice = Annotated[
    Annotated[ResponsesFunctionChoice, Tag("<function>")]
    | Annotated[BuiltinTool, Tag("<builtin>")]
    | Annotated[OtherChoice, Tag("<other>")],
    kinds("type", _TOOLS),
]


class TextFormat(Body):
    """The form of the answer, held to whatever `strict` says; `name`, `description` and `strict` are given back."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """How the answer's text is written."""

    refused: ClassVar = {"verbosity": ChatRequest.refused["verbosity"]}

    format: TextFormat | None = None


class ReasoningOptions(Body):
    """How much the model reasons. Summaries are not made: the reasoning itself is given out."""

    harmless: ClassVar = frozenset({"summary", "generate_summary"})
    refused: ClassVar = ChatReasoning.refused

    effort: Effort = None


LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""All but log-probabilities are parts of items that are never given out here."""


class ResponsesRequest(Body):
    """The body of /v1/responses."""

    harmless: ClassVar = _BOOKKEEPING - {"metadata"} | {"parallel_tool_calls", "max_tool_calls", "stream_options"}
    refused: ClassVar = {
        **_SAMPLING,
        **_DIALOGUE,
        "previous_response_id": No((), "nothing is stored; send the whole input"),
        "conversation": No((), "nothing is stored; send the whole input"),
        "background": No((False,)),
        "prompt": No((), "write instructions and input"),
        "truncation": No(("disabled",), "send a shorter input"),
        "context_management": No(([],), "send a shorter input"),
        "messages": No((), "write input"),
        "response_format": No((), "write text.format"),
        **dict.fromkeys(("structured_outputs", "guided_json"), No((), "write text.format")),
        **dict.fromkeys(("guided_choice", "guided_regex"), _CHATS_ONLY),
        "reasoning_effort": No((), "write reasoning.effort"),
        "include_reasoning": No((True,)),
        "max_completion_tokens": No((), "write max_output_tokens"),
        "n": No((1,)),
        "stop": No(([],), "it is for chats"),
        "logprobs": No((False,), "write top_logprobs"),
        "verbosity": ChatRequest.refused["verbosity"],
        "ignore_eos": No((False,), "it is for chats"),
    }

    model: str | None = None
    input: str | list[InputItem]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Count = None
    max_tokens: Count = None
    temperature: Temperature = None
    top_p: TopP = None
    top_logprobs: TopLogprobs = None
    include: list[Include] | None = None
    seed: Seed = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    text: TextOptions | None = None
    tools: list[AnyResponsesTool] | None = None
    builtin_tools: Builtins = None
    tool_choice: Word | ResponsesToolChoice | None = None
    metadata: dict[str, str] | None = None


PLACES: tuple[tuple[str, type[Body]], ...] = (
    ("chats", ChatRequest),
    ("responses", ResponsesRequest),
    ("completions", CompletionRequest),
    ("a message: system, developer", InstructionMessage),
    ("a message: user", UserMessage),
    ("a message: assistant", AssistantMessage),
    ("a message: tool", ToolMessage),
    ("a message: function", FunctionMessage),
    ("`reasoning_details`, `thinking_blocks`", ReasoningDetail),
    ("`tool_calls`", ToolCallBody),
    ("`function`, `function_call` of a call", FunctionCall),
    ("an item: message", MessageItem),
    ("an item: reasoning", ReasoningItem),
    ("an item: function_call", CallItem),
    ("an item: function_call_output", ResultItem),
    ("a part: text", TextPart),
    ("a part: refusal", RefusalPart),
    ("a part: reasoning", ReasoningPart),
    ("a tool of chats", Tool),
    ("`function` of a tool", Function),
    ("a tool of responses", ResponsesTool),
    ("a built-in tool, `tool_choice` of one", BuiltinTool),
    ("`tool_choice` of chats", FunctionChoice),
    ("`function` of `tool_choice`", NamedFunction),
    ("`tool_choice` of responses", ResponsesFunctionChoice),
    ("`reasoning` of chats", ChatReasoning),
    ("`reasoning` of responses", ReasoningOptions),
    ("`chat_template_kwargs`", TemplateKwargs),
    ("`response_format`", ResponseFormat),
    ("`json_schema` in it", JsonSchema),
    ("`structured_outputs`", StructuredOutputs),
    ("`text`", TextOptions),
    ("`text.format`", TextFormat),
    ("`stream_options`", StreamOptions),
)
"""Every body that is read, with its name in docs/serve.md."""
