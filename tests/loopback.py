"""Where clients of S3 and of Google Cloud Storage find the server for tests, and nothing else."""

from __future__ import annotations

__all__ = ["environment"]


def environment(url: str) -> dict[str, str]:
    """Return the variables of the environment by which standard clients find a server, whatever else there is."""
    return {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "STORAGE_EMULATOR_HOST": url,
    }
