import pytest

from hf_gem.cli import main


@pytest.fixture
def hf_gem(capsys):
    """Runs `hf-gem` in this process; returns its exit code, and what it printed to both streams."""

    def run(*arguments):
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
