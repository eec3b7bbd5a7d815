"""Tests of `tests/prose.py`, and of our figures of plain writing."""

from textwrap import dedent

from tests import prose

SNIPPET = '''
    """What a study is. What is meant: `which one`."""

    # the first of two lines,
    # and so the second  # noqa: S101
    LIMIT = 3  # seconds, whatever the caller wants


    class Study:
        """A study."""

        @property
        def state(self):
            return LIMIT  # noqa: ERA001

        def __len__(self):
            """Return the number of trials."""
            return 0

        def _prune_trials(self):
            """Whether a trial ended.

            What ended it is in its event.
            """

        def prune(self):
            pass
'''


def counted(tmp_path, text=SNIPPET, name="snippet.py"):
    path = tmp_path / name
    path.write_text(dedent(text))
    return prose.count(path)


def test_words_of_docstrings_and_comments_are_counted_without_code_and_markers(tmp_path):
    counts = counted(tmp_path)
    # Words in backticks count only in the simple count.
    assert (counts.vague, counts.simple) == (5, 7)
    assert counts.all_words == counts.words + 2 == 41
    assert counts.its == 1


def test_a_block_of_comments_on_lines_of_their_own_counts_its_lines(tmp_path):
    counts = counted(tmp_path)
    assert (counts.own_comments, counts.code_lines) == (2, 17)
    assert counts.comments_per_100 == 100 * 2 / 17


def test_docstrings_and_sentences_that_begin_with_what_are_counted(tmp_path):
    counts = counted(tmp_path)
    assert (counts.docstrings, counts.what_docstrings, counts.question_docstrings) == (4, 1, 2)
    assert counts.what_sentences == 3
    assert counted(tmp_path, "x = 1  # what is due\n").what_sentences == 1
    assert counted(tmp_path, "# Say\n# What is due\n").what_sentences == 0


def test_names_are_of_one_word_but_for_properties_and_special_methods(tmp_path):
    counts = counted(tmp_path)
    assert (counts.functions, counts.one_word) == (2, 1)
    assert (counts.properties, counts.dunder) == (1, 1)


def test_a_page_counts_without_its_code(tmp_path):
    page = "# Such a page\n\n```sh\nwhich python\n```\nWho reads `one`?\n"
    counts = counted(tmp_path, page, "page.md")
    assert (counts.words, counts.vague, counts.docstrings) == (5, 2, 0)


def test_the_table_has_a_row_for_each_path_and_the_list_begins_with_the_worst(tmp_path, capsys):
    counted(tmp_path)
    prose.main([str(tmp_path), str(tmp_path / "snippet.py")])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert len({len(row) for row in rows if row[0] != "| ---"}) == 1
    assert [row[3] for row in rows[2:]] == ["128.2", "128.2"]
    prose.main(["--list", str(tmp_path)])
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"2 {tmp_path}/snippet.py:2: What a study is. What is meant: `which one`."


def test_the_code_is_written_plainly():
    counts = prose.count(*(prose.ROOT / name for name in prose.PACKAGES))
    assert counts.files > 200
    found = (counts.vague_per_1000, counts.comments_per_100, counts.what_docstrings)
    assert counts.vague_per_1000 <= 14, found
    assert counts.comments_per_100 >= 3, found
    assert counts.what_docstrings == 0, found
