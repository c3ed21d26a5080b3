"""What HTML pages share: a template engine that escapes everything, and numbers as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from dpo.data.messages import message_text, response_text
from dpo.files import replace_text
from dpo.outcomes import EnvironmentFailure
from dpo.terminal import show_controls

REPORT_TEMPLATE = "report.html.jinja"
"""The template of a run's report."""


def render(template: str, content: Mapping[str, object]) -> str:
    """A template of this folder with this content; every text is escaped, figures are our own SVG."""
    return make_environment().get_template(template).render(content)


def require_template(template: str) -> None:
    """See that a page can be written at the end, while nothing is computed yet.

    Raises:
      EnvironmentFailure: where the template is not there, or not whole.
    """
    try:
        make_environment().get_template(template)
    except (jinja2.TemplateError, OSError) as error:
        raise EnvironmentFailure(
            f"the page's template {Path(__file__).with_name(template)} can't be read ({error}): "
            "install the package anew"
        ) from error


def make_environment() -> jinja2.Environment:
    """Of all pages: a text is shown as it is, what would turn or hide its neighbours too."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["options_whole"] = options_whole
    environment.globals.update(percent=percent, percents=percents, interval=with_interval)
    return environment


_OPTION = re.compile(r"(?<![\w.-])--[\w.-]{1,40}(?![\w.-])")


def options_whole(command: str) -> Markup:
    """A command, escaped, whose options no line ends in: browsers break after every dash."""
    return Markup(
        "".join(
            f'<span class="option">{escape(piece)}</span>'
            if _OPTION.fullmatch(piece)
            else escape(show_controls(piece))
            for piece in re.split(f"({_OPTION.pattern})", command)
        )
    )


def _shown(value: object) -> object:
    """Of a text control characters and directions; markup is this project's own."""
    return show_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def write_page(path: Path, text: str) -> Path:
    """Write it whole or not at all."""
    replace_text(path, text, what="the page")
    return path


def percent(value: float) -> str:
    """A rate, such as 84.3%."""
    return f"{100 * value:z.1f}%"


def percents(interval: Sequence[float]) -> str:
    """The ends of a rate's interval."""
    return f"{percent(interval[1])} to {percent(interval[2])}"


def percent_with_interval(interval: Sequence[float]) -> str:
    """A rate and the ends of its interval."""
    return f"{percent(interval[0])} ({percents(interval)})"


def points_with_interval(interval: Sequence[float]) -> str:
    """A difference of two rates in percentage points, and the ends of its interval."""
    estimate, low, high = (f"{100 * value:+z.1f}" for value in interval)
    return f"{estimate} points ({low} to {high})"


def with_interval(interval: Sequence[float], digits: int = 3) -> str:
    """Estimate and ends."""
    estimate, low, high = interval
    return f"{estimate:z.{digits}f} ({low:z.{digits}f} to {high:z.{digits}f})"


def prompt_text(prompt: Any) -> str:
    """A prompt as one text; of a conversation with several turns each begins with who speaks."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return message_text(prompt[0])
    return "\n".join(f"{turn['role']}: {response_text((turn,))}" for turn in prompt)
