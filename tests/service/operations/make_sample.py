"""A script that writes samples/REVISION.backup: a database at the newest revision, with data in it.

    python -m tests.service.operations.make_sample      # from the repository's root

For a past revision, run the scenario with the code of its time (`FOLDER --play`, in a checkout of
that code). Then write the backup with the code of today (`FOLDER --dump`).
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
            play_scenario(url, Path(folder))
        if "--dump" in steps:
            write_sample(url, Path(folder))


def play_scenario(url, folder):
    from service.operations.migrations import upgrade_database
    from tests import conftest

    upgrade_database(url)
    # A fixed root: the URIs of checkpoints are in the sample, and a folder under /tmp would go.
    settings = conftest.make_settings(folder).model_copy(update={"artifacts": "s3://bucket/all"})
    with conftest.serve_api(settings, url) as api:
        play(Worker(api.client))


def write_sample(url, folder):
    from service.operations.backup.dump import write_backup
    from service.operations.migrations import list_scripts

    aside = folder / "new.backup"
    revision = write_backup(url, aside, lambda *_: None).revisions["warmscale"]
    assert revision in {script.revision for script in list_scripts()}
    # A backup replaces no file. The sample of this revision may be there already.
    aside.replace(SAMPLES / f"{revision}.backup")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="warmscale-", ignore_cleanup_errors=True) as folder:
        main(*(sys.argv[1:2] or [folder]), sys.argv[2:] or ["--play", "--dump"])
