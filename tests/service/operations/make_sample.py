"""Makes samples/REVISION.backup: a database as the newest revision has it, with data in it.

    python -m tests.service.make_sample            # from the repository's root

For a revision of the past, play it with that time's code (--play, in a checkout of it) and back it
up with this one's (--dump).
"""

import sys
from pathlib import Path

from tests.by_hand import Worker
from tests.service.operations.scenario import play

SAMPLES = Path(__file__).with_name("samples")


def main(folder, steps):
    from service.database import engine

    engine.use_utc()
    with engine.start_embedded(Path(folder)) as server:
        url = engine.normalize_url(server.get_uri())
        if "--play" in steps:
            played(url, Path(folder))
        if "--dump" in steps:
            from service.operations.backup.dump import write_backup
            from service.operations.migrations import scripts

            aside = Path(folder) / "new.backup"
            revision = write_backup(url, aside, lambda *_: None).revisions["warmscale"]
            assert revision in {script.revision for script in scripts()}
            aside.replace(SAMPLES / f"{revision}.backup")


def played(url, folder):
    from tests import conftest

    try:
        from service.operations.migrations import upgrade
    except ImportError:
        from service.database.engine import upgrade
    upgrade(url)
    settings = conftest.settings_below(folder).model_copy(update={"artifacts": "s3://bucket/all"})
    with conftest.serving(settings, url) as api:
        play(Worker(api.client))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="warmscale-", ignore_cleanup_errors=True) as folder:
        main(*(sys.argv[1:2] or [folder]), sys.argv[2:] or ["--play", "--dump"])
