"""Files of a run that are altered, lost or another run's, and a disk that is really full."""

import contextlib
import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from result_runs import (
    COUNTS,
    IDENTITY,
    INFO,
    PLAN,
    Killed,
    complete,
    measured,
    parts,
    skipped,
    small_disk,
)

from jaxgrad.errors import OutputError, UserError
from jaxgrad.results import RunDirectory, iter_results, read_results
from jaxgrad.results.layout import is_whole, run_bytes

pytestmark = pytest.mark.usefixtures("unsynced")
OTHER = IDENTITY | {"protocol": "clean"}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """Killed after the first window's checksums, with its journal still there, and a later batch."""
    path = tmp_path_factory.mktemp("halfway") / "run"
    with RunDirectory.open(path, IDENTITY, INFO) as run:
        for number, batch in enumerate(PLAN[0]):
            run.write_batch(0, number, [measured(index) for index in batch])
        journal = {file: file.read_bytes() for file in (path / "journal").iterdir()}
        run.finish_window(0, [skipped(2)], num_examples=7)
        for file, data in journal.items():
            file.write_bytes(data)
        run.write_batch(1, 0, [measured(index) for index in PLAN[1][0]])
    return path


def flipped(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def cut(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def lost(file: Path, chance: random.Random) -> None:
    file.unlink()


def whole(path: Path) -> dict[str, bytes]:
    """A run's files, without those that were set aside."""
    return {name: data for name, data in parts(path).items() if not name.startswith("damaged/")}


@pytest.mark.parametrize("harm", [flipped, cut, lost])
@pytest.mark.parametrize("start", ["undisturbed", "halfway"])
def test_any_file_that_is_harmed_by_hand(tmp_path, request, undisturbed, start, harm):
    """The same rows afterwards, none twice, none missing; or, for run.json alone, a clear error."""
    source = request.getfixturevalue(start)
    names = sorted(str(f.relative_to(source)) for f in source.rglob("*") if f.is_file())
    assert len(names) == {"undisturbed": 7, "halfway": 8}[start]
    for seed, name in enumerate(names * 3):
        chance, path = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(source, path)
        harm(path / name, chance)
        harmed = (path / name).read_bytes() if harm is not lost else None
        if harmed == (source / name).read_bytes():
            continue
        computed: list[int] = []
        if start == "undisturbed":
            with contextlib.suppress(UserError):
                # What can be read at all is right.
                assert read_results(path).matrices.equals(read_results(source).matrices)
                assert name == "run.json"
        try:
            complete(path, computed)
        except OutputError as error:
            assert name == "run.json" and harm is not lost
            assert "run.json is damaged" in str(error) and "Remove it and run the same" in str(
                error
            )
            (path / name).unlink()
            complete(path, computed)
        assert whole(path) == whole(undisturbed)
        assert read_results(path).run["counts"] == COUNTS
        assert len(computed) == len(set(computed))
        # A window at most was computed again, of the batches that were there a batch at most.
        again = {"undisturbed": {0: 6, 1: 5}, "halfway": {0: 6, 1: 2}}[start]
        spent = len(computed) - (3 if start == "halfway" else 0)
        assert spent in (0, *again.values()) and (name != "run.json" or not spent)
        if harm is not lost and name != "run.json" and spent:
            assert harmed in [file.read_bytes() for file in (path / "damaged").iterdir()]


def test_damage_is_named_and_only_its_window_is_computed_again(tmp_path, undisturbed, caplog):
    path = tmp_path / "run"
    shutil.copytree(undisturbed, path)
    assert is_whole(path)
    file = path / "matrices/part-00001.parquet"
    for count in (1, 2):
        flipped(file, random.Random(count))
        assert not is_whole(path)
        # Its first window can still be read.
        windows = iter_results(path)
        assert len(next(windows).examples) == 7
        for attempt in (lambda: next(windows), lambda: read_results(path)):  # noqa: B023
            with pytest.raises(
                UserError, match=r"part-00001\.parquet does not fit its checksum.*agai"
            ):
                attempt()
        computed: list[int] = []
        complete(path, computed)
        assert sorted(computed) == [7, 8, 9, 10, 11]
        told = caplog.messages[-1]
        assert f"{file} does not fit its checksum; window 1 is computed again" in told
        assert f"{path}/damaged/matrices-part-00001.parquet.{count}" in told
        assert whole(path) == whole(undisturbed) and is_whole(path)
    assert len(caplog.messages) == 2
    assert len(read_results(path).run["sessions"]) == 3


@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_a_kill_while_damage_is_mended(tmp_path, monkeypatch, undisturbed, step):
    real = getattr(os, step)
    for k in range(1000):
        path, calls = tmp_path / str(k), 0
        shutil.copytree(undisturbed, path)
        flipped(path / "examples/part-00000.parquet", random.Random(k))
        cut(path / "matrices/part-00000.parquet", random.Random(k))

        def failing(*args):
            nonlocal calls
            calls += 1
            if calls == k + 1:  # noqa: B023
                raise Killed
            return real(*args)

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(os, step, failing)
            complete(path)
        if calls <= k:
            break
        complete(path)
        assert whole(path) == whole(undisturbed) and is_whole(path)
    assert k >= {"replace": 10, "unlink": 4}[step]


def test_another_runs_files_do_not_fit(tmp_path, undisturbed, caplog):
    """Copied in by hand; of another protocol here, of another model or data it is the same."""
    other = tmp_path / "other"
    with RunDirectory.open(other, OTHER, INFO) as run:
        for number, batch in enumerate(PLAN[1]):
            run.write_batch(1, number, [measured(index) for index in batch])
        journal = sorted((other / "journal").iterdir())
        copies = [file.read_bytes() for file in journal]
        run.finish_window(1, [skipped(12)], num_examples=6)
    # Finished windows, with their checksums.
    path = tmp_path / "finished"
    shutil.copytree(undisturbed, path)
    for name in ("checksums/window-00001.json", "matrices/part-00001.parquet"):
        shutil.copy(other / name, path / name)
    with pytest.raises(UserError, match=r"window-00001\.json is another run's"):
        read_results(path)
    computed: list[int] = []
    complete(path, computed)
    assert sorted(computed) == [7, 8, 9, 10, 11] and whole(path) == whole(undisturbed)
    # Batches of the journal; and one of this run under another's name.
    path = tmp_path / "journal"
    with RunDirectory.open(path, IDENTITY, INFO) as run:
        run.write_batch(1, 0, [measured(index) for index in PLAN[1][0]])
    shutil.copy(path / "journal" / journal[0].name, path / "journal/window-00000-batch-00000.batch")
    (path / "journal" / journal[1].name).write_bytes(copies[1])
    caplog.clear()
    computed = []
    complete(path, computed)
    assert len(caplog.messages) == 2 and all("another run's" in line for line in caplog.messages)
    assert set(computed) == set(range(12)) - {2, 8, 11} and whole(path) == whole(undisturbed)
    # While a run goes on.
    path = tmp_path / "later"
    with RunDirectory.open(path, IDENTITY, INFO) as run:
        (path / "journal" / journal[1].name).write_bytes(copies[1])
        with pytest.raises(OutputError, match="is damaged, or another run's"):
            run.finish_window(1)


def test_a_window_under_another_number_does_not_fit(tmp_path, undisturbed, caplog):
    path = tmp_path / "run"
    with RunDirectory.open(path, IDENTITY, INFO):
        pass
    for name in ("checksums/window-0000{}.json", "examples/part-0000{}.parquet"):
        shutil.copy(undisturbed / name.format(0), path / name.format(7))
    computed: list[int] = []
    complete(path, computed)
    assert len(computed) == 11 and whole(path) == whole(undisturbed)
    assert "window-00007.json is another run's, or another window's" in caplog.messages[0]
    assert "part-00007.parquet is no part of this run" in caplog.messages[1]


def test_a_lost_run_json(tmp_path, undisturbed):
    """What the checksums vouch for is kept by a run with the same settings, and refused by others."""
    path = tmp_path / "run"
    shutil.copytree(undisturbed, path)
    (path / "run.json").unlink()
    RunDirectory.check_compatible(path, {"protocol": "clean"})
    before = parts(path)
    with pytest.raises(OutputError, match=r"no run\.json, and its results are of a run with other"):
        RunDirectory.open(path, OTHER, INFO)
    assert parts(path) == before and not (path / "run.json").exists()
    computed: list[int] = []
    complete(path, computed)
    assert not computed and parts(path) == parts(undisturbed)
    # Folders of such names are not enough, and nothing else may be there.
    (path / "run.json").unlink()
    (path / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="holds no run"):
        RunDirectory.open(path, IDENTITY, INFO)


def test_a_run_json_that_says_more_than_is_there(tmp_path, undisturbed):
    path = tmp_path / "run"
    shutil.copytree(undisturbed, path)
    run = read_results(path).run
    (path / "run.json").write_text(json.dumps(run | {"counts": {"measured": 12}}))
    with pytest.raises(UserError, match=r"run\.json is damaged \(its content does not fit"):
        read_results(path)
    (path / "run.json").write_bytes(run_bytes(run | {"windows": 3}))
    with pytest.raises(UserError, match=r"window-00002\.json is missing"):
        read_results(path)
    (path / "run.json").write_bytes(run_bytes(run | {"format": 1}))
    with pytest.raises(UserError, match="has format 1, this program writes 2"):
        RunDirectory.open(path, IDENTITY, INFO)


@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount command")
def test_a_disk_that_fills(tmp_path, undisturbed):
    """At every size: what was recorded stays, and with more space the run ends as it would have."""
    errors = 0
    for pages in range(1, 40):
        disk = tmp_path / str(pages)
        with small_disk(disk, f"{4 * pages}k") as resize:
            computed: list[int] = []
            try:
                complete(disk / "run", computed)
            except OutputError as error:
                assert "The disk is full" in str(error) and "run the same command" in str(error)
                errors += 1
                recorded = parts(disk / "run") if (disk / "run").exists() else {}
                assert not [name for name in recorded if name.endswith(".tmp")]
                resize("4m")
                complete(disk / "run", computed)
                assert len(computed) == len(set(computed)) == 11
            else:
                assert errors == pages - 1
                assert errors > 10
                break
            finally:
                assert whole(disk / "run") == whole(undisturbed)
    else:
        pytest.fail("the disk was always full")


def test_a_disk_that_fails_otherwise(tmp_path, monkeypatch):
    run = RunDirectory.open(tmp_path / "run", IDENTITY, INFO)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OutputError, match=r"Cannot write .*Input/output error"):
        run.write_batch(0, 0, [measured(0)])
    monkeypatch.undo()
    assert not run.journaled_batches()
