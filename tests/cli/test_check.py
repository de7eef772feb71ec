"""`trl_ext check`: a line for every check."""

import json

from trl_ext.cli import main


def test_check_reports_every_check(package, capsys):
    file = str(package / "trl_ext_my_method.py")
    assert main.main(["check", "--plugin", file, "--set", "my-method.eps=1e-3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report) == 6 and all(entry["passed"] for entry in report)
