"""`milepost doctor` on every backend: all in order, and nothing left."""

from __future__ import annotations

from milepost.engine.doctoring import doctor

NOT_THERE = {"rename", "exchange", "compare and swap", "compare and swap, raced", "listing in order"}
NOT_TOLD = {"unfinished uploads", "clock", "native driver"}


def test_every_backend_does_what_checkpoints_need(root):
    before = sorted(root.opened().storage.children(""))
    findings = doctor(root.url)
    assert [one for one in findings if one.verdict == "failed"] == []
    assert {one.check for one in findings if one.verdict != "ok"} <= NOT_THERE | NOT_TOLD
    assert sorted(root.opened().storage.children("")) == before
