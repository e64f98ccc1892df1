import gc
import json
import time

import pytest
import tokenizers

from qlora_jax.hf.chat import ChatTemplate, load_chat_template, token_mask
from qlora_jax.hf.tokenizers import load_tokenizer

# Chat templates in the style of each family, written for these tests: who may speak when, what
# becomes of the system message, tools and thinking. Then the roles and further special tokens.
LLAMA2 = """
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, turns = none, messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 is even) %}
        {{- raise_exception('Turns of user and assistant alternate, from the user on.') }}
    {%- endif %}
    {%- set text = turn.content | trim %}
    {%- if loop.first and system is not none %}
        {%- set text = '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ text %}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- bos_token + '[INST] ' + text + ' [/INST]' }}
    {%- else %}
        {{- ' ' + text + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
LLAMA3 = """
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none and tools %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{{- 'Today Date: ' + (date_string if date_string is defined else '26 Jul 2024') + '\\n\\n' }}
{{- ns.system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('One tool call at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {%- set role = 'ipython' if message.role == 'tool' else message.role %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
        {%- if loop.first and tools %}
            {{- 'Functions you may call:\\n\\n' }}
            {%- for tool in tools %}
                {{- tool | tojson(indent=4) + '\\n\\n' }}
            {%- endfor %}
        {%- endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}
        {%- if loop.last and system_message is defined %}
            {{- system_message + '\\n\\n' }}
        {%- endif %}
        {{- message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {{- call.function | tojson }}
            {%- if not loop.last %}{{ ', ' }}{% endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Roles are user, assistant and tool; a system message comes first.') }}
    {%- endif %}
{%- endfor %}
"""
MIXTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{% endfor %}"""
QWEN25 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a careful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nSignatures, one a line:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a careful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
          or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Thinking is shown after the last question alone, and an empty one opens a turn that has none.
QWEN3 = """
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
          and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content, reasoning = message.content or '', '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + tool_call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- if loop.first and tools %}
            {{- '\\n<tools>' }}
            {%- for tool in tools %}{{- '\\n' ~ tool | tojson }}{%- endfor %}
            {{- '\\n</tools>' }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set first_user_prefix = '' %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("user and assistant take turns") }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- elif message['content'] is iterable %}
        {%- for item in message['content'] if item['type'] == 'text' %}
            {{- item['text'] | trim }}
        {%- endfor %}
    {%- else %}
        {{- raise_exception("Invalid content type") }}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' }}
{%- endif -%}
"""
PHI3 = """{% for message in messages %}
{% if message['role'] in ['system', 'user'] and message['content'] %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
PHI4 = """{% for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '<|im_sep|>' ~ message.content ~ '<|im_end|>' -}}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
OLMO2 = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + '\\n' -}}
{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + '\\n' -}}
{% elif message['role'] == 'assistant' %}
{% if not loop.last %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' -}}
{% else %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token -}}
{% endif %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>\\n' -}}
{% endif %}
{% endfor %}"""
# The one with generation blocks.
SMOLLM3 = """
{%- set thinks = enable_thinking | default(true) %}
{%- if messages[0].role == 'system' %}
    {%- set wish = messages[0].content %}
    {%- if '/no_think' in wish %}{%- set thinks = false %}{%- endif %}
    {%- set wish = wish.replace('/no_think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\n## Metadata\\n\\n' }}
{{- 'Today Date: ' ~ (strftime_now('%d %B %Y') | length > 8) ~ '\\n' }}
{{- 'Reasoning Mode: ' + ('/think' if thinks else '/no_think') + '\\n\\n' }}
{%- if wish %}{{- wish + '\\n' }}{%- endif %}
{%- for tool in xml_tools or tools or [] %}{{- tool | string + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if not thinks %}
            {{- '<think>\\n\\n</think>\\n' }}
        {%- endif %}
        {{- (message.content or '').lstrip('\\n') + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n' + message.content | string + '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if thinks else '<think>\\n\\n</think>\\n') }}
{%- endif %}
"""
IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
  "llama2": (LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"}, ()),
  "llama3": (
    LLAMA3,
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ("<|start_header_id|>", "<|end_header_id|>"),
  ),
  "mistral": (
    MISTRAL,
    {"bos_token": "<s>", "eos_token": "</s>"},
    ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
  ),
  "mixtral": (MIXTRAL, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}, ("<unk>",)),
  "qwen2.5": (QWEN25, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, IM),
  "qwen3": (QWEN3, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, IM),
  "gemma": (
    GEMMA,
    {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    ("<start_of_turn>", "<end_of_turn>"),
  ),
  "phi3": (
    PHI3,
    {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
  ),
  "phi4": (PHI4, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, (*IM, "<|im_sep|>")),
  "olmo2": (OLMO2, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, ()),
  "smollm3": (SMOLLM3, {"eos_token": "<|im_end|>"}, (*IM, "<think>", "</think>")),
}

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " What is 1 < 2 & é? 🙂 "}
ASSISTANT = {"role": "assistant", "content": "True.\n"}
AGAIN = {"role": "user", "content": "Sure?"}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
TOOL = {
  "type": "function",
  "function": {
    "name": "add",
    "description": "Adds <b>two</b> numbers & é.",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
  },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<é>"}}}
CONVERSATIONS = {
  "question": ([USER], {}),
  "prompt": ([USER], {"add_generation_prompt": True}),
  "answer": ([USER, ASSISTANT], {}),
  "system": ([SYSTEM, USER, ASSISTANT, AGAIN], {"add_generation_prompt": True}),
  "turns": ([SYSTEM, USER, ASSISTANT, AGAIN, THOUGHT], {}),
  "no thinking": ([USER], {"add_generation_prompt": True, "enable_thinking": False}),
  "reasoning": (
    [USER, {**ASSISTANT, "thinking": "Hm."}, AGAIN, {**ASSISTANT, "reasoning": "So"}],
    {},
  ),
  "nothing said": ([USER, {"role": "assistant", "content": "", "tool_calls": None}], {}),
  "parts": ([{"role": "user", "content": [{"type": "text", "text": " Hi "}]}], {}),
  "out of turn": ([ASSISTANT, USER], {}),
  "special tokens": ([{"role": "user", "content": "</s><|im_end|> <eos>x"}, ASSISTANT], {}),
  "variables": ([USER], {"date_string": "1 May 2025", "bos_token": "<|x|>"}),
  "tools": (
    [
      SYSTEM,
      USER,
      {"role": "assistant", "content": None, "tool_calls": [CALL]},
      {"role": "tool", "content": "3"},
      {"role": "assistant", "content": "3 & no more."},
    ],
    {"tools": [TOOL]},
  ),
}


def byte_tokenizer(directory, roles, special):
  """A tokenizer.json of bytes and special tokens."""
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  alphabet = {letter: i for i, letter in enumerate(sorted(byte_level.alphabet()))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
  tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(list(dict.fromkeys([*roles.values(), *special])))
  tokenizer.save(str(directory / "tokenizer.json"))
  (directory / "tokenizer_config.json").write_text(json.dumps(roles))


def family_directory(directory, name):
  source, roles, special = FAMILIES[name]
  byte_tokenizer(directory, roles, special)
  (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
  return directory


def load(directory, **options):
  return load_chat_template(directory, load_tokenizer(directory), **options)


def template_of(tmp_path, source, **options):
  byte_tokenizer(tmp_path, {"bos_token": "<s>", "eos_token": "</s>"}, ())
  (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
  return load(tmp_path, **options)


TURNS = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, AGAIN]


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    (
      "llama2",
      "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Ho </s><s>[INST] Sure? [/INST]",
    ),
    (
      "llama3",
      "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
      "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
      "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
      "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
      "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
      "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    ("mistral", "<s>[INST] Hi[/INST] Ho</s>[INST] Be brief.\n\nSure?[/INST]"),
    (
      "qwen2.5",
      "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
      "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
      "<|im_start|>assistant\n",
    ),
    (
      "qwen3",
      "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
      "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
      "<|im_start|>assistant\n",
    ),
    (
      "gemma",
      "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
      "Ho<end_of_turn>\n<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
      "phi3",
      "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHo<|end|>\n"
      "<|user|>\nSure?<|end|>\n<|assistant|>\n",
    ),
    (
      "phi4",
      "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
      "<|im_start|>assistant<|im_sep|>Ho<|im_end|><|im_start|>user<|im_sep|>Sure?<|im_end|>"
      "<|im_start|>assistant<|im_sep|>",
    ),
    (
      "olmo2",
      "<|endoftext|><|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHo<|endoftext|>\n"
      "<|user|>\nSure?\n<|assistant|>\n",
    ),
    (
      "smollm3",
      "<|im_start|>system\n## Metadata\n\nToday Date: True\nReasoning Mode: /think\n\n"
      "Be brief.\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
      "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    ),
  ],
)
def test_families_write_turns_as_they_should(tmp_path, name, expected):
  template = load(family_directory(tmp_path, name))
  assert template.render(TURNS, add_generation_prompt=True) == expected
  ids = template.encode(TURNS, add_generation_prompt=True)
  assert ids == load_tokenizer(tmp_path).encode(expected)


def test_mixtral_and_its_refusal(tmp_path):
  template = load(family_directory(tmp_path, "mixtral"))
  text = template.render(TURNS[1:])
  assert text == "<s> [INST] Hi [/INST] Ho</s> [INST] Sure? [/INST]"
  message = rf"^{tmp_path}/chat_template\.jinja: Conversation roles must alternate"
  with pytest.raises(ValueError, match=message):
    template.render(TURNS)


def test_tools_and_thinking(tmp_path):
  template = load(family_directory(tmp_path, "qwen3"))
  conversation, options = CONVERSATIONS["tools"]
  call = '{"name": "add", "arguments": {"a": 1, "b": "<é>"}}'
  text = template.render(conversation, **options)
  # JSON is written plainly: no escapes of HTML, none of é.
  assert text.startswith(
    "<|im_start|>system\nBe brief.\n<tools>\n" + json.dumps(TOOL, ensure_ascii=False) + "\n</tools>"
  )
  assert f"<|im_start|>assistant\n\n<tool_call>\n{call}\n</tool_call><|im_end|>" in text
  assert text.endswith("<think>\n\n</think>\n\n3 & no more.<|im_end|>\n")
  text = template.render([USER, {**ASSISTANT, "reasoning": "Hm."}])
  assert text.endswith("<think>\nHm.\n</think>\n\nTrue.\n<|im_end|>\n")
  text = template.render([USER], add_generation_prompt=True, enable_thinking=False)
  assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def sentencepiece_directory(directory, name, shared):
  source, roles, special = FAMILIES[name]
  model = shared / "data" / "tokenizers" / "mistral-v1" / "tokenizer.model"
  (directory / "tokenizer.model").write_bytes(model.read_bytes())
  added = [
    t for t in dict.fromkeys([*roles.values(), *special]) if t not in ("<s>", "</s>", "<unk>")
  ]
  decoder = {str(32000 + i): {"content": t, "special": True} for i, t in enumerate(added)}
  config = {**roles, "added_tokens_decoder": decoder, "chat_template": source}
  (directory / "tokenizer_config.json").write_text(json.dumps(config))
  return directory


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("name", FAMILIES)
def test_text_ids_and_masks_against_transformers(tmp_path, request, name, kind):
  transformers = pytest.importorskip("transformers")
  if kind == "bytes":
    family_directory(tmp_path, name)
  else:
    sentencepiece_directory(tmp_path, name, request.getfixturevalue("shared"))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = load(tmp_path)
  rendered = 0
  for messages, options in CONVERSATIONS.values():
    try:
      expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    except Exception:  # the template's own refusals, in whatever class they come
      with pytest.raises(ValueError, match=str(tmp_path)):
        ours.render(messages, **options)
      continue
    rendered += 1
    assert ours.render(messages, **options) == expected
    ids = theirs.apply_chat_template(messages, return_dict=False, **options)
    assert ours.encode(messages, **options) == ids
    if name == "smollm3":
      masked = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **options
      )
      ids, mask = ours.encode_with_mask(messages, **options)
      assert ids == masked["input_ids"]
      assert [int(each) for each in mask] == masked["assistant_masks"]
      assert any(mask) == any(message["role"] == "assistant" for message in messages)
  assert rendered > len(CONVERSATIONS) / 2


def test_spans_are_what_the_assistant_says(tmp_path):
  template = load(family_directory(tmp_path, "smollm3"))
  conversation = [SYSTEM, USER, ASSISTANT, AGAIN, THOUGHT]
  text, spans = template.render_with_spans(conversation)
  said = [text[start:stop] for start, stop in spans]
  assert said == ["True.\n<|im_end|>", "<think>\nHm.\n</think>\n\nYes.<|im_end|>"]
  assert text == template.render(conversation)
  ids, mask = template.encode_with_mask(conversation)
  tokenizer = load_tokenizer(tmp_path)
  learned = [i for i, each in zip(ids, mask, strict=True) if each]
  assert learned == tokenizer.encode("".join(said))


def test_tokens_that_touch_a_span_are_in_it():
  offsets = [(0, 2), (2, 4), (4, 4), (4, 6), (6, 9), (9, 10)]
  assert token_mask(offsets, [(3, 5), (9, 12)]) == [False, True, True, True, False, True]
  assert token_mask(offsets, []) == [False] * 6
  assert token_mask([], [(0, 1)]) == []


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("{{ messages[0].content }}", r"no {% generation %} block"),
    (
      "{% macro say() %}long{% generation %}x{% endgeneration %}{% endmacro %}before{{ say() }}",
      "inside of a macro",
    ),
  ],
)
def test_spans_that_are_not_known_are_refused(tmp_path, source, message):
  template = template_of(tmp_path, source)
  assert template.render([USER])
  with pytest.raises(ValueError, match=rf"^{tmp_path}/chat_template\.jinja: .*{message}"):
    template.render_with_spans([USER])


# Each is stopped, by the sandbox or from outside, within the second that it gets and a few more.
@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "after 1 s"),
    (
      "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
      "1 s",
    ),
    ("{{ lipsum(n=10**9) }}", "after 1 s"),
    ("{{ 'x' * 10**10 }}", "1 GiB of memory"),
    (
      "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
      "1 GiB of memory",
    ),
    ("{{ '%09999999999d' % 1 }}", "1 GiB of memory|OverflowError|ValueError"),
    ("{{ 'x' * 2**25 }}", "more than 16,777,216 characters"),
    ("{{ range(10**9) }}", "Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ ''.__class__ }}", "attribute '__class__' of a str is not for templates"),
    ("{{ messages | attr('__class__') }}", "attribute '__class__' of a list is not for"),
    ("{{ messages[0]['__class__'] }}", "attribute '__class__' of a dict is not for"),
    ("{{ '{0.__class__}'.format(1) }}", "attribute '__class__' of a int is not for"),
    ("{{ cycler.__init__.__globals__ }}", "attribute '__init__' of a type is not for"),
    ("{{ dict.__globals__ }}", "attribute '__globals__' of a function is not for"),
    ("{{ raise_exception.__globals__ }}", "attribute '__globals__' of a function is not for"),
    ("{% set n = namespace(__x=1) %}", "'__x' begins with an underscore"),
    ("{% set n = namespace() %}{% set n.__x = 1 %}", "'__x' begins with an underscore"),
    ("{{ messages.append(1) }}", "attribute 'append' of a list is not for templates"),
    ("{{ messages[0].update({'a': 1}) }}", "attribute 'update' of a dict is not for templates"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ raise_exception('not\n  so') }}", "not so$"),
    ("{{ nothing.at.all }}", "'nothing' is undefined$"),
    ("line\n{% for", "line 2: "),
    ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero$"),
  ],
)
def test_hostile_and_wrong_templates_are_stopped(tmp_path, source, message):
  # Those that never end alone are to be stopped: on a busy machine the others take a while.
  template = template_of(tmp_path, source, seconds=1.0 if message.endswith("1 s") else 8.0)
  start = time.monotonic()
  with pytest.raises(ValueError, match=message) as caught:
    template.render([USER])
  assert time.monotonic() - start < 10
  assert str(caught.value).startswith(f"{tmp_path}/chat_template.jinja: ")
  assert "\n" not in str(caught.value)
  # The next chat is rendered as if nothing had been.
  template.templates["default"] = "{{ messages[0].role }}"
  assert template.render([USER]) == "user"


def test_a_render_that_was_interrupted_leaves_no_answer_behind(tmp_path, monkeypatch):
  template = template_of(tmp_path, "{{ messages[0].content }}")
  assert template.render([{"role": "user", "content": "a"}]) == "a"
  process = template._process
  assert process is not None and process.stdout is not None
  pipe = process.stdout

  class Interrupted:
    close = pipe.close

    def readline(self):
      raise KeyboardInterrupt

  monkeypatch.setattr(process, "stdout", Interrupted())
  with pytest.raises(KeyboardInterrupt):
    template.render([{"role": "user", "content": "b"}])
  assert template.render([{"role": "user", "content": "c"}]) == "c"


def test_the_process_ends_with_the_template(tmp_path):
  template = template_of(tmp_path, "{{ bos_token }}")
  assert template.render([USER]) == "<s>"
  process = template._process
  assert process is not None and process.poll() is None
  del template
  gc.collect()
  assert process.poll() is not None


def test_what_a_template_sees(tmp_path):
  source = "{{ messages | tojson }}{{ tools is none }}{{ documents is none }}{{ bos_token }}{{ x }}"
  template = template_of(tmp_path, source)
  message = {"role": "user", "content": None, "reasoning": "r"}
  text = template.render([message], x=[1, None])
  seen = {"thinking": "r", "role": "user", "reasoning": "r", "reasoning_content": "r"}
  assert text == json.dumps([seen]) + "TrueTrue<s>[1, None]"
  assert message == {"role": "user", "content": None, "reasoning": "r"}
  assert "a surrogate \ud800" in template.render(
    [{"role": "user", "content": "a"}], x="a surrogate \ud800"
  )


def test_what_is_no_conversation_is_refused(tmp_path):
  template = template_of(tmp_path, "x")
  with pytest.raises(ValueError, match="messages: none; a conversation has at least one"):
    template.render([])
  with pytest.raises(ValueError, match=r"messages\[1\]: 'hi'; a message is a mapping"):
    template.render([USER, "hi"])  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match=r"jinja: a template is given JSON values alone: a bytes"):
    template.render([{"role": "user", "content": b"hi"}])
  with pytest.raises(ValueError, match=r"no chat template 'rag'; there are default$"):
    template.render([USER], template_name="rag")


def test_where_templates_are_read(tmp_path):
  byte_tokenizer(tmp_path, {"bos_token": "<s>"}, ())
  looked_for = r"no chat template; looked for chat_template\.jinja, additional_chat_templates/"
  with pytest.raises(FileNotFoundError, match=looked_for):
    load(tmp_path)

  (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
  assert load(tmp_path).render([USER]) == "json"
  config: dict[str, object] = {"bos_token": "<s>", "chat_template": "config"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  assert load(tmp_path).render([USER]) == "config"

  named = [("default", "d"), ("tool_use", "{{ tools | length }}"), ("rag", "{{ 1 / 0 }}")]
  config["chat_template"] = [{"name": name, "template": source} for name, source in named]
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  template = load(tmp_path)
  assert template.render([USER]) == "d"
  assert template.render([USER], tools=[TOOL]) == "1"
  with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template 'rag': ZeroDiv"):
    template.render([USER], template_name="rag")

  (tmp_path / "chat_template.jinja").write_text("jinja")
  assert sorted(load(tmp_path).templates) == ["default"]
  (tmp_path / "additional_chat_templates").mkdir()
  (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
  template = load(tmp_path)
  assert template.render([USER], template_name="rag") == "rag"
  assert template.render([USER], tools=[TOOL]) == "jinja"


@pytest.mark.parametrize("value", [3, [], ["x"], [{"name": "default"}], {"default": "x"}])
def test_what_is_no_template_is_refused(tmp_path, value):
  byte_tokenizer(tmp_path, {"bos_token": "<s>"}, ())
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
  expected = FileNotFoundError if value == [] else ValueError
  with pytest.raises(expected, match="chat_template"):
    load(tmp_path)


def test_templates_by_name_alone(tmp_path):
  byte_tokenizer(tmp_path, {"bos_token": "<s>"}, ())
  template = ChatTemplate({"a": "x"}, {"a": "here"}, load_tokenizer(tmp_path))
  assert template.render([USER], template_name="a") == "x"
  with pytest.raises(ValueError, match="no chat template 'default'; there are a"):
    template.render([USER])
