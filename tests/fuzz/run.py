"""Fuzzes the readers of names, plans and records with atheris: python -m tests.fuzz.run --seconds 60

Inputs that fail are written to build/fuzz. `--input FILE` runs one of them again. atheris has wheels for Linux and
Python 3.11 or newer; `make fuzz` installs it.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / "build" / "fuzz"
PACKAGES = ["hf_gem.family", "hf_gem.files", "hf_gem.compare.plan", "hf_gem.surgery.plans", "hf_gem.training.record"]
NAMES = ("name", "study_plan", "conversion", "record")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=NAMES, metavar="|".join(NAMES))
    parser.add_argument("--seconds", type=int, default=60, help="time for each target")
    parser.add_argument("--input", help="a file in build/fuzz; runs only this input")
    parser.add_argument("--here", action="store_true", help="fuzz the first target in this process, then exit")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(NAMES):
        parser.error(f"no targets {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if args.here:
        fuzz(args.targets[0], args.seconds, args.input)
    more = ["--seconds", str(args.seconds), *(["--input", args.input] if args.input else [])]
    commands = [[sys.executable, "-m", "tests.fuzz.run", "--here", target, *more] for target in args.targets]
    failed = [command[4] for command in commands if subprocess.run(command, cwd=ROOT, check=False).returncode]
    print(f"{len(commands)} targets for {args.seconds} s each; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


def fuzz(target: str, seconds: int, given: str | None) -> None:
    """Fuzzes one target, then exits the process."""
    try:
        import atheris
    except ImportError:
        sys.exit("fuzzing needs atheris, which is not installed; `pip install atheris`, on Linux with Python 3.11")
    with atheris.instrument_imports(include=PACKAGES):
        from tests.fuzz import targets
    function = getattr(targets, target)
    corpus = FOUND / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(targets.TARGETS[function]()):
        (corpus / f"seed{number}").write_bytes(data)
    words = FOUND / f"{target}.dict"
    words.write_text("".join('"' + word.replace("\\", "\\\\") + '"\n' for word in targets.WORDS[function]))
    limits = ["-max_len=20000", "-timeout=60", "-rss_limit_mb=8000", f"-max_total_time={seconds}"]
    places = [f"-artifact_prefix={FOUND}/{target}-", f"-dict={words}"]

    def tried(data: bytes) -> None:
        try:
            function(data)
        except BaseException:
            (FOUND / f"{target}-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    atheris.Setup([sys.argv[0], *limits, *places, given or str(corpus)], tried)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
