"""Count how plainly the docstrings, comments and names of the code are written.

`python tests/prose.py` prints a table over the packages, the tests and the benchmarks, and
`python tests/prose.py PATH...` over files or folders (Markdown too). With `--list` it prints every
passage that holds a vague word, the worst first.

"vague" counts among the words of prose: code in backticks and markers of tools are left out.
"simple" counts the same words among all words of docstrings and comments.
"""

import ast
import io
import re
import sys
import tokenize
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("service", "warmcore", "workers")
WORD = re.compile(r"[A-Za-z]+")
VAGUE = frozenset(
    WORD.findall("what whatever who whoever whose which such one ones else thereof so")
)
QUESTIONS = ("what", "whether", "how", "which", "as")
MARKER = re.compile(r"#\s*(?:noqa|type|pyright|ruff|fmt|pragma)\b:?\s*[\w\[\]=]*(?:,\s*[A-Z]+\d+)*")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
WHAT_SENTENCE = re.compile(r"\A\W*[Ww]hat\b|[.!?][\"')]*\s+What\b|\n\s*\n\s*(?:[-*#]+\s+)?What\b")
LAYOUT_TOKENS = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A docstring, a comment (a block of own-line comments counts once), or a page."""

    path: Path
    line: int
    text: str
    is_docstring: bool = False
    own_lines: int = 0

    @property
    def prose(self) -> str:
        return CODE.sub(" ", MARKER.sub(" ", self.text))

    @property
    def vague_words(self) -> list[str]:
        return [word for word in words_of(self.prose) if word in VAGUE]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over files; `+` adds two of them."""

    files: int = 0
    words: int = 0
    vague: int = 0
    all_words: int = 0
    simple: int = 0
    its: int = 0
    own_comments: int = 0
    code_lines: int = 0
    docstrings: int = 0
    what_docstrings: int = 0
    question_docstrings: int = 0
    what_sentences: int = 0
    functions: int = 0
    one_word: int = 0
    properties: int = 0
    dunder: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        sums = map(sum, zip(astuple(self), astuple(other), strict=True))
        return Counts(**dict(zip((field.name for field in fields(Counts)), sums, strict=True)))

    @property
    def vague_per_1000(self) -> float:
        return 1000 * self.vague / max(self.words, 1)

    @property
    def simple_per_1000(self) -> float:
        return 1000 * self.simple / max(self.all_words, 1)

    @property
    def comments_per_100(self) -> float:
        return 100 * self.own_comments / max(self.code_lines, 1)

    @property
    def columns(self) -> dict[str, str | int]:
        """The cells of a row by heading."""
        return {
            "files": self.files,
            "words": self.words,
            "vague /1000": f"{self.vague_per_1000:.1f}",
            "simple /1000": f"{self.simple_per_1000:.1f}",
            "its /1000": f"{1000 * self.its / max(self.all_words, 1):.1f}",
            "own-line comments": self.own_comments,
            "/100 lines": f"{self.comments_per_100:.2f}",
            "docstrings": self.docstrings,
            "begin: What": self.what_docstrings,
            "begin: What, whether, how, which, as": self.question_docstrings,
            "sentences: What": self.what_sentences,
            "functions": self.functions,
            "one word": self.one_word,
            "share": f"{self.one_word / max(self.functions, 1):.0%}",
            "properties": self.properties,
            "dunder": self.dunder,
        }


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def docstrings_of(path: Path, tree: ast.Module) -> list[Passage]:
    found: list[Passage] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            line = node.body[0].lineno
            found.append(Passage(path=path, line=line, text=text, is_docstring=True))
    return found


