"""Chat templates in the forms that models come with, written anew with the constructs of each."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

_CHATML_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
)


@dataclass(frozen=True)
class KnownTemplate:
    """A template, and what it makes of a conversation.

    Attributes:
        asked: of "What is this?" about one picture.
        told: the same after the system message "Be brief."; None where it refuses one.
    """

    source: str
    image_token: str
    asked: str
    told: str | None


KNOWN = {
    "vicuna": KnownTemplate(
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'].upper() + ': ' }}{% endif %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "<image>",
        "USER: <image>\nWhat is this? ASSISTANT:",
        "Be brief. USER: <image>\nWhat is this? ASSISTANT:",
    ),
    "mistral": KnownTemplate(
        "{{ bos_token }}{% for message in messages %}"
        + _ALTERNATE
        + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('a role of its own') }}{% endif %}{% endfor %}",
        "<image>",
        "<s>[INST] <image>\nWhat is this? [/INST]",
        None,
    ),
    "llava-next-mistral": KnownTemplate(
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}",
        "<image>",
        "[INST] <image>\nWhat is this? [/INST]",
        "<<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] <image>\nWhat is this? [/INST]",
    ),
    "chatml": KnownTemplate(
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}" + _CHATML_END,
        "<image>",
        "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama-2": KnownTemplate(
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for message in rest %}" + _ALTERNATE + "{% if loop.index0 == 0 and system != false %}"
        "{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set text = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + text.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}",
        "<image>",
        "<s>[INST] <image>\nWhat is this? [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is this? [/INST]",
    ),
    "llama-3": KnownTemplate(
        "{% for message in messages %}{% set text = '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<image>",
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "qwen2-vl": KnownTemplate(
        "{% set pictures = namespace(value=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
        "{% set pictures.value = pictures.value + 1 %}"
        "{% if add_vision_id %}Picture {{ pictures.value }}: {% endif %}"
        "<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + _CHATML_END,
        "<|image_pad|>",
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "qwen3-vl": KnownTemplate(
        "{%- set pictures = namespace(value=0) %}"
        "{%- macro written(content, counted) %}{%- if content is string %}{{- content }}"
        "{%- else %}{%- for part in content %}"
        "{%- if 'image' in part or 'image_url' in part or part.type == 'image' %}"
        "{%- if counted %}{%- set pictures.value = pictures.value + 1 %}{%- endif %}"
        "{%- if add_vision_id %}Picture {{ pictures.value }}: {% endif -%}"
        "<|vision_start|><|image_pad|><|vision_end|>"
        "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
        "{%- endmacro %}"
        "{%- if tools %}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}"
        "{%- elif messages[0].role == 'system' %}"
        "{{- '<|im_start|>system\n' + written(messages[0].content, false) + '<|im_end|>\n' }}"
        "{%- endif %}{%- for message in messages %}"
        "{%- set content = written(message.content, true) %}"
        "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
        "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
        "{%- elif message.role == 'assistant' %}"
        "{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}"
        "{%- endif %}{%- endfor %}" + _CHATML_END,
        "<|image_pad|>",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
}
