"""Methods for tool calls from the command line: tools by name in the YAML file, and what is said without them."""

import json

import pytest

from trl_ext.testing import calls

TOOLS = '''
def add(a: int, b: int) -> str:
    """Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return str(a + b)


def finished(completions, **columns):
    return [float(not completion[-1].get("tool_calls")) for completion in completions]
'''


@pytest.mark.slow
def test_hdpo_with_a_tool_of_the_user(script, config, tool_model, tmp_path):
    (tmp_path / "my_tools.py").write_text(TOOLS)
    path = config(
        model_name_or_path=tool_model,
        reward_funcs=["my_tools.finished"],
        max_completion_length=150,
        max_tool_calling_iterations=2,
        generation_kwargs=json.dumps(calls(tool_model, "add", likelihood=5.0, a=2, b=3)),
        plugins={"tools": {"functions": ["my_tools.add"]}, "hdpo": {}, "otc": {}},
    )
    done = script("train", "--config", path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "trl_ext_run.json").read_text())
    text = json.dumps(record)
    assert "hdpo/tool_calls_mean" in text and "otc/r_tool_mean" in text and "tools/call_frequency" in text


@pytest.mark.slow
def test_hdpo_without_tools(script, config):
    done = script("train", "--config", config(plugins={"hdpo": {}}))
    assert done.returncode == 2, done.stderr[-2000:]
    text = " ".join(done.stderr.split())
    assert "hdpo: rollouts must be able to call tools" in text and "add a plugin that does, such as `tools`" in text
    assert "Traceback" not in text
