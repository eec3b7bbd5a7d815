"""Projects: names and idempotency keys are unique per project, and a key sees its project only."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_UNIQUE = ("name", "idempotency_key")
_EVERYWHERE = "'admin' = ANY (scopes) OR scopes <@ ARRAY['work'] OR scopes <@ ARRAY['metrics']"
_OPTUNA_NAME = "CASE WHEN project = 'default' THEN name ELSE project || '/' || name END"
_PATTERN = "project ~ '^[a-z0-9][a-z0-9._-]{0,62}$'"


def upgrade() -> None:
    """Put every study and key into project `default`; admins and fleets see all projects."""
    project = sa.Column("project", sa.Text(), server_default="default", nullable=False)
    op.add_column("studies", project, schema="warmscale")
    op.create_check_constraint(op.f("ck_studies_project"), "studies", _PATTERN, schema="warmscale")
    for name in _UNIQUE:
        op.drop_constraint(op.f(f"uq_studies_{name}"), "studies", schema="warmscale")
        both = [name, "project"]
        op.create_unique_constraint(
            op.f(f"uq_studies_{name}_project"), "studies", both, schema="warmscale"
        )
    # Optuna's names are unique over all projects: other projects prefix theirs, "team/lr".
    computed = sa.Computed(_OPTUNA_NAME, persisted=True)
    column = sa.Column("optuna_name", sa.Text(), computed, nullable=False)
    op.add_column("studies", column, schema="warmscale")
    op.create_unique_constraint(
        op.f("uq_studies_optuna_name"), "studies", ["optuna_name"], schema="warmscale"
    )
    for column in (
        sa.Column("project", sa.Text(), nullable=True),
        sa.Column("last_used_at", sa.TIMESTAMP(timezone=True), nullable=True),
    ):
        op.add_column("api_keys", column, schema="warmscale")
    # Only these keys may be without a project; the constraint below enforces it.
    bound = f"WHERE NOT ({_EVERYWHERE})"
    op.execute("UPDATE warmscale.api_keys SET project = 'default' " + bound)  # noqa: S608 - ours
    op.create_check_constraint(
        op.f("ck_api_keys_project"),
        "api_keys",
        f"CASE WHEN project IS NULL THEN {_EVERYWHERE} ELSE {_PATTERN} END",
        schema="warmscale",
    )


def downgrade() -> None:
    """Remove projects, if `default` is the only project.

    Otherwise names would collide, and a key would see studies of other projects.
    """
    op.execute("""
        DO $$ BEGIN
            IF EXISTS (SELECT FROM warmscale.studies WHERE project <> 'default')
               OR EXISTS (SELECT FROM warmscale.api_keys WHERE project <> 'default') THEN
                RAISE EXCEPTION 'there are projects beside default; the version before has none';
            END IF;
        END $$""")
    op.drop_constraint(op.f("ck_api_keys_project"), "api_keys", schema="warmscale")
    for column in ("last_used_at", "project"):
        op.drop_column("api_keys", column, schema="warmscale")
    for name in reversed(_UNIQUE):
        op.drop_constraint(op.f(f"uq_studies_{name}_project"), "studies", schema="warmscale")
        op.create_unique_constraint(
            op.f(f"uq_studies_{name}"), "studies", [name], schema="warmscale"
        )
    op.drop_column("studies", "optuna_name", schema="warmscale")
    op.drop_constraint(op.f("ck_studies_project"), "studies", schema="warmscale")
    op.drop_column("studies", "project", schema="warmscale")
