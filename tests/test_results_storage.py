"""Where results are: local paths, file:// and object stores; their locks; names that lead nowhere."""

import errno
import fcntl
import gc
import itertools
import json
import os
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from result_runs import COUNTS, IDENTITY, INFO, Killed, complete, measured, parts, stored

from jaxgrad.errors import OutputError, UserError
from jaxgrad.report import write_report
from jaxgrad.report.cells import read_run
from jaxgrad.results import RunDirectory, iter_results, read_results, write_authors_jsonl
from jaxgrad.results import lease as lease_module
from jaxgrad.results.layout import load_run
from jaxgrad.results.storage import open_storage
from jaxgrad.results.urls import local_path, path_below
from jaxgrad.runs.asked import run_directories

_numbers = itertools.count()


@pytest.fixture
def url():
    """A directory of its own in the one memory:// of the process."""
    return f"memory://bucket/{next(_numbers)}"


@pytest.fixture
def impatient(monkeypatch):
    """Leases expire at once, so that a killed process's need not be waited for."""
    monkeypatch.setattr(lease_module, "EXPIRE_SECONDS", 0.0)
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.0)


@pytest.fixture
def quick(monkeypatch):
    """Leases are renewed and looked at so often that nobody waits for long."""
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(lease_module, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.0)


def files_of(url: str) -> MemoryFileSystem:
    return fsspec.filesystem("memory")


def lease_path(url: str) -> str:
    return f"/{url.removeprefix('memory://')}/lock.json"


def test_the_same_bytes_wherever_they_are(url, tmp_path, undisturbed):
    complete(url)
    complete(f"file://{tmp_path}/run")
    assert stored(url) == parts(tmp_path / "run") == parts(undisturbed)
    assert load_run(url)["identity"] == IDENTITY
    expected = read_results(undisturbed)
    for directory in (url, f"{url}/", f"file://{tmp_path}/run"):
        results = read_results(directory)
        assert results.examples.equals(expected.examples)
        assert results.matrices.equals(expected.matrices)
        assert results.run["counts"] == COUNTS
        assert read_run(directory).matrices.equals(expected.matrices)
    assert [len(window.examples) for window in iter_results(url)] == [7, 6]


def test_a_run_in_a_store_is_continued(url, undisturbed):
    with RunDirectory.open(url, IDENTITY, INFO) as run:
        run.write_batch(0, 1, [measured(1), measured(6)])
        with pytest.raises(UserError, match=r"not finished: 0 examples .* and 1 batch"):
            read_results(url)
        assert read_results(url, allow_unfinished=True).examples["example_index"].tolist() == [1, 6]
        with pytest.raises(ValueError, match="before every window"):
            run.finish({})
    computed: list[int] = []
    complete(url, computed)
    assert sorted(computed) == [0, 3, 4, 5, 7, 8, 9, 10, 11]
    assert stored(url) == parts(undisturbed)
    before = stored(url)
    complete(url)
    RunDirectory.check_compatible(url, {"protocol": "paper"})
    RunDirectory.probe(url)
    assert stored(url) == before and len(load_run(url)["sessions"]) == 2


def test_directories_in_a_store_that_are_no_run(url):
    with pytest.raises(UserError, match="is no directory"):
        read_results(url)
    RunDirectory.probe(url)
    files_of(url).pipe_file(f"{url}/thesis.txt", b"x")
    for attempt in (
        lambda: RunDirectory.open(url, IDENTITY, INFO),
        lambda: RunDirectory.check_compatible(url, {}),
    ):
        with pytest.raises(UserError, match=r"no run.*thesis\.txt"):
            attempt()
    with pytest.raises(UserError, match=r"no run\.json"):
        read_results(url)
    assert set(stored(url)) == {"thesis.txt"}


def test_a_process_that_does_not_lead_sees_what_the_others_write(url, monkeypatch):
    monkeypatch.setattr("jaxgrad.results.storage.LISTING_SECONDS", 0.0)
    with pytest.raises(OutputError, match="no run that process 0 began"):
        RunDirectory.open(url, IDENTITY, INFO, leads=False)
    with RunDirectory.open(url, IDENTITY, INFO) as leader:
        follower = RunDirectory.open(url, IDENTITY, INFO, leads=False)
        assert not leader.journaled_batches()
        follower.write_batch(0, 1, [measured(1), measured(6)])
        assert follower.journaled_batches() == leader.journaled_batches() == {(0, 1)}
        leader.finish_window(0, num_examples=2)
        assert follower.window_done(0)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["pipe_file", "rm_file"])
