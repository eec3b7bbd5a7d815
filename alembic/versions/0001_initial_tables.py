"""Initial tables: studies, runs, measurements, checkpoints, events, api_keys."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    # The key itself is never stored, only its SHA-256.
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("revoked_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_keys_hash")),
        schema="warmscale",
    )
    # `spec` is the study's spec as submitted. The same idempotency key returns the same study.
    op.create_table(
        "studies",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('active', 'paused', 'completed', 'cancelled', 'failed')",
            name=op.f("ck_studies_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_studies")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_studies_idempotency_key")),
        sa.UniqueConstraint("name", name=op.f("uq_studies_name")),
        schema="warmscale",
    )
    # A run has both its place in the study (trial number, or rung, arm and seed) and its lease.
    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("study_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("trial_number", sa.Integer(), nullable=True),
        sa.Column("launch", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("rung", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("arm", sa.Text(), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("params", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("cpus", sa.Integer(), nullable=False),
        sa.Column("gpus", sa.Double(), nullable=False),
        sa.Column("base_checkpoint_id", sa.BigInteger(), nullable=True),
        sa.Column("base_hash", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column(
            "available_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("lease_token", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("step", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("flops_per_token", sa.Double(), nullable=False),
        sa.Column("loss_nats", sa.Double(), nullable=True),
        sa.Column("val_loss_nats", sa.Double(), nullable=True),
        sa.Column("tokens_per_second", sa.Double(), nullable=True),
        sa.Column("diverged", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("told", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("provenance", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("timing", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("started_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('trial', 'target')", name=op.f("ck_runs_kind")),
        sa.CheckConstraint(
            "(kind = 'target') = (arm IN ('warm', 'cold') IS TRUE)", name=op.f("ck_runs_arm")
        ),
        sa.CheckConstraint(
            "(kind = 'trial') = (trial_number IS NOT NULL)", name=op.f("ck_runs_trial_number")
        ),
        sa.CheckConstraint(
            "state <> 'leased' OR lease_token IS NOT NULL", name=op.f("ck_runs_leased_has_token")
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'leased', 'succeeded', 'pruned', 'failed', 'cancelled')",
            name=op.f("ck_runs_state"),
        ),
        sa.ForeignKeyConstraint(
            ["study_id"],
            ["warmscale.studies.id"],
            name=op.f("fk_runs_study_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("study_id", "trial_number", name=op.f("uq_runs_study_id_trial_number")),
        schema="warmscale",
    )
    # Partial indexes: a lease request reads only queued, leased or untold rows, of all runs ever.
    op.create_index(
        "ix_runs_expiry",
        "runs",
        ["lease_expires_at"],
        unique=False,
        schema="warmscale",
        postgresql_where=sa.text("state = 'leased'"),
    )
    op.create_index(
        "ix_runs_queue",
        "runs",
        ["available_at"],
        unique=False,
        schema="warmscale",
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        op.f("ix_runs_study_id"), "runs", ["study_id"], unique=False, schema="warmscale"
    )
    op.create_index(
        "ix_runs_untold",
        "runs",
        ["study_id"],
        unique=False,
        schema="warmscale",
        postgresql_where=sa.text("NOT told AND kind = 'trial'"),
    )
    # Of two requests that enqueue the same target at once, the second fails here.
    op.create_index(
        "uq_runs_target",
        "runs",
        ["study_id", "launch", "rung", "arm", "seed"],
        unique=True,
        schema="warmscale",
        postgresql_where=sa.text("kind = 'target'"),
    )
    # The row publishes the files: a checkpoint without a row does not exist for readers.
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("val_loss_nats", sa.Double(), nullable=True),
        sa.Column("final", sa.Boolean(), nullable=False),
        sa.Column("superseded", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["warmscale.runs.id"],
            name=op.f("fk_checkpoints_run_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint(
            "run_id", "attempt", "step", name=op.f("uq_checkpoints_run_id_attempt_step")
        ),
        schema="warmscale",
    )
    # Runs and checkpoints refer to each other: this constraint needs both tables.
    op.create_foreign_key(
        "fk_runs_base_checkpoint_id",
        "runs",
        "checkpoints",
        ["base_checkpoint_id"],
        ["id"],
        source_schema="warmscale",
        referent_schema="warmscale",
    )
    # `xid` is the writing transaction: event streams read by (xid, id), see event_stream.py.
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("study_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column(
            "xid",
            sa.BigInteger(),
            server_default=sa.text("(pg_current_xact_id()::text)::bigint"),
            nullable=False,
        ),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("payload", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["warmscale.runs.id"], name=op.f("fk_events_run_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["study_id"],
            ["warmscale.studies.id"],
            name=op.f("fk_events_study_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        schema="warmscale",
    )
    op.create_index(
        "ix_events_run_id_xid_id",
        "events",
        ["run_id", "xid", "id"],
        unique=False,
        schema="warmscale",
    )
    op.create_index(
        "ix_events_study_id_xid_id",
        "events",
        ["study_id", "xid", "id"],
        unique=False,
        schema="warmscale",
    )
    # The key (run, step) makes a repeated report change nothing.
    op.create_table(
        "measurements",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("loss_nats", sa.Double(), nullable=True),
        sa.Column("val_loss_nats", sa.Double(), nullable=True),
        sa.Column("evaluation", sa.Integer(), nullable=True),
        sa.Column("lr", sa.Double(), nullable=True),
        sa.Column("grad_norm", sa.Double(), nullable=True),
        sa.Column("tokens_per_second", sa.Double(), nullable=True),
        sa.Column("train_seconds", sa.Double(), nullable=True),
        sa.Column(
            "created_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["warmscale.runs.id"],
            name=op.f("fk_measurements_run_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("run_id", "step", name=op.f("pk_measurements")),
        schema="warmscale",
    )


def downgrade() -> None:
    """Drop every table."""
    op.drop_table("measurements", schema="warmscale")
    op.drop_index("ix_events_study_id_xid_id", table_name="events", schema="warmscale")
    op.drop_index("ix_events_run_id_xid_id", table_name="events", schema="warmscale")
    op.drop_table("events", schema="warmscale")
    op.drop_constraint("fk_runs_base_checkpoint_id", "runs", schema="warmscale", type_="foreignkey")
    op.drop_table("checkpoints", schema="warmscale")
    op.drop_index(
        "uq_runs_target",
        table_name="runs",
        schema="warmscale",
        postgresql_where=sa.text("kind = 'target'"),
    )
    op.drop_index(
        "ix_runs_untold",
        table_name="runs",
        schema="warmscale",
        postgresql_where=sa.text("NOT told AND kind = 'trial'"),
    )
    op.drop_index(op.f("ix_runs_study_id"), table_name="runs", schema="warmscale")
    op.drop_index(
        "ix_runs_queue",
        table_name="runs",
        schema="warmscale",
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.drop_index(
        "ix_runs_expiry",
        table_name="runs",
        schema="warmscale",
        postgresql_where=sa.text("state = 'leased'"),
    )
    op.drop_table("runs", schema="warmscale")
    op.drop_table("studies", schema="warmscale")
    op.drop_table("api_keys", schema="warmscale")
