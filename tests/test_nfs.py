"""The run directory on real NFS, v4.2 and v3, and on v3 without locks: ``make nfs``, some fifteen minutes.

The machines are virtual ones without KVM, so that all that is measured is slow; docs/nfs.md has the figures.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
from nfs_machines import MOUNTS, Machine, Machines, Order, missing_requirement

pytestmark = [pytest.mark.nfs, pytest.mark.timeout(1500)]
STARTS_S = 240.0
"""What an import may take on a machine of this kind."""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    if reason := missing_requirement():
        pytest.skip(reason)
    with Machines() as machines:
        yield machines


@pytest.fixture(autouse=True)
def as_it_was(machines: Machines) -> Iterator[None]:
    yield
    machines.one.join()
    machines.server.thaw()


def hold(machine: Machine, kind: str, name: str, job: int, requeues: int = 0, seconds: float = 900) -> Order:
    """Start nfs/hold.py there."""
    machine.run(f"mkdir -p /mnt/{kind}/{name}.{kind}")
    return machine.order(f"cd /src/nfs && python3 hold.py /mnt/{kind}/{name}.{kind} {job} {requeues} {seconds}")


def see(machine: Machine, what: str, kind: str, name: str, seconds: float = 60) -> Order:
    """Start nfs/see.py there; it is looking when this returns."""
    order = machine.order(f"cd /src/nfs && python3 see.py {what} /mnt/{kind}/{name}.{kind} {seconds}")
    order.wait_for("LOOKING", STARTS_S)
    return order


def seconds_at(order: Order, words: str) -> float:
    """What the line of hold.py with ``words`` says of when it was."""
    match = re.search(rf"^ *([\d.]+) {re.escape(words)}", order.text(), re.MULTILINE)
    assert match is not None, f"no {words!r}: {order.text()}"
    return float(match[1])


def lines(machine: Machine, kind: str, name: str) -> list[dict[str, object]]:
    """Those of metrics.jsonl, of which none may be missing, torn or doubled."""
    text = machine.run(f"cat /mnt/{kind}/{name}.{kind}/metrics.jsonl")
    assert "\0" not in text
    records = [json.loads(line) for line in text.splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return records


def test_a_start_that_was_cut_off_and_comes_back_has_lost_the_directory_and_takes_no_line_from_its_successor(
    machines: Machines,
) -> None:
    one, two = machines.one, machines.two
    first = {kind: hold(one, kind, "cut", 7) for kind in MOUNTS}
    for order in first.values():
        order.wait_for("steps go on", STARTS_S)
    time.sleep(10)
    one.cut()
    began = time.monotonic()
    second = {kind: hold(two, kind, "cut", 7, requeues=1, seconds=60) for kind in MOUNTS}
    for kind, order in second.items():
        order.wait_for("TAKEN", STARTS_S)
        took_s = seconds_at(order, "TAKEN")
        print(f"{kind}: a start that was cut off was taken over from after {took_s:.0f} s")
        assert took_s < 120
    time.sleep(max(0.0, 120 - (time.monotonic() - began)))
    one.join()
    for kind, order in first.items():
        assert order.wait(180) == 3, f"{kind}: {order.text()}"
    for kind, order in second.items():
        assert order.wait(STARTS_S) == 0, f"{kind}: {order.text()}"
        records = lines(two, kind, "cut")
        print(f"{kind}: {len(records)} lines, none lost")
        last = re.search(r"last step (\d+)", order.text())
        assert last is not None and len(records) == int(last[1])
    third = {kind: hold(one, kind, "cut", 8, seconds=2) for kind in MOUNTS}
    for order in third.values():
        assert order.wait(STARTS_S) == 0, order.text()


@pytest.mark.parametrize(("job", "requeues"), [(7, 1), (8, 0)], ids=["the-same-job", "another-job"])
def test_a_dead_holders_directory_is_taken_within_120_seconds(machines: Machines, job: int, requeues: int) -> None:
    name = f"dead{job}"
    for order in [hold(machines.one, kind, name, 7) for kind in MOUNTS]:
        order.wait_for("steps go on", STARTS_S)
    machines.one.kill()
    try:
        taking = {kind: hold(machines.two, kind, name, job, requeues, seconds=2) for kind in MOUNTS}
        for kind, order in taking.items():
            assert order.wait(STARTS_S + 120) == 0, order.text()
            took_s = seconds_at(order, "TAKEN")
            print(f"{kind}: a dead holder's directory was taken after {took_s:.0f} s")
            assert took_s < 120
        for kind in MOUNTS:  # its lock may still stand, and is nobody's
            order = hold(machines.two, kind, name, 9, seconds=2)
            assert order.wait(STARTS_S) == 0 and seconds_at(order, "TAKEN") < 40
    finally:
        machines.revive(machines.one)


def test_a_reader_that_vanishes_holds_nothing_up(machines: Machines) -> None:
    order = hold(machines.one, "v4", "reader", 7)
    order.wait_for("steps go on", STARTS_S)
    see(machines.two, "status", "v4", "reader", 900).wait_for("step", STARTS_S)
    machines.two.kill()
    try:
        time.sleep(120)
        order.ended.wait(0)
        assert order.code is None and "STALL" not in order.text(), order.text()
        beats = machines.one.run(
            "cd /mnt/v4/reader.v4; for i in $(seq 20); do stat -c %Y .lock; sleep 1; done | sort -u | wc -l"
        )
        assert int(beats) >= 3
    finally:
        machines.revive(machines.two)
    machines.one.run("pkill -f hold.py || true")


def test_a_live_run_is_seen_at_once_where_nobody_looked_and_where_it_was_absent(machines: Machines) -> None:
    looking = {kind: see(machines.two, "exists", kind, "absent", 200) for kind in MOUNTS}
    locked = {kind: see(machines.two, "locked", kind, "absent", 200) for kind in MOUNTS}
    time.sleep(3)
    holding = {kind: hold(machines.one, kind, "absent", 7, seconds=150) for kind in MOUNTS}
    for kind, order in holding.items():
        order.wait_for("steps go on", STARTS_S)
        looking[kind].wait_for("SEEN", 30)
        locked[kind].wait_for("SEEN", 30)
    refused = {kind: hold(machines.two, kind, "absent", 8) for kind in MOUNTS}
    for order in refused.values():
        assert order.wait(STARTS_S) == 1 and "in use by job 7" in order.text(), order.text()
    machines.one.run("pkill -f hold.py || true")


def test_a_pause_of_the_server_takes_the_directory_from_nobody(machines: Machines) -> None:
    holding = {kind: hold(machines.one, kind, "pause", 7) for kind in MOUNTS}
    for order in holding.values():
        order.wait_for("steps go on", STARTS_S)
    others = {kind: hold(machines.two, kind, "pause", 8) for kind in MOUNTS}
    time.sleep(1)
    machines.server.freeze()
    time.sleep(45)
    machines.server.thaw()
    for order in others.values():
        assert order.wait(STARTS_S) == 1 and "in use by job 7" in order.text(), order.text()
    for kind, order in holding.items():
        assert order.code is None and "LOST" not in order.text(), f"{kind}: {order.text()}"
    machines.one.run("pkill -f hold.py || true")
