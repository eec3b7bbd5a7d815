"""Settings of a deployment, read from the environment variables `WARMSCALE_…`."""

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.observability.logs import LogFormat


class Settings(BaseSettings):
    """The choices of a deployment. Every setting has a default that works on a single machine."""

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
        description="folders that studies may read, separated by colons; None: see `readable`",
    )
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    lease_seconds: Annotated[float, Field(gt=0, le=86400)] = 30.0
    webhook_allow_private: bool = Field(
        default=False, description="also send webhooks to addresses of private networks"
    )
    log_format: LogFormat = Field(
        default="text", description="text: lines of key=value; json: an object per line"
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        default=4_000_000, description="largest body of a request; a larger body is a 413"
    )
    body_seconds: Annotated[float, Field(gt=0)] = Field(
        default=30.0, description="time in which a body must arrive; a slower body is a 408"
    )
    requests_per_second: Annotated[float, Field(gt=0)] = Field(
        default=500.0,
        description="rate of a key at a replica, with bursts of ten seconds' worth; more is a 429",
    )
    max_waiting_leases: Annotated[int, Field(ge=1)] = Field(
        default=1000,
        description="waiting lease requests of a key at a replica; more is a 429",
    )
    max_event_streams: Annotated[int, Field(ge=0)] = Field(
        default=200,
        description="event streams open at a replica; more is a 503, over a quarter by a key a 429",
    )
    event_heartbeat_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=15.0,
        description="pause between comments on a stream, which keep proxies from closing it",
    )
    # Connections of each of the two engines, ours and Optuna's, in each replica.
    pool_size: Annotated[int, Field(ge=1, le=100)] = 10

    @field_validator("data_roots", mode="before")
    @classmethod
    def _split_paths(cls, given: object) -> object:
        """Split the variable at its colons, like PATH."""
        return [part for part in given.split(":") if part] if isinstance(given, str) else given

    @property
    def readable(self) -> tuple[Path, ...] | None:
        """The folders that studies may read; None: every folder."""
        # On loopback with the embedded database, only a user of this machine can send a study. Any
        # other case may be a deployment behind a proxy: it reads no file until folders are named.
        if self.data_roots is not None:
            return self.data_roots
        return None if self.is_loopback and self.database_url is None else ()

    @property
    def is_loopback(self) -> bool:
        """True if the API accepts connections from this machine only."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def artifact_root(self) -> str:
        """The root URI of checkpoints, without a trailing slash."""
        return (self.artifacts or (self.home.resolve() / "artifacts").as_uri()).rstrip("/")
