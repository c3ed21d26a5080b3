from dpo.data.preferences import Preference
from dpo.judging.prompts import prompt_key
from dpo.judging.samples import Request
from dpo.models.drawing import SamplingConfig


def test_a_prompt_with_tools_is_another_than_without():
    row = Preference("p", ("a", "b"), (0, 1), None, "s", "d:1")
    with_tools = row._replace(context={"tools": [{"name": "f"}]})
    assert prompt_key(row) != prompt_key(with_tools)
    for preference in (row, with_tools):
        request = Request(preference.prompt, 0, SamplingConfig(), preference.context)
        assert prompt_key(request) == prompt_key(preference)
    assert Request("p", 0, SamplingConfig()).asks == "p"