@pytest.mark.parametrize("kind", ["kill", "fail"])
def test_a_kill_or_a_failure_at_every_call_of_a_store(
    monkeypatch, impatient, undisturbed, kind, step, after
):
    """The k-th call ends the run, for every k; a second run completes it."""
    real = getattr(MemoryFileSystem, step)
    for k in range(1000):
        url, calls = f"memory://steps/{kind}/{step}/{after}/{k}", 0

        def failing(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls != k + 1:  # noqa: B023
                return real(*args, **kwargs)
            if after:
                real(*args, **kwargs)
            raise Killed if kind == "kill" else PermissionError("403 Forbidden")

        computed: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(MemoryFileSystem, step, failing)
            try:
                complete(url, computed)
            except Killed:
                assert kind == "kill"
            except OutputError as error:
                assert kind == "fail" and "403 Forbidden. Nothing written before" in str(error)
        if calls <= k:
            break
        complete(url, computed)
        assert stored(url) == parts(undisturbed)
        assert load_run(url)["counts"] == COUNTS
        assert len(computed) == len(set(computed))
    assert k >= {"pipe_file": 16, "rm_file": 6}[step]


def test_a_second_owner_is_refused(url, quick):
    run = RunDirectory.open(url, {"a": 1}, {})
    for _ in range(2):
        with pytest.raises(OutputError, match=rf"process {os.getpid()} on .* is writing {url}\."):
            RunDirectory.open(url, {"a": 1}, {})
    run.write_batch(0, 0, [])
    run.close()
    run.close()
    # A run that failed in a notebook can be opened again there, also when nobody closed it.
    with pytest.raises(OutputError, match="other settings"):
        RunDirectory.open(url, {"a": 2}, {})
    lost = RunDirectory.open(url, {"a": 1}, {})
    del lost
    gc.collect()
    RunDirectory.open(url, {"a": 1}, {}).close()
    assert not files_of(url).exists(lease_path(url))


def other_lease(age: float) -> bytes:
    return json.dumps(
        {"owner": "f" * 32, "host": "elsewhere", "pid": 7, "time": time.time() - age}
    ).encode()


def test_a_lease_of_the_dead_is_taken_over(url, quick, caplog):
    for content, waits in (
        (other_lease(59.9), True),  # killed a minute ago
        (other_lease(65), False),
        (b"", False),
        (b'{"owner": 3}', False),
    ):
        caplog.clear()
        files_of(url).pipe_file(lease_path(url), content)
        RunDirectory.open(url, {}, {}).close()
        assert "taken over" in caplog.text and not files_of(url).exists(lease_path(url))
        assert ("waiting up to 0 s" in caplog.text) == waits


@pytest.mark.parametrize("age", [55, -20], ids=["young", "a clock that is ahead"])
def test_a_lease_that_is_renewed_refuses_and_one_given_free_does_not(url, monkeypatch, age):
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.0)
    content, waited = other_lease(age), []

    def renew(seconds):
        waited.append(seconds)
        files_of(url).pipe_file(lease_path(url), other_lease(0))

    monkeypatch.setattr(lease_module.time, "sleep", renew)
    files_of(url).pipe_file(lease_path(url), content)
    with pytest.raises(OutputError, match="process 7 on elsewhere"):
        RunDirectory.open(url, {}, {})
    assert waited == [lease_module.LOOK_SECONDS]
    monkeypatch.setattr(
        lease_module.time, "sleep", lambda _: files_of(url).rm_file(lease_path(url))
    )
    RunDirectory.open(url, {}, {}).close()


def test_of_two_that_take_over_one_wins(url, monkeypatch):
    files_of(url).pipe_file(lease_path(url), other_lease(100))
    quick = other_lease(0)
    # Who also found it dead, and wrote after we did.
    monkeypatch.setattr(
        lease_module.time, "sleep", lambda _: files_of(url).pipe_file(lease_path(url), quick)
    )
    with pytest.raises(OutputError, match="process 7 on elsewhere"):
        RunDirectory.open(url, {}, {})
    assert files_of(url).cat_file(lease_path(url)) == quick


def test_of_two_that_begin_one_creates_the_lease(url, monkeypatch):
    first, read = other_lease(0), lease_module.Lease._read

    def found_nothing(self):
        monkeypatch.setattr(lease_module.Lease, "_read", read)
        files_of(url).pipe_file(lease_path(url), first)

    monkeypatch.setattr(lease_module.Lease, "_read", found_nothing)
    with pytest.raises(OutputError, match="process 7 on elsewhere"):
        RunDirectory.open(url, {}, {})
    assert files_of(url).cat_file(lease_path(url)) == first


def test_a_lease_is_renewed_and_its_loss_is_noticed(url, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.01)
    run = RunDirectory.open(url, {}, {})
    first = json.loads(files_of(url).cat_file(lease_path(url)))["time"]
    deadline = time.monotonic() + 20
    while json.loads(files_of(url).cat_file(lease_path(url)))["time"] == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    taken = other_lease(0)
    files_of(url).pipe_file(lease_path(url), taken)
    while True:
        assert time.monotonic() < deadline
        try:
            run.write_batch(0, 0, [])
        except OutputError as error:
            assert "process 7 on elsewhere" in str(error) and "took over" in str(error)
            break
        files_of(url).pipe_file(lease_path(url), taken)
        time.sleep(0.01)
    run.close()
    assert files_of(url).cat_file(lease_path(url)) == taken


