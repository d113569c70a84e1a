"""Chat templates that write calls in each form, as short as they can be, for the models' own."""

TURN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}@{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if tools %}{% endif %}"
)
EACH = "{% for call in m.tool_calls or [] %}{% set f = call.function %}@{% endfor %}"
JSON = '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
OF_PYTHON = (
    "{{ v | tojson if v is mapping or (v is sequence and v is not string) else v | string }}"
)
RAW = "{{ v if v is string else v | tojson }}"
DEEPSEEK = "{% if m.tool_calls %}<｜tool▁calls▁begin｜>@<｜tool▁calls▁end｜>{% endif %}"


def template(one: str, around: str = "@") -> str:
    """`one`: how a call `f` is written; `around` the @ of all calls of a message."""
    return TURN.replace("@", around.replace("@", EACH.replace("@", one)))


TEMPLATES = {
    "hermes": template(f"\n<tool_call>\n{JSON}\n</tool_call>"),
    "llama": template("<|python_tag|>" + JSON.replace('arguments"', 'parameters"')),
    "mistral list": template(
        JSON + "{{ '' if loop.last else ', ' }}",
        "{% if m.tool_calls %}[TOOL_CALLS] [@]{% endif %}",
    ),
    "mistral": template("[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}"),
    "qwen3_coder": template(
        "\n<tool_call>\n<function={{ f.name }}>\n"
        "{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n"
        + OF_PYTHON
        + "\n</parameter>\n"
        "{% endfor %}</function>\n</tool_call>"
    ),
    "glm": template(
        "\n<tool_call>{{ f.name + '\n' }}{% for k, v in f.arguments.items() %}"
        "<arg_key>{{ k }}</arg_key>\n<arg_value>" + RAW + "</arg_value>\n{% endfor %}</tool_call>"
    ),
    "glm without lines": template(
        "<tool_call>{{ f.name }}{% for k, v in f.arguments.items() %}"
        "<arg_key>{{ k }}</arg_key><arg_value>" + RAW + "</arg_value>{% endfor %}</tool_call>"
    ),
    "deepseek": template(
        "<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>{{ f.arguments | tojson }}"
        "<｜tool▁call▁end｜>",
        DEEPSEEK,
    ),
    "deepseek fenced": template(
        "{{ '' if loop.first else '\n' }}<｜tool▁call▁begin｜>{{ call.type }}<｜tool▁sep｜>"
        "{{ f.name }}\n```json\n{{ f.arguments | tojson }}\n```<｜tool▁call▁end｜>",
        DEEPSEEK,
    ),
}
