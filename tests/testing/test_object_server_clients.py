"""The server for tests is one for clients that are not ours, too."""

from __future__ import annotations

import io

import pytest

LARGE = bytes(range(256)) * (12 << 12)  # 12 MiB: more than one part, for every client


@pytest.fixture(autouse=True)
def environment(server, monkeypatch):
    """Keep clients from looking anywhere else."""
    env = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "TENSORSTORE_GCS_HTTP_URL": server.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def boto(server):
    """Return a client of boto3 that tries once."""
    import boto3
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=server.url, config=config)
    yield client
    client.close()


@pytest.fixture
def google(server):
    """Return a bucket of Google's client."""
    storage = pytest.importorskip("google.cloud.storage")
    from google.auth.credentials import AnonymousCredentials

    client = storage.Client("project", AnonymousCredentials(), client_options={"api_endpoint": server.url})
    yield client.bucket("bucket")
    client.close()


def test_boto3_writes_reads_lists_and_deletes(server, boto):
    from botocore.exceptions import ClientError

    where = {"Bucket": "bucket", "Key": "a b/ä"}
    boto.put_object(**where, Body=b"data", IfNoneMatch="*", Metadata={"x": "y"})
    with pytest.raises(ClientError) as caught:
        boto.put_object(**where, Body=b"lost", IfNoneMatch="*")
    assert caught.value.response["Error"]["Condition"] == "If-None-Match"
    got = boto.get_object(**where, Range="bytes=1-2")
    assert (got["Body"].read(), got["Metadata"]) == (b"at", {"x": "y"})
    server.store.put("bucket", "b+c", b"")
    pages = boto.get_paginator("list_objects_v2").paginate(Bucket="bucket", PaginationConfig={"PageSize": 1})
    assert [each["Key"] for page in pages for each in page["Contents"]] == ["a b/ä", "b+c"]
    boto.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "a b/ä"}, {"Key": "b+c"}]})
    assert server.store.keys("bucket") == []


def test_boto3_uploads_in_parts(server, boto):
    boto.upload_fileobj(io.BytesIO(LARGE), "bucket", "large")
    assert server.store.get("bucket", "large") == LARGE
    assert [each.kind for each in server.requests if each.kind != "upload_part"] == ["create_upload", "complete_upload"]
    boto.create_multipart_upload(Bucket="bucket", Key="left")
    (left,) = boto.list_multipart_uploads(Bucket="bucket")["Uploads"]
    boto.abort_multipart_upload(Bucket="bucket", Key="left", UploadId=left["UploadId"])
    assert server.store.uploads("bucket") == []


def test_googles_client_writes_reads_lists_and_deletes(server, google):
    from google.api_core.exceptions import PreconditionFailed

    blob = google.blob("a b/ä")
    blob.upload_from_string(b"data", if_generation_match=0, checksum="md5")
    with pytest.raises(PreconditionFailed):
        google.blob("a b/ä").upload_from_string(b"lost", if_generation_match=0)
    assert blob.download_as_bytes(start=1, end=2) == b"at"
    assert google.get_blob("a b/ä").generation == blob.generation
    google.blob("b").upload_from_string(b"")
    assert [each.name for each in google.list_blobs(page_size=1)] == ["a b/ä", "b"]
    with google.client.batch():
        google.blob("b").delete()
        google.blob("a b/ä").delete()
    assert server.store.keys("bucket") == []
    assert server.requests[-1].kind == "delete_many"


def test_googles_client_resumes_uploads(server, google):
    lost = server.rule("drop_after", kind="resumable_part", nth=2)
    google.blob("large", chunk_size=4 << 20).upload_from_file(io.BytesIO(LARGE), if_generation_match=0)
    assert lost.reached.is_set()
    assert server.store.get("bucket", "large") == LARGE
    assert google.blob("large").download_as_bytes() == LARGE


def spec_of(server, driver):
    spec = {"driver": driver, "bucket": "bucket", "path": "p/"}
    if driver == "s3":
        spec |= {"endpoint": server.url, "aws_region": "us-east-1", "aws_credentials": {"type": "environment"}}
    return spec


@pytest.mark.parametrize("driver", ["s3", "gcs"])
def test_tensorstore_creates_replaces_and_lists(server, driver):
    tensorstore = pytest.importorskip("tensorstore")
    store = tensorstore.KvStore.open(spec_of(server, driver)).result()
    missing = store.read("a").result().stamp.generation
    first = store.write("a", b"first", if_equal=missing).result().generation
    assert store.write("a", b"lost", if_equal=missing).result().generation == b""
    second = store.write("a", b"second", if_equal=first).result().generation
    assert store.write("a", b"lost", if_equal=first).result().generation == b""
    read = store.read("a").result()
    assert (read.value, read.stamp.generation, server.store.get("bucket", "p/a")) == (b"second", second, b"second")
    store.write("b/c", LARGE).result()
    assert store.read("b/c").result().value == LARGE
    assert sorted(store.list().result()) == [b"a", b"b/c"]
    store.delete_range(tensorstore.KvStore.KeyRange("b/", "b0")).result()
    assert server.store.keys("bucket") == ["p/a"]


@pytest.mark.parametrize("driver", ["s3", "gcs"])
def test_many_writers_of_one_database_of_tensorstore_lose_nothing(server, driver):
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "ocdbt", "base": spec_of(server, driver)}
    # Each of its own context, so that they share no view of the database.
    stores = [tensorstore.KvStore.open(spec, context=tensorstore.Context()).result() for _ in range(4)]
    writes = [store.write(f"{who}-{turn}", b"data") for turn in range(4) for who, store in enumerate(stores)]
    for write in writes:
        write.result()
    fresh = tensorstore.KvStore.open(spec, context=tensorstore.Context()).result()
    assert sorted(fresh.list().result()) == sorted(b"%d-%d" % (who, turn) for who in range(4) for turn in range(4))
    assert "p/manifest.ocdbt" in server.store.keys("bucket")
