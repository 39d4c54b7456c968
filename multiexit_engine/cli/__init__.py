"""The command line ``multiexit``: the engine's face as commands, one file for each."""

from multiexit_engine.cli.app import app
from multiexit_engine.cli.bench import bench
from multiexit_engine.cli.bench_exits import exits
from multiexit_engine.cli.calibrate import calibrate
from multiexit_engine.cli.demo import demo
from multiexit_engine.cli.generate import generate
from multiexit_engine.cli.info import info
from multiexit_engine.cli.lm_eval import lm_eval
from multiexit_engine.cli.score import score
from multiexit_engine.cli.serve import serve
from multiexit_engine.cli.train import train

__all__ = ["app"]

for command in (generate, score, calibrate, serve, info, demo):
    app.command()(command)
app.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)(lm_eval)
bench.command()(exits)
app.add_typer(bench)
app.add_typer(train)
