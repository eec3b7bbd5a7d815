"""Events name their actor and are append-only, and webhooks send them.

An event is deleted with its study or run. A trigger refuses every other change. It guards against
errors in our own code: the owner of the database can drop it.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# A cascade deletes the study (or run) first: its events may go once that row no longer exists.
_FUNCTION = """
CREATE FUNCTION warmscale.refuse_change_of_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND (
        (OLD.study_id IS NOT NULL
         AND NOT EXISTS (SELECT FROM warmscale.studies WHERE id = OLD.study_id))
        OR (OLD.run_id IS NOT NULL
            AND NOT EXISTS (SELECT FROM warmscale.runs WHERE id = OLD.run_id))
    ) THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'events are append-only: event % cannot be changed or deleted', OLD.id
        USING ERRCODE = 'restrict_violation';
END $$
"""
_TRIGGER = """
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON warmscale.events
FOR EACH ROW EXECUTE FUNCTION warmscale.refuse_change_of_event()
"""


def _created_at() -> sa.Column[object]:
    return sa.Column(
        "created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
    )


def upgrade() -> None:
    """Add actors, the trigger, and the tables of webhooks and their deliveries."""
    # Events of keys and webhooks belong to no study.
    op.add_column("events", sa.Column("actor", sa.Text(), nullable=True), schema="warmscale")
    op.alter_column("events", "study_id", nullable=True, schema="warmscale")
    op.execute(_FUNCTION)
    op.execute(_TRIGGER)
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("events", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("project", sa.Text(), nullable=True),
        sa.Column("secret", sa.Text(), nullable=False),
        _created_at(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
        schema="warmscale",
    )
    # The outbox: a row is written in the transaction of its event, and sent after the commit.
    op.create_table(
        "deliveries",
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("webhook_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="waiting", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "next_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("ended_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('waiting', 'delivered', 'dead')", name=op.f("ck_deliveries_state")
        ),
        sa.ForeignKeyConstraint(
            ["event_id"],
            ["warmscale.events.id"],
            name=op.f("fk_deliveries_event_id"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["webhook_id"],
            ["warmscale.webhooks.id"],
            name=op.f("fk_deliveries_webhook_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("event_id", "webhook_id", name=op.f("pk_deliveries")),
        schema="warmscale",
    )
    # Partial: delivered rows stay for a week, and the outbox must not read them in every round.
    op.create_index(
        "ix_deliveries_waiting",
        "deliveries",
        ["next_at"],
        schema="warmscale",
        postgresql_where=sa.text("state = 'waiting'"),
    )
    op.create_index("ix_deliveries_webhook_id", "deliveries", ["webhook_id"], schema="warmscale")


def downgrade() -> None:
    """Drop webhooks, deliveries and actors, and delete the events of no study."""
    op.drop_table("deliveries", schema="warmscale")
    op.drop_table("webhooks", schema="warmscale")
    op.execute("DROP TRIGGER append_only ON warmscale.events")
    op.execute("DROP FUNCTION warmscale.refuse_change_of_event()")
    op.execute("DELETE FROM warmscale.events WHERE study_id IS NULL")
    op.alter_column("events", "study_id", nullable=False, schema="warmscale")
    op.drop_column("events", "actor", schema="warmscale")
