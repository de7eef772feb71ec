"""Calls are counted in the text, so that rollouts without tools will do."""

from __future__ import annotations

OPTIONS = {"call_tag": "<tool_call>"}
