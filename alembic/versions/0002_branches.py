"""Branches: runs that continue from the checkpoint of a trunk.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TARGET = ("study_id", "launch", "rung", "arm", "seed")


def upgrade() -> None:
    """Add the columns of branches; every existing run is a whole run (branch 0)."""
    zero = sa.text("0")
    columns = (
        sa.Column("branch", sa.Integer(), server_default=zero, nullable=False),
        sa.Column("trunk_id", sa.Text(), nullable=True),
        sa.Column("trunk_tokens", sa.BigInteger(), server_default=zero, nullable=False),
    )
    for column in columns:
        op.add_column("runs", column, schema="warmscale")
    # A trunk is a run as well, and is deleted with its branches.
    op.create_foreign_key(
        op.f("fk_runs_trunk_id"),
        "runs",
        "runs",
        ["trunk_id"],
        ["id"],
        source_schema="warmscale",
        referent_schema="warmscale",
        ondelete="CASCADE",
    )
    op.create_check_constraint(
        op.f("ck_runs_branch"), "runs", "(branch > 0) = (trunk_id IS NOT NULL)", schema="warmscale"
    )
    _recreate_index((*_TARGET, "branch"))


def downgrade() -> None:
    """Delete branches: without `trunk_id` no program could continue them."""
    op.execute("DELETE FROM warmscale.runs WHERE branch > 0")
    _recreate_index(_TARGET)
    for column in ("trunk_tokens", "trunk_id", "branch"):
        op.drop_column("runs", column, schema="warmscale")


def _recreate_index(columns: tuple[str, ...]) -> None:
    op.drop_index("uq_runs_target", table_name="runs", schema="warmscale")
    op.create_index(
        "uq_runs_target",
        "runs",
        columns,
        unique=True,
        schema="warmscale",
        postgresql_where=sa.text("kind = 'target'"),
    )
