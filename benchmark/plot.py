"""
Figures and tables from benchmark/results/*.csv: curves/*.svg, and in README.md and benchmark/README.md what
stands between <!-- results:NAME --> and <!-- /results -->.

  python benchmark/plot.py            write them
  python benchmark/plot.py --check    write nothing; exit code 1 and one line if one of them is out of date
"""

import argparse
import importlib
import re
import sys

from report import ROOT, read_results, speed

CURVES = ROOT / "benchmark" / "curves"
READMES = (ROOT / "README.md", ROOT / "benchmark" / "README.md")
MAX_SVG = 80_000  # bytes
REPORTS = {p.stem[7:]: importlib.import_module(p.stem)
           for p in sorted((ROOT / "benchmark").glob("report_*.py"))}  # {script: its module}

# ---------------------------------------------------------------- files
def fill(text, tables):
    """A README with every block between <!-- results:NAME --> and <!-- /results --> written anew."""
    def new(m):
        if m[2] not in tables:
            raise SystemExit(f"plot.py: no table for {m[1]}")
        return f"{m[1]}\n{tables[m[2]]}\n{m[3]}"

    return re.sub(r"(<!-- results:(\S+) -->)\n.*?(<!-- /results -->)", new, text, flags=re.DOTALL)


def same(a, b):
    """Whether two texts are equal up to the last digit of coordinates and matplotlib's own labels of shapes,
    which may differ from one processor or release to the next."""
    number = r"-?\d+\.\d+"
    a, b = (re.sub(r"\b[a-z][0-9a-f]{10}\b", "label", x) for x in (a, b))
    pairs = zip(re.findall(number, a), re.findall(number, b))
    return re.sub(number, "", a) == re.sub(number, "", b) and all(
        abs(float(x) - float(y)) < 0.02 for x, y in pairs)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    results, speeds = read_results()
    names, wanted = [p.stem for p in (ROOT / "benchmark").glob("speed_*.py")], {}
    tables = {name: speed(*speeds[name]) if name in speeds else "No results yet." for name in names}
    for script, module in REPORTS.items():
        found = results.get(script, [])
        tables |= {name: make(found) if found else "No results yet." for name, make in module.TABLES.items()}
        wanted |= {CURVES / name: text for name, text in module.figures(found).items()}
    for path, text in wanted.items():
        assert len(text) < MAX_SVG, f"{path} has {len(text)} bytes"
    wanted |= {p: fill(p.read_text(), tables) for p in READMES if p.exists()}
    stale = [path for path in CURVES.glob("*.svg") if path not in wanted]
    if check:
        for path, text in wanted.items():
            old = path.read_text() if path.exists() else None
            if old is None or not (same(old, text) if path.suffix == ".svg" else old == text):
                reason = "is not there" if old is None else "does not show what benchmark/results/ hold"
                return f"{path.relative_to(ROOT)} {reason}; run python benchmark/plot.py"
        return f"{stale[0].relative_to(ROOT)} belongs to no result" if stale else None
    CURVES.mkdir(exist_ok=True)
    for path, text in wanted.items():
        if not path.exists() or not same(path.read_text(), text) or path.suffix == ".md":
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}, {len(text) / 1e3:.1f} kB")
    for path in stale:
        path.unlink()
        print(f"removed {path.relative_to(ROOT)}, which belongs to no result")


if __name__ == "__main__":
    if reason := main():
        print(f"plot.py: {reason}", file=sys.stderr)
        raise SystemExit(1)
