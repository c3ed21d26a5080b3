"""Templates write what transformers has them write, and are stopped at what they must not do."""

import datetime
import os
import threading
import time
from typing import Any, Literal

import pytest
from toy_tokenizer import TEMPLATE, make_tokenizer
from transformers.utils import chat_template_utils

from dpo.config import DataConfig
from dpo.data import template_worker, templates
from dpo.data.preferences import Preference
from dpo.data.templates import (
    LIMITS,
    TEMPLATE_DATE,
    Limits,
    Refusal,
    SandboxedTemplate,
    TemplateLimitError,
    read_template,
)
from dpo.data.tokenization import tokenize

MESSAGES = [
    {"role": "system", "content": "Be <kind> & 'brief'."},
    {"role": "user", "content": "  {{ 7 * 7 }} é\n"},
    {"role": "assistant", "content": "{% raw %}"},
]
TIGHT = Limits(seconds=0.2, characters=1000)

STYLES = {
    "toy": TEMPLATE,
    "chatml": (
        "{%- for message in messages -%}\n"
        "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}\n"
        "{%- endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "blocks": (
        "{{ bos_token }}\n  {% if tools is not none %}\n tools\n  {% endif %}\n"
        "{% for m in messages if m.role != 'x' %}"
        "{% set loop_messages = messages[1:] %}\n  {{ loop.index0 }} {{ m | tojson }}\n{% endfor %}\n"
    ),
    "namespace": (
        "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.found = true %}{% set ns.n = loop.index %}{% break %}{% endif %}{% endfor %}"
        "{{ ns.found, ns.n }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim }}|{% endif %}{% endfor %}"
    ),
    "macro": (
        "{% macro show(m, mark='*') %}{{ mark ~ m.content.strip().upper() }}{% endmacro %}"
        "{{ show(messages[0]) }}{{ show(messages[1], mark='-') }}{{ strftime_now('%Y') }}{{ dict(a=1) }}"
    ),
}


def variables(**more):
    tokens = make_tokenizer().special_tokens_map
    return {
        "messages": MESSAGES,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **tokens,
        **more,
    }


def make(text, *, limits=LIMITS, dialect: Literal["chat", "judge"] = "chat", date=TEMPLATE_DATE):
    return SandboxedTemplate(text, name="the template", limits=limits, dialect=dialect, date=date)


@pytest.mark.parametrize("style", STYLES)
def test_a_chat_template_writes_what_transformers_has_it_write(style):
    expected = make_tokenizer().apply_chat_template(
        MESSAGES, chat_template=STYLES[style], tokenize=False, add_generation_prompt=True
    )
    today = datetime.date.today().isoformat()
    assert make(STYLES[style], date=today).render(variables()) == expected


def test_todays_date_is_the_one_that_is_given_whatever_the_clock_says():
    """Llama 3.2's own line; the default is the date that its template has where there is no clock."""
    template = "Today Date: {{ strftime_now('%d %b %Y') }}"
    assert make(template).render({}) == "Today Date: 26 Jul 2024"
    assert make(template, date="2031-02-03").render({}) == "Today Date: 03 Feb 2031"
    assert DataConfig().template_date == TEMPLATE_DATE


def test_a_chat_template_finds_the_names_that_transformers_gives_it():
    theirs = chat_template_utils._cached_compile_jinja_template("x").environment
    ours = template_worker._chat_environment("2024-07-26")
    assert set(ours.filters) == set(theirs.filters)
    assert set(ours.tests) == set(theirs.tests)
    assert set(ours.globals) == set(theirs.globals)
    assert {tag for e in ours.extensions.values() for tag in e.tags} == {
        tag for e in theirs.extensions.values() for tag in e.tags
    }
    assert type(ours) is type(theirs)


def test_many_inputs_come_back_in_order_with_refusals_among_them():
    template = make("{% if n % 100 == 7 %}{{ raise_exception('seven') }}{% endif %}{{ n }}")
    found = template.render_all([{"n": n} for n in range(200)])
    refused = [n for n, text in enumerate(found) if isinstance(text, Refusal)]
    assert refused == [7, 107]
    assert isinstance(found[7], Refusal)
    assert found[7].reason == "TemplateError: seven"
    assert [text for n, text in enumerate(found) if n not in refused] == [
        str(n) for n in range(200) if n not in refused
    ]


BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}0123456789{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "string": "{{ 'x' * 10 ** 10 }}",
    "list": "{{ ([0] * 10 ** 9) | length }}",
    "padding": "{{ 'x' | center(10 ** 10) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "doubling": (
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    ),
    "nesting": (
        "{% set ns = namespace(x=[1]) %}"
        "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_stopped_by_name_and_what_comes_after_it_renders(bomb):
    template = make(BOMBS[bomb], limits=TIGHT)
    with pytest.raises(ValueError, match=r"the template(:| is refused: it (ran|wrote|used)) "):
        template.render({})
    assert make("{{ 1 + 1 }}").render({}) == "2"


@pytest.mark.parametrize("text", ["{{ '😀' * 7999999 }}", "{{ 'x ' * 3999999 }}", "{{ 'x' * 100005 }}"])
def test_what_a_template_writes_of_its_own_is_little_beside_what_it_is_given(text):
    """The first took a minute to receive, the second gigabytes as tokens of a few rows."""
    with pytest.raises(
        TemplateLimitError, match=r"wrote more than 1000\d\d characters; data\.this allows more"
    ):
        SandboxedTemplate(text, name="the template", setting="data.this").render({})


def test_a_long_text_of_the_data_is_written_however_long():
    content = "word " * 500_000
    assert make("{{ content }}{{ content }}").render({"content": content}) == 2 * content
    assert make("{{ '😀' * 90000 }}").render({}) == "😀" * 90_000


def test_texts_that_are_rendered_in_one_go_share_a_budget():
    template = make("{{ 'x' * 900 }}", limits=LIMITS._replace(characters=1000, texts=64))
    assert len(template.render_all([{}] * 64)) == 64
    with pytest.raises(TemplateLimitError, match="it wrote more than 64000 characters for 200 texts"):
        template.render_all([{}] * 200)


@pytest.mark.parametrize("end", ["", "{{ raise_exception('no') }}"])
def test_texts_that_are_rendered_in_one_go_share_their_time(end, monkeypatch):
    """Each of them ends just in time: thousands would take hours."""
    monkeypatch.setattr("dpo.data.templates.SECONDS_A_TEXT", 0.001)
    slow = "{% for i in range(20000) %}{% for k in range(3) %}{% endfor %}{% endfor %}" + end
    template = make(slow, limits=LIMITS._replace(seconds=1.5))
    begun = time.monotonic()
    with pytest.raises(TemplateLimitError, match="all its texts together ran for more than 1"):
        template.render_all([{}] * 200)
    assert time.monotonic() - begun < 30
    assert len(make("{{ x }}", limits=LIMITS._replace(seconds=0.3)).render_all([{"x": "y"}] * 200)) == 200


def test_the_setting_raises_what_a_template_may_write():
    tokenizer = make_tokenizer()
    rows = [Preference("p", ("a", "b"), (0, 1), None, "", "rows:1")]
    given: Any = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' * 5000 }}"}
    with pytest.raises(TemplateLimitError, match=r"data\.template_characters .* allows more"):
        tokenize(rows, tokenizer, max_length=9000, template_characters=1000, **given)
    assert len(tokenize(rows, tokenizer, max_length=9000, template_characters=6000, **given)) == 1


@pytest.mark.parametrize("bomb", ["loops", "output", "string", "doubling", "nesting"])
def test_what_is_beyond_a_limit_says_which(bomb):
    message = {"loops": "it ran for more than 0.2 s", "output": "it wrote more than 1004 characters"}
    with pytest.raises(TemplateLimitError, match=message.get(bomb, "it used more memory than it may|it ran")):
        make(BOMBS[bomb], limits=TIGHT).render({})


@pytest.mark.ci
def test_an_operation_that_nothing_can_interrupt_is_ended_by_the_kernel():
    """To compare two lists of lists is one call into C: no signal handler runs before it returns."""
    deep = "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
    text = "{% set ns = namespace(x=[1], y=[1]) %}" + deep + "{{ ns.x == ns.y }}"
    with pytest.raises(TemplateLimitError, match="the process that renders it was ended by SIGXCPU"):
        make(text, limits=TIGHT).render({})
    assert make("x").render({}) == "x"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append.__self__.__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ('%s' | attr('__class__')).__base__ }}",
    "{{ namespace(_a=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(role='x') }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ dict.__class__ }}{{ dict.mro() }}",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_python_and_files_are_out_of_reach(text):
    try:
        rendered = make(text).render(variables())
    except TemplateLimitError:
        raise
    except ValueError:
        return
    assert rendered == "", "an attribute that may not be read is undefined, and writes nothing"


def test_the_process_that_renders_knows_no_secrets_and_writes_no_files(monkeypatch):
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    templates._WORKER.close()
    make("x")
    process = templates._WORKER._process
    assert process is not None
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert b"secret" not in file.read()
    with open(f"/proc/{process.pid}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert limits["Max file size"] == "0"
    assert limits["Max address space"] == str(templates.MEMORY)


def test_a_process_that_was_ended_from_outside_is_replaced():
    template = make("{{ 2 }}")
    process = templates._WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert template.render({}) == "2"


def test_threads_take_turns():
    template, found = make("{{ n }}"), {}

    def ask(n):
        found[n] = template.render({"n": n})

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) for n in range(8)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% if %}", "the template: TemplateSyntaxError"),
        ("{{ 1 +", "the template: TemplateSyntaxError"),
        ("{% nothing %}", "unknown tag 'nothing'"),
        ("{{ x | nothing }}", "No filter named 'nothing'"),
        ("(" * 10 + "{{ " + "(" * 5000, "the template"),
        ("x" * (templates.MAX_TEMPLATE + 1), "has 1000001 characters; allowed are 1000000"),
    ],
)
def test_what_is_no_template_is_refused_when_it_is_made(text, message):
    with pytest.raises(ValueError, match=message):
        make(text)


def test_in_a_judges_template_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="'frist' is undefined"):
        make("{{ frist }}", dialect="judge").render({"first": "x"})
    assert make("{{ frist }}").render({"first": "x"}) == ""


def test_any_text_passes_through_unchanged():
    odd = "\ud800 \x00 \x1b[2J \u2028 </script> {{ 1 }} \U0001f600"
    assert make("{{ t }}").render({"t": odd}) == odd


def test_a_template_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "t.jinja"
    for content, said in (
        (b"\xff\xfe", "its first bytes are those of UTF-16; allowed is UTF-8"),
        (b"\xe9t\xe9", "cannot be read: .*allowed is a UTF-8 file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"data.chat_template .*t.jinja: {said}"):
            read_template(path, name="data.chat_template")
    with pytest.raises(ValueError, match="must be a regular file, and is a directory"):
        read_template(tmp_path, name="data.chat_template")
