"""What a completion says last."""

from __future__ import annotations

from trl_ext.lab.messages import call, calls_made, final_text, result


def test_last_words() -> None:
    assert final_text("plain") == "plain" and calls_made("plain") == 0
    assert final_text([]) == "" == final_text([call("calculate", expression="1+1")])
    assert final_text([call("calculate", expression="1+1"), result("calculate", 2)]) == ""
    assert final_text([{"role": "assistant", "content": None}]) == ""
