"""Settings, from the environment: `WARMSCALE_…`."""

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.observability.logs import LogFormat


class Settings(BaseSettings):
    """What a deployment may choose. Everything has a default that works on one machine."""

    model_config = SettingsConfigDict(env_prefix="WARMSCALE_", frozen=True)

    home: Path = Field(
        default=Path(".warmscale"),
        description="folder of the embedded database, checkpoints and the local key",
    )
    database_url: str | None = Field(
        default=None, description="postgresql://…; None starts the embedded server below `home`"
    )
    artifacts: str | None = Field(
        default=None,
        description="root URI of checkpoints (file://, s3://, gs://); None: below `home`",
    )
    data_roots: Annotated[tuple[Path, ...] | None, NoDecode] = Field(
        default=None,
        description="folders that studies may read, with colons between; None: see `readable`",
    )
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    lease_seconds: Annotated[float, Field(gt=0, le=86400)] = 30.0
    webhook_allow_private: bool = Field(
        default=False, description="send webhooks to addresses of private networks too"
    )
    log_format: LogFormat = Field(
        default="text", description="text: lines of key=value; json: an object a line"
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        default=4_000_000, description="of a request; more is a 413"
    )
    body_seconds: Annotated[float, Field(gt=0)] = Field(
        default=30.0, description="until a body has arrived; later is a 408"
    )
    requests_per_second: Annotated[float, Field(gt=0)] = Field(
        default=500.0,
        description="of one key at one replica, ten seconds' worth at once; more is a 429",
    )
    max_waiting_leases: Annotated[int, Field(ge=1)] = Field(
        default=1000,
        description="lease requests of one key in line at one replica; one more is a 429",
    )
    max_event_streams: Annotated[int, Field(ge=0)] = Field(
        default=200,
        description="open at one replica; one more is a 503, more than a quarter of one key a 429",
    )
    event_heartbeat_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=15.0, description="between comments on a stream, so that nobody on the way ends it"
    )
    pool_size: Annotated[int, Field(ge=1, le=100)] = 10

    @field_validator("data_roots", mode="before")
    @classmethod
    def _split(cls, given: object) -> object:
        """As PATH is written."""
        return [part for part in given.split(":") if part] if isinstance(given, str) else given

    @property
    def readable(self) -> tuple[Path, ...] | None:
        """Folders that studies may read; None: any, where nobody but this machine's user asks.

        That is so on loopback with the embedded database. Anything else is a deployment, which may
        stand behind a proxy, and reads no file until it is told which.
        """
        if self.data_roots is not None:
            return self.data_roots
        return None if self.is_loopback and self.database_url is None else ()

    @property
    def is_loopback(self) -> bool:
        """Whether the API listens to this machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def artifact_root(self) -> str:
        """Root URI of checkpoints, without a trailing slash."""
        return (self.artifacts or (self.home.resolve() / "artifacts").as_uri()).rstrip("/")
