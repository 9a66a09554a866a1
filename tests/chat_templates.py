"""Chat templates with tools, in the notations of three model families (shortened)."""

from __future__ import annotations

# Qwen 2.5 and Hermes: a tag around the JSON of each call.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '\n</tools><|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not (tools and loop.first)) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant' }}"
    "{%- if message.content or not message.tool_calls %}{{- '\n' + message.content }}{%- endif %}"
    "{%- for tool_call in message.tool_calls %}"
    "{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}"
    '{{- \'\n<tool_call>\n{"name": "\' }}{{- tool_call.name }}{{- \'", "arguments": \' }}'
    "{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' }}"
    "{{- message.content }}{{- '\n</tool_response><|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Llama 3.1: JSON alone, its arguments called parameters.
LLAMA31 = (
    "{%- macro head(role) %}{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{%- endmacro %}{{- bos_token }}"
    "{%- if tools %}{{- head('system') }}"
    "{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}"
    "{{- '<|eot_id|>' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.tool_calls %}{{- head('assistant') }}"
    '{{- \'{"name": "\' + message.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{- message.tool_calls[0].function.arguments | tojson }}{{- '}<|eot_id|>' }}"
    "{%- elif message.role == 'tool' %}{{- head('ipython') }}"
    "{{- message.content | tojson }}{{- '<|eot_id|>' }}"
    "{%- else %}{{- head(message.role) }}{{- message.content | trim }}{{- '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}"
)
# Mistral v0.3: a list of calls after a control token; ids of nine characters; no system turn.
MISTRAL_V3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- if tools and loop.first %}"
    "{{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST] ' + message.content + '[/INST]' }}"
    "{%- elif message.tool_calls %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in message.tool_calls %}"
    "{%- if call.id | length != 9 %}{{- raise_exception('IDs of length 9!') }}{%- endif %}"
    "{%- set out = call.function | tojson %}{{- out[:-1] }}{{- ', \"id\": \"' + call.id + '\"}' }}"
    "{{- ']' + eos_token if loop.last else ', ' }}{%- endfor %}"
    "{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}"
    "{%- elif message.role == 'tool' %}{%- if message.tool_call_id | length != 9 %}"
    "{{- raise_exception('IDs of length 9!') }}{%- endif %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' ~ message.content | tojson ~ '}[/TOOL_RESULTS]' }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles!') }}{%- endif %}{%- endfor %}"
)
MISTRAL_TOKENS = [
    f"[{end}{name}]"
    for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS", "TOOL_CALLS")
    for end in ("", "/")
]
