"""A run in an object store behind a network: s3fs against moto's server, both installed by hand."""

import fsspec
import pytest
from result_runs import COUNTS, complete, parts

from jaxgrad.errors import OutputError, UserError
from jaxgrad.results import RunDirectory, read_results
from jaxgrad.results.lease import Lease
from jaxgrad.results.urls import path_below


@pytest.fixture
def bucket(monkeypatch):
    """The URL of an empty bucket. `pip install s3fs 'moto[server]'`; in no extra, being 70 packages."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "any"),
        ("AWS_SECRET_ACCESS_KEY", "any"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
    ):
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_run_in_s3(bucket, tmp_path, caplog):
    files = fsspec.filesystem("s3")
    calm, directory = tmp_path / "run", path_below(bucket, "runs", "a")

    def there():
        files.invalidate_cache()
        names = [name.removeprefix("bucket/runs/a/") for name in files.find("bucket/runs/a")]
        return {name: files.cat_file(f"bucket/runs/a/{name}") for name in names}

    complete(calm)
    complete(directory)
    whole = there()
    del whole["run.json"]
    assert whole == parts(calm)
    assert read_results(directory).matrices.equals(read_results(calm).matrices)
    # One bit of a part.
    name = "matrices/part-00001.parquet"
    data = bytearray(whole[name])
    data[77] ^= 1
    files.pipe_file(f"bucket/runs/a/{name}", bytes(data))
    with pytest.raises(UserError, match="does not fit its checksum"):
        read_results(directory)
    computed: list[int] = []
    complete(directory, computed)
    assert len(computed) == 5 and read_results(directory).run["counts"] == COUNTS
    assert there().items() >= whole.items()
    assert there()["damaged/matrices-part-00001.parquet.1"] == bytes(data)
    # The lease: refused while it is held; created by one alone, as the store itself sees to.
    other = path_below(bucket, "runs", "b")
    with RunDirectory.open(other, {}, {}) as run:
        with pytest.raises(OutputError, match="is writing s3://bucket/runs/b"):
            RunDirectory.open(other, {}, {})
        with pytest.raises(FileExistsError):
            Lease(files, "bucket/runs/b/lock.json", other)._create()
        run.finish({"x": 1})
    files.invalidate_cache()
    assert files.ls("bucket/runs/b") == ["bucket/runs/b/run.json"]
    with pytest.raises(OutputError, match=r"Cannot write s3://none/x/lock\.json: .*bucket"):
        RunDirectory.open("s3://none/x", {}, {})
