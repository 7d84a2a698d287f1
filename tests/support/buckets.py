"""A store on this machine: S3's protocol, served by moto."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from raysft import stores

BUCKET = "corpora"


@contextmanager
def store() -> Iterator[str]:
    """The URL of an empty bucket; the environment names it for as long as it is there."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    own = {
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of a server that was before
    stores._path.cache_clear()
    try:
        client().create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def client():  # type: ignore[no-untyped-def]
    """Of the store that the environment names: another library than what is tested."""
    import boto3

    return boto3.client("s3")


def upload(folder: Path, below: Path) -> None:
    """All files of a folder, under their paths below another."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client().upload_file(str(path), BUCKET, str(path.relative_to(below)))
