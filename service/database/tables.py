"""Our tables, in schema `warmscale`. Optuna has its own in schema `optuna` and migrates them."""

from datetime import datetime
from secrets import token_hex
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Computed,
    Double,
    ForeignKey,
    Index,
    MetaData,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA = "warmscale"
OPTUNA_SCHEMA = "optuna"
DEFAULT_PROJECT = "default"

_STUDY_STATES = "'active', 'paused', 'completed', 'cancelled', 'failed'"
_PROJECT = "project ~ '^[a-z0-9][a-z0-9._-]{0,62}$'"
# Optuna has no projects, and its names are unique. Our names have no slash: two studies never get
# the same name there. Example: "lr" in project default, "team/lr" in project team.
_OPTUNA_NAME = "CASE WHEN project = 'default' THEN name ELSE project || '/' || name END"
# The keys that may see every project: an admin's, a fleet's, and a key for metrics alone.
_EVERYWHERE = "'admin' = ANY (scopes) OR scopes <@ ARRAY['work'] OR scopes <@ ARRAY['metrics']"
_RUN_STATES = "'queued', 'leased', 'succeeded', 'pruned', 'failed', 'cancelled'"


class Base(DeclarativeBase):
    """The base class of our tables. It names all constraints, because migrations refer to them."""

    metadata = MetaData(
        schema=SCHEMA,
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        },
    )
    type_annotation_map = {  # noqa: RUF012 - read by SQLAlchemy
        str: Text(),
        float: Double(),
        datetime: TIMESTAMP(timezone=True),
        dict[str, Any]: JSONB(),
        list[str]: ARRAY(Text()),
    }


class Study(Base):
    """A study: a search, its targets and its verdict. `spec` is a StudySpec."""

    __tablename__ = "studies"
    __table_args__ = (
        CheckConstraint(f"state IN ({_STUDY_STATES})", name="state"),
        CheckConstraint(_PROJECT, name="project"),
        UniqueConstraint("name", "project"),
        UniqueConstraint("idempotency_key", "project"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: f"st_{token_hex(8)}")
    project: Mapped[str] = mapped_column(server_default=DEFAULT_PROJECT)
    name: Mapped[str]
    optuna_name: Mapped[str] = mapped_column(
        Computed(_OPTUNA_NAME, persisted=True),
        unique=True,
        doc="the study's name in Optuna",
    )
    state: Mapped[str] = mapped_column(default="active")
    reason: Mapped[str | None]
    spec: Mapped[dict[str, Any]]
    idempotency_key: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]


class Run(Base):
    """A training run: a trial of the search, or a target trained warm or cold.

    A target with several budgets is a trunk, with `branches` in its spec, and a run per branch.

    `attempt` counts leases and is part of the paths of checkpoints, so that attempts cannot
    overwrite each other's. `failures` counts attempts that failed. `lease_token` stays after the
    lease ends: it tells a finish that is sent twice from a finish by a stale attempt.
    """

    __tablename__ = "runs"
    __table_args__ = (
        CheckConstraint(f"state IN ({_RUN_STATES})", name="state"),
        CheckConstraint("kind IN ('trial', 'target')", name="kind"),
        CheckConstraint("(kind = 'target') = (arm IN ('warm', 'cold') IS TRUE)", name="arm"),
        CheckConstraint("(kind = 'trial') = (trial_number IS NOT NULL)", name="trial_number"),
        CheckConstraint("state <> 'leased' OR lease_token IS NOT NULL", name="leased_has_token"),
        CheckConstraint("(branch > 0) = (trunk_id IS NOT NULL)", name="branch"),
        UniqueConstraint("study_id", "trial_number"),
        # Two requests that enqueue the same target at once: the second fails here.
        Index("uq_runs_target", "study_id", "launch", "rung", "arm", "seed", "branch", unique=True,
              postgresql_where=text("kind = 'target'")),
        # Partial indexes: a lease request reads only these rows, out of all runs ever.
        Index("ix_runs_queue", "available_at", postgresql_where=text("state = 'queued'")),
        Index("ix_runs_expiry", "lease_expires_at", postgresql_where=text("state = 'leased'")),
        Index("ix_runs_untold", "study_id", postgresql_where=text("NOT told AND kind = 'trial'")),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: f"run_{token_hex(8)}")
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"), index=True)
    kind: Mapped[str]
    trial_number: Mapped[int | None]
    launch: Mapped[int] = mapped_column(
        server_default=text("0"),
        doc="0: the study's own targets; from 1: targets that a user started",
    )
    rung: Mapped[int] = mapped_column(server_default=text("0"))
    arm: Mapped[str | None]
    seed: Mapped[int] = mapped_column(BigInteger)
    branch: Mapped[int] = mapped_column(
        server_default=text("0"),
        doc="0: a whole run or a trunk; k: the branch of the trunk's k-th budget",
    )
    trunk_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    trunk_tokens: Mapped[int] = mapped_column(
        BigInteger,
        server_default=text("0"),
        doc="tokens of `tokens` that the trunk trained, not this run",
    )
    state: Mapped[str] = mapped_column(default="queued")
    spec: Mapped[dict[str, Any]]
    params: Mapped[dict[str, Any]]
    cpus: Mapped[int]
    gpus: Mapped[float]
    base_checkpoint_id: Mapped[int | None] = mapped_column(
        BigInteger, ForeignKey("checkpoints.id", use_alter=True)
    )
    base_hash: Mapped[str | None]
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    failures: Mapped[int] = mapped_column(server_default=text("0"))
    max_attempts: Mapped[int]
    available_at: Mapped[datetime] = mapped_column(server_default=func.now())
    worker: Mapped[str | None]
    lease_token: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    graced: Mapped[bool] = mapped_column(
        server_default=text("false"),
        doc="the lease was extended after an outage, and no report has come since",
    )
    step: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    num_steps: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    num_tokens: Mapped[int] = mapped_column(BigInteger)
    flops_per_token: Mapped[float]
    loss_nats: Mapped[float | None]
    val_loss_nats: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    diverged: Mapped[bool] = mapped_column(server_default=text("false"))
    told: Mapped[bool] = mapped_column(
        server_default=text("false"), doc="the end is stored in Optuna too"
    )
    error: Mapped[str | None]
    provenance: Mapped[dict[str, Any] | None]
    timing: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    @hybrid_property
    def cost_flops(self) -> float:
        """The FLOPs of this run itself: a trunk's tokens are the trunk's cost, not a branch's."""
        return (self.tokens - self.trunk_tokens) * self.flops_per_token


