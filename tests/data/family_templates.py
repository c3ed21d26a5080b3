"""Chat templates in the styles of well-known families, small: what they open, mark, strip and show."""

# Qwen3: tools in the system text, reasoning of old turns stripped, an empty block where thinking is off.
QWEN3 = """
{%- if tools %}{{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, looking=true) %}
{%- for m in messages[::-1] %}
    {%- if ns.looking and m.role == 'user' %}
        {%- set ns.looking = false %}{%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if '</think>' in content and not reasoning %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {%- set f = call.function or call %}
            {{- '\n<tool_call>\n{"name": "' + f.name + '", "arguments": ' }}
            {{- f.arguments if f.arguments is string else f.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

# Llama 3.2: a date, one call a message, tools in the first user message, no newline after the end of a turn.
LLAMA = """{{- bos_token }}{%- set system = '' %}{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + (strftime_now('%d %b %Y')) + '\n\n' + system }}
{{- '<|eot_id|>' }}
{%- if tools %}{%- set first = messages[0].content | trim %}{%- set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\n\n' }}{%- for t in tools %}
{{- t | tojson(indent=4) }}{%- endfor %}
{{- first + '<|eot_id|>' }}{%- endif %}
{%- for m in messages %}
    {%- if not (m.role in ['ipython', 'tool'] or 'tool_calls' in m) %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if not m.tool_calls | length == 1 %}{{- raise_exception('one call a message') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

# SmolLM3: marks what the assistant says, a mode in the system text, tools by a name of their own.
SMOLLM3 = """{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}
{{- '<|im_start|>system\nMode: ' + ('/think' if enable_thinking else '/no_think') + '\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- for t in xml_tools or tools or [] %}{{- t | string }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if not enable_thinking %}{{- '<think>\n\n</think>\n' }}{%- endif %}
        {{- m.content.lstrip('\n') + '<|im_end|>\n' }}
        {%- endgeneration %}
    {%- elif m.role == 'tool' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if not enable_thinking %}{{- '<think>\n\n</think>\n' }}{%- endif %}
{%- endif %}"""

# Gemma 3: the system text before the first question, the assistant is called model, parts are read.
GEMMA3 = """{{ bos_token }}
{%- set start = '' %}{%- set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set start = messages[0]['content'] + '\n\n' if messages[0]['content'] is string
        else messages[0]['content'][0]['text'] + '\n\n' %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for m in turns %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
    {{- '<start_of_turn>' + role + '\n' + (start if loop.first else '') }}
    {%- if m['content'] is string %}{{ m['content'] | trim }}
    {%- else %}{%- for part in m['content'] %}{%- if part['type'] == 'text' %}{{ part['text'] | trim }}
    {%- endif %}{%- endfor %}{%- endif %}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"""

# Phi-4: no newlines, a separator after the role.
PHI4 = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

# Hermes: tools as JSON in the system text, calls in tags.
HERMES = """{%- if tools %}{{- '<|im_start|>system\n<tools>' }}{%- for t in tools %}
{{- t | tojson }}{%- endfor %}
{{- '</tools><|im_end|>\n' }}{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.content %}{{- m.content }}{%- endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# R1: the turn is opened with a block, which written turns have lost.
R1 = """{{ bos_token }}{%- for m in messages if m['role'] == 'system' %}{{ m['content'] }}{%- endfor %}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{- '<|User|>' + m['content'] }}
    {%- elif m['role'] == 'assistant' and m['content'] is not none %}
        {{- '<|Assistant|>' + m['content'].split('</think>')[-1] + '<|end|>' }}
    {%- elif m['role'] == 'assistant' %}
        {%- for call in m['tool_calls'] %}
            {{- '<|Assistant|><|call|>' + call['function']['name'] }}
            {{- call['function']['arguments'] | tojson + '<|end|>' }}
        {%- endfor %}
    {%- elif m['role'] == 'tool' %}{{- '<|output|>' + m['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{%- endif %}"""

FAMILIES = {
    "qwen3": QWEN3,
    "llama": LLAMA,
    "smollm3": SMOLLM3,
    "gemma3": GEMMA3,
    "phi4": PHI4,
    "hermes": HERMES,
    "r1": R1,
}
