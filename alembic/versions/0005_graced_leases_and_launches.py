"""Leases that are extended once after an outage, and launches of targets by idempotency key."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add `runs.graced` and the table of launches."""
    # A lease that expired while the service was down is extended, once: `graced` records that.
    graced = sa.Column("graced", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    op.add_column("runs", graced, schema="warmscale")
    # A repeated request with the same key returns the targets of the first.
    op.create_table(
        "launches",
        sa.Column("study_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("request", postgresql.JSONB(), nullable=False),
        sa.Column(
            "created_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["study_id"],
            ["warmscale.studies.id"],
            name=op.f("fk_launches_study_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("study_id", "number", name=op.f("pk_launches")),
        sa.UniqueConstraint(
            "study_id", "idempotency_key", name=op.f("uq_launches_study_id_idempotency_key")
        ),
        schema="warmscale",
    )


def downgrade() -> None:
    """Drop the idempotency keys of launches, and the record of extended leases."""
    op.drop_table("launches", schema="warmscale")
    op.drop_column("runs", "graced", schema="warmscale")