def comments_of(path: Path, tokens: list[tokenize.TokenInfo]) -> list[Passage]:
    """Join own-line comments on consecutive lines: a wrapped sentence begins once."""
    found: list[Passage] = []
    previous_line = -1  # of an own-line comment
    for token in tokens:
        if token.type != tokenize.COMMENT or token.string.startswith("#!"):
            continue
        line, is_own = token.start[0], token.line.lstrip().startswith("#")
        text = MARKER.sub("#", token.string)
        own_lines = int(is_own and bool(words_of(text)))
        if is_own and previous_line == line - 1:
            block = found.pop()
            text = f"{block.text}\n{text.lstrip('# ')}"
            line, own_lines = block.line, block.own_lines + own_lines
        found.append(Passage(path=path, line=line, text=text, own_lines=own_lines))
        previous_line = token.start[0] if is_own else -1
    return found


def passages_of(path: Path) -> list[Passage]:
    source = path.read_text()
    if path.suffix != ".py":
        return [Passage(path=path, line=1, text=source)]
    comments = comments_of(path, list(tokenize.generate_tokens(io.StringIO(source).readline)))
    return docstrings_of(path, ast.parse(source)) + comments


def count_code_lines(source: str) -> int:
    """Count the lines with a token of the language: docstrings included, comments excluded."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*LAYOUT_TOKENS, tokenize.COMMENT, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def count_names(source: str) -> Counts:
    functions = one_word = properties = dunder = 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("__") and node.name.endswith("__"):
            dunder += 1
        elif any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
            properties += 1
        else:
            functions += 1
            one_word += "_" not in node.name.strip("_")
    return Counts(functions=functions, one_word=one_word, properties=properties, dunder=dunder)


def count_file(path: Path) -> Counts:
    passages = passages_of(path)
    all_words = [word for passage in passages for word in words_of(passage.text)]
    openings = [words_of(passage.text)[:1] for passage in passages if passage.is_docstring]
    prose = Counts(
        files=1,
        words=sum(len(words_of(passage.prose)) for passage in passages),
        vague=sum(len(passage.vague_words) for passage in passages),
        all_words=len(all_words),
        simple=sum(word in VAGUE for word in all_words),
        its=all_words.count("its"),
        own_comments=sum(passage.own_lines for passage in passages),
        docstrings=len(openings),
        what_docstrings=openings.count(["what"]),
        question_docstrings=sum(opening[0] in QUESTIONS for opening in openings if opening),
        what_sentences=sum(len(WHAT_SENTENCE.findall(passage.text)) for passage in passages),
    )
    if path.suffix != ".py":
        return prose
    source = path.read_text()
    return prose + count_names(source) + Counts(code_lines=count_code_lines(source))


def files_under(*paths: Path) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = [*path.rglob("*.py"), *path.rglob("*.md")] if path.is_dir() else [path]
        found.extend(sorted(inside))
    return found


def count(*paths: Path) -> Counts:
    return sum(map(count_file, files_under(*paths)), Counts())


def format_table(groups: dict[str, list[Path]]) -> str:
    """Return a Markdown table with a row for each group of paths."""
    rows = [["over", *Counts().columns], ["---"] * (len(Counts().columns) + 1)]
    rows.extend([name, *map(str, count(*paths).columns.values())] for name, paths in groups.items())
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def format_passages(paths: list[Path]) -> str:
    passages = [passage for path in files_under(*paths) for passage in passages_of(path)]
    worst = sorted(passages, key=lambda passage: -len(passage.vague_words))
    return "\n".join(
        f"{len(found)} {passage.path}:{passage.line}: {' '.join(passage.text.split())}"
        for passage in worst
        if (found := passage.vague_words)
    )


def main(arguments: list[str]) -> None:
    """Print the table, or with `--list` the passages, of the paths or of the whole project."""
    paths = [Path(argument) for argument in arguments if argument != "--list"]
    packages = [ROOT / name for name in PACKAGES]
    groups = {str(path): [path] for path in paths} or {
        **{path.name: [path] for path in packages},
        "the three": packages,
        "tests": [ROOT / "tests"],
        "benchmarks": [ROOT / "benchmarks"],
    }
    text = format_passages(paths or packages) if "--list" in arguments else format_table(groups)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
