import sys

from lightning_distill import progress as module
from lightning_distill.progress import as_called, progress


def test_commands_are_named_as_they_can_be_called(monkeypatch):
    message = "continue with `lightning-distill collect --resume d`"
    monkeypatch.setattr(sys, "argv", ["/x/.venv/bin/lightning-distill", "fit"])
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    expected = "continue with `/x/.venv/bin/lightning-distill collect --resume d`"
    assert as_called(message) == expected
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert as_called(message) == message


def test_log_gets_a_line_every_half_minute_and_one_at_the_end(monkeypatch, capsys):
    clock = iter((0.0, 0.0, 10.0, 30.0, 40.0, 50.0, 51.0))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("collect d", 100, "steps") as report:
        report(20, "")
        for completed in (30, 50, 60, 100, 100):
            report(completed, "return 3")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "collect d: 50 of 100 steps, 1.0/s, 50 s left return 3",
        "collect d: 100 of 100 steps, 1.6/s, 0 s left return 3",
    ]