def test_a_process_that_slept_looks_before_it_writes(url, monkeypatch):
    run = RunDirectory.open(url, {}, {})
    files_of(url).pipe_file(lease_path(url), other_lease(0))
    now = time.monotonic()
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now + 100)
    with pytest.raises(OutputError, match="took over"):
        run.write_batch(0, 0, [measured(0)])
    assert "journal/window-00000-batch-00000.batch" not in stored(url)


def test_a_network_disk_without_locks_has_a_lease(tmp_path, monkeypatch, quick, undisturbed):
    def no_locks(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run = RunDirectory.open(tmp_path / "run", IDENTITY, INFO)
    with pytest.raises(OutputError, match=rf"process {os.getpid()} on .* is writing"):
        RunDirectory.open(tmp_path / "run", IDENTITY, INFO)
    assert (tmp_path / "run/lock.json").exists()
    run.close()
    complete(tmp_path / "run")
    assert parts(tmp_path / "run") == parts(undisturbed)


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("gs://", "SCHEME://BUCKET/FOLDER"),
        ("memory://", "SCHEME://BUCKET/FOLDER"),
        ("memory://a/../b", "plain characters"),
        ("memory://a//b", "plain characters"),
        ("memory://a/*", "plain characters"),
        ("simplecache::memory://a", "neither a path nor a URL"),
        ("nosuch://a/b", "Protocol not known"),
        ("file://a/b", "three slashes"),
        ("gs:/a/b", "lost a slash"),
        (Path("gs://a/b"), "lost a slash"),
    ],
)
def test_urls_that_cannot_be_used(directory, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for attempt in (
        lambda: RunDirectory.open(directory, {}, {}),
        lambda: RunDirectory.probe(directory),
        lambda: read_results(directory),
    ):
        with pytest.raises(UserError, match=message):
            attempt()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_library_is_named(scheme, package, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install it")

    monkeypatch.setattr("jaxgrad.results.storage.url_to_fs", missing)
    with pytest.raises(UserError, match=rf"pip install {package} \(jaxgrad's extra"):
        open_storage(f"{scheme}://bucket/run")


def test_what_a_store_refuses_is_told_in_a_line(url, monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("Anonymous caller\ndoes not have access")

    for call, attempt in (
        ("pipe_file", lambda: RunDirectory.probe(url)),
        ("pipe_file", lambda: RunDirectory.open(url, {}, {})),
        ("cat_file", lambda: read_results(url)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(MemoryFileSystem, call, refused)
            with pytest.raises(OutputError, match="Anonymous caller does not have access") as told:
                attempt()
        assert url in str(told.value) and "\n" not in str(told.value)


def test_authors_jsonl_in_a_store(url, tmp_path):
    """The lines are written whole or not at all there, too."""
    fields = {"entry_max": [1.0], "entry_min": [0.0], "entry_mean": [0.5], "frobenius_norm": [1.0]}
    fields |= {"nuclear_norm": [1.0], "sigma_max": [1.0], "sigma_min": [0.5]}
    row = measured(0)
    object.__setattr__(row, "matrices", {"layer": [0], "projection": ["q"], **fields})
    for directory in (url, tmp_path / "run"):
        with RunDirectory.open(directory, {}, {}) as run:
            run.write_batch(0, 0, [row])
            run.finish_window(0)
            run.finish({})
        assert (
            write_authors_jsonl(iter_results(directory), path_below(directory, "authors.jsonl"))
            == 1
        )
    assert stored(url)["authors.jsonl"] == (tmp_path / "run/authors.jsonl").read_bytes()

    def torn():
        yield read_results(url)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_authors_jsonl(torn(), f"{url}/other.jsonl")
    assert "other.jsonl" not in stored(url)


@pytest.mark.parametrize("directory", ["D", "memory://bucket/D"])
@pytest.mark.parametrize("name", ["..json", "...json", "a\nb.json", "a\x00b.json"])
def test_no_data_file_leads_out_of_the_output_directory(directory, name):
    """A run's directory is named after its file: "...json" without its suffix is ".."."""
    with pytest.raises(UserError, match="No directory can be named"):
        run_directories(["data/x.json", f"data/{name}"], directory)


def test_reports_are_local():
    assert local_path("file:///a/b") == local_path("/a/b") == Path("/a/b")
    with pytest.raises(UserError, match=r"gs://b/report is a URL, but reports.* local disk"):
        write_report([], "gs://b/report", title="")


def test_names_of_runs_of_several_files():
    files = ["a/x.json", "b/.hidden", "c/two words é.jsonl"]
    for directory, pattern in (("D", "D/{}"), ("memory://b/D/", "memory://b/D/{}")):
        names = ["x", ".hidden", "two words é"]
        expected = {file: pattern.format(name) for file, name in zip(files, names, strict=True)}
        assert run_directories(files, directory) == expected
    assert run_directories(["a/...json"], Path("D")) == {"a/...json": Path("D")}
    for name in ("a*b.json", "a::b.json", "a?b.json", "a#b.json"):
        assert run_directories(["x.json", name], "D")
        with pytest.raises(UserError, match="rename the file"):
            run_directories(["x.json", name], "memory://b/D")
    with pytest.raises(UserError, match="the same name"):
        run_directories(["a/x.json", "b/x.json"], "memory://b/D")
