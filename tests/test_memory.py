"""What memory is available: the least that the machine, control groups and the process's own limit leave."""

import os
import resource
import subprocess
import sys

import pytest

from sd_numba.memory import UNKNOWN, available_memory

MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"}


@pytest.fixture
def system(tmp_path):
    """Write files below a made-up root; returns it."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_the_peak_of_memory_stays_when_memory_is_given_back():
    program = "from sd_numba.memory import peak_memory as p; a = p(); x = b'x' * (200 << 20); del x; print(a, p())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    before, after = map(int, result.stdout.split())
    assert 100 << 20 < after - before < 260 << 20  # importing may have taken some of it before


def test_here_there_is_some():
    assert 0 < available_memory() < UNKNOWN


def test_a_system_that_tells_nothing(system):
    assert available_memory(system({})) == UNKNOWN


def test_the_machine(system):
    assert available_memory(system(MACHINE)) == 4000 * 1024


@pytest.mark.parametrize("limited", ["", "a/", "a/b/"])
def test_control_groups_of_version_2(system, limited):
    """The limit may be that of a group above; what is cached of files can go."""
    group = f"sys/fs/cgroup/{limited}"
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        f"{group}memory.max": "1000000\n",
        f"{group}memory.current": "700000\n",
        f"{group}memory.stat": "anon 5\ninactive_file 30000\nactive_file 4000\n",
    }
    assert available_memory(system(MACHINE | files)) == 334000


@pytest.mark.parametrize("limited", ["", "a/"])
def test_control_groups_of_version_1(system, limited):
    """In a container the path of the group is that outside, and its files are at the root."""
    group = f"sys/fs/cgroup/memory/{limited}"
    files = {
        "proc/self/cgroup": "5:cpu:/\n4:memory:/a\n0::/\n",
        f"{group}memory.limit_in_bytes": "1000000\n",
        f"{group}memory.usage_in_bytes": "700000\n",
        f"{group}memory.stat": "inactive_file 1\ntotal_inactive_file 30000\ntotal_active_file 4000\n",
    }
    assert available_memory(system(MACHINE | files)) == 334000


def test_a_group_that_is_full_leaves_nothing(system):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1000",
        "sys/fs/cgroup/memory.current": "1001",
    }
    assert available_memory(system(MACHINE | files)) == 0


def test_the_limit_of_the_process(system, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    assert available_memory(system(MACHINE | {"proc/self/statm": "16 9 8 7 0 6 0\n"})) == (
        (1 << 20) - 16 * resource.getpagesize()
    )