class Launch(Base):
    """Targets that a user started with an idempotency key; `number` is their `Run.launch`."""

    __tablename__ = "launches"
    __table_args__ = (UniqueConstraint("study_id", "idempotency_key"),)

    study_id: Mapped[str] = mapped_column(
        ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    idempotency_key: Mapped[str]
    request: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Measurement(Base):
    """A point of a run's curve. A second report of the same step changes nothing."""

    __tablename__ = "measurements"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt: Mapped[int]
    tokens: Mapped[int] = mapped_column(BigInteger)
    loss_nats: Mapped[float | None]
    val_loss_nats: Mapped[float | None]
    ema_val_loss_nats: Mapped[float | None]
    swa_val_loss_nats: Mapped[float | None]
    evaluation: Mapped[int | None]
    lr: Mapped[float | None]
    grad_norm: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    train_seconds: Mapped[float | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Checkpoint(Base):
    """A complete checkpoint: the row publishes its files. A `superseded` one may be deleted."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("run_id", "attempt", "step"),)

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    step: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    uri: Mapped[str]
    hash: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    val_loss_nats: Mapped[float | None]
    final: Mapped[bool]
    superseded: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Event(Base):
    """A transition, written in the transaction that made it. A trigger refuses every change."""

    __tablename__ = "events"
    __table_args__ = (
        Index("ix_events_study_id_xid_id", "study_id", "xid", "id"),
        Index("ix_events_run_id_xid_id", "run_id", "xid", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    study_id: Mapped[str | None] = mapped_column(
        ForeignKey("studies.id", ondelete="CASCADE"),
        doc="None for an event of no study, `key.created` for example",
    )
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    actor: Mapped[str | None] = mapped_column(
        doc="the key's id; `operator` for a command on the database; or `service`"
    )
    xid: Mapped[int] = mapped_column(
        BigInteger,
        server_default=text("(pg_current_xact_id()::text)::bigint"),
        doc="the transaction; streams read by (xid, id), up to the oldest running transaction",
    )
    type: Mapped[str] = mapped_column(doc="study.created, run.leased, run.succeeded, …")
    attempt: Mapped[int | None]
    payload: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class ApiKey(Base):
    """An API key, stored as its SHA-256. The key itself is shown once, when it is created."""

    __tablename__ = "api_keys"
    __table_args__ = (
        CheckConstraint(
            f"CASE WHEN project IS NULL THEN {_EVERYWHERE} ELSE {_PROJECT} END", name="project"
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: f"key_{token_hex(4)}")
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]]
    project: Mapped[str | None] = mapped_column(doc="None: every project")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None] = mapped_column(doc="to the minute")


class Webhook(Base):
    """A URL that gets events of these types. The secret is stored as it is: signing needs it."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: f"wh_{token_hex(4)}")
    url: Mapped[str]
    events: Mapped[list[str]]
    project: Mapped[str | None] = mapped_column(doc="None: every project")
    secret: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Delivery(Base):
    """A row of the outbox: an event to send to a webhook. A claim moves `next_at` forward."""

    __tablename__ = "deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('waiting', 'delivered', 'dead')", name="state"),
        # Delivered rows stay for a week; the outbox must not read them on every round.
        Index("ix_deliveries_waiting", "next_at", postgresql_where=text("state = 'waiting'")),
    )

    event_id: Mapped[int] = mapped_column(
        BigInteger, ForeignKey("events.id", ondelete="CASCADE"), primary_key=True
    )
    webhook_id: Mapped[str] = mapped_column(
        ForeignKey("webhooks.id", ondelete="CASCADE"), primary_key=True, index=True
    )
    state: Mapped[str] = mapped_column(server_default="waiting")
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    next_at: Mapped[datetime] = mapped_column(server_default=func.now())
    error: Mapped[str | None]
    ended_at: Mapped[datetime | None]
