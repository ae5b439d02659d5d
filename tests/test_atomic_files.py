"""Atomic files: a file is written completely or not at all, with other writers and after a crash."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import pyro_flows as pf
from pyro_flows import atomic_files, flows
from pyro_flows.atomic_files import save_tensors, try_path, write_atomically

WRITERS = f"""
import importlib.util, sys, time
from pathlib import Path

spec = importlib.util.spec_from_file_location("files", {atomic_files.__file__!r})  # alone, without torch
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""
KILLED = f"""{WRITERS}
def slow(draft):
    Path(draft).write_text("half")
    print("begun", flush=True)
    time.sleep(60)

files.write_atomically(Path(sys.argv[1]), slow)
"""
REPEATED = f"""{WRITERS}
for _ in range(60):
    files.write_atomically(Path(sys.argv[1]), lambda draft: Path(draft).write_text(sys.argv[2] * 100_000))
"""


def words(text: str) -> object:
    return lambda draft: Path(draft).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def a_flow(seed: int) -> flows.Flow:
    torch.manual_seed(seed)
    flow = flows.realnvp(2, num_transforms=2, hidden_dims=(32,))
    for parameter in flow.parameters():
        torch.nn.init.constant_(parameter, float(seed))
    return flow


def seeds_in(flow: flows.Flow) -> set[float]:
    """Return the values of all parameters of a flow: a single one, unless several files are mixed."""
    return {number for parameter in flow.parameters() for number in parameter.detach().unique().tolist()}


@pytest.mark.slow
def test_threads_that_save_to_one_path_never_mix_flows(tmp_path: Path) -> None:
    file, loaded, over = tmp_path / "flow.pt", [], threading.Event()
    pf.save(a_flow(1), file)

    def keep(seed: int) -> None:
        flow = a_flow(seed)
        for _ in range(80):
            pf.save(flow, file)

    def read() -> None:
        while not over.is_set():
            loaded.append(seeds_in(pf.load(file)))

    with ThreadPoolExecutor(4) as pool:
        reader, writers = pool.submit(read), [pool.submit(keep, seed) for seed in (1, 2, 3)]
        try:
            for writer in writers:
                writer.result()
        finally:
            over.set()
        reader.result()
    assert len(loaded) > 5
    assert all(found in ({1.0}, {2.0}, {3.0}) for found in loaded)
    assert names(tmp_path) == ["flow.pt"]


def test_processes_that_write_to_one_path_never_mix_contents(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    command = [sys.executable, "-c", REPEATED, str(file)]
    writers = [subprocess.Popen([*command, letter]) for letter in "abc"]
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            assert (text := file.read_text()) in {letter * 100_000 for letter in "abc"}, text[:9]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["numbers"]


def test_drafts_of_killed_writers_are_removed_a_day_later(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "other.nc")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        writer.kill()
    (tmp_path / "draft-horse.txt").write_text("a file of the user's")
    draft, other = names(tmp_path)
    assert draft.endswith(".nc")
    write_atomically(tmp_path / "mine", words("mine"))
    assert names(tmp_path) == [draft, other, "mine"]
    for name in (draft, other):
        os.utime(tmp_path / name, (time.time() - 2 * 86_400,) * 2)
    write_atomically(tmp_path / "mine", words("mine"))
    assert names(tmp_path) == [other, "mine"]


@pytest.mark.parametrize("length", [249, 255])
def test_names_near_the_limit_of_the_file_system_work(length: int, tmp_path: Path) -> None:
    file = tmp_path / ("n" * (length - 3) + ".pt")
    pf.save(a_flow(2), file)
    assert seeds_in(pf.load(file)) == {2.0}
    fit = pf.fit_density(a_flow(0), torch.randn(60, 2), max_epochs=1, progress=False, checkpoint=file.with_suffix(".c"))
    assert fit.stopped == "steps"
    write_atomically(tmp_path / ("a." + "s" * (length - 2)), words("a suffix that long"))


def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store" / "file")
    for text in ("new", "newer"):  # at first, the link points to a missing file
        write_atomically(tmp_path / "link", words(text))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "store" / "file").read_text() == text
    assert names(tmp_path / "store") == ["file"]
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OSError, match="symbolic links"):
        try_path(tmp_path / "circle")
    assert (tmp_path / "circle").is_symlink()


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_modes_are_those_of_the_old_file_or_of_the_umask(tmp_path: Path) -> None:
    def mode(file: Path) -> int:
        return stat.S_IMODE(file.stat().st_mode)

    file, during = tmp_path / "a", []
    write_atomically(file, words("new"))
    assert mode(file) == 0o640
    file.chmod(0o604)
    write_atomically(file, lambda draft: (Path(draft).write_text("newer"), during.append(mode(Path(draft)))))
    assert mode(file) == 0o604
    assert during == [0o600]  # drafts are private too


def test_what_is_no_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for refused, why in (("pipe", "a device or a pipe"), (".", "it is a folder"), ("no/where", "there is no folder")):
        with pytest.raises(OSError, match=why):
            write_atomically(tmp_path / refused, words("x"))
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(OSError, match="too long"):
        try_path(tmp_path / ("n" * 256))
    assert names(tmp_path) == ["pipe"]


def test_write_protected_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of the system is simulated, because an administrator may write everything."""
    (tmp_path / "a").write_text("keep me")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="write-protected"):
        write_atomically(tmp_path / "a", words("x"))
    assert (tmp_path / "a").read_text() == "keep me"


@pytest.mark.usefixtures("ctrl_c")
def test_an_interruption_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def half(draft: str) -> None:
        Path(draft).write_text("ha")
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", half)
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_told_in_the_systems_words(tmp_path: Path) -> None:
    """The message is not that of torch, "enforce fail at inline_container.cc"."""
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"x": torch.ones(100_000)}, str(tmp_path / "plain"))
