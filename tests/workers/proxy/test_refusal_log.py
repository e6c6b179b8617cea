from workers.proxy.refusal_log import RefusalLog


def test_first_line_is_told_and_repetitions_as_a_number():
    log = RefusalLog(window_seconds=30)
    assert log.note("pg refused", 0.0)
    assert [log.note("pg refused", float(i)) for i in range(1, 30)] == [False] * 29
    assert log.due(29.9) == []
    assert log.due(30.0) == ["pg refused (29 times more)"]
    assert log.due(31.0) == []
    assert log.note("pg refused", 31.0)


def test_line_without_repetition_is_told_once():
    log = RefusalLog()
    assert log.note("pg refused", 0.0)
    assert log.note("other refused", 1.0)
    assert log.due(100.0) == []
    assert log.note("pg refused", 100.0)
    assert not log.note("pg refused", 101.0)
    assert log.due(200.0) == ["pg refused (once more)"]


def test_flood_of_different_lines_is_bounded():
    log = RefusalLog(window_seconds=30, max_kinds=3)
    told = [i for i in range(65536) if log.note(f"port {i} refused", 0.0)]
    assert told == [0, 1, 2]
    assert len(log._kinds) == 3
    assert log.due(30.0) == ["other connections were refused 65533 times"]
    assert log.note("port 7 refused", 31.0)
    assert log.due(100.0) == []
