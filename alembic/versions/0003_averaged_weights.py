"""Losses of averaged weights beside those of the raw weights."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_COLUMNS = ("ema_val_loss_nats", "swa_val_loss_nats")


def upgrade() -> None:
    """Add a column for each kind of average; earlier measurements have none."""
    for name in _COLUMNS:
        op.add_column(
            "measurements", sa.Column(name, sa.Double(), nullable=True), schema="warmscale"
        )


def downgrade() -> None:
    """Drop the losses of averaged weights; those of the raw weights stay."""
    for name in reversed(_COLUMNS):
        op.drop_column("measurements", name, schema="warmscale")
