"""What TensorStore's own driver is told, so that it reaches the same objects as s3fs does, in the same way.

Decides when it cannot be told. The rule: the driver is used only if it would come by the same endpoint, region and
credentials; everything that was said in words which it does not have sends its files through the storage instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from milepost.protocols import Json

    from milepost_s3._settings import Settings

__all__ = ["specification"]

_BY_METHOD: Final = {
    "env": "environment",
    "shared-credentials-file": "profile",
    "config-file": "profile",
    "iam-role": "imds",
    "container-role": "ecs",
}
"""What TensorStore calls the ways in which botocore may have found credentials."""

_SAME: Final = frozenset({"region_name", "endpoint_url", "use_ssl"})
_HARMLESS: Final = frozenset(
    {
        *(
            "connect_timeout",
            "read_timeout",
            "max_pool_connections",
            "retries",
            "s3",
            "region_name",
            "signature_version",
        ),
        *("response_checksum_validation", "request_checksum_calculation", "tcp_keepalive", "user_agent_extra"),
    }
)


async def specification(fs: Any, client: Any, settings: Settings) -> dict[str, Json] | None:
    """Return how TensorStore reaches a store as this client does, but for bucket and path; None where it cannot."""
    styles = client.meta.config.s3 or {}
    endpoint, region = client.meta.endpoint_url, client.meta.region_name
    if fs.s3_additional_kwargs or {*fs.client_kwargs} - _SAME or {*fs.config_kwargs} - _HARMLESS:
        return None
    if endpoint.startswith("https:") and fs.session.get_config_variable("ca_bundle"):
        return None
    if styles.get("use_accelerate_endpoint") or styles.get("addressing_style") == "virtual":
        return None
    credentials = await _credentials(fs)
    if credentials is None:
        return None
    made: dict[str, Json] = {
        "driver": "s3",
        "aws_credentials": credentials,
        "s3_request_concurrency": {"limit": settings.concurrency},
        "s3_request_retries": {"max_retries": settings.retries, "initial_delay": "100ms", "max_delay": "5s"},
    }
    known = region and region != "aws-global"
    if known:
        made["aws_region"] = region
    if urlsplit(endpoint).hostname not in {"s3.amazonaws.com", f"s3.{region}.amazonaws.com"}:
        # Without a region it would ask the bucket for it; signatures of botocore name this one then.
        made |= {"endpoint": endpoint, "aws_region": region if known else "us-east-1"}
        # Ceph heeds `If-Match` without quotation marks only, so that a database there would try for ever to replace its
        # manifest. The condition is not missed: a database lies below a prefix that is one attempt's (by name, or by
        # a claim), one process at a time writes it, and all stores that it opens share one context and one writer.
        made["use_conditional_write"] = False
    if settings.s3fs.get("requester_pays"):
        made["requester_pays"] = True
    return made


async def _credentials(fs: Any) -> dict[str, Json] | None:
    if fs.anon:
        return {"type": "anonymous"}
    if fs.key or fs.secret or fs.token:
        return None
    found = await fs.session.get_credentials()
    kind = _BY_METHOD.get(found.method) if found else None
    if kind is None:
        return None
    if kind == "profile":
        return {"type": kind, "profile": fs.session.profile or "default"}
    return {"type": kind}
