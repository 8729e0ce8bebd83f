"""`weka://bucket/key`: a Weka file system's S3 endpoint, apart from whatever `s3://` means on the same machine.

The class is an fsspec entry point of this project, so pandas, `torch.distributed.checkpoint` and child processes know
the scheme too. DVC accepts no scheme of others: give it the same bucket as an `s3://` remote with `endpointurl` and
`profile`.
"""

import os
from typing import Any

from s3fs import S3FileSystem

from molmo_model.errors import StorageError


class WekaFileSystem(S3FileSystem):
    """S3 at `$WEKA_ENDPOINT_URL`, with the credentials of the AWS profile `$WEKA_PROFILE` where one is set.

    Raises:
        StorageError: no endpoint is known; falling back to Amazon would send private data to the wrong place.
    """

    protocol = ("weka",)

    def __init__(self, *args: Any, endpoint_url: str | None = None, profile: str | None = None, **kwargs: Any) -> None:
        endpoint_url = endpoint_url or os.environ.get("WEKA_ENDPOINT_URL")
        if not endpoint_url:
            raise StorageError("weka:// needs the environment variable WEKA_ENDPOINT_URL, such as https://weka:9000")
        if "key" not in kwargs:
            profile = profile or os.environ.get("WEKA_PROFILE") or None
        super().__init__(*args, endpoint_url=endpoint_url, profile=profile, **kwargs)
