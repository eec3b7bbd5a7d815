"""Settings, from the environment: `WARMSCALE_…`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.logs import Format


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
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    lease_seconds: Annotated[float, Field(gt=0, le=86400)] = 30.0
    log_format: Format = Field(
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
    pool_size: Annotated[int, Field(ge=1, le=100)] = 10

    @property
    def artifact_root(self) -> str:
        """Root URI of checkpoints, without a trailing slash."""
        return (self.artifacts or (self.home.resolve() / "artifacts").as_uri()).rstrip("/")
